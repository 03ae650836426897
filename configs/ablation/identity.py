"""Table 6 of RepVGG, identity only, on digits before photographs, offline.

python train.py --config configs/ablation/identity.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("identity")

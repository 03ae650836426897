"""Table 7 of RepVGG, ACB, on digits before photographs, offline.

python train.py --config configs/ablation/acb.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("acb")

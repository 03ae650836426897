"""Table 6 of RepVGG, 1x1 only, on digits before photographs, offline.

python train.py --config configs/ablation/one.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("one")

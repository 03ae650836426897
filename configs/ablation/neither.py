"""Table 6 of RepVGG, neither (plain), on digits before photographs, offline.

python train.py --config configs/ablation/neither.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("neither")

"""Table 6 of RepVGG, identity and 1x1 (RepVGG), on digits before photographs, offline.

python train.py --config configs/ablation/both.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("both")

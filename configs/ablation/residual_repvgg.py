"""Beside Table 7 of RepVGG, ResNet with RepVGG blocks, on digits before photographs, offline.

python train.py --config configs/ablation/residual_repvgg.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("residual_repvgg")

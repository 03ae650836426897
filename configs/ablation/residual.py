"""Table 7 of RepVGG, residual reorganization, on digits before photographs, offline.

python train.py --config configs/ablation/residual.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("residual")

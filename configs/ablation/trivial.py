"""Table 7 of RepVGG, trivial re-parameterization, on digits before photographs, offline.

python train.py --config configs/ablation/trivial.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("trivial")

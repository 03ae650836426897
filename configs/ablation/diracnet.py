"""Table 7 of RepVGG, DiracNet, on digits before photographs, offline.

python train.py --config configs/ablation/diracnet.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("diracnet")

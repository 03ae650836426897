"""Table 7 of RepVGG, identity without BN, on digits before photographs, offline.

python train.py --config configs/ablation/identity_without_bn.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("identity_without_bn")

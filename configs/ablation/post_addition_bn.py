"""Table 7 of RepVGG, post-addition BN, on digits before photographs, offline.

python train.py --config configs/ablation/post_addition_bn.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("post_addition_bn")

"""Table 7 of RepVGG, ReLU in branches, on digits before photographs, offline.

python train.py --config configs/ablation/relu_in_branches.py
"""

from repvgg_jax.studies.rows import recipe


def get_config():
    return recipe("relu_in_branches")

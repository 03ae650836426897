"""Other people's checkpoints: read, recognised, translated, written.

tree        every array of a RepVGG in our own tree
names       what the official, timm and mmpretrain projects call it, and how they lay it out
recognise   which network a state dict is
files       safetensors, .npz and .pth by content; pth and unpickling read .pth without torch
loading     files to variables          writing    variables to files
merging     where fine-tuning starts    hub        timm's pretrained models by name
"""

from repvgg_jax.weights.hub import PRETRAINED, load_file_or_pretrained, load_pretrained
from repvgg_jax.weights.loading import Weights, load_weights
from repvgg_jax.weights.merging import Merged, merge_weights
from repvgg_jax.weights.names import FAMILIES
from repvgg_jax.weights.writing import save_weights, to_state_dict

__all__ = [
    "FAMILIES",
    "PRETRAINED",
    "Merged",
    "Weights",
    "load_file_or_pretrained",
    "load_pretrained",
    "load_weights",
    "merge_weights",
    "save_weights",
    "to_state_dict",
]

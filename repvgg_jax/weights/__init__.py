"""Other projects' checkpoints: read, detect, translate, write.

tree          every array of a RepVGG in our own tree
naming        translation of that list to a project's keys and layouts, in both directions
names         the official, timm and mmpretrain projects; names_family: their other blocks;
              repvit: RepViT by its authors and by timm
detect        which network a state dict belongs to
files         safetensors, .npz and .pth, read and written; torch_pickle reads .pth without
              PyTorch; tensor is one array, read lazily
unpickle      pickles without running code; archive: zip files; both with limits
state_dict    the state dict in whatever was saved, and what lies beside it
scales        the scales of RepOptimizers
channels      weights for images with another number of channels
load          files, or timm's pretrained models by name, to variables; merging into others
"""

from repvgg_jax.weights.files import (
    load_variables,
    save_variables,
    save_weights,
    to_state_dict,
)
from repvgg_jax.weights.load import (
    PRETRAINED,
    Merged,
    Weights,
    is_pretrained,
    load_file_or_pretrained,
    load_pretrained,
    load_weights,
    merge_weights,
)
from repvgg_jax.weights.names import FAMILIES
from repvgg_jax.weights.scales import load_scales

__all__ = [
    "FAMILIES",
    "PRETRAINED",
    "Merged",
    "Weights",
    "is_pretrained",
    "load_file_or_pretrained",
    "load_pretrained",
    "load_scales",
    "load_variables",
    "load_weights",
    "merge_weights",
    "save_variables",
    "save_weights",
    "to_state_dict",
]

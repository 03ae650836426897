"""Other projects' checkpoints: read, detect, translate, write.

tree          every array of a RepVGG in our own tree
names         its key and layout in the official, timm and mmpretrain projects
detect        which network a state dict belongs to
files         safetensors, .npz and .pth, detected by their contents; torch_pickle reads .pth
              without PyTorch and without running code; tensor is one array, read lazily
load          files to variables, and variables to start fine-tuning from
save          variables to files
hub           timm's pretrained models by name
"""

from repvgg_jax.weights.hub import PRETRAINED, load_file_or_pretrained, load_pretrained
from repvgg_jax.weights.load import Merged, Weights, load_weights, merge_weights
from repvgg_jax.weights.names import FAMILIES
from repvgg_jax.weights.save import save_weights, to_state_dict

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

"""ImageNet's tars, a folder tree, or images with masks -> sharded ArrayRecord files, once.

`python -m repvgg_jax.data.prepare` is the command; see docs/data.md.
"""

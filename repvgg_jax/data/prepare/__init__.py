"""ImageNet's tar files, or a folder tree -> sharded ArrayRecord files, once.

`python -m repvgg_jax.data.prepare` is the command; see docs/data.md.
"""

"""ImageNet's tar files, or a folder tree -> sharded ArrayRecord files, once.

`python -m repvgg_jax.data.prepare` is the command; docs/data.md says how to use it.
"""

"""What pyproject.toml cannot say: the recipes of configs/ are a part of the installed package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["repvgg_jax*"]), "repvgg_jax.configs"],
    package_dir={"repvgg_jax.configs": "configs"},
)

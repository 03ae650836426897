"""What pyproject.toml cannot say: the recipes of configs/ are a part of the installed package."""

import pathlib

from setuptools import find_packages, setup

# The working directory is the project's when it is built.
folders = sorted({path.parent for path in pathlib.Path("configs").rglob("*.py")})
recipes = {".".join(("repvgg_jax", *folder.parts)): str(folder) for folder in folders}

setup(packages=[*find_packages(include=["repvgg_jax*"]), *recipes], package_dir=recipes)

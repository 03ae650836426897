"""Trains a network, resumes a run that was interrupted, or evaluates one."""

import pathlib

from repvgg_jax.train import command

if __name__ == "__main__":
    command.run(pathlib.Path(__file__).resolve().parent / "configs" / "digits.py")

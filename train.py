"""Trains a RepVGG, resumes a run that was interrupted, or evaluates one.

python train.py --config configs/digits.py --workdir runs/digits --config.train.epochs=5
python train.py --workdir runs/digits --eval_only --by_class
python train.py --config configs/digits.py --eval_only --init_from deploy/model.safetensors
"""

import pathlib

from repvgg_jax.train import command

if __name__ == "__main__":
    command.run(pathlib.Path(__file__).resolve().parent / "configs" / "digits.py")

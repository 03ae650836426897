"""A picture of a network's fused kernels, and of each branch's share of them.

python -m repvgg_jax.visualize --model runs/digits --output kernels.png
python -m repvgg_jax.visualize --model RepVGG-B1-train.pth --output kernels.svg
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from repvgg_jax import cli

MODEL = flags.DEFINE_string(
    "model",
    None,
    "A run directory, a directory that convert.py wrote, a checkpoint file or a hub name.",
)
OUTPUT = flags.DEFINE_string("output", "kernels.png", "The picture to write: .png, .svg or .pdf.")
STEP = flags.DEFINE_string("step", None, "Of a run: the checkpoint, a number, best or newest.")

GROUPS = {"The network": ("model", "step"), "The picture": ("output",)}

SUFFIXES = (".png", ".svg", ".pdf")


def main(_: Sequence[str]) -> int:
    """Draws the picture; returns the exit status."""
    from repvgg_jax.files import replacing
    from repvgg_jax.visualize.network import blocks_of
    from repvgg_jax.visualize.picture import draw_blocks, table

    if MODEL.value is None:
        raise ValueError("give --model, e.g. a run directory or a checkpoint file")
    output = pathlib.Path(OUTPUT.value)
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output={output} must end in {', '.join(SUFFIXES[:-1])} or .pdf")
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: there is no directory {output.parent}")
    title, blocks = blocks_of(MODEL.value, STEP.value)
    figure: Any = draw_blocks(blocks, title)
    with replacing(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:].lower())
    print(title)
    print(table(blocks))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    cli.run(main)

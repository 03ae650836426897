"""Table 8 of the RepVGG paper side by side: PSPNet on six backbones, as trained and fused.

Parameters and MACs are counted from the programs that JAX traces, without computing anything; MACs
are those of convolutions. With `--time`, both forms run in turn, each in its own process, on
images of `--time-size` pixels; "time x" is relative to the first row's fused form. The paper's
columns are what its authors measured on Cityscapes, with 713x713 pixels and batch 16 on a 1080Ti.

    python benchmarks/segmentation.py
    python benchmarks/segmentation.py --time --time-size 257 --write
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import convolutions
import harness
import jax
import jax.numpy as jnp
import numpy as np
import paper

import repvgg_jax as rv

CLASSES = 19


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of Table 8.

    Attributes:
      backbone: as `create_segmenter` calls it.
      fast: whether its dilation is "fast".
      miou: mean intersection over union in percent, of the paper.
      accuracy: pixel accuracy in percent, of the paper.
      speed: images per second, of the paper.
    """

    backbone: str
    fast: bool
    miou: float | None
    accuracy: float
    speed: float | None

    @property
    def name(self) -> str:
        """As in the paper."""
        prefix = "" if self.backbone.startswith("ResNet") else "RepVGG-"
        return f"{prefix}{self.backbone}{'-fast' if self.fast else ''}"


PIXEL_ACCURACY = {
    "B1g2-fast": 96.19,
    "ResNet-50": 95.99,
    "B1g2": 96.27,
    "B2-fast": 96.36,
    "ResNet-101": 96.30,
    "B2": 96.50,
}
"""In percent, of the paper; its other columns are in `paper.TABLES`."""

ROWS = tuple(
    Row(
        backbone=name.removesuffix("-fast"),
        fast=name.endswith("-fast"),
        miou=printed.accuracy,
        accuracy=PIXEL_ACCURACY[name],
        speed=printed.speed,
    )
    for name, printed in paper.TABLES["8"].rows.items()
)


def segmenter(row: Row, *, deploy: bool, **options: Any) -> rv.Segmenter:
    """The network of a row; without the auxiliary head, which inference never runs."""
    return rv.create_segmenter(
        row.backbone, CLASSES, fast=row.fast, deploy=deploy, auxiliary_width=0, **options
    )


def count(row: Row, size: int, *, deploy: bool) -> tuple[int, int]:
    """Parameters, and MACs of the convolutions for one image of that height and width."""
    model = segmenter(row, deploy=deploy, lowering="plain")
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    return parameters, convolutions.count(model.apply, variables, images).macs


def build(name: str, size: int, batch: int) -> tuple[Callable[[], Any], None]:
    """A run of one form of one row, called `NAME fused` or `NAME trained`."""
    row_name, _, form = name.rpartition(" ")
    row = next(row for row in ROWS if row.name == row_name)
    images = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    model = segmenter(row, deploy=form == "fused")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    # Speed does not depend on the values, as long as they stay finite.
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3, leaf.dtype), shapes)
    run = jax.jit(lambda x: model.apply(variables, x))
    x = jax.device_put(images)
    return lambda: jax.block_until_ready(run(x)), None


def main() -> None:
    """Counts, measures what the flags select, and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument(
        "--image-size", type=int, default=paper.SEGMENTED_SIZE, help="pixels, for MACs"
    )
    parser.add_argument("--time", action="store_true", help="also time both forms")
    parser.add_argument("--time-size", type=int, default=257, help="pixels, for times")
    parser.add_argument("--batch", type=int, default=1, help="images, for times")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    took = {}
    if args.time:
        names = [f"{row.name} {form}" for row in ROWS for form in ("trained", "fused")]
        times, _ = harness.take_turns_apart(
            build, names, (args.time_size, args.batch), rounds=args.rounds
        )
        took = {name: harness.summary(seconds) for name, seconds in times.items()}
    table = []
    for row in ROWS:
        trained, fused = (count(row, args.image_size, deploy=deploy) for deploy in (False, True))
        cells = {
            "backbone": row.name,
            "params trained M": trained[0] / 1e6,
            "params fused M": fused[0] / 1e6,
            "MACs trained G": trained[1] / 1e9,
            "MACs fused G": fused[1] / 1e9,
            "paper mIoU %": f"{row.miou:.2f}",
            "paper accuracy %": f"{row.accuracy:.2f}",
            "paper images/s": row.speed,
        }
        for form in ("trained", "fused") if args.time else ():
            name = f"{row.name} {form}"
            cells[f"{form} ms"] = 1e3 * took[name]["median"] if name in took else None
            cells[f"{form} time x"] = (
                harness.ratio(took, name, f"{ROWS[0].name} fused") if name in took else None
            )
        table.append(cells)
    harness.report(
        "segmentation",
        table,
        note=__doc__ or "",
        write=args.write,
        image_size=args.image_size,
        **({"time_size": args.time_size, "batch": args.batch} if args.time else {}),
    )


if __name__ == "__main__":
    main()

"""Draws every operation and policy of augmentation.

python -m repvgg_jax.data.augment --output augment.png
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from repvgg_jax import cli, files
from repvgg_jax.data.augment.base import Op, SampledOps
from repvgg_jax.data.augment.ops import apply_op
from repvgg_jax.data.augment.pipeline import Augmentation, Mixing, RandomErasing
from repvgg_jax.data.augment.policies import AutoAugment, ColorJitter, RandAugment, Raug15
from repvgg_jax.data.images import resize
from repvgg_jax.data.sources import photo_crops
from repvgg_jax.normalize import Normalize

GROUPS = {"The picture": ("output", "seed")}

SIZE = 128
ARGUMENTS = {
    Op.IDENTITY: (0, 0, 0, 0),
    Op.AUTO_CONTRAST: (0, 0, 0, 0),
    Op.EQUALIZE: (0, 0, 0, 0),
    Op.INVERT: (0, 0, 0, 0),
    Op.POSTERIZE: (4, 3, 2, 1),
    Op.SOLARIZE: (205, 154, 102, 51),
    Op.SOLARIZE_ADD: (27, 55, 82, 110),
    Op.BRIGHTNESS: (0.19, 0.6, 1.4, 1.81),
    Op.CONTRAST: (0.19, 0.6, 1.4, 1.81),
    Op.COLOR: (0.19, 0.6, 1.4, 1.81),
    Op.SHARPNESS: (0, 0.6, 1.8, 2.6),
    Op.HUE: (-0.4, -0.1, 0.1, 0.4),
    Op.SHEAR_X: (-0.3, -0.1, 0.1, 0.3),
    Op.SHEAR_Y: (-0.3, -0.1, 0.1, 0.3),
    Op.TRANSLATE_X: (-0.45, -0.1, 0.1, 0.45),
    Op.TRANSLATE_Y: (-0.45, -0.1, 0.1, 0.45),
    Op.ROTATE: (-30, -10, 10, 30),
    Op.CUTOUT: (8, 24, 40, 56),
}


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Labeled rows of eight images: uint8 (8, 128, 128, 3), half of them of each photograph."""
    images = np.stack([resize(crop, SIZE, SIZE) for crop in photo_crops(427, 2)]).repeat(4, 0)
    key = jax.random.key(seed)
    ops = jnp.array(list(ARGUMENTS), jnp.int32).repeat(8)
    arguments = jnp.array([(*of, *of) for of in ARGUMENTS.values()], jnp.float32).reshape(-1)
    center = jnp.full(ops.shape, 0.5)
    sampled = SampledOps(ops, arguments, jnp.zeros(ops.shape, bool), center, center)
    changed = jax.jit(lambda i: apply_op(i, sampled, possible=frozenset(ARGUMENTS)))(
        np.tile(images, (len(ARGUMENTS), 1, 1, 1))
    ).reshape(len(ARGUMENTS), *images.shape)
    pictures = {_label(op): np.asarray(row) for op, row in zip(ARGUMENTS, changed, strict=True)}
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    plain = Augmentation(normalize, flip=0.5, fill=(124, 116, 104))
    for name, augment in {
        "flip": plain,
        "autoaugment": dataclasses.replace(plain, policy=AutoAugment()),
        "randaugment": dataclasses.replace(plain, policy=RandAugment()),
        "raug15": dataclasses.replace(plain, policy=Raug15(), fill=(128, 128, 128)),
        "jitter 0.4, hue 0.1": dataclasses.replace(plain, jitter=ColorJitter(0.4, 0.4, 0.4, 0.1)),
        "erase": dataclasses.replace(plain, erase=RandomErasing(probability=1.0)),
    }.items():
        pictures[name] = _to_uint8(jax.jit(augment)(key, images), normalize)
    for name, mixing in {
        "mixup 1.0": Mixing(mixup=1.0, group=2),
        "cutmix 1.0": Mixing(cutmix=1.0, group=2),
    }.items():
        ordered = normalize(images[[0, 4, 1, 5, 2, 6, 3, 7]])
        mixed, _ = jax.jit(mixing)(key, ordered, jnp.ones((8, 1)))
        pictures[name] = _to_uint8(mixed, normalize)
    return pictures


def draw(path: str | os.PathLike[str], seed: int = 0) -> None:
    """Writes the picture, a row for each operation, policy and stage.

    Raises:
      ValueError: the parent directory does not exist.
    """
    from PIL import Image, ImageDraw

    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"--output={path}: there is no directory {path.parent}")
    pictures = rows(seed)
    gap, margin = 4, 140
    sheet = Image.new(
        "RGB", (margin + 8 * (SIZE + gap), len(pictures) * (SIZE + gap) + gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(pictures.items()):
        top = gap + row * (SIZE + gap)
        pen.multiline_text((8, top + SIZE // 2), name, fill="black", anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (margin + column * (SIZE + gap), top))
    with files.replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _label(op: Op) -> str:
    """The operation, named as in docs/augmentation.md, and the arguments of its columns."""
    name = op.name.lower().replace("_", "-")
    if not any(ARGUMENTS[op]):
        return name
    return f"{name}\n{', '.join(f'{argument:g}' for argument in ARGUMENTS[op])}"


def _to_uint8(images: jax.Array, normalize: Normalize) -> np.ndarray:
    pixels = np.asarray(images) * np.array(normalize.std) + np.array(normalize.mean)
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def main(_: Sequence[str]) -> int:
    """Draws the picture; returns the exit status."""
    draw(OUTPUT.value, SEED.value)
    print(f"wrote {OUTPUT.value}")
    return 0


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", "augment.png", "The PNG file to write.")
    SEED = flags.DEFINE_integer("seed", 0, "Seed of what is sampled.", lower_bound=0)
    cli.run(main)

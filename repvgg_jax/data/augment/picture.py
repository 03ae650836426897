"""A picture of every operation and policy, for a person to look at."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.composition import Augmentation
from repvgg_jax.data.augment.erasing import Erasing
from repvgg_jax.data.augment.jitter import Jitter
from repvgg_jax.data.augment.kinds import Choice, Kind
from repvgg_jax.data.augment.mixing import Mixing
from repvgg_jax.data.augment.normalise import Normalise
from repvgg_jax.data.augment.operation import operate
from repvgg_jax.data.augment.policies import AutoAugment, RandAugment, Raug15
from repvgg_jax.data.photos import crops
from repvgg_jax.data.resizing import resize

SIZE = 128
ARGUMENTS = {
    Kind.IDENTITY: (0, 0, 0, 0),
    Kind.AUTO_CONTRAST: (0, 0, 0, 0),
    Kind.EQUALIZE: (0, 0, 0, 0),
    Kind.INVERT: (0, 0, 0, 0),
    Kind.POSTERIZE: (4, 3, 2, 1),
    Kind.SOLARIZE: (205, 154, 102, 51),
    Kind.SOLARIZE_ADD: (27, 55, 82, 110),
    Kind.BRIGHTNESS: (0.19, 0.6, 1.4, 1.81),
    Kind.CONTRAST: (0.19, 0.6, 1.4, 1.81),
    Kind.COLOR: (0.19, 0.6, 1.4, 1.81),
    Kind.SHARPNESS: (0, 0.6, 1.8, 2.6),
    Kind.HUE: (-0.4, -0.1, 0.1, 0.4),
    Kind.SHEAR_X: (-0.3, -0.1, 0.1, 0.3),
    Kind.SHEAR_Y: (-0.3, -0.1, 0.1, 0.3),
    Kind.TRANSLATE_X: (-0.45, -0.1, 0.1, 0.45),
    Kind.TRANSLATE_Y: (-0.45, -0.1, 0.1, 0.45),
    Kind.ROTATE: (-30, -10, 10, 30),
    Kind.CUTOUT: (8, 24, 40, 56),
}


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Labelled rows of eight pictures: uint8 (8, 128, 128, 3), half of each photograph."""
    images = np.stack([resize(crop, SIZE, SIZE) for crop in crops(427, 2)]).repeat(4, 0)
    key = jax.random.key(seed)
    kinds = jnp.array(list(ARGUMENTS), jnp.int32).repeat(8)
    arguments = jnp.array([(*of, *of) for of in ARGUMENTS.values()], jnp.float32).reshape(-1)
    middle = jnp.full(kinds.shape, 0.5)
    choice = Choice(kinds, arguments, jnp.zeros(kinds.shape, bool), middle, middle)
    operations = jax.jit(lambda i: operate(i, choice, possible=frozenset(ARGUMENTS)))(
        np.tile(images, (len(ARGUMENTS), 1, 1, 1))
    ).reshape(len(ARGUMENTS), *images.shape)
    pictures = {
        _label(kind): np.asarray(row) for kind, row in zip(ARGUMENTS, operations, strict=True)
    }
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    plain = Augmentation(normalise, flip=0.5, fill=(124, 116, 104))
    for name, augment in {
        "flip": plain,
        "autoaugment": dataclasses.replace(plain, policy=AutoAugment()),
        "randaugment": dataclasses.replace(plain, policy=RandAugment()),
        "raug15": dataclasses.replace(plain, policy=Raug15(), fill=(128, 128, 128)),
        "jitter 0.4, hue 0.1": dataclasses.replace(plain, jitter=Jitter(0.4, 0.4, 0.4, 0.1)),
        "erase": dataclasses.replace(plain, erase=Erasing(probability=1.0)),
    }.items():
        pictures[name] = _visible(jax.jit(augment)(key, images), normalise)
    for name, mixing in {
        "mixup 1.0": Mixing(mixup=1.0, group=2),
        "cutmix 1.0": Mixing(cutmix=1.0, group=2),
    }.items():
        ordered = normalise(images[[0, 4, 1, 5, 2, 6, 3, 7]])
        mixed, _ = jax.jit(mixing)(key, ordered, jnp.ones((8, 1)))
        pictures[name] = _visible(mixed, normalise)
    return pictures


def draw(path: str | os.PathLike[str], seed: int = 0) -> None:
    """Writes the picture, a row for each operation, policy and stage.

    Raises:
      ValueError: the directory that shall hold it does not exist.
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
    temporary = path.with_name(path.name + ".tmp")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)


def _label(kind: Kind) -> str:
    """The operation, as docs/augmentation.md calls it, and what its columns differ in."""
    name = kind.name.lower().replace("_", "-")
    if not any(ARGUMENTS[kind]):
        return name
    return f"{name}\n{', '.join(f'{argument:g}' for argument in ARGUMENTS[kind])}"


def _visible(images: jax.Array, normalise: Normalise) -> np.ndarray:
    pixels = np.asarray(images) * np.array(normalise.std) + np.array(normalise.mean)
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)

"""A network with everything between an image file and the probabilities of its classes."""

import contextlib
import dataclasses
import functools
import glob
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.layout import Format, Layout
from PIL import Image

from repvgg_jax.data.decoding import Decoder, read_file
from repvgg_jax.data.images import CenterCrop
from repvgg_jax.data.sources import SUFFIXES
from repvgg_jax.normalize import Normalize
from repvgg_jax.segmentation.labels import class_colors
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.segmentation.pictures import overlay
from repvgg_jax.text import first_few

BATCH = 32
"""Images that are computed at once, at most."""


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier in deploy form.

    Attributes:
      model: in deploy form.
      variables: of the model, NumPy arrays.
      normalize: pixels to what the model takes.
      classes: names by label; empty if unknown.
      image_shape: (height, width, channels) that the network was made for.
      crop: how images of other sizes are cropped and resized to it.
      constant_weights: compile the weights into the program. It then runs faster on CPUs, and
        compiling takes longer: 9 s instead of 3 s for A0.
      run: computes the probabilities of uint8 images instead of the model; None for the model.
    """

    model: nn.Module
    variables: Any
    normalize: Normalize
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    crop: CenterCrop
    constant_weights: bool = True
    run: Callable[[np.ndarray], np.ndarray] | None = None

    def preprocess(self, image: str | os.PathLike | bytes | np.ndarray) -> np.ndarray:
        """An image as evaluation of a classifier crops and resizes it.

        Args:
          image: a path, the content of a file, or uint8 pixels (height, width, channels).

        Returns:
          uint8 of `image_shape`.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is not an image, or has other channels.
        """
        if isinstance(image, (str, os.PathLike, bytes)):
            encoded = image if isinstance(image, bytes) else read_file(image)
            return self._with_channels(self.crop({"encoded": encoded}))
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or not pixels.size:
            raise ValueError(
                "an image must be a path, the content of a file, or uint8 pixels (height, width, "
                f"channels), got {type(image).__name__} {pixels.dtype} {pixels.shape}"
            )
        return self._with_channels(self.crop({"image": pixels}))

    def whole(self, path: str | os.PathLike) -> np.ndarray:
        """All pixels of an image file, uint8 (height, width, channels): what segmenters take.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is not an image, or has other channels.
        """
        return self._with_channels(self.crop.decoder(read_file(path)))

    def _with_channels(self, pixels: np.ndarray) -> np.ndarray:
        channels = self.image_shape[-1]
        if pixels.shape[-1] == 3 and channels == 1:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        if pixels.shape[-1] != channels:
            raise ValueError(
                f"an image of {pixels.shape[-1]} channels, but the network takes {channels}"
            )
        return pixels

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Probabilities of the classes.

        Args:
          images: uint8 (images, height, width, channels), as `preprocess` or `whole` returns them.

        Returns:
          float32 (images, classes); of a segmenter (images, height, width, classes).

        Raises:
          ValueError: images of another type, rank or number of channels, or without pixels.
        """
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise ValueError("images must have one size; predict them one after another") from error
        channels = self.image_shape[-1]
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[-1] != channels
            or not all(images.shape[1:])
        ):
            raise ValueError(
                f"images must be uint8 (images, height, width, {channels}), as `preprocess` "
                f"returns them, got {images.dtype} {images.shape}"
            )
        parts = [
            np.asarray(self._probabilities(images[start : start + BATCH]))
            for start in range(0, len(images), BATCH)
        ]
        if parts:
            return np.concatenate(parts)
        pixels = images.shape[1:3] if isinstance(self.model, Segmenter) else ()
        return np.zeros((0, *pixels, self._num_classes), np.float32)

    def predict_files(
        self, paths: Sequence[str | os.PathLike]
    ) -> Iterator[tuple[str | os.PathLike, np.ndarray]]:
        """Path and probabilities (classes,) of every file, in order.

        Raises:
          OSError: a file cannot be read.
          ValueError: a file is not an image; it is named.
        """
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            yield from zip(batch, self.predict(self._read(batch)), strict=True)

    def write_mask(
        self, path: str | os.PathLike, output: pathlib.Path
    ) -> tuple[pathlib.Path, pathlib.Path, np.ndarray]:
        """Writes the classes of an image's pixels, by a segmenter.

        Args:
          path: the image.
          output: the directory for `NAME.mask.png`, which holds the labels, and
            `NAME.overlay.png`, the image with the colors of its classes.

        Returns:
          Both paths, and the mask, uint8 (height, width).

        Raises:
          OSError: a file cannot be read or written.
          ValueError: it is not an image; it is named.
        """
        with _naming(path):
            pixels = self.whole(path)
        mask = self.predict(pixels[None])[0].argmax(axis=-1).astype(np.uint8)
        stem = pathlib.Path(path).stem
        masks, overlays = output / f"{stem}.mask.png", output / f"{stem}.overlay.png"
        Image.fromarray(mask).save(masks)
        colors = class_colors(self.names(range(self._num_classes)))
        Image.fromarray(overlay(pixels, mask, colors)).save(overlays)
        return masks, overlays, mask

    def names(self, labels: Iterable[int]) -> list[str]:
        """Names of classes; the label itself if they have none."""
        return [self.classes[label] if self.classes else str(label) for label in labels]

    def _read(self, paths: Sequence[str | os.PathLike]) -> np.ndarray:
        images = []
        for path in paths:
            with _naming(path):
                images.append(self.preprocess(path))
        return np.stack(images)

    @property
    def _num_classes(self) -> int:
        return self.model.num_classes

    def _probabilities(self, images: np.ndarray) -> Any:
        return self._compiled(jnp.asarray(images)) if self.run is None else self.run(images)

    @functools.cached_property
    def _compiled(self) -> Any:
        def probabilities(variables: Any, images: jax.Array) -> jax.Array:
            logits: Any = self.model.apply(variables, self.normalize(images))
            return jax.nn.softmax(logits.astype(jnp.float32))

        if self.constant_weights:
            return jax.jit(functools.partial(probabilities, self.variables))
        return _Stored(probabilities, self.variables)


class _Stored:
    """A function of variables and images that keeps the variables as its program reads them.

    Kernels that lie in memory as arrays usually do are transposed in every call on GPUs.
    """

    def __init__(self, function: Callable[[Any, jax.Array], jax.Array], variables: Any) -> None:
        self._function = function
        self._variables = variables
        self._formats: Any = Format(Layout.AUTO)
        self._programs: dict[tuple[int, ...], Callable[..., jax.Array]] = {}

    def __call__(self, images: jax.Array) -> jax.Array:
        program = self._programs.get(images.shape)
        if program is None:
            # The first program chooses how the variables lie, those for other shapes take them so.
            program = (
                jax.jit(self._function, in_shardings=(self._formats, None))
                .lower(jax.tree.map(_shape, self._variables), images)
                .compile()
            )
            if not self._programs:
                self._formats = program.input_formats[0][0]
                self._variables = jax.device_put(self._variables, self._formats)
            self._programs[images.shape] = program
        return program(self._variables, images)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """A context in which errors name the file that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def center_crop(
    image_shape: tuple[int, int, int],
    *,
    fraction: float,
    background: tuple[int, int, int],
    white: float,
) -> CenterCrop:
    """The crop that evaluation takes of image files; `config.data` explains the arguments."""
    decoder = Decoder(background=background, white=white)
    return CenterCrop(image_shape[:2], fraction, decoder)


def find_images(arguments: Sequence[str]) -> list[str]:
    """Image files of paths, directories (with their subdirectories) and glob patterns.

    Of a directory, these are the files whose names end in one of `SUFFIXES`. Directories that a
    pattern matches are searched, too; each file of a pattern is in the list once.

    Raises:
      ValueError: there is no such file, or no image in a directory or in all that a pattern
        matches.
    """
    found: list[str] = []
    for argument in arguments:
        path = pathlib.Path(argument)
        if path.is_dir():
            files = _images_below(path)
        elif path.exists():
            files = [argument]
        elif matches := sorted(glob.glob(argument, recursive=True)):
            files = _matched(matches)
        else:
            raise ValueError(f"there is no image file, directory or pattern {argument}")
        if not files:
            raise ValueError(
                f"{argument} holds no images; their names end in {first_few(SUFFIXES)}"
            )
        found += files
    return found


def _images_below(directory: pathlib.Path) -> list[str]:
    return sorted(
        str(file)
        for file in directory.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file()
    )


def _matched(matches: Sequence[str]) -> list[str]:
    """Files among the matches of a pattern, and images below its directories, each once."""
    found: dict[pathlib.Path, str] = {}
    for match in matches:
        path = pathlib.Path(match)
        for file in _images_below(path) if path.is_dir() else [match]:
            found.setdefault(pathlib.Path(file), file)
    return list(found.values())

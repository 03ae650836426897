"""Prepares ImageNet, a folder tree, Cityscapes or pairs of images and masks for training.

The result is sharded ArrayRecord files.

python -m repvgg_jax.data.prepare --source /data/imagenet-tars --output /data/imagenet
python -m repvgg_jax.data.prepare --verify /data/imagenet
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from repvgg_jax import cli

SOURCE = flags.DEFINE_string(
    "source",
    None,
    "ImageNet's tar files, train/ and val/ with a folder per class, or with images/ and masks/, or "
    "Cityscapes as it is unpacked.",
)
OUTPUT = flags.DEFINE_string("output", None, "The directory to write; a second call continues.")
SPLITS = flags.DEFINE_list(
    "splits", None, "Folders of a tree of classes, e.g. train,val,test or test; default: train,val."
)
SHORT_SIDE = flags.DEFINE_integer(
    "short_side", 0, "Shrink larger images to this short side, in pixels; 0 keeps the files."
)
QUALITY = flags.DEFINE_integer(
    "quality", 95, "JPEG quality of images that are encoded again.", lower_bound=1, upper_bound=100
)
STORE = flags.DEFINE_enum(
    "store", "jpeg", ["jpeg", "raw"], "raw: pixels, several times the room, no decoding."
)
SHARD_IMAGES = flags.DEFINE_integer("shard_images", 2048, "Images per shard.", lower_bound=1)
PROCESSES = flags.DEFINE_integer("processes", 0, "Number of workers; 0: one per core.")
MAX_BAD = flags.DEFINE_integer("max_bad", 0, "Undecodable images that may be left out.")
ALLOW_EMPTY = flags.DEFINE_bool(
    "allow_empty", False, "Allow classes without images (config.data.allow_empty)."
)
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    None,
    "Height times width of the largest image that is decoded (config.data.max_pixels).",
    lower_bound=1,
)
BACKGROUND = flags.DEFINE_list(
    "background",
    None,
    "Red, green and blue behind transparent pixels, e.g. 0,0,0 (config.data.background).",
)
WHITE = flags.DEFINE_float(
    "white",
    None,
    "Value that becomes 255 in images of more than 8 bits (config.data.white).",
    lower_bound=0,
)
VERIFY = flags.DEFINE_string(
    "verify", None, "Check this prepared directory instead, image by image."
)


GROUPS = {
    "What to read": (
        "source",
        "splits",
        "max_bad",
        "allow_empty",
        "max_pixels",
        "background",
        "white",
    ),
    "What to write": ("output", "store", "short_side", "quality", "shard_images", "processes"),
    "Instead": ("verify",),
}


def main(_: Sequence[str]) -> int:
    """Prepares or verifies; returns the exit status."""
    from repvgg_jax.data.dataset import decoder_of
    from repvgg_jax.data.prepare import inputs, shards
    from repvgg_jax.data.prepare.prepare import (
        Settings,
        estimate_imagenet,
        format_bytes,
        free_bytes,
        prepare,
        training_command,
        verify,
    )
    from repvgg_jax.data.settings import DataSettings, parse_background

    processes = PROCESSES.value or os.cpu_count() or 1
    if VERIFY.value is not None:
        verify(pathlib.Path(VERIFY.value), processes=processes)
        print(f"{VERIFY.value}: every shard is what was written, every image can be decoded")
        return 0
    if SOURCE.value is None or OUTPUT.value is None:
        raise ValueError(
            "give --source, where the images are, and --output, the directory to write; or --verify"
        )
    if SHORT_SIDE.value < 0:
        raise ValueError(f"--short_side={SHORT_SIDE.value} must be 0 or more")
    output = pathlib.Path(OUTPUT.value)
    given: dict[str, Any] = {"max_pixels": MAX_PIXELS.value, "white": WHITE.value}
    if BACKGROUND.value is not None:
        given["background"] = parse_background(BACKGROUND.value)
    data = DataSettings(**{name: value for name, value in given.items() if value is not None})
    encoding = shards.Encoding(SHORT_SIDE.value, QUALITY.value, decoder_of(data), STORE.value)
    try:
        found = inputs.find(
            pathlib.Path(SOURCE.value),
            splits=SPLITS.value,
            allow_empty=ALLOW_EMPTY.value,
            decoder=encoding.decoder,
        )
    except inputs.MissingError as error:
        needed = estimate_imagenet(encoding, SHARD_IMAGES.value)
        raise ValueError(
            f"{error}; prepared with --short_side={encoding.short_side}, all of ImageNet takes "
            f"about {format_bytes(needed)}, {format_bytes(free_bytes(output))} are free "
            f"in {output}"
        ) from error
    manifest = prepare(
        found,
        output,
        Settings(
            encoding=encoding,
            shard_images=SHARD_IMAGES.value,
            processes=processes,
            max_bad=MAX_BAD.value,
        ),
    )
    total = sum(shard.bytes for split in manifest.splits.values() for shard in split)
    print(f"{output}: {total / 1e6:,.2f} MB in {sum(map(len, manifest.splits.values()))} shards")
    print(f"next: {training_command(manifest, output)}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Encoded images to pixels; the only place that chooses a decoder.

JPEG files go to simplejpeg, the fastest of those that `benchmarks/input_pipeline.py` compares,
and the only fast one that reports damaged data. Everything else goes to Pillow: CMYK JPEGs, which
other decoders do not convert, PNG and all other formats, and whatever simplejpeg rejects, because
it also rejects harmless oddities. An image is undecodable if Pillow says so.

EXIF rotations are not applied, as in other frameworks' ImageNet pipelines.
"""

import io
import math

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

REDUCTIONS = (8, 4, 2)
"""Factors by which decoding can shrink a JPEG for less work, the largest first."""


class UndecodableError(ValueError):
    """Data that no decoder can read; the text is the reason, without the image's name."""


def image_size(encoded: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
      UndecodableError: no known header.
    """
    header = _jpeg_header(encoded)
    if header is not None:
        return header[0], header[1]
    with _opened(encoded) as image:
        return image.height, image.width


def decode(encoded: bytes, reduction: int = 1, *, fast_upsample: bool = False) -> np.ndarray:
    """Decodes an image.

    Args:
      encoded: a JPEG, PNG or other file that Pillow reads.
      reduction: 1, 2, 4 or 8: divides height and width, rounding up, in the frequency domain of
        a JPEG, which takes less time. Other formats ignore it; look at the shape.
      fast_upsample: repeat the values of JPEGs that store color at half the resolution, instead
        of interpolating them as Pillow does. Brightness is the same.

    Returns:
      RGB, uint8 (height, width, 3).

    Raises:
      UndecodableError: damaged, or not an image.
    """
    header = _jpeg_header(encoded)
    if header is not None and header[2] not in ("CMYK", "YCCK"):
        height, width = (math.ceil(length / reduction) for length in header[:2])
        try:
            return simplejpeg.decode_jpeg(
                encoded,
                "RGB",
                fastupsample=fast_upsample,
                min_height=height,
                min_width=width,
                min_factor=reduction,
            )
        except ValueError:
            pass  # Pillow tells damage from oddity
    with _opened(encoded) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's plugins raise anything
            raise UndecodableError(str(error) or type(error).__name__) from error


def is_plain_jpeg(encoded: bytes) -> bool:
    """Whether it is a gray or RGB JPEG, which fast decoders read."""
    header = _jpeg_header(encoded)
    return header is not None and header[2] not in ("CMYK", "YCCK")


def _jpeg_header(encoded: bytes) -> tuple[int, int, str, str] | None:
    if not encoded.startswith(b"\xff\xd8"):
        return None
    try:
        return simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None


def _opened(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        what = f"{len(encoded):,} bytes of no known image format" if encoded else "an empty file"
        raise UndecodableError(what) from error
    except Exception as error:  # Pillow's plugins raise anything
        raise UndecodableError(str(error) or type(error).__name__) from error

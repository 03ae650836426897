"""Encoded images to pixels; which decoder reads what is decided here and nowhere else.

JPEG files go to simplejpeg, the fastest of those that `benchmarks/input_pipeline.py` compares,
and the only fast one that says when data are damaged. Everything else goes to Pillow: CMYK
JPEGs, which other decoders leave to their caller, PNG and all other formats, and whatever
simplejpeg objects to, for it rejects harmless oddities, too. An image is undecodable when
Pillow says so.

A rotation that EXIF data ask for is not applied: neither are the ones of ImageNet in other
frameworks' pipelines.
"""

import io
import math

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

REDUCTIONS = (8, 4, 2)  # that a JPEG can be decoded at for less work, the strongest first


class UndecodableError(ValueError):
    """Data that no decoder can read; the text is the reason, without the image's name."""


def size(encoded: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
      UndecodableError: it has no header that we know.
    """
    header = _jpeg_header(encoded)
    if header is not None:
        return header[0], header[1]
    with _opened(encoded) as image:
        return image.height, image.width


def decode(encoded: bytes, reduction: int = 1, *, quickly: bool = False) -> np.ndarray:
    """All pixels.

    Args:
      encoded: a JPEG, PNG or other file that Pillow knows.
      reduction: 1, 2, 4 or 8. Height and width are divided by it, rounding up, in the JPEG's
        frequencies, which takes less time. Only where the format can; look at the shape.
      quickly: a JPEG that stores colour at half the resolution has each value repeated, where
        otherwise values in between are interpolated, as Pillow does. Brightness is the same.

    Returns:
      RGB, uint8 (height, width, 3).

    Raises:
      UndecodableError: it is damaged or no image.
    """
    header = _jpeg_header(encoded)
    if header is not None and header[2] not in ("CMYK", "YCCK"):
        height, width = (math.ceil(length / reduction) for length in header[:2])
        try:
            return simplejpeg.decode_jpeg(
                encoded,
                "RGB",
                fastupsample=quickly,
                min_height=height,
                min_width=width,
                min_factor=reduction,
            )
        except ValueError:
            pass  # Pillow tells damage from oddity
    with _opened(encoded) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except Exception as error:  # its plugins raise what they please
            raise UndecodableError(str(error) or type(error).__name__) from error


def is_plain_jpeg(encoded: bytes) -> bool:
    """Whether it is a JPEG of grey or RGB pixels, as fast decoders want it."""
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
    except Exception as error:  # its plugins raise what they please
        raise UndecodableError(str(error) or type(error).__name__) from error

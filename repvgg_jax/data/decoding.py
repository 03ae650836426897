"""Opening image files safely, and decoding them to uint8 RGB.

Every encoded image that training, evaluation, preparing, proofs and predictions see is opened here:
only the formats of `FORMATS`, and only up to a number of pixels, which is read from the header
before memory for them is taken.

This is also the only place that chooses a decoder: JPEG files go to simplejpeg, the fastest of
those that `benchmarks/input_pipeline.py` compares, and the only fast one that reports damaged
data. What `raw` writes is pixels already. Everything else goes to Pillow: CMYK JPEGs, which other
decoders do not convert, PNG and all other formats, and whatever simplejpeg rejects, because it also
rejects harmless oddities. An image is undecodable if Pillow rejects it.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import struct

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from repvgg_jax.files import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""Pillow's formats that are read. Others start programs (EPS: Ghostscript) or are rarely tried."""

MAX_PIXELS = 178_956_970
"""Height times width of the largest image, by default: where Pillow refuses, too."""

MAX_BYTES = 1 << 30  # of a file; one that never ends must not fill the memory

_RAW = b"P6\n"
_RAW_HEADER = re.compile(rb"P6\n(\d{1,9}) (\d{1,9})\n255\n")

_WHITE_IS_ZERO = 262, 0  # TIFF tag PhotometricInterpretation, and its value


class UndecodableError(ValueError):
    """Data that no decoder can read; the text is the reason, without the image's name."""


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of an image file.

    Raises:
      OSError: it cannot be read, is not a regular file, or holds more than `MAX_BYTES`.
    """
    with open_regular(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"{path} holds more than {MAX_BYTES:,} bytes")
    return content


def open_image(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image with Pillow without decoding it.

    Args:
      encoded: the file.
      max_pixels: largest height times width.

    Raises:
      UndecodableError: not one of `FORMATS`, a damaged header, or more pixels.
    """
    # Pillow has a limit of its own, for the whole process; it is raised only if that was asked for.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError as error:
        what = f"{len(encoded):,} bytes of no image format that is read" if encoded else ""
        raise UndecodableError(what or "an empty file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = str(error).rstrip(".")
        raise UndecodableError(f"{what}; config.data.max_pixels={max_pixels:,}") from error
    except Exception as error:  # Pillow's plugins raise anything
        raise UndecodableError(str(error) or type(error).__name__) from error
    _check_pixels(image.height, image.width, max_pixels)
    return image


def is_jpeg(encoded: bytes) -> bool:
    """Whether it is a JPEG, by its first bytes."""
    return encoded.startswith(b"\xff\xd8")


def is_plain_jpeg(encoded: bytes) -> bool:
    """Whether it is a gray or RGB JPEG, which fast decoders read."""
    header = _jpeg_header(encoded)
    return header is not None and header[2] not in ("CMYK", "YCCK")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Encoded images to pixels, turned upright as EXIF says.

    Attributes:
      max_pixels: largest height times width.
      background: color behind transparent pixels, (red, green, blue), 0 … 255.
      white: what becomes 255 in images of more than 8 bits; larger values do, too. 0: 65535 in
        images of 16 bits, 1 in those of floats.
    """

    max_pixels: int = MAX_PIXELS
    background: tuple[int, int, int] = (255, 255, 255)
    white: float = 0.0

    def size(self, encoded: bytes) -> tuple[int, int]:
        """Height and width in pixels of what `__call__` returns, from the header of a JPEG.

        Raises:
          UndecodableError: as `__call__`.
        """
        header = _jpeg_header(encoded)
        if header is None:
            height, width, _ = self(encoded).shape
            return height, width
        height, width = header[:2]
        _check_pixels(height, width, self.max_pixels)
        return (width, height) if _orientation(encoded) > 4 else (height, width)

    def __call__(
        self, encoded: bytes, reduction: int = 1, *, fast_upsample: bool = False
    ) -> np.ndarray:
        """Decodes an image, the first one of several.

        Args:
          encoded: a file of one of `FORMATS`.
          reduction: 1, 2, 4 or 8: divides height and width, rounding up, in the frequency domain
            of a JPEG, which takes less time. Other formats ignore it; look at the shape.
          fast_upsample: repeat the values of JPEGs that store color at half the resolution,
            instead of interpolating them as Pillow does. Brightness is the same.

        Returns:
          RGB, uint8 (height, width, 3); of a file of `raw` a view of its bytes.

        Raises:
          UndecodableError: damaged, not an image, of more than `max_pixels`, or of values whose
            range is unknown.
        """
        if encoded.startswith(_RAW) and (stored := _stored(encoded)) is not None:
            _check_pixels(stored.shape[0], stored.shape[1], self.max_pixels)
            return stored
        header = _jpeg_header(encoded)
        if header is not None and header[2] not in ("CMYK", "YCCK"):
            _check_pixels(header[0], header[1], self.max_pixels)
            height, width = (math.ceil(length / reduction) for length in header[:2])
            try:
                pixels = simplejpeg.decode_jpeg(
                    encoded,
                    "RGB",
                    fastupsample=fast_upsample,
                    min_height=height,
                    min_width=width,
                    min_factor=reduction,
                )
                return _upright(pixels, _orientation(encoded))
            except ValueError:
                pass  # Pillow tells damage from oddity
        with open_image(encoded, max_pixels=self.max_pixels) as image:
            try:
                return self._pixels(image)
            except UndecodableError:
                raise
            except Exception as error:  # Pillow's plugins raise anything
                raise UndecodableError(str(error) or type(error).__name__) from error

    def is_animated(self, encoded: bytes) -> bool:
        """Whether an image that can be decoded holds further pages or frames; they are not read."""
        if is_jpeg(encoded):
            return False  # MPO, as cameras write it, holds the picture and its previews
        with open_image(encoded, max_pixels=self.max_pixels) as image:
            try:
                return bool(getattr(image, "is_animated", False))
            except Exception:  # damage beyond the first one
                return False

    def _pixels(self, image: Image.Image) -> np.ndarray:
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF is ignored, as in a JPEG
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            return self._from_deep(image)
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB"))
        behind = Image.new("RGBA", image.size, (*self.background, 255))
        return np.asarray(Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB"))

    def _from_deep(self, image: Image.Image) -> np.ndarray:
        """Gray values of 16 or 32 bits."""
        values = np.asarray(image).astype(np.float32)
        low, high = values.min(), values.max()
        if image.mode == "I" and image.format == "PPM":
            white = 65535.0  # Pillow scales the file's own maximum to it
        elif self.white:
            white = self.white
        elif image.mode.startswith("I;16"):
            white = 65535.0
        elif image.mode == "F" and 0 <= low <= high <= 1:
            white = 1.0
        else:
            kind = "floats" if image.mode == "F" else "integers of 32 or signed ones of 16 bits"
            raise UndecodableError(
                f"{kind} from {low:g} to {high:g}; which value is white? Give it as "
                f"config.data.white"
            )
        if not (np.isfinite(low) and np.isfinite(high)):
            raise UndecodableError(f"values from {low} to {high}, but they must be finite")
        scaled = np.clip(values * (255 / white), 0, 255)
        tag, inverted = _WHITE_IS_ZERO
        if getattr(image, "tag_v2", {}).get(tag) == inverted:
            scaled = 255 - scaled
        gray = np.repeat(np.rint(scaled).astype(np.uint8)[..., None], 3, axis=-1)
        if (transparent := image.info.get("transparency")) is not None:
            gray[values == transparent] = self.background
        return gray


def raw(pixels: np.ndarray) -> bytes:
    """RGB pixels, uint8 (height, width, 3), as a file that takes no decoding: a PPM."""
    height, width, _ = pixels.shape
    return b"%s%d %d\n255\n%s" % (_RAW, width, height, pixels.tobytes())


def is_raw(encoded: bytes) -> bool:
    """Whether it is a whole file of `raw`."""
    return _stored(encoded) is not None


def _stored(encoded: bytes) -> np.ndarray | None:
    """The pixels of what `raw` returned; None for any other PPM."""
    header = _RAW_HEADER.match(encoded)
    if header is None:
        return None
    width, height = map(int, header.groups())
    if len(encoded) != header.end() + height * width * 3 or not height * width:
        return None  # Pillow says what is wrong
    return np.frombuffer(encoded, np.uint8, offset=header.end()).reshape(height, width, 3)


decode = Decoder()
"""A decoder with the default settings."""


def _check_pixels(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise UndecodableError(
            f"{height:,}x{width:,} are {height * width:,} pixels, but "
            f"config.data.max_pixels={most:,}"
        )


def _jpeg_header(encoded: bytes) -> tuple[int, int, str, str] | None:
    if not is_jpeg(encoded):
        return None
    try:
        return simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None


def _orientation(jpeg: bytes) -> int:
    """EXIF orientation, 1 … 8, from the header of a JPEG; 1 if there is none or it is damaged.

    Only the markers before the pixels are read, which takes microseconds.
    """
    position = 2
    try:
        while jpeg[position] == 0xFF and jpeg[position + 1] != 0xDA:  # start of scan
            if jpeg[position + 1] == 0xFF:  # a fill byte
                position += 1
                continue
            length = int.from_bytes(jpeg[position + 2 : position + 4], "big")
            if jpeg[position + 1] == 0xE1 and jpeg[position + 4 : position + 10] == b"Exif\0\0":
                return _orientation_of_exif(jpeg[position + 10 : position + 2 + length])
            position += 2 + length
    except (IndexError, struct.error):
        pass
    return 1


def _orientation_of_exif(exif: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
        if tag == ExifTags.Base.Orientation:
            (value,) = struct.unpack_from(
                f"{order}H" if kind == 3 else f"{order}I", exif, entry + 8
            )
            return value if 1 <= value <= 8 else 1
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels that are stored in an orientation of EXIF (section 4.6.4 A), as they are meant."""
    if orientation == 1:
        return pixels
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])

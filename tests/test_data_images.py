"""Decoding, resizing and cropping against Pillow."""

import io
import os
import subprocess
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from repvgg_jax.data.decoding import Decoder, UndecodableError, decode, open_image, read_file
from repvgg_jax.data.images import REDUCTIONS, CenterCrop, RandomResizedCrop, fast_resize
from repvgg_jax.data.settings import height_width
from tests.helpers.pictures import damaged, encoded, photo, pixels


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b.astype(int))


class TestDecoding:
    files = {
        "jpeg": encoded(photo(0)),
        "progressive": encoded(photo(1), progressive=True),
        "gray": encoded(photo(2).convert("L")),
        "cmyk": encoded(photo(3).convert("CMYK")),
        "png": encoded(photo(4), "PNG"),
        "gray png": encoded(photo(4).convert("L"), "PNG"),
        "palette": encoded(photo(5).quantize(16), "GIF"),
        "transparent": encoded(photo(6).convert("RGBA"), "PNG"),
        "webp": encoded(photo(7), "WEBP"),
        "odd": encoded(photo(8, 61, 83)),
        "trailing": encoded(photo(9)) + b"rubbish",
    }

    @pytest.mark.parametrize("name", files)
    def test_is_what_pillow_decodes(self, name):
        content = self.files[name]
        assert difference(decode(content), pixels(content)).max() <= 1
        assert decode.size(content) == pixels(content).shape[:2]

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("name", ["jpeg", "odd", "gray", "progressive"])
    def test_a_reduced_jpeg_is_the_average_of_its_pixels(self, name, reduction):
        content = self.files[name]
        small, full = decode(content, reduction), pixels(content)
        height, width = (-(-length // reduction) for length in full.shape[:2])
        assert small.shape == (height, width, 3)
        inside = full[: full.shape[0] // reduction * reduction][
            :, : full.shape[1] // reduction * reduction
        ]
        rows, columns = (length // reduction for length in inside.shape[:2])
        mean = inside.reshape(rows, reduction, columns, reduction, 3).mean((1, 3))
        assert np.abs(mean - small[:rows, :columns]).mean() < 2.5

    @pytest.mark.parametrize("name", ["jpeg", "odd", "gray", "progressive", "trailing"])
    def test_fast_upsampling_changes_color_only(self, name):
        content = self.files[name]
        quick, exact = decode(content, fast_upsample=True), decode(content)
        brightness = [one @ np.array([0.299, 0.587, 0.114]) for one in (quick, exact)]
        inside = (exact.min(-1) > 16) & (exact.max(-1) < 240)  # where no channel is cut off
        assert np.abs(brightness[0] - brightness[1])[inside].max() < 1.5
        assert difference(quick, exact).mean() < 4
        assert (quick != exact).any() == (name != "gray")

    @pytest.mark.parametrize("name", ["cmyk", "png"])
    def test_what_cannot_be_reduced_is_decoded_whole(self, name):
        assert decode(self.files[name], 2).shape == (60, 80, 3)

    @pytest.mark.parametrize("name", ["jpeg", "png", "cmyk", "progressive", "webp"])
    def test_damage_is_an_error(self, name):
        with pytest.raises(UndecodableError, match=r"\w"):
            decode(damaged(self.files[name]))

    @pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8", b"\x89PNG\r\n\x1a\n"])
    def test_what_is_not_an_image_is_an_error(self, content):
        for read in (decode, decode.size):
            with pytest.raises(UndecodableError) as error:
                read(content)
            assert "0x" not in str(error.value)


def saved(values: np.ndarray, file_format: str, **options) -> bytes:
    return encoded(Image.fromarray(values), file_format, **options)


class TestUpright:
    """EXIF orientation."""

    picture = photo(0, 40, 56)

    def rotated(self, orientation, file_format="JPEG", **options):
        exif = Image.Exif()
        exif[0x010F], exif[0x0112] = "a camera", orientation
        return encoded(self.picture, file_format, exif=exif, **options)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize(
        ("file_format", "options"),
        [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
    )
    def test_is_pillows(self, orientation, file_format, options):
        content = self.rotated(orientation, file_format, **options)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        assert expected.size == ((40, 56) if orientation > 4 else (56, 40))
        assert difference(decode(content), np.asarray(expected)).max() <= 1
        assert decode.size(content) == (expected.height, expected.width)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_reduced_jpeg_is_turned_too(self, orientation):
        content = self.rotated(orientation)
        full, small = decode(content), decode(content, 2)
        mean = full.reshape(full.shape[0] // 2, 2, full.shape[1] // 2, 2, 3).mean((1, 3))
        assert np.abs(mean - small).mean() < 2.5

    @pytest.mark.parametrize("order", ["little", "big"])
    def test_both_byte_orders_fill_bytes_and_other_segments(self, order):
        mark = {"little": b"II*\0", "big": b"MM\0*"}[order]

        def number(value, size):
            return value.to_bytes(size, order)

        entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(6, 2) + b"\0\0"
        exif = b"Exif\0\0" + mark + number(8, 4) + number(1, 2) + entry
        plain = encoded(self.picture)
        segments = b"\xff\xfe\0\x05abc" + b"\xff\xff\xe1" + (len(exif) + 2).to_bytes(2, "big")
        content = plain[:2] + segments + exif + plain[2:]
        np.testing.assert_array_equal(decode(content), np.rot90(decode(plain), -1))

    def test_damaged_exif_is_none(self):
        content, plain = bytearray(self.rotated(6)), decode(encoded(self.picture))
        start = content.index(b"Exif\0\0") + 6
        rng = np.random.default_rng(0)
        for _ in range(300):
            broken = bytearray(content)
            for place in rng.integers(start, start + 40, 4):
                broken[place] = rng.integers(256)
            found = decode(bytes(broken))
            assert found.shape in (plain.shape, (*plain.shape[1::-1], 3))

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
    def test_damaged_exif_of_other_formats_is_none(self, file_format):
        options = {"lossless": True} if file_format == "WEBP" else {}
        content = encoded(self.picture, file_format, exif=b"Exif\0\0XX*\0\x07\0", **options)
        np.testing.assert_array_equal(decode(content), np.asarray(self.picture))

    def test_crops_are_those_of_the_upright_image(self):
        content = self.rotated(6)
        upright = {"image": decode(content)}
        for crop in (CenterCrop(24), RandomResizedCrop()):
            seeds = [np.random.default_rng(3)] if isinstance(crop, RandomResizedCrop) else []
            more = [24, *seeds] if seeds else []
            seen = crop({"encoded": content}, *more)
            more = [24, np.random.default_rng(3)] if seeds else []
            assert difference(seen, crop(upright, *more)).mean() < 3


class TestDeepImages:
    """Gray values of 16 bits, of 32 bits and floats."""

    ramp = np.linspace(0, 65535, 40 * 50).reshape(40, 50)
    gray = np.rint(ramp / 257).astype(np.uint8)

    def check(self, content, expected, decoder=decode):
        found = decoder(content)
        assert (found[..., :1] == found).all()
        assert difference(found[..., 0], expected).max() <= 1

    @pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
    def test_16_bits_keep_their_range(self, file_format):
        self.check(saved(self.ramp.astype(np.uint16), file_format), self.gray)

    def test_16_bits_in_color(self):
        """As a PPM, which Pillow does not write."""
        values = np.stack([self.ramp, self.ramp[::-1], self.ramp / 2], -1).astype(">u2")
        found = decode(b"P6 50 40 65535\n" + values.tobytes())
        assert difference(found, np.rint(values / 257).astype(np.uint8)).max() <= 1

    def test_a_pgms_own_maximum_is_white(self):
        values = (self.ramp / 16).astype(">u2")
        content = b"P5 50 40 4095\n" + values.tobytes()
        for decoder in (decode, Decoder(white=200.0)):
            self.check(content, np.rint(values / 4095 * 255).astype(np.uint8), decoder)

    def test_floats_from_0_to_1(self):
        self.check(saved((self.ramp / 65535).astype(np.float32), "TIFF"), self.gray)

    def test_inverted_tiffs(self):
        content = saved(self.ramp.astype(np.uint16), "TIFF", tiffinfo={262: 0})
        self.check(content, 255 - self.gray)

    @pytest.mark.parametrize(
        ("values", "numbers"),
        [
            (ramp.astype(np.float32), r"floats from 0 to 65535"),
            (-(ramp / 65535).astype(np.float32), r"floats from -1 to "),
            (ramp.astype(np.int32), r"integers .*from 0 to 65535"),
        ],
    )
    def test_an_unknown_range_is_refused(self, values, numbers):
        with pytest.raises(UndecodableError, match=rf"{numbers}.*config\.data\.white"):
            decode(saved(values, "TIFF"))
        expected = np.clip(np.rint(values * (255 / 40000)), 0, 255).astype(np.uint8)
        self.check(saved(values, "TIFF"), expected, Decoder(white=40000.0))

    def test_what_is_not_a_number_is_refused(self):
        values = self.ramp.astype(np.float32)
        values[3, 3] = np.nan
        with pytest.raises(UndecodableError, match="finite"):
            Decoder(white=65535.0)(saved(values, "TIFF"))

    def test_12_bits_in_16(self):
        content = saved((self.ramp / 16).astype(np.uint16), "PNG")
        self.check(content, self.gray, Decoder(white=4095.0))


class TestTransparency:
    color = np.asarray(photo(2, 20, 30))
    alpha = np.linspace(0, 255, 600).reshape(20, 30, 1).round()

    def over(self, background):
        share = self.alpha / 255
        return np.rint(self.color * share + np.array(background) * (1 - share)).astype(np.uint8)

    @pytest.mark.parametrize("background", [(255, 255, 255), (0, 128, 40)])
    @pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
    def test_is_composited(self, file_format, background):
        pixels = np.concatenate([self.color, self.alpha.astype(np.uint8)], -1)
        options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
        content = saved(pixels, file_format, **options)
        found = Decoder(background=background)(content)
        assert difference(found, self.over(background)).max() <= 1

    def test_gray_with_alpha(self):
        gray = np.concatenate([self.color[..., :1], self.alpha.astype(np.uint8)], -1)
        found = decode(encoded(Image.fromarray(gray, "LA"), "PNG"))
        share = self.alpha / 255
        expected = np.rint(self.color[..., :1] * share + 255 * (1 - share)).astype(np.uint8)
        assert difference(found, expected.repeat(3, -1)).max() <= 1

    @pytest.mark.parametrize("file_format", ["PNG", "GIF"])
    def test_a_transparent_color_of_a_palette(self, file_format):
        image = photo(5, 20, 30).quantize(8)
        clear = np.asarray(image) == 3
        content = encoded(image, file_format, transparency=3)
        found = Decoder(background=(9, 8, 7))(content)
        assert clear.any()
        np.testing.assert_array_equal(found[clear], np.tile([9, 8, 7], (clear.sum(), 1)))
        np.testing.assert_array_equal(found[~clear], np.asarray(image.convert("RGB"))[~clear])

    def test_a_transparent_value_of_16_bits(self):
        values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
        found = Decoder(background=(1, 2, 3))(saved(values, "PNG", transparency=700))
        assert found[0, 7].tolist() == [1, 2, 3]
        assert found[0, 8].tolist() == [3, 3, 3]


class TestSeveralFrames:
    frames = [photo(number, 20, 30).quantize(16) for number in range(3)]

    @pytest.mark.parametrize("file_format", ["GIF", "TIFF", "WEBP", "PNG"])
    def test_the_first_is_read(self, file_format):
        options = {"lossless": True} if file_format == "WEBP" else {}
        images = [f.convert("RGB") for f in self.frames] if options else self.frames
        content = encoded(
            images[0], file_format, save_all=True, append_images=images[1:], **options
        )
        np.testing.assert_array_equal(decode(content), np.asarray(images[0].convert("RGB")))
        assert decode.is_animated(content)
        assert not decode.is_animated(encoded(images[0], file_format))


class TestUntrusted:
    """Files that take memory, programs or time."""

    def jpeg_header(self, height, width):
        content = encoded(photo(0, 16, 16))
        at = content.index(b"\xff\xc0") + 5
        return (
            content[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + content[at + 4 :]
        )

    @pytest.mark.parametrize("height", [30_000, 65_500])
    def test_a_header_of_many_pixels_takes_no_memory(self, height):
        content = self.jpeg_header(height, height)
        tracemalloc.start()
        for read in (decode, decode.size, open_image):
            with pytest.raises(UndecodableError, match=rf"{height**2:,}|{height**2}.*max_pixels"):
                read(content)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()

    def test_pillows_own_limit_is_raised_only_if_that_was_asked_for(self, monkeypatch):
        before = Image.MAX_IMAGE_PIXELS
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)
        content = b"P5 20000 30000 255\n"
        with pytest.raises(UndecodableError, match=r"600000000.*max_pixels"):
            open_image(content)
        assert before == Image.MAX_IMAGE_PIXELS
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            assert open_image(content, max_pixels=700_000_000).size == (20_000, 30_000)

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP"])
    def test_the_limit_holds_for_every_format(self, file_format):
        content = encoded(photo(0, 30, 41), file_format)
        assert Decoder(max_pixels=1230)(content).shape == (30, 41, 3)
        with pytest.raises(UndecodableError, match=r"30x41 .*1,230 .*max_pixels=1,229"):
            Decoder(max_pixels=1229)(content)

    @pytest.mark.parametrize(
        "content",
        [
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            encoded(photo(0), "EPS"),
            encoded(photo(0), "PDF"),
            encoded(photo(0), "TGA"),
        ],
    )
    def test_other_formats_start_nothing(self, content, monkeypatch):
        monkeypatch.setattr(subprocess, "Popen", None)
        with pytest.raises(UndecodableError, match="format"):
            decode(content)

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
    def test_changed_bytes_give_an_image_or_one_error(self, file_format):
        picture = photo(0, 20, 30)
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif} if file_format in ("JPEG", "PNG", "TIFF", "WEBP") else {}
        content = encoded(picture, file_format, **options)
        decoder, rng = Decoder(max_pixels=10_000), np.random.default_rng(0)
        for _ in range(150):
            changed = bytearray(content)
            for place in rng.integers(0, min(len(content), 150), rng.integers(1, 5)):
                changed[place] = rng.integers(256)
            try:
                found = decoder(bytes(changed))
            except UndecodableError:
                continue
            assert decoder.size(bytes(changed)) == found.shape[:2]
            assert found.size <= 30_000
            assert decoder.is_animated(bytes(changed)) in (True, False)

    def test_what_is_no_file_is_not_read(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "lost.jpg").symlink_to(tmp_path / "nothing")
        (tmp_path / "zero.jpg").symlink_to("/dev/zero")
        for name in ("pipe.jpg", "folder.jpg", "lost.jpg", "zero.jpg"):
            with pytest.raises(OSError, match=name):
                read_file(tmp_path / name)


class TestResizing:
    full = np.asarray(photo(0, 300, 400))

    @pytest.mark.parametrize("shape", [(90, 70), (100, 128), (128, 128), (128, 40)])
    def test_growing_is_pillows_to_a_gray_level(self, shape):
        crop = self.full[: shape[0], : shape[1]]
        assert difference(fast_resize(crop, 128, 128), self._pillow(crop)).max() <= 1

    @pytest.mark.parametrize("shape", [(140, 130), (160, 200), (256, 180), (256, 256), (250, 60)])
    def test_shrinking_is_close_to_pillows_and_does_not_alias(self, shape):
        crop = self.full[: shape[0], : shape[1]]
        assert difference(fast_resize(crop, 128, 128), self._pillow(crop)).mean() < 2

    def test_shrinking_to_half_is_the_same_filter(self):
        crop = self.full[:256, :256]
        assert difference(fast_resize(crop, 128, 128), self._pillow(crop)).max() <= 2

    def test_shrinking_further_is_pillows(self):
        crop = self.full[:290, :100]
        np.testing.assert_array_equal(fast_resize(crop, 128, 128), self._pillow(crop))

    def test_a_pattern_that_would_alias_becomes_gray(self):
        stripes = np.zeros((256, 256, 1), np.uint8)
        stripes[::2] = 255
        small = fast_resize(stripes, 128, 128)
        assert small.shape == (128, 128, 1)
        assert np.abs(small[1:-1].astype(int) - 127.5).max() <= 1

    @staticmethod
    def _pillow(crop):
        return np.asarray(Image.fromarray(crop).resize((128, 128), Image.Resampling.BILINEAR))


class TestCenterCrop:
    @pytest.mark.parametrize("shape", [(60, 80), (81, 60), (33, 200), (64, 64), (20, 25)])
    @pytest.mark.parametrize("fraction", [0.875, 1.0])
    def test_is_pillows_resize_and_crop(self, shape, fraction):
        content = encoded(photo(3, *shape))
        seen = CenterCrop(56, fraction)({"encoded": content})
        image, short = Image.fromarray(pixels(content)), int(56 / fraction)
        longer = int(short * max(shape) / min(shape))
        width, height = (longer, short) if shape[1] >= shape[0] else (short, longer)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - 56) / 2), round((height - 56) / 2)
        expected = np.asarray(image.crop((left, top, left + 56, top + 56)))
        assert difference(seen, expected).max() <= 1

    @pytest.mark.parametrize("shape", [(60, 80), (200, 33), (30, 70), (64, 32)])
    @pytest.mark.parametrize("size", [(24, 48), (40, 12)])
    def test_a_rectangle_is_covered_and_its_center_seen(self, shape, size):
        image = photo(3, *shape)
        seen = CenterCrop(size, 0.8)({"image": np.asarray(image)})
        box = [int(length / 0.8) for length in size]
        scale = max(box[0] / shape[0], box[1] / shape[1])
        height, width = (int(length * scale + 1e-9) for length in shape)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
        expected = np.asarray(image.crop((left, top, left + size[1], top + size[0])))
        np.testing.assert_array_equal(seen, expected)

    def test_arrays_too(self):
        image = np.asarray(photo(1).convert("L"))[..., None]
        assert CenterCrop(32)({"image": image}).shape == (32, 32, 1)


class TestRandomResizedCrop:
    def test_crops_have_the_areas_and_shapes_that_were_asked_for(self):
        crop, rng = RandomResizedCrop((0.2, 0.6), (0.5, 2.0)), np.random.default_rng(0)
        crops = np.array([crop.sample(300, 400, rng) for _ in range(4000)])
        top, left, height, width = crops.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height).max() == 300
        assert (left + width).max() == 400
        share, ratio = height * width / 120_000, width / height
        assert 0.198 < share.min() < 0.21
        assert 0.58 < share.max() < 0.602
        assert 0.49 < ratio.min() < 0.52
        assert 1.9 < ratio.max() < 2.02
        assert abs(np.log(ratio)).max() > 0.6

    def test_areas_are_uniform_where_every_crop_fits(self):
        crop, rng = RandomResizedCrop((0.1, 0.5), (1.0, 1.0)), np.random.default_rng(0)
        shares = [np.prod(crop.sample(500, 500, rng)[2:]) / 250_000 for _ in range(4000)]
        histogram = np.histogram(shares, 4, (0.1, 0.5))[0] / 4000
        np.testing.assert_allclose(histogram, 0.25, atol=0.03)

    @pytest.mark.parametrize(("shape", "expected"), [((10, 400), (10, 13)), ((400, 9), (12, 9))])
    def test_a_strip_gives_its_center(self, shape, expected):
        top, left, *crop = RandomResizedCrop((0.5, 1.0)).sample(*shape, np.random.default_rng(0))
        assert tuple(crop) == expected
        assert (top, left) == ((shape[0] - crop[0]) // 2, (shape[1] - crop[1]) // 2)

    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
    def test_is_nearly_pillows_resize_of_the_crop(self, file_format, seed):
        """Also where a large JPEG is decoded at a fraction of its size."""
        self.compare(photo(seed, 427, 640), file_format, seed, 48)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("shape", [(256, 341), (375, 500)])
    def test_is_nearly_pillows_resize_of_the_crop_at_the_usual_size(self, shape, seed):
        self.compare(photo(seed, *shape), "JPEG", seed, 224)

    def compare(self, image, file_format, seed, size):
        content, crop = encoded(image, file_format), RandomResizedCrop()
        rows, columns = height_width(size)
        seen = crop({"encoded": content}, size, np.random.default_rng(seed))
        assert seen.shape == (rows, columns, 3)
        top, left, height, width = crop.sample(
            image.height, image.width, np.random.default_rng(seed), columns / rows
        )
        # A crop of a JPEG is decoded at a fraction, and its edges are multiples of that.
        step = max((r for r in REDUCTIONS if min(height / rows, width / columns) >= r), default=1)
        step = step if file_format == "JPEG" else 1
        top, left, height, width = (round(n / step) * step for n in (top, left, height, width))
        shown = pixels(content)[top : top + height, left : left + width]
        expected = Image.fromarray(shown).resize((columns, rows), Image.Resampling.BILINEAR)
        assert difference(seen, np.asarray(expected)).mean() < 4

    @pytest.mark.parametrize("aspect", [0.5, 2.0])
    def test_ratios_are_relative_to_the_results(self, aspect):
        crop, rng = RandomResizedCrop((0.1, 0.3), (0.8, 1.25)), np.random.default_rng(0)
        crops = np.array([crop.sample(500, 500, rng, aspect) for _ in range(2000)])
        ratio = crops[:, 3] / crops[:, 2]
        assert 0.78 * aspect < ratio.min() < 0.82 * aspect
        assert 1.2 * aspect < ratio.max() < 1.28 * aspect

    @pytest.mark.parametrize("size", [(24, 60), (60, 24)])
    def test_rectangles(self, size):
        self.compare(photo(2, 427, 640), "JPEG", 1, size)

    def test_rng_decides(self):
        content, crop = encoded(photo(0)), RandomResizedCrop()
        first, again, other = (
            crop({"encoded": content}, 24, np.random.default_rng(seed)) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

"""Decoding, resizing and cropping against Pillow."""

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data.images import (
    REDUCTIONS,
    CenterCrop,
    RandomResizedCrop,
    UndecodableError,
    decode,
    fast_resize,
    image_size,
)
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
        assert image_size(content) == pixels(content).shape[:2]

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
        for read in (decode, image_size):
            with pytest.raises(UndecodableError) as error:
                read(content)
            assert "0x" not in str(error.value)


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
        seen = crop({"encoded": content}, size, np.random.default_rng(seed))
        assert seen.shape == (size, size, 3)
        top, left, height, width = crop.sample(
            image.height, image.width, np.random.default_rng(seed)
        )
        # A crop of a JPEG is decoded at a fraction, and its edges are multiples of that.
        step = max((r for r in REDUCTIONS if min(height, width) >= size * r), default=1)
        step = step if file_format == "JPEG" else 1
        top, left, height, width = (round(n / step) * step for n in (top, left, height, width))
        shown = pixels(content)[top : top + height, left : left + width]
        expected = Image.fromarray(shown).resize((size, size), Image.Resampling.BILINEAR)
        assert difference(seen, np.asarray(expected)).mean() < 4

    def test_rng_decides(self):
        content, crop = encoded(photo(0)), RandomResizedCrop()
        first, again, other = (
            crop({"encoded": content}, 24, np.random.default_rng(seed)) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

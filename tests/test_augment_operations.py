"""Every operation against Pillow's own, on photographs and on images that are all edge case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from repvgg_jax.data.augment.geometry import GEOMETRY_KINDS
from repvgg_jax.data.augment.kinds import Choice, Kind
from repvgg_jax.data.augment.operation import operate
from repvgg_jax.data.photos import crops

FILL = (124, 116, 104)
HEIGHT, WIDTH = 61, 50
FACTORS = (0.0, 0.1, 0.46, 1.0, 1.9, 2.62)
ARGUMENTS = {
    Kind.IDENTITY: (0,),
    Kind.AUTO_CONTRAST: (0,),
    Kind.EQUALIZE: (0,),
    Kind.INVERT: (0,),
    Kind.POSTERIZE: (1, 2, 4, 7, 8),
    Kind.SOLARIZE: (0, 77, 128, 256),
    Kind.SOLARIZE_ADD: (0, 33, 110, 154),
    Kind.BRIGHTNESS: FACTORS,
    Kind.CONTRAST: FACTORS,
    Kind.COLOR: FACTORS,
    Kind.SHARPNESS: FACTORS,
    Kind.HUE: (-0.5, -0.1, 0.03, 0.3, 0.5),
    Kind.SHEAR_X: (-0.3, 0.17, 0.42),
    Kind.SHEAR_Y: (-0.3, 0.17, 0.42),
    Kind.TRANSLATE_X: (-0.45, 0.1, 0.63),
    Kind.TRANSLATE_Y: (-0.45, 0.1, 0.63),
    Kind.ROTATE: (-42, -30, 0, 7.5, 27),
}
# Pillow stretches contrast and moves pixels in double precision and cuts off: where the exact
# result is an integer, float32 can land on the other side.
ONE_LEVEL = GEOMETRY_KINDS | {Kind.AUTO_CONTRAST}


def pillow(kind, argument, cubic, image):
    """The same by Pillow."""
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    fill = FILL if image.mode == "RGB" else FILL[0]
    width, height = image.size

    def moved(*matrix):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill
        )

    def turned():
        hue, saturation, value = image.convert("HSV").split()
        steps = (np.array(hue, int) + int(argument * 255)) % 256
        hue = Image.fromarray(steps.astype(np.uint8))
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    def added():
        table = [min(255, v + argument) if v < 128 else v for v in range(256)]
        return image.point(table * len(image.getbands()))

    return {
        Kind.IDENTITY: lambda: image,
        Kind.AUTO_CONTRAST: lambda: ImageOps.autocontrast(image),
        Kind.EQUALIZE: lambda: ImageOps.equalize(image),
        Kind.INVERT: lambda: ImageOps.invert(image),
        Kind.POSTERIZE: lambda: ImageOps.posterize(image, argument),
        Kind.SOLARIZE: lambda: ImageOps.solarize(image, argument),
        Kind.SOLARIZE_ADD: added,
        Kind.BRIGHTNESS: lambda: ImageEnhance.Brightness(image).enhance(argument),
        Kind.CONTRAST: lambda: ImageEnhance.Contrast(image).enhance(argument),
        Kind.COLOR: lambda: ImageEnhance.Color(image).enhance(argument),
        Kind.SHARPNESS: lambda: ImageEnhance.Sharpness(image).enhance(argument),
        Kind.HUE: turned,
        Kind.SHEAR_X: lambda: moved(1, argument, 0, 0, 1, 0),
        Kind.SHEAR_Y: lambda: moved(1, 0, 0, argument, 1, 0),
        Kind.TRANSLATE_X: lambda: moved(1, 0, argument * width, 0, 1, 0),
        Kind.TRANSLATE_Y: lambda: moved(1, 0, 0, 0, 1, argument * height),
        Kind.ROTATE: lambda: image.rotate(argument, resample=resample, fillcolor=fill),
    }[kind]()


def photos_and_edge_cases():
    rng = np.random.default_rng(0)
    edge = np.zeros((7, HEIGHT, WIDTH, 3), np.uint8)  # the first stays black
    edge[1] = 200
    edge[2, ..., 1] = rng.integers(0, 256, (HEIGHT, WIDTH))  # one channel
    edge[3] = rng.integers(100, 103, edge[3].shape)  # hardly any contrast
    edge[4] = rng.integers(0, 256, edge[4].shape)  # noise
    edge[5, :20] = 255  # two colours
    edge[6, 7, 9] = 255  # a dot
    photos = crops(max(HEIGHT, WIDTH), 4)[:, :HEIGHT, :WIDTH]
    return np.concatenate([photos, edge])


def choice_of(kinds, arguments, cubic):
    count = len(kinds)
    return Choice(
        kind=jnp.array(kinds, jnp.int32),
        argument=jnp.array(arguments, jnp.float32),
        cubic=jnp.array(cubic, bool),
        row=jnp.zeros(count),
        column=jnp.zeros(count),
    )


def compared(images, kinds, resampling):
    """Differences to Pillow: int (images, …), by kind; all jobs are one program."""
    jobs = [
        (kind, argument, cubic, index)
        for kind in kinds
        for argument in ARGUMENTS[kind]
        for cubic in ((False, True) if resampling == "random" and kind in GEOMETRY_KINDS else (0,))
        for index in range(len(images))
    ]
    which, arguments, cubic, indices = zip(*jobs, strict=True)

    @jax.jit
    def program(images, choice):
        return operate(
            images,
            choice,
            possible=frozenset(kinds),
            fill=FILL[: images.shape[-1]],
            resampling=resampling,
        )

    ours = np.asarray(program(images[list(indices)], choice_of(which, arguments, cubic)))
    differences = {kind: [] for kind in kinds}
    for (kind, argument, is_cubic, index), found in zip(jobs, ours, strict=True):
        image = Image.fromarray(images[index].squeeze())
        theirs = np.asarray(pillow(kind, argument, is_cubic, image)).reshape(found.shape)
        differences[kind].append(np.abs(theirs.astype(int) - found))
    return {kind: np.stack(values) for kind, values in differences.items()}


@pytest.fixture(scope="module")
def colour_differences():
    return compared(photos_and_edge_cases(), list(ARGUMENTS), "random")


@pytest.fixture(scope="module")
def grey_differences():
    kinds = [kind for kind in ARGUMENTS if kind not in (Kind.COLOR, Kind.HUE)]
    return compared(photos_and_edge_cases()[..., 1:2], kinds, "bilinear")


@pytest.mark.parametrize("kind", [kind for kind in ARGUMENTS if kind not in ONE_LEVEL])
def test_operations_equal_pillows_exactly(colour_differences, grey_differences, kind):
    assert colour_differences[kind].max() == 0
    if kind in grey_differences:
        assert grey_differences[kind].max() == 0


@pytest.mark.parametrize("kind", sorted(ONE_LEVEL))
def test_operations_in_double_precision_equal_pillows_to_one_grey_level(
    colour_differences, grey_differences, kind
):
    for found in (colour_differences[kind], grey_differences[kind]):
        assert found.max() <= 1
        assert (found > 0).mean() < 0.01


def test_posterizing_to_no_bit_is_black():
    image = photos_and_edge_cases()[:1]
    choice = choice_of([Kind.POSTERIZE], [0], [False])
    assert np.asarray(operate(image, choice, possible={Kind.POSTERIZE})).max() == 0


@pytest.mark.parametrize(("row", "column", "side"), [(0.0, 0.999, 10), (0.5, 0.3, 2), (0.7, 0, 56)])
def test_cutouts_are_squares_of_repvggs_colour(row, column, side):
    image = photos_and_edge_cases()[0]
    choice = choice_of([Kind.CUTOUT], [side], [False])
    choice = choice._replace(row=jnp.array([row]), column=jnp.array([column]))
    cut = np.asarray(operate(image[None], choice, possible={Kind.CUTOUT}))[0]
    y, x = int(row * HEIGHT), int(column * WIDTH)
    expected = image.copy()
    area = (slice(max(0, p - side // 2), p + side // 2) for p in (y, x))
    expected[tuple(area)] = (125, 122, 113)
    np.testing.assert_array_equal(cut, expected)


def test_what_cannot_occur_is_not_in_the_program():
    image = photos_and_edge_cases()[:2]
    choice = choice_of([Kind.INVERT, Kind.IDENTITY], [0, 0], [False, False])

    def program(possible):
        return jax.jit(lambda i: operate(i, choice, possible=possible)).lower(image).as_text()

    lean = program(frozenset({Kind.INVERT}))
    assert "dot_general" not in lean
    assert "floor" not in lean
    assert "dot_general" in program(frozenset({Kind.INVERT, Kind.EQUALIZE}))
    assert "floor" in program(frozenset({Kind.INVERT, Kind.ROTATE}))

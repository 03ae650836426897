"""Every operation against Pillow's, and what TPUs compute against the gathers of others."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from repvgg_jax.data.augment.base import Op, SampledOps
from repvgg_jax.data.augment.ops import apply_op, look_up, matmul_tables
from repvgg_jax.data.augment.policies import Raug15
from repvgg_jax.data.augment.warp import GEOMETRIC_OPS, warp
from repvgg_jax.data.sources import photo_crops
from tests.helpers.jit import quick_jit

FILL = (124, 116, 104)
HEIGHT, WIDTH = 61, 50
FACTORS = (0.0, 0.1, 0.46, 1.0, 1.9, 2.62)
ARGUMENTS = {
    Op.IDENTITY: (0,),
    Op.AUTO_CONTRAST: (0,),
    Op.EQUALIZE: (0,),
    Op.INVERT: (0,),
    Op.POSTERIZE: (1, 2, 4, 7, 8),
    Op.SOLARIZE: (0, 77, 128, 256),
    Op.SOLARIZE_ADD: (0, 33, 110, 154),
    Op.BRIGHTNESS: FACTORS,
    Op.CONTRAST: FACTORS,
    Op.COLOR: FACTORS,
    Op.SHARPNESS: FACTORS,
    Op.HUE: (-0.5, -0.1, 0.03, 0.3, 0.5),
    Op.SHEAR_X: (-0.3, 0.17, 0.42),
    Op.SHEAR_Y: (-0.3, 0.17, 0.42),
    Op.TRANSLATE_X: (-0.45, 0.1, 0.63),
    Op.TRANSLATE_Y: (-0.45, 0.1, 0.63),
    Op.ROTATE: (-42, -30, 0, 7.5, 27),
}
# Pillow stretches contrast and moves pixels in double precision and cuts off: where the exact
# result is an integer, float32 can land on the other side.
ONE_LEVEL = GEOMETRIC_OPS | {Op.AUTO_CONTRAST}


def pillow(op, argument, cubic, image):
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
        Op.IDENTITY: lambda: image,
        Op.AUTO_CONTRAST: lambda: ImageOps.autocontrast(image),
        Op.EQUALIZE: lambda: ImageOps.equalize(image),
        Op.INVERT: lambda: ImageOps.invert(image),
        Op.POSTERIZE: lambda: ImageOps.posterize(image, argument),
        Op.SOLARIZE: lambda: ImageOps.solarize(image, argument),
        Op.SOLARIZE_ADD: added,
        Op.BRIGHTNESS: lambda: ImageEnhance.Brightness(image).enhance(argument),
        Op.CONTRAST: lambda: ImageEnhance.Contrast(image).enhance(argument),
        Op.COLOR: lambda: ImageEnhance.Color(image).enhance(argument),
        Op.SHARPNESS: lambda: ImageEnhance.Sharpness(image).enhance(argument),
        Op.HUE: turned,
        Op.SHEAR_X: lambda: moved(1, argument, 0, 0, 1, 0),
        Op.SHEAR_Y: lambda: moved(1, 0, 0, argument, 1, 0),
        Op.TRANSLATE_X: lambda: moved(1, 0, argument * width, 0, 1, 0),
        Op.TRANSLATE_Y: lambda: moved(1, 0, 0, 0, 1, argument * height),
        Op.ROTATE: lambda: image.rotate(argument, resample=resample, fillcolor=fill),
    }[op]()


def photos_and_edge_cases():
    rng = np.random.default_rng(0)
    edge = np.zeros((7, HEIGHT, WIDTH, 3), np.uint8)  # the first stays black
    edge[1] = 200
    edge[2, ..., 1] = rng.integers(0, 256, (HEIGHT, WIDTH))  # one channel
    edge[3] = rng.integers(100, 103, edge[3].shape)  # hardly any contrast
    edge[4] = rng.integers(0, 256, edge[4].shape)  # noise
    edge[5, :20] = 255  # two colors
    edge[6, 7, 9] = 255  # a dot
    photos = photo_crops(max(HEIGHT, WIDTH), 4)[:, :HEIGHT, :WIDTH]
    return np.concatenate([photos, edge])


def sampled_ops(ops, arguments, cubic):
    count = len(ops)
    return SampledOps(
        op=jnp.array(ops, jnp.int32),
        argument=jnp.array(arguments, jnp.float32),
        cubic=jnp.array(cubic, bool),
        row=jnp.zeros(count),
        column=jnp.zeros(count),
    )


def compared(images, ops, resampling):
    """Differences to Pillow by operation: int (images, …); all jobs are one program."""
    jobs = [
        (op, argument, cubic, index)
        for op in ops
        for argument in ARGUMENTS[op]
        for cubic in ((False, True) if resampling == "random" and op in GEOMETRIC_OPS else (0,))
        for index in range(len(images))
    ]
    which, arguments, cubic, indices = zip(*jobs, strict=True)

    @jax.jit
    def program(images, sampled):
        return apply_op(
            images,
            sampled,
            possible=frozenset(ops),
            fill=FILL[: images.shape[-1]],
            resampling=resampling,
        )

    ours = np.asarray(program(images[list(indices)], sampled_ops(which, arguments, cubic)))
    differences = {op: [] for op in ops}
    for (op, argument, is_cubic, index), found in zip(jobs, ours, strict=True):
        image = Image.fromarray(images[index].squeeze())
        theirs = np.asarray(pillow(op, argument, is_cubic, image)).reshape(found.shape)
        differences[op].append(np.abs(theirs.astype(int) - found))
    return {op: np.stack(values) for op, values in differences.items()}


@pytest.fixture(scope="module")
def color_differences():
    return compared(photos_and_edge_cases(), list(ARGUMENTS), "random")


@pytest.fixture(scope="module")
def gray_differences():
    ops = [op for op in ARGUMENTS if op not in (Op.COLOR, Op.HUE)]
    return compared(photos_and_edge_cases()[..., 1:2], ops, "bilinear")


@pytest.mark.parametrize("op", [op for op in ARGUMENTS if op not in ONE_LEVEL])
def test_operations_equal_pillows_exactly(color_differences, gray_differences, op):
    assert color_differences[op].max() == 0
    if op in gray_differences:
        assert gray_differences[op].max() == 0


@pytest.mark.parametrize("op", sorted(ONE_LEVEL))
def test_operations_in_double_precision_equal_pillows_to_one_gray_level(
    color_differences, gray_differences, op
):
    for found in (color_differences[op], gray_differences[op]):
        assert found.max() <= 1
        assert (found > 0).mean() < 0.01


def test_posterizing_to_no_bit_is_black():
    image = photos_and_edge_cases()[:1]
    sampled = sampled_ops([Op.POSTERIZE], [0], [False])
    assert np.asarray(apply_op(image, sampled, possible={Op.POSTERIZE})).max() == 0


@pytest.mark.parametrize(("row", "column", "side"), [(0.0, 0.999, 10), (0.5, 0.3, 2), (0.7, 0, 56)])
def test_cutouts_are_squares_of_repvggs_color(row, column, side):
    image = photos_and_edge_cases()[0]
    sampled = sampled_ops([Op.CUTOUT], [side], [False])
    sampled = sampled._replace(row=jnp.array([row]), column=jnp.array([column]))
    cut = np.asarray(apply_op(image[None], sampled, possible={Op.CUTOUT}))[0]
    y, x = int(row * HEIGHT), int(column * WIDTH)
    expected = image.copy()
    area = (slice(max(0, p - side // 2), p + side // 2) for p in (y, x))
    expected[tuple(area)] = (125, 122, 113)
    np.testing.assert_array_equal(cut, expected)


def test_what_cannot_occur_is_not_in_the_program():
    image = photos_and_edge_cases()[:2]
    sampled = sampled_ops([Op.INVERT, Op.IDENTITY], [0, 0], [False, False])

    def program(possible):
        return jax.jit(lambda i: apply_op(i, sampled, possible=possible)).lower(image).as_text()

    lean = program(frozenset({Op.INVERT}))
    assert "dot_general" not in lean
    assert "floor" not in lean
    assert "dot_general" in program(frozenset({Op.INVERT, Op.EQUALIZE}))
    assert "floor" in program(frozenset({Op.INVERT, Op.ROTATE}))


WARPED = [*sorted(GEOMETRIC_OPS), Op.IDENTITY]


def some_ops(count: int) -> SampledOps:
    """Every geometric operation in turn, by amounts beyond those of the policies."""
    rng = np.random.default_rng(count)
    op = np.resize(WARPED, count)
    amount = rng.uniform(-1, 1, count) * np.where(op == Op.ROTATE, 59, 0.5)
    return SampledOps(
        jnp.asarray(op, jnp.int32),
        jnp.asarray(amount, jnp.float32),
        jnp.asarray(rng.integers(0, 2, count) > 0),
        jnp.asarray(rng.uniform(size=count), jnp.float32),
        jnp.asarray(rng.uniform(size=count), jnp.float32),
    )


def some_images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def as_on_a_tpu(monkeypatch):
    """Computes here what a TPU computes."""

    def choose(*operands, tpu, default):
        return tpu(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


@pytest.mark.parametrize(
    ("size", "channels", "resampling"),
    [
        ((37, 52), 3, "bilinear"),
        ((52, 37), 1, "bilinear"),
        ((37, 52), 1, "bicubic"),
        ((52, 37), 3, "random"),
        ((1, 5), 3, "random"),
        ((1, 5), 1, "bicubic"),
    ],
)
def test_warps_on_a_tpu_are_those_of_the_gathers(monkeypatch, size, channels, resampling):
    images = some_images(36, *size, channels)
    sampled = some_ops(len(images))

    def warped(images, sampled):
        return warp(images, sampled, (7,) * channels, resampling)

    gathered = np.asarray(quick_jit(warped)(images, sampled), int)
    as_on_a_tpu(monkeypatch)
    # Another jit: the first would answer from its cache.
    multiplied = np.asarray(quick_jit(lambda *given: warped(*given))(images, sampled), int)
    # Bitwise, except that a compiler may round a coordinate otherwise in another program:
    # one gray level then, or a pixel at the very edge.
    assert (gathered != multiplied).mean() < 1e-3
    np.testing.assert_array_equal(gathered[5::6], images[5::6])
    np.testing.assert_array_equal(multiplied[5::6], images[5::6])


def test_table_lookups_on_a_tpu_are_those_of_the_gathers():
    images, tables = some_images(5, 9, 14, 3), some_images(5, 3, 256)
    gathered = look_up(images, tables)
    np.testing.assert_array_equal(matmul_tables(images, tables), gathered)
    np.testing.assert_array_equal(gathered[2, 3, 4, 1], tables[2, 1, images[2, 3, 4, 1]])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_tpu_gathers_no_single_pixels(platform):
    images = jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.uint8)
    policy = Raug15()

    def one_operation(images, sampled):
        return apply_op(images, sampled, possible=policy.possible, resampling=policy.resampling)

    traced = jax.jit(one_operation).trace(images, some_ops(2))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo\.gather.* -> tensor<([\dx]+)x\w+>", text)
    large = [s for s in found if math.prod(map(int, s.split("x"))) >= 24 * 24]
    assert bool(large) == (platform != "tpu"), found

import pytest

from repvgg_jax import VARIANTS, cost

pytestmark = pytest.mark.core

# Parameters of both forms; G MACs of the deploy and the training form and G Winograd
# multiplications at 224 pixels.
TABLE = {
    "A0": (9_108_968, 8_309_384, "1.361", "1.513", "0.747"),
    "A1": (14_092_264, 12_789_864, "2.364", "2.626", "1.272"),
    "A2": (28_210_600, 25_499_944, "5.117", "5.685", "2.660"),
    "B0": (15_817_960, 14_339_048, "3.058", "3.397", "1.580"),
    "B1": (57_415_016, 51_829_480, "11.815", "13.128", "5.907"),
    "B1g2": (45_782_376, 41_360_104, "8.810", "9.788", "4.571"),
    "B1g4": (39_966_056, 36_125_416, "7.307", "8.119", "3.903"),
    "B2": (89_022_376, 80_315_112, "18.377", "20.418", "9.144"),
    "B2g2": (70_846_376, 63_956_712, "13.680", "15.200", "7.057"),
    "B2g4": (61_758_376, 55_777_512, "11.332", "12.591", "6.013"),
    "B3": (123_085_288, 110_960_872, "26.209", "29.121", "12.914"),
    "B3g2": (96_911_848, 87_404_776, "19.446", "21.606", "9.909"),
    "B3g4": (83_825_128, 75_626_728, "16.064", "17.849", "8.406"),
    "D2se": (133_334_836, 120_387_572, "32.830", "36.477", "15.57"),
    "plus-L2pse": (140_099_224, 127_151_960, "32.836", "36.484", "15.58"),
}

# Tables 4 and 5 of the paper: parameters in M (truncated), FLOPs and Winograd MULs in B.
PAPER = {
    "A0": (8.30, 1.4, 0.7),
    "A1": (12.78, 2.4, 1.3),
    "A2": (25.49, 5.1, 2.7),
    "B0": (14.33, 3.1, 1.6),
    "B1": (51.82, 11.8, 5.9),
    "B1g2": (41.36, 8.8, 4.6),
    "B1g4": (36.12, 7.3, 3.9),
    "B2": (80.31, 18.4, 9.1),
    "B2g4": (55.77, 11.3, 6.0),
    "B3": (110.96, 26.2, 12.9),
    "B3g4": (75.62, 16.1, 8.4),
}


def giga(value: int, printed: str) -> str:
    return f"{value / 1e9:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_number_of_the_table(name):
    train, deploy, macs_deploy, macs_train, winograd = TABLE[name]
    found = cost(name)
    assert (found.params_train, found.params_deploy) == (train, deploy)
    assert giga(found.macs_deploy, macs_deploy) == macs_deploy
    assert giga(found.macs_train, macs_train) == macs_train
    assert giga(found.winograd_muls, winograd) == winograd


def test_auxiliary_heads_are_counted_apart():
    assert cost("plus-L2pse").params_auxiliary == 5_963_640
    assert cost("B1").params_auxiliary == 0


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_tables(name):
    params, flops, winograd = PAPER[name]
    found = cost(name, image_size=224)
    assert int(found.params_deploy / 1e4) / 100 == params  # the paper truncates
    assert round(found.macs_deploy / 1e9, 1) == flops
    assert round(found.winograd_muls / 1e9, 1) == winograd


def test_costs_are_integers_and_follow_size_and_classes():
    small, large = cost("A0", image_size=112, num_classes=10), cost("A0")
    assert all(isinstance(value, int) for value in vars(small).values())
    assert small.macs_deploy < large.macs_deploy / 3.9
    assert large.params_deploy - small.params_deploy == 990 * (1280 + 1)


def test_rectangles():
    square, wide, tall = (cost("B1g2", image_size=s) for s in (256, (128, 512), (512, 128)))
    assert square == wide == tall  # the same number of pixels at every stride
    small, odd, turned, large = (
        cost("A0", image_size=s).macs_deploy for s in (33, (33, 70), (70, 33), 70)
    )
    assert small < odd == turned < large


@pytest.mark.parametrize("size", [0, -1, 22.5, (8, 0)])
def test_images_of_no_size(size):
    with pytest.raises(ValueError, match="image_size="):
        cost("A0", image_size=size)

"""The tutorials of docs/, word for word, with small networks and short runs in place of theirs."""

import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import repvgg_jax
from repvgg_jax.data.sources import SUFFIXES
from repvgg_jax.train.settings import Settings
from tests.helpers.pages import ROOT, blocks, commands, python, shell, text
from tests.helpers.pictures import encoded, photo
from tests.helpers.pth_writer import write_zip
from tests.helpers.trees import random_variables

TINY = 'Variant("tiny", (1, 1), (8, 16), 8, strides=(2, 2), stem_stride=2)'


def checkout(place: pathlib.Path) -> None:
    """The scripts, where a reader has them."""
    for script in ("train.py", "convert.py"):
        (place / script).symlink_to(ROOT / script)


def with_tiny(recipe: str) -> str:
    """A recipe for A0 with a small network in its place."""
    assert '"A0"' in recipe
    return "from repvgg_jax import Variant\n" + recipe.replace('"A0"', TINY)


def changed(command: str, **settings: object) -> str:
    """A training command with other settings, given as `train__epochs=1`."""
    changes = (f"--config.{k.replace('__', '.')}={v}" for k, v in settings.items())
    return " ".join([command, *changes])


def photographs(root: pathlib.Path) -> None:
    """Eight images of each of two flowers, to train on and to validate."""
    for name, kind in (("daisy/7.jpg", "JPEG"), ("tulip/b.png", "PNG")):
        for split in ("train", "val"):
            path = root / split / name
            path.parent.mkdir(parents=True)
            for number in range(1, 9):
                stored = path.with_stem(f"{path.stem}{number}" if number > 1 else path.stem)
                stored.write_bytes(encoded(photo(number), kind))


def test_the_page_lists_every_type_of_file():
    (told,) = re.findall(r"File names end in (.*?), in either", text("own_images.md"), re.S)
    assert tuple(re.findall(r"`(\.\w+)`", told)) == SUFFIXES


@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("own_images.md", "folder:flowers"),
        ("fine_tuning.md", "folder:flowers"),
        ("own_masks.md", "masks:streets"),
    ],
)
def test_the_recipe_of_a_page_is_one(page, source):
    (recipe,) = (block for block in blocks(page) if "def get_config" in block)
    namespace: dict = {}
    exec(compile(recipe, page, "exec"), namespace)
    assert Settings.from_config(namespace["get_config"]()).data.source == source


@pytest.mark.slow
def test_getting_started(digits_run, tmp_path):
    """From a run of one epoch; test_readme.py runs the whole one."""
    checkout(tmp_path)
    shutil.copytree(digits_run / "runs", tmp_path / "runs")
    train, convert, ask, draw = commands("getting_started.md")
    assert train == "python train.py --config configs/digits.py"
    assert "written to deploy" in shell(convert, tmp_path)
    (tmp_path / "images.py").write_text(python("getting_started.md"))
    shell("python images.py", tmp_path)
    rows = [line.split() for line in shell(ask, tmp_path).splitlines()]
    assert [row[0] for row in rows] == ["digit10.png", "digit11.png"]
    assert all(row[1] in "0123456789" for row in rows)
    assert "wrote kernels.png" in shell(draw, tmp_path)


@pytest.mark.slow
def test_own_images_from_a_tree_to_their_classes(tmp_path):
    """Word for word, with a small network in the place of A0 and a shorter run."""
    checkout(tmp_path)
    photographs(tmp_path / "flowers")
    recipe, classify = blocks("own_images.md")
    (tmp_path / "flowers.py").write_text(with_tiny(recipe))
    (tmp_path / "classify.py").write_text(classify)
    check, train, convert, ask = commands("own_images.md")
    assert "nothing in these images would stop a run" in shell(check, tmp_path)
    shell(changed(train, train__epochs=4, train__batch_size=8, data__train_size=32), tmp_path)
    assert "written to deploy-flowers" in shell(convert, tmp_path)
    files = ask.split()[5:]
    rows = [line.split() for line in shell(ask, tmp_path).splitlines()]
    assert [row[0] for row in rows] == files
    assert {row[1] for row in rows} <= {"daisy", "tulip"}
    lines = shell(f"python classify.py {' '.join(files)}", tmp_path).splitlines()
    for (file, best, share, *_), line in zip(rows, lines, strict=True):
        assert line.startswith(f"{file}: {best}, probability ")
        assert abs(float(line.split()[-1]) - float(share.rstrip("%")) / 100) < 0.011


@pytest.mark.slow
def test_fine_tuning(tmp_path):
    """Word for word, with the checkpoint of a small network in the place of A0's."""
    checkout(tmp_path)
    photographs(tmp_path / "flowers")
    variant = eval(TINY, {"Variant": repvgg_jax.Variant})
    variables = random_variables(repvgg_jax.create_model(variant, num_classes=1000))
    state = repvgg_jax.to_state_dict(variables, variant=variant, family="official")
    write_zip(tmp_path / "RepVGG-A0-train.pth", state)
    look, recipe = blocks("fine_tuning.md")
    look = look.replace('train.pth")', f'train.pth", variant=rv.{TINY})')
    (tmp_path / "look.py").write_text(look)
    assert "training form official\n1000 classes" in shell("python look.py", tmp_path)
    (tmp_path / "tuned.py").write_text(
        with_tiny(recipe).replace('"stem", "stage1", "stage2_block0"', '"stem", "stage1"')
    )
    train, evaluate, convert = commands("fine_tuning.md")
    short = {"train__epochs": 2, "train__batch_size": 8, "data__train_size": 32}
    assert "RepVGG-A0-train.pth" in shell(changed(train, **short), tmp_path)
    out = shell(evaluate, tmp_path)
    assert re.search(r"^daisy +", out, re.M)
    assert re.search(r"^tulip +", out, re.M)
    shell(convert, tmp_path)
    back = repvgg_jax.load_weights(
        tmp_path / "deploy-tuned" / "model.official.safetensors", variant=variant
    )
    assert (back.deploy, back.family, back.num_classes) == (True, "official", 2)


@pytest.mark.slow
def test_own_masks(tmp_path):
    """Word for word, with a small network in the place of A0, small crops and a short run."""
    checkout(tmp_path)
    names = [("train", f"a{number}" if number else "a") for number in range(4)]
    for split, name in [*names, ("val", "b")]:
        for kind in ("images", "masks"):
            (tmp_path / "streets" / split / kind).mkdir(parents=True, exist_ok=True)
        picture = photo(3, 40, 60)
        picture.save(tmp_path / "streets" / split / "images" / f"{name}.jpg")
        mask = np.uint8(np.asarray(picture.convert("L")) > 128)
        Image.fromarray(mask).save(tmp_path / "streets" / split / "masks" / f"{name}.png")
    (tmp_path / "streets" / "classes.txt").write_text("dark\nlight\n")
    recipe, shares = blocks("own_masks.md")
    four = '"tiny", (1, 1, 1, 1), (8, 8, 16, 16), 8'
    recipe = recipe.replace('"A0"', f"Variant({four})").replace("513, 513", "41, 65")
    (tmp_path / "streets.py").write_text("from repvgg_jax import Variant\n" + recipe)
    (tmp_path / "shares.py").write_text(shares)
    train, convert, predict = commands("own_masks.md")
    small = {"segmentation__width": 8, "segmentation__auxiliary_width": 8}
    short = {"train__epochs": 2, "train__batch_size": 4, "data__train_size": 33}
    shell(changed(train, **small, **short), tmp_path)
    assert "written to deploy-streets" in shell(convert, tmp_path)
    shell(predict, tmp_path)
    found = np.asarray(Image.open(tmp_path / "found" / "b.mask.png"))
    assert found.shape == (40, 60)
    assert np.asarray(Image.open(tmp_path / "found" / "b.overlay.png")).shape == (40, 60, 3)
    out = shell("python shares.py", tmp_path)
    assert f"light: {(found == 1).mean():.1%} of the image" in out


@pytest.mark.slow
def test_runtimes(digits_run, tmp_path):
    """The page compares the runtimes itself."""
    for package in ("onnxruntime", "openvino", "ai_edge_litert", "tensorflow"):
        pytest.importorskip(package)
    checkout(tmp_path)
    shutil.copytree(digits_run / "runs", tmp_path / "runs")
    (convert,) = commands("runtimes.md")
    assert "UNPROVEN" not in shell(convert, tmp_path)
    (tmp_path / "compare.py").write_text(python("runtimes.md"))
    assert "classes:" in shell("python compare.py", tmp_path)

"""What `--config` names, and what it is if it is not given."""

import json
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from repvgg_jax import VARIANTS, cli
from repvgg_jax.train import config
from repvgg_jax.train.config import (
    CHECKED_FLAGS,
    RecipeError,
    RecipeParser,
    check_flags,
    default_recipe,
    find_recipe,
    recipes,
)
from repvgg_jax.train.restore import parse_step
from repvgg_jax.train.settings import Settings
from tests.helpers.commands import ROOT
from tests.helpers.runs import small_settings

GOOD = "from repvgg_jax.train.config import default_config as get_config\n"


def parse(path):
    return Settings.from_config(RecipeParser().parse(str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", r"mine\.py:1: invalid syntax"),
        ("\nimport nothing_of_that_name\n", r"mine\.py:2: No module named 'nothing_of_that_name'$"),
        ("import optax\nfrom optax import nosuch\n", r"mine\.py:2: cannot import name 'nosuch'"),
        ("config = 3\n", r"mine\.py: .*get_config"),
        ("def get_config():\n    pass\n", r"mine\.py: .*ConfigDict, not None"),
        ("def get_config():\n    return x\n", r"mine\.py:2: NameError: .*'x'"),
        ("def get_config():\n    raise ValueError('too odd')\n", r"mine\.py:2: too odd$"),
        (
            f"{GOOD}make = get_config\ndef get_config():\n    make().lock().train.epoch = 3\n",
            r"mine\.py:4: unknown setting .*epoch.*epochs",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        parse(tmp_path / "mine.py")
    assert "\n" not in str(caught.value).strip()


def test_a_library_of_an_extra_is_not_the_recipes_mistake(tmp_path, monkeypatch):
    """`repvgg-train` advises to install the extra only if it is this package that needs it."""
    monkeypatch.setitem(sys.modules, "optax", None)
    monkeypatch.delitem(sys.modules, "repvgg_jax.train.experiment", raising=False)
    (tmp_path / "mine.py").write_text("import repvgg_jax.train.experiment\n")
    with pytest.raises(ModuleNotFoundError, match="optax"):
        parse(tmp_path / "mine.py")


def test_recipes_with_an_argument_and_missing_ones(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    assert parse(f"{tmp_path / 'mine.py'}:B1g4").model.variant.name == "B1g4"
    for path in (tmp_path / "mien.py", tmp_path):
        with pytest.raises(RecipeError, match=f"--config={path}: no"):
            parse(path)


def test_a_run_is_a_recipe(tmp_path):
    settings = small_settings(seed=7, bn__group_size=16)
    (tmp_path / "config.json").write_text(json.dumps(settings.as_json()))
    config = RecipeParser().parse(str(tmp_path))
    assert Settings.from_config(config) == settings
    config.bn.group_size = "global"
    with pytest.raises(AttributeError, match="epoch"):
        config.train.epoch = 3
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"config\.json cannot be read"):
        parse(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "other.py"),
        ("--workdir=new", "other.py"),
        ("--workdir=old --config.train.epochs=3 --step 3", "old"),
        ("--step 3 --workdir old", "old"),
        ("-workdir old --noeval_only", "old"),
        ("--workdir=new --init_from=old", "old"),
        ("--workdir=old --init_from=source", "old"),
        ("--init_from=old", "other.py"),  # a run does not start from itself
        ("--workdir=failed", "other.py"),
        ("--eval_only --workdir=failed", "failed"),
        ("--eval_only --init_from=old", "old"),
        ("--eval_only --init_from=source --workdir=old", "source"),
        ("--eval_only --init_from=w.pth --workdir=old", "old"),
    ],
)
def test_the_default(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    for run in ("old", "source", "failed"):
        (tmp_path / run / "checkpoints" / "3").mkdir(parents=True)
        (tmp_path / run / "config.json").touch()
    (tmp_path / "failed" / "checkpoints" / "3").rmdir()
    line = ["train.py", *arguments.split()]
    assert default_recipe(line, "other.py") == expected
    assert default_recipe(line, None) == (None if expected == "other.py" else expected)
    assert not cli.is_given("config", line)


def test_a_spelled_out_variant_is_replaced_by_a_name():
    """On the command line, `--config.model.variant=A0` with digits.py."""
    values = flags.FlagValues()
    line = ["train.py", f"--config={ROOT / 'configs/digits.py'}", "--config.model.variant=A0"]
    flag = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line)
    values["config"].parser = RecipeParser()
    values(line)
    assert Settings.from_config(flag.value).model.variant == VARIANTS["A0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": "best"}, "--step has an effect only with --eval_only"),
        ({"by_class": True}, "--by_class"),
        ({"entry": "ema", "eval_only": True}, "--entry has an effect only with --init_from"),
        ({"extend": True, "eval_only": True}, "--extend has no effect with --eval_only"),
        ({"profile_steps": "1:2", "eval_only": True}, "--profile_steps has no effect"),
        ({"step": "best", "by_class": True, "eval_only": True}, None),
        ({"extend": True, "entry": "ema", "init_from": "w.pth"}, None),
        ({}, None),
    ],
)
def test_flags_without_effect_are_refused(given, message):
    values = {**dict.fromkeys(CHECKED_FLAGS), **given}
    if message is None:
        check_flags(values)
        return
    with pytest.raises(ValueError, match=message):
        check_flags(values)


@pytest.mark.parametrize("text", ["0", "-3", "last", "1.5"])
def test_checkpoints_that_cannot_be_named(text):
    assert [parse_step(t) for t in (None, "newest", "best", "22")] == ["newest"] * 2 + ["best", 22]
    with pytest.raises(ValueError, match=f"--step={text} must be"):
        parse_step(text)


def test_recipes_by_name(tmp_path, monkeypatch):
    """In any spelling of the variant, from any directory; a file or a run of that name wins."""
    monkeypatch.chdir(tmp_path)
    assert recipes()["b1g4"] == ROOT / "configs" / "b1g4.py"
    for name in ("b1g4", "B1g4", "RepVGG-B1g4", "repvgg_b1g4"):
        assert parse(name).model.variant == VARIANTS["B1g4"]
    for name in ("acb", "residual_repvgg"):
        assert recipes()[f"ablation/{name}"] == ROOT / "configs" / "ablation" / f"{name}.py"
        assert parse(f"ablation/{name}").model.variant.block == name
    (tmp_path / "b1").mkdir()
    assert find_recipe("b1") == ROOT / "configs" / "b1.py"
    (tmp_path / "a0").write_text((ROOT / "configs" / "a1.py").read_text())
    assert parse("a0").model.variant == VARIANTS["A1"]
    with pytest.raises(RecipeError, match=r"--config=b1g5: no such file; did you mean 'b1g4'"):
        parse("b1g5")


def test_recipes_of_an_installed_package(tmp_path, monkeypatch):
    """Those in the package are taken, if there are any."""
    package = tmp_path / "site-packages" / "repvgg_jax"
    (package / "configs" / "deep").mkdir(parents=True)
    for name in ("mine", "deep/other"):
        (package / "configs" / f"{name}.py").write_text(GOOD)
    monkeypatch.setattr(config, "_PACKAGE", str(package))
    assert list(recipes()) == ["mine", "deep/other"]
    for name in recipes():
        assert parse(name).model.variant == VARIANTS["A0"]

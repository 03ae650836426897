"""Rows of the table of TPU programs say where they come from."""

import importlib
import pathlib
import re

import pytest

from repvgg_jax.train import aot as ahead

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("scaling")


def test_a_new_row_says_when_and_of_which_commit(scaling, monkeypatch):
    def no_compiler(*_, **__):
        raise ValueError("no compiler here")

    monkeypatch.setattr(ahead, "compile_ahead", no_compiler)
    row = scaling.row_of("A0", "v5e:2x2", 1.0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
    assert row["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}\+?", row["commit"])
    assert f"{row['date']}, {row['commit'] or 'no commit'}" in scaling.table([row])


def test_an_old_row_gets_no_date(scaling):
    row = {"model": "A0", "topology": "v5e:2x2", "error": "no compiler here"}
    assert "compiled" not in scaling.table([row])
    new = row | {"date": "2026-01-02", "commit": None}
    assert "not recorded" in scaling.table([row, new])


@pytest.mark.parametrize(
    ("base", "each", "room"),
    [
        (500, 20.0, 1536),  # memory in proportion to the images beside the state
        (100, 6.4, 8192),
        (500, 20.0, 100),  # little more than the small program
    ],
)
@pytest.mark.parametrize("growth", [1.0, 0.8, 1.15])
def test_the_largest_batch_is_a_power_of_two_that_fits(scaling, base, each, room, growth):
    """Memory may grow faster or slower from the small program on than it does up to there."""
    hbm = round((base + each * room) / scaling.SHARE)

    def row(images: int) -> dict:
        peak = base + each * 32 + each * growth * (images - 32)
        return {"images": images, "arguments": base, "peak": peak, "hbm": hbm}

    compiled = []
    found = scaling.largest(row(32), lambda images: compiled.append(images) or row(images))
    assert found & (found - 1) == 0
    assert scaling.fits(row(found))
    assert not scaling.fits(row(2 * found))
    assert found in compiled
    assert len(compiled) <= 4


def test_one_compiler_need_not_know_the_other(scaling, monkeypatch):
    """Rows stay if a version is unknown here or there, and go if it is another."""
    mine = {"python": "3.11", "jax": "0.10.2", "libtpu": "0.0.42", "numpy": "2.4.6"}
    monkeypatch.setattr(scaling.harness, "versions", lambda: mine)
    rows = [
        {"model": "A0", "topology": "h100x8", "recipe": "a0.py", "versions": versions}
        for versions in (
            {"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2"},
            {"jax": "0.10.2", "numpy": "1.0"},  # what a program does not depend on
            {"jax": "0.10.1"},
            {"jax": "0.10.2", "libtpu": "0.0.41"},
        )
    ]
    assert [scaling._holds(row) for row in rows] == [True, True, False, False]


@pytest.mark.parametrize(("topology", "each"), [("h100x8", 2), ("v5e:2x4", 2), ("h100x4", 4)])
def test_segmenters_are_compiled_as_their_recipes_are(scaling, topology, each):
    assert len(scaling.SEGMENTERS) == 6
    for model in scaling.SEGMENTERS:
        config = scaling.config_of(model, topology)
        assert scaling.images_of(model, topology) == each
        assert (config.train.batch_size, config.data.train_size) == (16, 713)
        assert config.data.source.startswith("cityscapes:")
        assert scaling.facts_of(model)["recipe"] == f"{model}.py"
    row = {"model": model, "topology": topology}
    assert scaling._is_usual(row | {"images": each})
    assert not scaling._is_usual(row | {"images": 32})


def test_the_page_names_the_sizes_that_were_compiled(scaling):
    """Every row is at 224x224, but those of plus-L2pse, as its recipe says."""
    text = " ".join(scaling.PAGE.read_text().split())
    assert "256x256 for plus-L2pse and 224x224 for all others" in text
    for model in ("A0", "D2se", "plus-L2pse"):
        size = 256 if model == "plus-L2pse" else 224
        assert scaling.config_of(model, "v5e:2x2").data.train_size == size

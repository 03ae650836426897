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


def test_the_page_names_the_sizes_that_were_compiled(scaling):
    """Every row is at 224x224, but those of plus-L2pse, as its recipe says."""
    text = " ".join(scaling.PAGE.read_text().split())
    assert "256x256 for plus-L2pse and 224x224 for all others" in text
    for model in ("A0", "D2se", "plus-L2pse"):
        size = 256 if model == "plus-L2pse" else 224
        assert scaling.config_of(model, "v5e:2x2").data.train_size == size

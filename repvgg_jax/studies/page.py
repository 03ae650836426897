"""The page of the ablation study: a table, a picture, and what they say."""

import pathlib
from collections.abc import Mapping

from repvgg_jax.files import write_text
from repvgg_jax.studies.report import Sample, difference, draw_intervals, is_clear, signed, table
from repvgg_jax.studies.rows import ROWS, Row, recipe
from repvgg_jax.studies.runs import Results
from repvgg_jax.text import first_few
from repvgg_jax.train.settings import Settings

PICTURE = "ablation.svg"


def samples_of(results: Results) -> dict[str, Sample]:
    """Accuracies in percent of the rows that have any, with the settings of today."""
    found = {}
    for name in ROWS:
        runs = results.of(name, Settings.from_config(recipe(name)))
        if runs:
            found[name] = Sample(tuple(100 * run["accuracy"] for run in runs))
    return found


def write_page(output: pathlib.Path, results: Results) -> str:
    """Writes `ablation.md` and its picture, and returns the text."""
    samples = samples_of(results)
    if not samples:
        return "no results yet"
    text = f"{page_table(samples)}\n\n{sentences(samples)}\n"
    write_text(output / "ablation.md", text)
    draw_intervals(
        output / PICTURE,
        {"": {ROWS[name].title: sample for name, sample in samples.items()}},
        label="validation accuracy, %",
    )
    return text


def page_table(samples: Mapping[str, Sample]) -> str:
    """The rows with the paper's numbers beside them."""
    body = []
    for name, sample in samples.items():
        row = ROWS[name]
        body.append(
            [
                row.title,
                f"{row.table}" if row.table else "–",
                "–" if row.paper is None else f"{row.paper:.2f}",
                _change_in_paper(row),
                str(sample),
                _change(name, samples),
            ]
        )
    header = (
        "row",
        "table",
        "paper: B0, ImageNet, %",
        "change",
        "here: mean ± deviation (seeds), %",
        "change ± standard error",
    )
    return table(header, body)


def sentences(samples: Mapping[str, Sample]) -> str:
    """What the numbers show, and what they do not."""
    compared = [
        name for name in samples if ROWS[name].reference in samples and name != ROWS[name].reference
    ]
    if not compared:
        return "There is no row to compare with yet."
    clear = [name for name in compared if is_clear(samples[name], samples[ROWS[name].reference])]
    lines = []
    for word, sign in (("below", -1), ("above", 1)):
        those = [
            f"{ROWS[name].title} ({_change(name, samples)})"
            for name in clear
            if sign * difference(samples[name], samples[ROWS[name].reference])[0] > 0
        ]
        if those:
            lines.append(
                f"Clearly {word} their reference, by more than twice the standard error: "
                f"{first_few(those, 20)}."
            )
    unclear = [ROWS[name].title for name in compared if name not in clear]
    if unclear:
        lines.append(f"Not told apart from it by these seeds: {first_few(unclear, 20)}.")
    agree: list[str] = []
    disagree: list[str] = []
    for name in clear:
        paper, own = ROWS[name].paper, difference(samples[name], samples[ROWS[name].reference])[0]
        if paper is not None:
            same = (paper - 75.14) * own > 0
            (agree if same else disagree).append(ROWS[name].title)
    if agree or disagree:
        text = f"Of the clear differences {len(agree)} have the sign that the paper's have"
        lines.append(
            f"{text}." if not disagree else f"{text}, and {first_few(disagree, 20)} the other one."
        )
    lines.append(
        "A small network that is trained for a few epochs shows which blocks learn fast. It does "
        "not show what they reach in 120 epochs on ImageNet, and with a few seeds twice the "
        "standard error is not strict."
    )
    return "\n".join(lines)


def _change_in_paper(row: Row) -> str:
    full = ROWS["both"].paper
    if row.paper is None or full is None or row.paper == full:
        return "–"
    return f"{row.paper - full:+.2f}"


def _change(name: str, samples: Mapping[str, Sample]) -> str:
    reference = ROWS[name].reference
    if name == reference or reference not in samples:
        return "–"
    found, error = difference(samples[name], samples[reference])
    return f"{signed(found)} ± {error:.2f}" if error == error else signed(found)

"""What the train step of every network takes on slices of TPUs, counted without a TPU.

Compiles the very train step of a run (`train.py --compile_only`) for each network and slice,
32 images per chip in bfloat16, batch normalization over 32, and stores the compiler's counts: one
row per program, appended to `results/scaling.jsonl` at once. A program takes minutes of CPU time;
programs that have a row are skipped, so the same command continues a run that was interrupted.

    python benchmarks/scaling.py                             # all fifteen and the larger slices
    python benchmarks/scaling.py --models A0 --topologies v5e:2x2
    python benchmarks/scaling.py --table --write             # only update the page

The settings are those of the network's recipe in configs/, or the defaults if it has none. Rows of
other versions, or from before a network had its recipe, are ignored. Every row has the date and the
commit of its compilation, which the table shows; the oldest rows lack them.
"""

import argparse
import json
import pathlib
import runpy
import time
from collections.abc import Sequence
from typing import Any

import harness

IMAGES_PER_CHIP = 32
RESULTS = harness.RESULTS / "scaling.jsonl"
CONFIGS = harness.RESULTS.parents[1] / "configs"
PAGE = harness.RESULTS.parents[1] / "docs" / "scaling.md"
EVERY = ("v5e:16x16",)  # compiled for all networks
MORE = ("v4:4x4x8", "v5p:4x4x8")  # and for these
MORE_MODELS = ("A0", "B1", "B3")


def recipe_of(model: str) -> pathlib.Path | None:
    """The recipe of `model` in configs/, or None."""
    path = CONFIGS / f"{model.lower().replace('-', '_')}.py"
    return path if path.exists() else None


def config_of(model: str, topology: str) -> Any:
    """The recipe of `model`, or the default settings, with 32 images per chip of the slice."""
    from repvgg_jax.train.config import default_config
    from repvgg_jax.train.targets import Target

    recipe = recipe_of(model)
    config = runpy.run_path(str(recipe))["get_config"]() if recipe else default_config(model)
    config.data.source = "imagenet"  # of which only the shapes are needed
    config.model.dtype = "bfloat16"
    config.bn.group_size = IMAGES_PER_CHIP
    config.train.batch_size = config.eval.batch_size = (
        IMAGES_PER_CHIP * Target.parse(topology).count
    )
    return config


def row_of(model: str, topology: str, timeout: float) -> dict[str, Any]:
    """Compiles one program and returns its row; one that fails has `error`."""
    import dataclasses

    from repvgg_jax.train.aot import compile_ahead

    row: dict[str, Any] = facts_of(model) | harness.origin()
    row |= {"model": model, "topology": topology}
    began = time.monotonic()
    try:
        program = compile_ahead(config_of(model, topology), topology, timeout=timeout)
    except (ValueError, OSError) as error:
        row["error"] = str(error)
    else:
        row |= dataclasses.asdict(program)
    return row | {"wall_seconds": round(time.monotonic() - began, 1)}


def facts_of(model: str) -> dict[str, Any]:
    """What a row depends on besides the name of its program."""
    recipe = recipe_of(model)
    return {"recipe": recipe.name if recipe else None, "versions": harness.versions()}


def stored() -> list[dict[str, Any]]:
    """Rows of these versions and recipes, the newest of each program."""
    if not RESULTS.exists():
        return []
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines() if line.strip()]
    newest = {
        (row["model"], row["topology"]): row for row in rows if row | facts_of(row["model"]) == row
    }
    return list(newest.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; all counts but that of the parameters are of one chip and step.

    The column "compiled" is left out if no row says when it was.
    """
    cells = []
    for row in rows:
        cell = {"model": row["model"], "slice": row["topology"]}
        names = (
            "M params", "GFLOP", "GB accessed", "peak MiB", "of HBM", "collectives", "compile s",
            "compiled",
        )  # fmt: skip
        if "error" in row:
            failed = {"collectives": row["error"][:80], "compiled": _compiled(row)}
            cells.append(cell | dict.fromkeys(names) | failed)
            continue
        kinds = [f"{count} {kind}" for kind, count in sorted(row["collectives"].items())]
        values = (
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['flops'] / 1e9:,.0f}",
            f"{row['accessed'] / 1e9:.1f}",
            f"{row['peak'] / 2**20:,.0f}",
            f"{row['peak'] / row['hbm']:.1%}",
            ", ".join(kinds) or "none",
            f"{row['compile_seconds']:.0f}",
            _compiled(row),
        )
        cells.append(cell | dict(zip(names, values, strict=True)))
    if not any("date" in row for row in rows):
        cells = [{k: text for k, text in cell.items() if k != "compiled"} for cell in cells]
    return harness.table(cells)


def _compiled(row: dict[str, Any]) -> str:
    if "date" not in row:
        return "not recorded"
    return f"{row['date']}, {row['commit'] or 'no commit'}"


def fill(page: pathlib.Path, text: str) -> None:
    """Puts a table between the marks of a page."""
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->")
    unfinished = page.with_suffix(".tmp")
    unfinished.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->{after}")
    unfinished.replace(page)


def main() -> None:
    """Compiles what is missing, a row at a time, and prints the table."""
    from repvgg_jax import VARIANTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help="by default all")
    parser.add_argument("--topologies", nargs="+", help="by default those of docs/scaling.md")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one program")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    args = parser.parse_args()

    models = args.models or list(VARIANTS)
    if args.topologies:
        programs = [(model, topology) for topology in args.topologies for model in models]
    else:
        programs = [(model, topology) for topology in EVERY for model in models]
        programs += [(model, t) for t in MORE for model in MORE_MODELS if model in models]
    done = {(row["model"], row["topology"]) for row in stored() if "error" not in row}
    for model, topology in [] if args.table else programs:
        if (model, topology) in done:
            continue
        row = row_of(model, topology, args.timeout)
        RESULTS.parent.mkdir(exist_ok=True)
        with pathlib.Path(RESULTS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{model} {topology}: {row.get('error', 'done')}, {row['wall_seconds']} s", flush=True
        )
    rows = sorted(stored(), key=lambda row: _order(row, list(VARIANTS)))
    facts = ", ".join(f"{name} {version}" for name, version in harness.versions().items())
    if not rows:
        raise SystemExit(
            f"no row in {RESULTS.name} was measured with {facts}; the page is as it was"
        )
    if args.write:
        fill(PAGE, f"{table(rows)}\n\n{facts}.")
    print(f"{table(rows)}\n\n{facts}")


def _order(row: dict[str, Any], models: list[str]) -> tuple[int, int]:
    topologies = [*EVERY, *MORE]
    known = row["topology"] in topologies
    return (
        topologies.index(row["topology"]) if known else len(topologies),
        models.index(row["model"]) if row["model"] in models else len(models),
    )


if __name__ == "__main__":
    main()

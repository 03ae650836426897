"""What the train step of every network takes on TPU slices and on GPUs, counted without any.

Compiles the very train step of a run (`train.py --compile_only`) for each network and its devices,
32 images per device in bfloat16, batch normalization over 32, and stores the compiler's counts: one
row per program, appended to `results/scaling.jsonl` at once. A program takes minutes of CPU time;
programs that have a row are skipped, so the same command continues a run that was interrupted.

    python benchmarks/scaling.py                             # all fifteen and the larger slices
    python benchmarks/scaling.py --segmenters                # the six recipes of Table 8
    python benchmarks/scaling.py --models A0 --topologies v5e:2x2
    python benchmarks/scaling.py --topologies h100x8 --largest
    python benchmarks/scaling.py --table --write             # only update the page

`--largest` compiles, in addition, the largest power of two of images per device whose peak memory
is at most 75 %, the share that JAX reserves on a GPU unless told otherwise; batch normalization is
then over one device's images.

`--segmenters` compiles the recipes of the paper's Table 8 as they are: a batch of 16 crops of 713
pixels, over all of which batch normalization is.

The settings are those of the network's recipe in configs/, or the defaults if it has none. Rows of
other versions, or from before a network had its recipe, are ignored. Every row has the date and the
commit of its compilation, which the table shows; the oldest rows lack them.
"""

import argparse
import functools
import json
import math
import pathlib
import runpy
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness

IMAGES_PER_CHIP = 32
RESULTS = harness.RESULTS / "scaling.jsonl"
CONFIGS = harness.RESULTS.parents[1] / "configs"
PAGE = harness.RESULTS.parents[1] / "docs" / "scaling.md"
SHARE = 0.75  # of a device's memory that a program may take
MATTER = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "libtpu",
    "jax-cuda12-plugin",
)  # versions that a program depends on
EVERY = ("v5e:16x16", "h100x8")  # compiled for all networks
MORE = ("v4:4x4x8", "v5p:4x4x8")  # and for these
MORE_MODELS = ("A0", "B1", "B3")
SEGMENTERS = (
    "cityscapes_b1g2_fast",
    "cityscapes_r50",
    "cityscapes_b1g2",
    "cityscapes_b2_fast",
    "cityscapes_r101",
    "cityscapes_b2",
)  # recipes, which stand for their networks
EIGHT = ("v5e:2x4", "h100x8")  # compiled for these


def recipe_of(model: str) -> pathlib.Path | None:
    """The recipe of `model` in configs/, or None."""
    path = CONFIGS / f"{model.lower().replace('-', '_')}.py"
    return path if path.exists() else None


def images_of(model: str, topology: str) -> int:
    """Images per device: `IMAGES_PER_CHIP`, or a segmenter's share of its recipe's batch."""
    from repvgg_jax.train.targets import Target

    if model not in SEGMENTERS:
        return IMAGES_PER_CHIP
    return max(1, _settings(model).train.batch_size // Target.parse(topology).count)


def _settings(model: str) -> Any:
    """The recipe of a model, or the default settings."""
    from repvgg_jax.train.config import default_config

    recipe = recipe_of(model)
    return runpy.run_path(str(recipe))["get_config"]() if recipe else default_config(model)


def config_of(model: str, topology: str, images: int | None = None) -> Any:
    """The recipe of `model`, or the default settings, with so many images per device."""
    from repvgg_jax.train.targets import Target

    config, images = _settings(model), images or images_of(model, topology)
    if model in SEGMENTERS:
        config.train.batch_size = images * Target.parse(topology).count
        return config
    config.data.source = "imagenet"  # of which only the shapes are needed
    config.model.dtype = "bfloat16"
    config.bn.group_size = images
    config.train.batch_size = config.eval.batch_size = images * Target.parse(topology).count
    return config


def row_of(model: str, topology: str, timeout: float, images: int | None = None) -> dict[str, Any]:
    """Compiles one program and returns its row; one that fails has `error`."""
    import dataclasses

    from repvgg_jax.train.aot import compile_ahead

    images = images or images_of(model, topology)
    row: dict[str, Any] = facts_of(model) | harness.origin()
    row |= {"model": model, "topology": topology, "images": images}
    began = time.monotonic()
    try:
        program = compile_ahead(config_of(model, topology, images), topology, timeout=timeout)
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
    newest = {_program(row): row for row in rows if _holds(row)}
    return list(newest.values())


def _program(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["model"], row["topology"], row.get("images", IMAGES_PER_CHIP)


def _holds(row: dict[str, Any]) -> bool:
    """Whether a row is of these sources; only one of the compilers may be installed here."""
    facts = facts_of(row["model"])
    here, there = facts["versions"], row["versions"]
    known = [package for package in MATTER if package in here and package in there]
    return row["recipe"] == facts["recipe"] and all(here[p] == there[p] for p in known)


def _is_usual(row: dict[str, Any]) -> bool:
    model, topology, images = _program(row)
    return images == images_of(model, topology)


def _is_most(row: dict[str, Any], most: dict[tuple[str, str], tuple[str, str, int]]) -> bool:
    """Whether no larger program of the model that fits was compiled for these devices."""
    return most.get(_program(row)[:2]) == _program(row)


def fits(row: dict[str, Any]) -> bool:
    """Whether a program was compiled and leaves the share of memory that nothing may take."""
    return "error" not in row and row["peak"] <= SHARE * row["hbm"]


def largest(small: dict[str, Any], compiled: Callable[[int], dict[str, Any]]) -> int:
    """The largest power of two of images per device that fits.

    Args:
      small: the row of a program with few images.
      compiled: the row of the program with so many images.
    """
    # Beside the state, memory grows with the images, or at first more slowly.
    state = small["arguments"]
    each = max(small["peak"] - state, 1) / small["images"]
    images = 2 ** int(math.log2(max((SHARE * small["hbm"] - state) / each, 1)))
    while images > 1 and not fits(compiled(images)):
        images //= 2
    while True:
        row = compiled(images)
        if state + 2 * 0.9 * (row["peak"] - state) > SHARE * row["hbm"]:
            return images  # twice as many cannot fit
        if not fits(compiled(2 * images)):
            return images
        images *= 2


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; all counts but that of the parameters are of one chip and step.

    The column "compiled" is left out if no row says when it was.
    """
    cells = []
    for row in rows:
        cell = {"model": row["model"], "devices": row["topology"]}
        cell["images each"] = str(row.get("images", IMAGES_PER_CHIP))
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
            f"{row['flops'] / 1e9:,.0f}" if row["flops"] else "not counted",
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
    parser.add_argument(
        "--segmenters", action="store_true", help="the recipes of Table 8 instead of classifiers"
    )
    parser.add_argument("--topologies", nargs="+", help="by default those of docs/scaling.md")
    parser.add_argument(
        "--largest", action="store_true", help="also with as many images as devices have room for"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one program")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    args = parser.parse_args()

    models = args.models or list(SEGMENTERS if args.segmenters else VARIANTS)
    if args.segmenters and not args.topologies:
        args.topologies = EIGHT
    if args.topologies:
        programs = [(model, topology) for topology in args.topologies for model in models]
    else:
        programs = [(model, topology) for topology in EVERY for model in models]
        programs += [(model, t) for t in MORE for model in MORE_MODELS if model in models]
    done = {_program(row): row for row in stored() if "error" not in row}

    def compiled(model: str, topology: str, images: int) -> dict[str, Any]:
        program = model, topology, images
        if program not in done:
            row = row_of(model, topology, args.timeout, images)
            RESULTS.parent.mkdir(exist_ok=True)
            with pathlib.Path(RESULTS).open("a") as file:
                file.write(json.dumps(row) + "\n")
            result = f"{row.get('error', 'done')}, {row['wall_seconds']} s"
            print(f"{model} {topology}, {images} images each: {result}", flush=True)
            done[program] = row
        return done[program]

    if not args.table:
        small = [compiled(*program, images_of(*program)) for program in programs]
        for row in small if args.largest else []:
            if fits(row):
                largest(row, functools.partial(compiled, row["model"], row["topology"]))
    rows = sorted(stored(), key=lambda row: _order(row, [*VARIANTS, *SEGMENTERS]))
    if not rows:
        raise SystemExit(
            f"no row in {RESULTS.name} was measured with the versions installed here; the page is "
            "as it was"
        )
    most = {_program(row)[:2]: _program(row) for row in rows if fits(row)}  # ordered by images
    rows = [row for row in rows if _is_usual(row) or _is_most(row, most)]
    known = {p: row["versions"][p] for row in rows for p in MATTER if p in row["versions"]}
    facts = ", ".join(f"{name} {version}" for name, version in known.items())
    if args.write:
        fill(PAGE, f"{table(rows)}\n\n{facts}.")
    print(f"{table(rows)}\n\n{facts}")


def _order(row: dict[str, Any], models: list[str]) -> tuple[bool, int, int, int]:
    topologies = [*EVERY, *MORE, *EIGHT]
    known = row["topology"] in topologies
    return (
        row["model"] in SEGMENTERS,
        topologies.index(row["topology"]) if known else len(topologies),
        models.index(row["model"]) if row["model"] in models else len(models),
        row.get("images", IMAGES_PER_CHIP),
    )


if __name__ == "__main__":
    main()

"""The rows of RepVGG's Tables 6 and 7 on small data: what branches and norms are good for.

python -m repvgg_jax.studies.ablation --output ablation
python -m repvgg_jax.studies.ablation --output ablation --rows both,neither --seeds 2
"""

import logging
import pathlib
import time
from collections.abc import Sequence

from absl import flags

from repvgg_jax import cli

OUTPUT = flags.DEFINE_string(
    "output", "runs/ablation", "Directory of results; a row and seed that is there is not redone."
)
ROWS = flags.DEFINE_list("rows", None, "Names of rows; default: all.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds per row: 0, 1, ….", lower_bound=1)

logger = logging.getLogger("repvgg_jax.studies.ablation")  # also as __main__


def main(_: Sequence[str]) -> int:
    """Trains what is missing, and writes the page; returns the exit status."""
    from repvgg_jax.data.dataset import load
    from repvgg_jax.studies import rows
    from repvgg_jax.studies.page import write_page
    from repvgg_jax.studies.runs import Results, Trainer
    from repvgg_jax.train.settings import Settings

    names = ROWS.value or list(rows.ROWS)
    settings = {name: Settings.from_config(rows.recipe(name)) for name in names}
    output = pathlib.Path(OUTPUT.value)
    results = Results(output / "results.jsonl")
    trainers: dict[str, Trainer] = {}
    for seed in range(SEEDS.value):
        for name in names:
            if results.find(name, seed, settings[name]):
                continue
            began = time.perf_counter()
            if name not in trainers:
                trainers[name] = Trainer(settings[name], load(settings[name].data))
            found = trainers[name].accuracies(trainers[name].train(seed))
            line = results.add(name, seed, settings[name], found, began)
            logger.info(
                "%s, seed %d: %.2f %% (%.0f s)",
                rows.ROWS[name].title,
                seed,
                100 * found["accuracy"],
                line["seconds"],
            )
            write_page(output, results)
    print(write_page(output, results))
    return 0


if __name__ == "__main__":
    cli.run(main)

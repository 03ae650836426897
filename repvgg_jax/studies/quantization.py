"""Int8 by block and by method, on small data: which networks lose accuracy, and what helps.

python -m repvgg_jax.studies.quantization --output int8
python -m repvgg_jax.studies.quantization --output int8 --networks RepVGG,QARepVGG --seeds 1
"""

import logging
import pathlib
import time
from collections.abc import Sequence

from absl import flags

from repvgg_jax import cli
from repvgg_jax.text import did_you_mean

OUTPUT = flags.DEFINE_string(
    "output", "runs/int8", "Directory of results; a network and seed that is there is not redone."
)
NETWORKS = flags.DEFINE_list("networks", None, "Names of networks; default: all.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds per network: 0, 1, ….", lower_bound=1)

logger = logging.getLogger("repvgg_jax.studies.quantization")  # also as __main__


def main(_: Sequence[str]) -> int:
    """Trains and quantizes what is missing, and writes the page; returns the exit status."""
    from repvgg_jax.data.dataset import load
    from repvgg_jax.studies import integers
    from repvgg_jax.studies.integers_page import write_page
    from repvgg_jax.studies.runs import Results

    names = NETWORKS.value or list(integers.NETWORKS)
    for name in names:
        if name not in integers.NETWORKS:
            raise ValueError(
                f"--networks={name} is unknown; {did_you_mean(name, integers.NETWORKS)}there are "
                f"{', '.join(integers.NETWORKS)}"
            )
    settings = {name: integers.recipe(name) for name in names}
    output = pathlib.Path(OUTPUT.value)
    results = Results(output / "results.jsonl")
    study = None
    for seed in range(SEEDS.value):
        for name in names:
            if results.find(name, seed, settings[name]):
                continue
            began = time.perf_counter()
            study = study or integers.Study(load(settings[name].data))
            found = study.run(name, seed)
            results.add(name, seed, settings[name], found, began)
            accuracies = ", ".join(
                f"{method} {accuracy:.2%}" for method, accuracy in found["accuracies"].items()
            )
            logger.info("%s, seed %d: %s", name, seed, accuracies)
            write_page(output, results)
    print(write_page(output, results))
    return 0


if __name__ == "__main__":
    cli.run(main)

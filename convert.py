"""Fuses a trained RepVGG, proves the fused network equal and writes it.

python convert.py --workdir runs/digits --output deploy
"""

from collections.abc import Sequence

from absl import flags

from repvgg_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a training run.")
OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
FORMAT = flags.DEFINE_list("format", ["orbax", "safetensors"], "What to write, one or several.")
TOLERANCE = flags.DEFINE_float(
    "tolerance", 1e-5, "Largest |Δlogit| allowed, relative to the largest |logit|."
)


def main(_: Sequence[str]) -> int:
    """Converts; returns the exit status."""
    if WORKDIR.value is None or OUTPUT.value is None:
        raise ValueError(
            "give --workdir, the directory of a training run, and --output, the one to write"
        )
    from repvgg_jax.conversion import convert_run

    done = convert_run(WORKDIR.value, OUTPUT.value, formats=FORMAT.value, tolerance=TOLERANCE.value)
    print(done.table())
    return 0


if __name__ == "__main__":
    cli.run(main)

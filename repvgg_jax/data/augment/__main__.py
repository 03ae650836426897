"""Draws every operation and policy: `python -m repvgg_jax.data.augment --output augment.png`."""

from collections.abc import Sequence

from absl import flags

from repvgg_jax import cli

OUTPUT = flags.DEFINE_string("output", "augment.png", "The PNG file to write.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of what is sampled.", lower_bound=0)


def main(_: Sequence[str]) -> int:
    """Draws the picture; returns the exit status."""
    from repvgg_jax.data.augment.gallery import draw

    draw(OUTPUT.value, SEED.value)
    print(f"wrote {OUTPUT.value}")
    return 0


if __name__ == "__main__":
    cli.run(main)

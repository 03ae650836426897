"""Draws every operation and policy: `python -m repvgg_jax.data.augment --output augment.png`."""

import argparse

from repvgg_jax.data.augment.picture import draw


def main() -> None:
    """Parses the flags and draws."""
    parser = argparse.ArgumentParser(description="Draw every augmentation on two photographs.")
    parser.add_argument("--output", default="augment.png", help="the PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn by chance")
    flags = parser.parse_args()
    draw(flags.output, flags.seed)
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    main()

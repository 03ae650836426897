"""One step of a policy as this project does it against a `vmap` of a `switch` over its operations.

    python benchmarks/augmentation.py --batch 32 --size 224

Prints compile seconds, XLA's count of operations and bytes, and milliseconds a call on whatever
device JAX has.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.keys import image_keys
from repvgg_jax.data.augment.kinds import Choice
from repvgg_jax.data.augment.operation import operate
from repvgg_jax.data.augment.policies import RandAugment
from repvgg_jax.data.photos import crops


def together(images: jax.Array, choice: Choice) -> jax.Array:
    """All images through one table, one blend and one warp."""
    return operate(images, choice, possible=RandAugment().possible)


def switched(images: jax.Array, choice: Choice) -> jax.Array:
    """Each image through its own operation, which under `vmap` means through all of them."""
    kinds = sorted(RandAugment().possible)

    def branch(kind):
        return lambda image, one: operate(
            image[None], jax.tree.map(lambda v: v[None], one), possible={kind}
        )[0]

    def one_image(image, one):
        return jax.lax.switch(
            jnp.searchsorted(jnp.array(kinds), one.kind), [branch(k) for k in kinds], image, one
        )

    return jax.vmap(one_image)(images, choice)


def main() -> None:
    """Measures both on the same images and choices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    images = jnp.asarray(crops(flags.size, flags.batch))
    policy = RandAugment(ops=1, probability=1.0)
    drawn = jax.vmap(policy.draw)(image_keys(jax.random.key(0), flags.batch))
    choice = jax.tree.map(lambda field: field[:, 0], drawn)
    print(f"{jax.devices()[0].device_kind}: {flags.batch} images of {flags.size}x{flags.size}")
    results = []
    for way in (together, switched):
        started = time.perf_counter()
        program = jax.jit(way).lower(images, choice).compile()
        compiled = time.perf_counter() - started
        cost = program.cost_analysis()
        results.append(program(images, choice))
        seconds = []
        for _ in range(flags.repeats):
            started = time.perf_counter()
            jax.block_until_ready(program(images, choice))
            seconds.append(time.perf_counter() - started)
        print(
            f"{way.__name__:9} compiles in {compiled:5.1f} s, {cost['flops'] / 1e9:6.2f} Gflop, "
            f"{cost['bytes accessed'] / 1e9:6.2f} GB, {1e3 * statistics.median(seconds):7.0f} ms"
        )
    print(f"equal: {bool((results[0] == results[1]).all())}")


if __name__ == "__main__":
    main()

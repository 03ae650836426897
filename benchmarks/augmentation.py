"""One step of a policy as this project does it against a `vmap` of a `switch` over its operations.

    python benchmarks/augmentation.py --batch 32 --size 224 --write

Compile seconds, XLA's count of operations and bytes, and milliseconds a call, taking turns, on
whatever device JAX has.
"""

import time

import harness
import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.base import SampledOps, image_keys
from repvgg_jax.data.augment.ops import apply_op
from repvgg_jax.data.augment.policies import RandAugment
from repvgg_jax.data.sources import photo_crops


def together(images: jax.Array, sampled: SampledOps) -> jax.Array:
    """All images through one table, one blend and one warp."""
    return apply_op(images, sampled, possible=RandAugment().possible)


def switched(images: jax.Array, sampled: SampledOps) -> jax.Array:
    """Each image through its own operation, which under `vmap` means through all of them."""
    ops = sorted(RandAugment().possible)

    def branch(op):
        return lambda image, one: apply_op(
            image[None], jax.tree.map(lambda v: v[None], one), possible={op}
        )[0]

    def one_image(image, one):
        return jax.lax.switch(
            jnp.searchsorted(jnp.array(ops), one.op), [branch(op) for op in ops], image, one
        )

    return jax.vmap(one_image)(images, sampled)


def main() -> None:
    """Measures both on the same images and operations."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    images = jnp.asarray(photo_crops(args.size, args.batch))
    policy = RandAugment(ops=1, probability=1.0)
    samples = jax.vmap(policy.sample)(image_keys(jax.random.key(0), args.batch))
    sampled = jax.tree.map(lambda field: field[:, 0], samples)

    programs, compiling = {}, {}
    for way in (together, switched):
        started = time.perf_counter()
        programs[way.__name__] = jax.jit(way).lower(images, sampled).compile()
        compiling[way.__name__] = time.perf_counter() - started
    runs = {
        name: lambda program=program: jax.block_until_ready(program(images, sampled))
        for name, program in programs.items()
    }
    equal = bool((runs["together"]() == runs["switched"]()).all())
    times = harness.take_turns(runs, rounds=args.rounds)
    took = {name: harness.summary(seconds) for name, seconds in times.items()}
    rows = [
        {
            "way": name,
            "compile s": compiling[name],
            "GFLOP": program.cost_analysis()["flops"] / 1e9,
            "GB": program.cost_analysis()["bytes accessed"] / 1e9,
            **harness.milliseconds(took[name]),
            "time x": harness.ratio(took, name, "together"),
        }
        for name, program in programs.items()
    ]
    harness.report(
        "augmentation",
        rows,
        note=__doc__ or "",
        write=args.write,
        images=images.shape,
        rounds=args.rounds,
        equal=equal,
    )


if __name__ == "__main__":
    main()

"""How much of the device a deployed network uses, against limits that are measured first.

Measures the memory limit with a large copy and the arithmetic limit with a large matrix
product, on the device and in the dtype of the network, then times deployed networks. The least
time a network could take is the larger of its multiplications over the one limit, and of its
traffic over the other, counting each feature map written once and read once, and each
parameter read once. Achieved is that over the measured time.

    python benchmarks/roofline.py --models B1 --batch 256 --write
"""

from typing import Any

import harness


def limits(dtype: Any, rounds: int, copy_mib: int, product_size: int) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), and FLOP a second of a matrix product."""
    import jax
    import jax.numpy as jnp

    source = jnp.ones(copy_mib * 2**20 // jnp.dtype(dtype).itemsize, dtype)
    square = jnp.ones((product_size, product_size), dtype)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    product = jax.jit(lambda x: x @ x)
    times = harness.take_turns(
        {
            "copy": lambda: jax.block_until_ready(copy(source)),
            "product": lambda: jax.block_until_ready(product(square)),
        },
        rounds=rounds,
        seconds=0.2,
    )
    best = {name: min(took) for name, took in times.items()}
    return 2 * source.nbytes / best["copy"], 2 * product_size**3 / best["product"]


def least_work(name: str, batch: int, size: int, itemsize: int) -> tuple[float, float]:
    """Bytes and FLOP of a deployed network."""
    import repvgg_jax as rv

    cost = rv.cost(name, image_size=size)
    values = batch * size**2 * 3
    pixels = size
    for layer in rv.get_variant(name).layers():
        pixels = (pixels - 1) // layer.stride + 1
        values += 2 * batch * pixels**2 * layer.features
    return (values + cost.params_deploy) * itemsize, 2.0 * batch * cost.macs_deploy


def main() -> None:
    """Measures limits and networks, and reports."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import repvgg_jax as rv

    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["A0", "B1"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copy-mib", type=int, help="default 1024 on a GPU, 256 on a CPU")
    parser.add_argument("--product-size", type=int, help="default 8192 on a GPU, 2048 on a CPU")
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype(jnp.bfloat16 if gpu else jnp.float32)
    bandwidth, arithmetic = limits(
        dtype, args.rounds, args.copy_mib or (1024 if gpu else 256),
        args.product_size or (8192 if gpu else 2048),
    )  # fmt: skip
    rows = []
    for name in args.models:
        model = rv.create_model(name, deploy=True, dtype=dtype)
        shape = (args.batch, args.image_size, args.image_size, 3)
        images = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
        variables = jax.jit(model.init)(jax.random.key(0), images[:1])
        apply = jax.jit(model.apply)
        run = lambda: jax.block_until_ready(apply(variables, images))  # noqa: B023, E731
        took = harness.summary(
            harness.take_turns({"run": run}, rounds=args.rounds, seconds=0.2)["run"]
        )
        moved, flop = least_work(name, args.batch, args.image_size, dtype.itemsize)
        least = max(moved / bandwidth, flop / arithmetic)
        rows.append(
            {
                "model": name,
                "batch": args.batch,
                **harness.milliseconds(took),
                "least ms": 1e3 * least,
                "limited by": "memory" if moved / bandwidth > flop / arithmetic else "arithmetic",
                "achieved": least / took["median"],
            }
        )
    harness.report(
        "roofline",
        rows,
        note=__doc__ or "",
        write=args.write,
        device=jax.devices()[0].device_kind,
        dtype=dtype.name,
        copy_gb_per_s=bandwidth / 1e9,
        product_gflop_per_s=arithmetic / 1e9,
    )


if __name__ == "__main__":
    main()

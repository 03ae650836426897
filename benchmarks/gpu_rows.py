"""What one row of `gpu.py` measures, in a process of its own, and how correct it is.

Rows need JAX and this package, or PyTorch (and timm), and nothing for data or recipes.
"""

import copy
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

DISTINCT = 8  # images of a batch; the others repeat them
WARM_UP = 3  # calls before the clock runs


class Row(NamedTuple):
    """A measurement.

    Attributes:
      task: "limits", "train" or "deploy".
      model: variant; empty for limits.
      batch: images; 0 for limits.
      runner: what computes.
    """

    task: str
    model: str
    batch: int
    runner: str

    def __str__(self) -> str:
        return "/".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Row":
        """The inverse of `str`."""
        task, model, batch, runner = text.split("/")
        return cls(task, model, int(batch), runner)


class Runner(NamedTuple):
    """What is timed.

    Attributes:
      call: starts the work once.
      wait: returns when all started work is done.
      errors: relative to float32 on the CPU, by name.
      facts: whatever else is known, e.g. memory.
    """

    call: Callable[[], Any]
    wait: Callable[[], None]
    errors: dict[str, float]
    facts: dict[str, Any]


def measure(row: Row, *, size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Builds what `row` names, compares it with float32 on the CPU, and times it.

    Args:
      row: what to measure.
      size: of the images, in pixels.
      rounds: how many times are taken.
      seconds: how long calls are repeated for each; at batch 1 every call is waited for.

    Returns:
      Facts of the row, fit for JSON.
    """
    if row.task == "limits":
        return _limits(rounds)
    began = time.perf_counter()
    rng = np.random.default_rng(0)
    count = min(row.batch, DISTINCT)
    images = rng.normal(size=(count, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, 1000, count).astype(np.int32)
    build = _torch if row.runner.startswith(("timm", "torch")) else _jax
    if row.runner.startswith("onnxruntime"):
        build = _onnx
    runner = build(row, images, labels)
    for _ in range(WARM_UP):
        runner.call()
    runner.wait()
    ready = time.perf_counter() - began
    before = clocks()
    times = [_time(runner, seconds, each=row.batch == 1) for _ in range(rounds)]
    return {
        "ready_s": ready,
        "seconds": times,
        "errors": runner.errors,
        "clocks": [before, clocks()],
        **runner.facts,
    }


def _time(runner: Runner, seconds: float, *, each: bool) -> float:
    """The mean time of calls that together take at least `seconds`."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        for _ in range(1 if each else 5):
            runner.call()
            calls += 1
        runner.wait()
    return (time.perf_counter() - start) / calls


def repeated(array: np.ndarray, batch: int) -> np.ndarray:
    """A batch that repeats its images: means over it, and their gradients, stay the same."""
    if batch % len(array):
        raise ValueError(f"a batch of {batch} images does not repeat {len(array)} evenly")
    return np.concatenate([array] * (batch // len(array)))


def clocks() -> str | None:
    """The GPU's clock, temperature, power and use of memory now; None without one."""
    query = "clocks.sm,temperature.gpu,power.draw,memory.used"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0]


def _limits(rounds: int) -> dict[str, Any]:
    """Bytes per second of a copy, FLOP per second of a matrix product, as XLA runs them."""
    import jax
    import jax.numpy as jnp
    import roofline

    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    before = clocks()
    bandwidth, arithmetic = roofline.limits(
        dtype, rounds, 2048 if gpu else 64, 8192 if gpu else 512
    )
    return {"bandwidth": bandwidth, "arithmetic": arithmetic, "clocks": [before, clocks()]}


def _jax(row: Row, images: np.ndarray, labels: np.ndarray) -> Runner:
    import jax
    import jax.numpy as jnp

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    build = _jax_step if row.task == "train" else _jax_logits
    return build(row, images, labels, dtype)


def _jax_step(row: Row, images: np.ndarray, labels: np.ndarray, dtype: Any) -> Runner:
    import jax
    import jax.numpy as jnp
    from plain import PlainRepVGG
    from step import init_state, make_step

    import repvgg_jax as rv
    from repvgg_jax.train import hlo

    def model_of(form: str, dtype: Any, **options: Any) -> Any:
        if form == "plain":
            return PlainRepVGG(row.model, dtype=dtype)
        return rv.create_model(row.model, train_form=form, dtype=dtype, **options)

    model = model_of(row.runner, dtype)
    with jax.default_device(jax.devices("cpu")[0]):
        start = jax.device_get(jax.jit(lambda x: init_state(model, x))(images[:1]))
        # The reference is the branches of the paper, whatever is measured.
        exact = model_of("plain" if row.runner == "plain" else "branches", jnp.float32)
        after, loss = jax.device_get(jax.jit(make_step(exact))(start, (images, labels)))

    batch = jax.device_put((repeated(images, row.batch).astype(dtype), repeated(labels, row.batch)))
    state = jax.device_put(start)
    step = jax.jit(make_step(model), donate_argnums=0).lower(state, batch).compile()
    held = list(step(state, batch))
    errors = {
        "loss": abs(float(held[1]) - float(loss)) / abs(float(loss)),
        "update": _relative(
            _difference(jax.device_get(held[0][0]["params"]), start[0]["params"]),
            _difference(after[0]["params"], start[0]["params"]),
        ),
    }
    memory = step.memory_analysis()
    traffic = hlo.count(step.as_text() or "")

    def call() -> None:
        held[:] = step(held[0], batch)

    facts = {
        "memory_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
        "gb": traffic.touched / 1e9,
        "kernels": traffic.kernels,
    }
    return Runner(call, lambda: jax.block_until_ready(held), errors, facts)  # type: ignore[arg-type]


def _jax_logits(row: Row, images: np.ndarray, _: np.ndarray, dtype: Any) -> Runner:
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout

    import repvgg_jax as rv
    from repvgg_jax.train import hlo

    exact = rv.create_model(row.model)
    with jax.default_device(jax.devices("cpu")[0]):
        variables = jax.jit(exact.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        expected = jax.device_get(jax.jit(exact.apply)(variables, images))
        variables = exact.fuse(jax.device_get(variables))
    model = rv.create_model(row.model, deploy=True, dtype=dtype)
    x = jax.device_put(repeated(images, row.batch).astype(dtype))
    # Rounded once, instead of in every call.
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    if row.runner == "deploy constant":
        arguments: tuple[Any, ...] = (x,)
        program = jax.jit(lambda images: model.apply(variables, images)).lower(x).compile()
    else:
        layout = Format(Layout.AUTO) if row.runner == "deploy stored" else None
        apply = jax.jit(model.apply, in_shardings=(layout, None))
        program = apply.lower(jax.tree.map(_shape, variables), x).compile()
        arguments = jax.device_put(variables, program.input_formats[0][0]), x
    held = [program(*arguments)]

    def call() -> None:
        held[0] = program(*arguments)

    memory = program.memory_analysis()
    traffic = hlo.count(program.as_text() or "")
    facts = {
        "memory_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
        "gb": traffic.touched / 1e9,
        "kernels": traffic.kernels,
    }
    errors = {"logits": _relative([np.asarray(held[0], np.float32)[: len(images)]], [expected])}
    return Runner(call, lambda: jax.block_until_ready(held), errors, facts)  # type: ignore[arg-type]


def _torch(row: Row, images: np.ndarray, labels: np.ndarray) -> Runner:
    import torch
    import torch_peer

    gpu = torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    options = {
        "channels_last": "channels_last" in row.runner,
        "compile": "compile" in row.runner,
        "bf16": gpu,
        "wait": False,
    }
    build = torch_peer.build_timm if row.runner.startswith("timm") else torch_peer.build
    torch.manual_seed(0)
    model = build(row.model, deploy=row.task == "deploy")
    exact = copy.deepcopy(model)
    many = repeated(images, row.batch)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    if row.task == "train":
        before = [_numpy(p) for p in model.parameters()]
        loss, expected = _torch_step(exact.train(), pixels, labels, before)
        call = torch_peer.trainer(model, many, repeated(labels, row.batch), **options)
        found = float(call().detach())
        update = [_numpy(p) - old for p, old in zip(model.parameters(), before, strict=True)]
        errors = {"loss": abs(found - loss) / abs(loss), "update": _relative(update, expected)}
    else:
        with torch.inference_mode():
            logits = _numpy(exact.eval()(pixels))
        call = torch_peer.predictor(model, many, whole=True, **options)
        errors = {"logits": _relative([_numpy(call())[: len(images)]], [logits])}
    facts = {"memory_mib": torch_peer.peak_mib(call)} if gpu else {}
    return Runner(call, torch.cuda.synchronize if gpu else lambda: None, errors, facts)


def _torch_step(
    model: Any, pixels: Any, labels: np.ndarray, before: list[np.ndarray]
) -> tuple[float, list[np.ndarray]]:
    """Loss and change of the parameters of one step on the CPU, in float32."""
    import torch
    import torch_peer

    sgd = torch_peer.optimizer(model)
    loss = torch.nn.functional.cross_entropy(model(pixels), torch.from_numpy(labels).long())
    loss.backward()
    sgd.step()
    return float(loss.detach()), [
        _numpy(p) - old for p, old in zip(model.parameters(), before, strict=True)
    ]


def _onnx(row: Row, images: np.ndarray, _: np.ndarray) -> Runner:
    """The exported network in onnxruntime: float16 on a GPU, float32 on a CPU."""
    import pathlib
    import tempfile

    import infer
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    gpu = "CUDAExecutionProvider" in providers
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        logits = infer.write_onnx(row.model, path, images, "float16" if gpu else "float32")
        session = onnxruntime.InferenceSession(path, providers=providers)
    (inlet,) = session.get_inputs()
    dtype = np.float16 if "float16" in inlet.type else np.float32
    many = repeated(images, row.batch).transpose(0, 3, 1, 2).astype(dtype)
    device, index = ("cuda", 0) if gpu else ("cpu", 0)
    binding = session.io_binding()
    # Images and logits stay where the network is.
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(many), device, index)
    binding.bind_ortvalue_input(inlet.name, value)
    binding.bind_output(session.get_outputs()[0].name, device, index)
    call = lambda: session.run_with_iobinding(binding)  # noqa: E731
    call()
    found = np.float32(binding.copy_outputs_to_cpu()[0])[: len(images)]
    errors = {"logits": _relative([found], [logits])}
    return Runner(call, binding.synchronize_outputs, errors, {"providers": providers[0]})


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()


def _shape(leaf: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _difference(after: Any, before: Any) -> list[np.ndarray]:
    import jax

    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    return [np.float32(new) - np.float32(old) for new, old in pairs]


def _relative(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Norm of the difference over that of what is expected."""
    off = sum(float(np.square(a - b).sum()) for a, b in zip(found, expected, strict=True))
    whole = sum(float(np.square(b).sum()) for b in expected)
    return (off / whole) ** 0.5

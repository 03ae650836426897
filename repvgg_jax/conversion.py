"""From a training run to a deployment: restore, fuse, prove, write."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from repvgg_jax import deployment
from repvgg_jax.fuse import fuse_params
from repvgg_jax.model import RepVGG
from repvgg_jax.proof import TOLERANCE, Proof, prove
from repvgg_jax.training.checkpoint import Checkpoints
from repvgg_jax.training.run import Run
from repvgg_jax.training.workdir import Workdir

PROOF_IMAGES = 1000  # held-out images that the proof looks at, at most
TIMED_BATCH = 64
TIMED_ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      variant: name of the architecture.
      step: training step of the checkpoint it came from.
      params: parameters as trained and fused.
      images_per_second: of the two forms, batches of 64 on this machine; medians.
      proof: that both are the same function.
      output: the directory written.
      files: what is in it.
    """

    variant: str
    step: int
    params: tuple[int, int]
    images_per_second: tuple[float, float]
    proof: Proof
    output: pathlib.Path
    files: tuple[str, ...]

    def table(self) -> str:
        """What a person wants to know, as text."""
        (params, fused), (speed, fused_speed) = self.params, self.images_per_second
        rows = [
            ("", "as trained", "fused", ""),
            ("parameters", f"{params:,}", f"{fused:,}", f"{fused / params:.1%}"),
            ("images/s", f"{speed:,.0f}", f"{fused_speed:,.0f}", f"{fused_speed / speed:.2f}x"),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(
            [
                f"RepVGG {self.variant}, step {self.step}",
                *(line.rstrip() for line in lines),
                f"proof: {self.proof}",
                f"written to {self.output}: {', '.join(self.files)}",
            ]
        )


def convert_run(
    path: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    formats: Sequence[str] = ("orbax", "safetensors"),
    tolerance: float = TOLERANCE,
    say: Callable[[str], None] = print,
) -> Conversion:
    """Converts the newest sound checkpoint of a training run.

    Args:
      path: the run's directory.
      output: the directory to make; an earlier conversion there is replaced.
      formats: of `deployment.FORMATS`.
      tolerance: largest |Δlogit| allowed, relative to the largest |logit|.
      say: told of checkpoints that are passed over.

    Raises:
      ValueError: no run or no sound checkpoint there, an output that holds something else, an
        unknown format, or a proof that does not hold; nothing is written then.
      OSError: the output cannot be written.
    """
    if unknown := [name for name in formats if name not in deployment.FORMATS]:
        raise ValueError(
            f"unknown format {', '.join(unknown)}; there are: {', '.join(deployment.FORMATS)}"
        )
    if not tolerance > 0:
        raise ValueError(f"tolerance {tolerance} must be positive")
    workdir, output = Workdir(pathlib.Path(path)), pathlib.Path(output)
    deployment.check_free(output)
    run = Run.from_config(workdir.read_config())
    with Checkpoints(workdir.checkpoints, say=say) as checkpoints:
        state = checkpoints.restore(run.abstract_state())
    if state is None:
        raise ValueError(f"{workdir.path} holds no checkpoint yet; train further, then convert")

    variables = jax.device_get(state.variables)
    fused = fuse_params(variables)
    images = _held_out_images(run)
    model = run.model.clone(dtype=np.float32)  # the proof is about the function, not rounding
    proof = prove(model, variables, images, deployed=fused, tolerance=tolerance)
    if not proof.holds:
        raise ValueError(
            f"the fused network is not the one that was trained: {proof}; wrote nothing"
        )
    speed = _speed((model, variables), (model.clone(deploy=True), fused), images)

    variant = run.model.variant
    with deployment.writing(output) as directory:
        for name in formats:
            deployment.FORMATS[name](directory, fused, variant)
        metadata = {
            "classes": list(run.dataset.classes),
            "image_shape": list(run.dataset.image_shape),
            "mean": list(run.normalise.mean),
            "std": list(run.normalise.std),
            "formats": list(formats),
            "source": {"workdir": str(workdir.path), "step": int(state.step)},
        }
        deployment.write_metadata(directory, variant, metadata)
        deployment.write_proof(directory, {"fused": proof.as_dict()})
        files = sorted(entry.name for entry in directory.iterdir())
    return Conversion(
        variant=variant.name,
        step=int(state.step),
        params=(_size(variables["params"]), _size(fused["params"])),
        images_per_second=speed,
        proof=proof,
        output=output,
        files=tuple(files),
    )


def _held_out_images(run: Run) -> np.ndarray:
    source = run.dataset.evaluation
    count = min(len(source), PROOF_IMAGES)
    return np.asarray(run.normalise(np.stack([source[i]["image"] for i in range(count)])))


def _speed(
    trained: tuple[RepVGG, Any], fused: tuple[RepVGG, Any], images: np.ndarray
) -> tuple[float, float]:
    """Images per second of both forms, measured in turn: medians of several rounds."""
    batch = np.resize(images, (TIMED_BATCH, *images.shape[1:]))
    forms = [(jax.jit(model.apply), jax.device_put(v)) for model, v in (trained, fused)]
    seconds: tuple[list[float], list[float]] = [], []
    for round_ in range(TIMED_ROUNDS + 1):
        for taken, (apply, variables) in zip(seconds, forms, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(apply(variables, batch))
            if round_:  # the first one compiles
                taken.append(time.perf_counter() - began)
    first, second = (TIMED_BATCH / statistics.median(taken) for taken in seconds)
    return first, second


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))

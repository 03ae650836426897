"""From a trained network to a deployment: fuse, prove, write in every format asked for."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repvgg_jax.convert import deployed as deployment
from repvgg_jax.convert.source import Origin
from repvgg_jax.export import Network
from repvgg_jax.model import RepVGG
from repvgg_jax.proof import TOLERANCE, Proof, prove
from repvgg_jax.reparam import fuse_params

ARTEFACT_IMAGES = 64  # that every runtime of every artefact answers, at most
TIMED_BATCH = 32  # images
TIMED_ROUNDS = 11


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      title: what was converted.
      params: parameters as trained and fused; the first is None for what came fused.
      images_per_second: of the two forms, batches of 32 on this machine; medians.
      proof: that both are the same function; None for what came fused.
      output: the directory written.
      lines: what was written there, with its proof.
    """

    title: str
    params: tuple[int | None, int]
    images_per_second: tuple[float | None, float]
    proof: Proof | None
    output: pathlib.Path
    lines: tuple[str, ...]

    def table(self) -> str:
        """What a person wants to know, as text."""
        (params, fused), (speed, fused_speed) = self.params, self.images_per_second
        rows = [
            ("", "as trained", "fused", ""),
            ("parameters", _number(params), _number(fused), _share(fused, params, ".1%")),
            ("images/s", _number(speed), _number(fused_speed), _share(fused_speed, speed, ".2f")),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        proof = "none, it came in deploy form" if self.proof is None else str(self.proof)
        return "\n".join(
            [
                self.title,
                *(line.rstrip() for line in lines),
                f"proof: {proof}",
                f"written to {self.output}:",
                *(f"  {line}" for text in self.lines for line in text.splitlines()),
            ]
        )


def convert(
    origin: Origin,
    output: pathlib.Path,
    *,
    formats: Sequence[str] = ("orbax", "safetensors"),
    tolerance: float = TOLERANCE,
    with_preprocessing: bool = False,
) -> Conversion:
    """Fuses a network, proves the fused one equal, and writes it.

    Args:
      origin: the network.
      output: the directory to make; an earlier conversion there is replaced.
      formats: of `deployment.formats()`; `onnx:float16` asks for another type.
      tolerance: largest |Δlogit| allowed, relative to the largest |logit|.
      with_preprocessing: artefacts that hold a graph take uint8 images and give probabilities.

    Raises:
      ValueError: an output that holds something else, an unknown format, a proof that does not
        hold, an artefact that its runtime reads differently; nothing is written then.
      OSError: the output cannot be written.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance {tolerance} must be positive")
    deployment.check_formats(formats)
    deployment.check_free(output)
    images = origin.metadata.normalise(origin.images)
    proof, fused = None, origin.variables
    if not origin.deploy:
        fused = fuse_params(origin.variables)
        proof = prove(origin.model, origin.variables, images, deployed=fused, tolerance=tolerance)
        if not proof.holds:
            raise ValueError(
                f"the fused network is not the one that was trained: {proof}; wrote nothing"
            )
    network = Network(
        origin.model,
        fused,
        images=origin.images[:ARTEFACT_IMAGES],
        metadata=origin.metadata,
        with_preprocessing=with_preprocessing,
    )
    with deployment.writing(output) as directory:
        written = [deployment.write(name, network, directory) for name in formats]
        deployment.write_metadata(directory, network, origin.details)
        deployment.write_proof(
            directory,
            {
                "fused": None if proof is None else proof.as_dict(),
                "artefacts": [artefact.as_dict() for artefact in written],
            },
        )
    forms = {True: (origin.model.clone(deploy=True), fused)}
    if not origin.deploy:
        forms[False] = (origin.model, origin.variables)
    speed = _images_per_second(forms, images)
    return Conversion(
        title=origin.title,
        params=(
            None if origin.deploy else _size(origin.variables["params"]),
            _size(fused["params"]),
        ),
        images_per_second=(speed.get(False), speed[True]),
        proof=proof,
        output=output,
        lines=(*(str(artefact) for artefact in written), "metadata.json, proof.json"),
    )


def _images_per_second(
    forms: Mapping[bool, tuple[RepVGG, Any]], images: np.ndarray
) -> dict[bool, float]:
    """Medians of several rounds in which the forms take turns, by whether they are fused."""
    batch = np.resize(images, (TIMED_BATCH, *images.shape[1:]))
    compiled = {
        deploy: (jax.jit(model.apply), jax.device_put(variables))
        for deploy, (model, variables) in forms.items()
    }
    seconds: dict[bool, list[float]] = {deploy: [] for deploy in forms}
    for round_ in range(TIMED_ROUNDS + 1):
        for deploy, (apply, variables) in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(apply(variables, batch))
            if round_:  # the first one compiles
                seconds[deploy].append(time.perf_counter() - began)
    return {deploy: TIMED_BATCH / statistics.median(taken) for deploy, taken in seconds.items()}


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _share(part: float, whole: float | None, form: str) -> str:
    if whole is None:
        return ""
    return format(part / whole, form) + ("x" if form == ".2f" else "")

"""From a source to a deploy directory: fuse, prove, write."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repvgg_jax import activations
from repvgg_jax.convert import int8 as quantized
from repvgg_jax.convert.output import Output, write_description
from repvgg_jax.convert.subject import Source
from repvgg_jax.export import Network, Target
from repvgg_jax.progress import Advance, silent
from repvgg_jax.proof import TOLERANCE, Forward, Proof, compare_forwards

ARTIFACT_IMAGES = 64  # at most, run by every runtime of every artifact
TIMED_ROUNDS = 3, 11  # at least, at most
TIMED_SECONDS = 10.0  # no further round after this


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      title: what was converted.
      params: number of parameters as trained and fused; the first is None if the source was
        already fused.
      images_per_second: of the two forms in float32, batches of 32, or fewer if every pixel has a
        class, on this machine; medians.
      proof: that both compute the same function; None if the source was already fused.
      image_source: what the proof ran on.
      output: the directory written.
      lines: what was written there, with its proofs.
      notes: what the source had to assume, or what else it offers.
      int8: what quantization costs, a table.
    """

    title: str
    params: tuple[int | None, int]
    images_per_second: tuple[float | None, float]
    proof: Proof | None
    image_source: str
    output: pathlib.Path
    lines: tuple[str, ...]
    notes: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()

    def table(self) -> str:
        """A summary as text."""
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
        if self.proof is None:
            proof, images = "none, the source was in deploy form", "images of the artifacts' proofs"
        else:
            proof, images = str(self.proof), "proof images"
        return "\n".join(
            [
                self.title,
                *(line.rstrip() for line in lines),
                f"proof: {proof}",
                f"{images}: {self.image_source}",
                *self.notes,
                *self.int8,
                f"written to {self.output}:",
                *(f"  {line}" for text in self.lines for line in text.splitlines()),
            ]
        )


def convert(
    source: Source,
    output: Output,
    *,
    targets: Sequence[Target],
    tolerance: float = TOLERANCE,
    with_preprocessing: bool = False,
    feature_maps: Sequence[str] = (),
    dynamic_size: bool = False,
    int8: quantized.Int8 | None = None,
    advance: Advance = silent,
) -> Conversion:
    """Fuses a network, proves that the fused one computes the same, and writes it.

    Args:
      source: the network.
      output: where to write; an earlier conversion there is replaced, except for formats of the
        same weights and files of others.
      targets: what to write.
      tolerance: largest |Δlogit| allowed, relative to the largest |logit|.
      with_preprocessing: artifacts that hold a graph take uint8 images and return probabilities.
      feature_maps: stages whose maps such artifacts return instead; as in `export.Network`.
      dynamic_size: such artifacts take images of any size.
      int8: how the network is also quantized; None for not at all.
      advance: told of each of `steps`.

    Raises:
      ValueError: an unknown activation or stage, a format that cannot hold what is asked for, a
        proof that does not hold, or an artifact that its runtime reads differently; nothing is
        written then.
      OSError: the output cannot be written.
    """
    if not tolerance > 0:
        raise ValueError(f"--tolerance={tolerance} must be positive")
    activations.name_of(source.model.activation, source.title)  # `load_deployed` must know it
    advance(0, "comparing both forms")
    images = source.normalize(source.images)
    deployed = source.model.clone(deploy=True)
    fused, proof, batch = source.variables, None, source.batch
    forms: dict[str, Forward] = {}
    if not source.model.deploy:
        fused = source.model.fuse(source.variables)
        forms["trained"] = Forward(source.model.apply, source.variables, batch_size=batch)
    forms["fused"] = Forward(deployed.apply, fused, batch_size=batch)
    if "trained" in forms:
        proof = compare_forwards(forms["trained"], forms["fused"], images, tolerance=tolerance)
        if not proof.holds:
            raise ValueError(
                f"the fused network does not compute what the trained one does: {proof}; "
                "nothing was written"
            )
    advance(1, "timing both forms")
    # Before the runtimes are opened, whose idle threads would slow it down.
    speed = _images_per_second(forms, images)
    forms.clear()
    advance(1, "checking formats")
    network = Network(
        deployed,
        fused,
        images=source.images[: batch + 1 if source.per_pixel else ARTIFACT_IMAGES],
        normalize=source.normalize,
        labels=source.labels,
        with_preprocessing=with_preprocessing,
        feature_maps=feature_maps,
        dynamic_size=dynamic_size,
        crop=dataclasses.asdict(source.crop),
    )
    for target in targets:
        target.check(network)
    if int8 is not None and network.feature_maps:
        raise ValueError(
            "--quantize int8 is judged by the classes that a network finds, and feature maps "
            f"(--outputs={','.join(feature_maps)}) have none: leave out one of the two, and "
            "quantize what the maps are for, as a whole, with the tools of its runtime"
        )
    if int8 is not None:
        advance(0, "quantizing")
    rounded = None if int8 is None else quantized.Conversion(source, fused, int8)
    weights_only = network.without_preprocessing()
    with output.writing() as directory:
        artifacts = []
        for target in targets:
            what = network if target.format.holds_graph else weights_only
            for name in target.filenames:
                advance(0, f"writing and reading back {name}")
                artifacts.append(target.write(what, directory / name))
                advance(1)
        if rounded is not None:
            advance(0, "writing in int8")
            artifacts += rounded.write(network, directory)
            advance(1)
        kept = write_description(
            directory,
            network,
            artifacts,
            proof=proof or source.proof,
            source=source.details,
            crop=source.crop,
            earlier=output.path,
            int8=None if rounded is None else rounded.as_dict(),
        )
    return Conversion(
        title=source.title,
        params=(
            None if source.model.deploy else _size(source.variables["params"]),
            _size(fused["params"]),
        ),
        images_per_second=(speed.get("trained"), speed["fused"]),
        proof=proof,
        image_source=source.image_source,
        output=output.path,
        lines=(
            *(str(artifact) for artifact in artifacts),
            *kept.lines,
            "metadata.json, proof.json",
        ),
        notes=source.notes,
        int8=() if rounded is None else rounded.lines,
    )


def steps(targets: Sequence[Target], int8: quantized.Int8 | None = None) -> int:
    """The number of steps that `convert` takes: comparing, timing, a file each, and int8."""
    return 2 + sum(len(target.filenames) for target in targets) + (int8 is not None)


def _images_per_second(forms: Mapping[str, Forward], images: np.ndarray) -> dict[str, float]:
    """Medians of several rounds in which the forms take turns."""
    size = forms["fused"].batch_size
    batch = jax.device_put(np.resize(images, (size, *images.shape[1:])))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for forward in forms.values():
        jax.block_until_ready(forward.batch(batch))  # compiled by the proof, if there was one
    least, most = TIMED_ROUNDS
    began = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - began > TIMED_SECONDS:
            break
        for name, forward in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(forward.batch(batch))
            seconds[name].append(time.perf_counter() - start)
    return {name: size / statistics.median(taken) for name, taken in seconds.items()}


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _share(part: float, whole: float | None, form: str) -> str:
    if whole is None:
        return ""
    return format(part / whole, form) + ("x" if form == ".2f" else "")

"""Writing a network in a format and verifying what was written."""

import dataclasses
import functools
import importlib.util
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

import jax
import numpy as np

from repvgg_jax import files
from repvgg_jax.export import jax_formats, onnx, tensorflow
from repvgg_jax.export.format import Artifact, Format, Run, checksums, size
from repvgg_jax.export.network import Network
from repvgg_jax.proof import Proof, compare
from repvgg_jax.text import did_you_mean, first_few, named_leaves, versions

FORMATS: Mapping[str, Format] = types.MappingProxyType(
    {
        form.name: form
        for form in (
            jax_formats.ORBAX,
            jax_formats.SAFETENSORS,
            jax_formats.STABLEHLO,
            onnx.ONNX,
            tensorflow.TFLITE,
            tensorflow.SAVEDMODEL,
            jax_formats.TORCH_OFFICIAL,
            jax_formats.TORCH_TIMM,
        )
    }
)
"""All formats by name. None of them imports its packages before it is used."""


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
      ValueError: unknown, with a suggestion.
    """
    if name not in FORMATS:
        raise ValueError(
            f"unknown format {name!r}; {did_you_mean(name, FORMATS)}"
            f"Available formats: {', '.join(FORMATS)}"
        )
    return FORMATS[name]


@dataclasses.dataclass(frozen=True)
class Target:
    """What to write: a format in a dtype.

    Attributes:
      format: a row of `FORMATS`.
      dtype: one of its `dtypes`.

    Raises:
      ValueError: the format cannot compute in that dtype.
    """

    format: Format
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in self.format.dtypes:
            raise ValueError(
                f"format {self.format.name} cannot compute in {self.dtype!r}; "
                f"available: {', '.join(self.format.dtypes)}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """A target as `--format` takes it, `onnx` or `onnx:float16`.

        Raises:
          ValueError: an unknown format, or a dtype that it does not have.
        """
        name, _, dtype = text.partition(":")
        form = get_format(name)
        return cls(form, dtype or form.dtypes[0])

    @property
    def filenames(self) -> tuple[str, ...]:
        """Default names of what is written, e.g. `model.float16.onnx`."""
        stem, dot, suffix = self.format.filename.partition(".")
        default = self.dtype == self.format.dtypes[0]
        main = self.format.filename if default else f"{stem}.{self.dtype}{dot}{suffix}"
        also = [name for name, needed in self.format.also.items() if _is_installed(needed)]
        return (main, *also)

    def check(self, network: Network) -> None:
        """Whether the format can hold such a network.

        Raises:
          ValueError: it cannot; the message names those that can.
        """
        form = self.format
        if network.is_segmenter and not (form.own_modules or form.segmenters):
            able = [n for n, other in FORMATS.items() if other.own_modules or other.segmenters]
            raise ValueError(
                f"format {form.name} holds classifiers, not {network.name}; segmenters: "
                f"{', '.join(able)}"
            )
        if not network.is_ours and not form.own_modules:
            able = [name for name, other in FORMATS.items() if other.own_modules]
            raise ValueError(
                f"format {form.name} knows RepVGG only, not {network.name}; modules of your own: "
                f"{', '.join(able)}"
            )
        asked = bool(network.feature_maps) or network.dynamic_size
        if asked and form.holds_graph and not form.maps_and_sizes:
            able = [name for name, other in FORMATS.items() if other.maps_and_sizes]
            raise ValueError(
                f"format {form.name} returns logits of images of one size; feature maps and "
                f"dynamic sizes: {', '.join(able)}"
            )

    def write(self, network: Network, path: Path) -> Artifact:
        """Writes a network to a new file or directory, reads it back and compares.

        Graphs are run by every installed runtime of the format on the network's images, the
        first image alone and the others in batches. Weights are read back and compared bitwise.
        If anything fails, `path` may hold an incomplete artifact: write to a temporary one, as
        `export` does.

        Raises:
          ValueError: a package is not installed, or the artifact disagrees with the JAX model.
        """
        self.check(network)
        form = self.format
        start = time.perf_counter()
        if form.holds_graph:
            network.reference  # noqa: B018  compute it before anything is written
        try:
            form.write(network, path, self.dtype)
        except ImportError as error:
            raise ValueError(f"format {form.name}: {error}; {form.remedy}") from error
        proofs, unproven = run_in_runtimes(
            form,
            network,
            path,
            functools.partial(self._compare, network),
            disagrees=f"the {self.dtype} {form.name} artifact disagrees with the JAX model",
        )
        if form.read is not None:
            _check_identical(form.name, network.variables, form.read(path, network))
        return Artifact(
            format=form.name,
            path=path,
            dtype=self.dtype,
            description=network.description(form.input_layout(network)),
            proofs=proofs,
            unproven=unproven,
            identical=form.read is not None,
            versions=versions(*form.packages, *proofs),
            checksums=checksums(path),
            size=size(path),
            seconds=round(time.perf_counter() - start, 3),
        )

    def _compare(self, network: Network, run: Run) -> Proof:
        """The proof of an opened artifact; of several image sizes, the worst."""
        proofs = [
            compare(
                one.comparable(one.reference),
                one.comparable(one.answers(run)),
                tolerance=self.format.tolerances[self.dtype],
            )
            for one in (network, *network.at_other_sizes())
        ]
        # NaN never holds.
        worst = max(proofs, key=lambda proof: (not proof.holds, proof.relative))
        plain = network.is_ours and not network.feature_maps
        return worst if plain else dataclasses.replace(worst, numbers="output")


def run_in_runtimes(
    form: Format,
    network: Network,
    path: Path,
    prove: Callable[[Run], Proof],
    *,
    disagrees: str,
) -> tuple[dict[str, Proof], dict[str, str]]:
    """The proofs of an artifact by runtime, and why others have none.

    Args:
      form: of the artifact.
      network: what it holds.
      path: of the artifact.
      prove: compares what a runtime answers with what is expected.
      disagrees: how the message begins if a proof does not hold.

    Raises:
      ValueError: a proof does not hold.
    """
    proofs, unproven = {}, {}
    for runtime in form.runtimes:
        try:
            run = runtime.open(path, network)
        except ImportError as error:
            unproven[runtime.name] = f"{error}; {form.remedy}"
            continue
        proof = prove(run)
        if not proof.holds:
            raise ValueError(f"{disagrees} in {runtime.name}: {proof}; it was not written")
        proofs[runtime.name] = proof
        del run  # one runtime's copy of a large network at a time
    return proofs, unproven


def parse_targets(texts: Iterable[str]) -> tuple[Target, ...]:
    """The targets of a `--format` flag, without repetitions.

    Raises:
      ValueError: no format, an unknown one, or a dtype that it does not have.
    """
    targets = {(t.format.name, t.dtype): t for t in map(Target.parse, texts)}
    if not targets:
        raise ValueError(f"no format given; available formats: {', '.join(FORMATS)}")
    return tuple(targets.values())


def export(name: str, network: Network, path: str | Path, *, dtype: str | None = None) -> Artifact:
    """Writes a deploy network in one format and verifies it; see `Target.write`.

    The artifact is written under a temporary name next to `path` and renamed once it is verified.
    If anything fails, an older artifact at `path` stays. If a runtime is not installed, the
    result marks the artifact as unproven there.

    Args:
      name: one of `FORMATS`.
      network: what to write, and the images to prove it on.
      path: the file or directory to write; an older artifact there is replaced.
      dtype: what the artifact computes in, one of the format's `dtypes`; None for the first.

    Raises:
      ValueError: an unknown format or dtype, a package that is not installed, a path that holds
        something else, or an artifact that disagrees with the JAX model.
      OSError: `path` cannot be written.
    """
    form = get_format(name)
    target = Target(form, dtype or form.dtypes[0])
    path = Path(path)
    if network.with_preprocessing and not form.holds_graph:
        raise ValueError(
            f"format {form.name} holds weights and no graph, so preprocessing cannot be part of "
            "it; leave out the format or the preprocessing"
        )
    target.check(network)
    _check_replaceable(form, path)
    with files.replacing(path) as temporary:
        artifact = target.write(network, temporary)
    # The temporary name is the only thing that depended on where it was written.
    renamed = {
        path.name + key.removeprefix(temporary.name): sha for key, sha in artifact.checksums.items()
    }
    return dataclasses.replace(artifact, path=path, checksums=renamed)


def _check_replaceable(form: Format, path: Path) -> None:
    if form.marker is None:
        if path.is_dir():
            raise ValueError(
                f"{path} is a directory; format {form.name} writes a file, "
                f"e.g. {path / form.filename}"
            )
        return
    ours = path.is_dir() and ((path / form.marker).exists() or not any(path.iterdir()))
    if path.exists() and not ours:
        raise ValueError(f"{path} exists and is not a {form.name} directory; choose another path")


def _check_identical(name: str, written: object, read: object) -> None:
    expected, found = named_leaves(written), named_leaves(jax.device_get(read))
    if expected.keys() != found.keys():
        raise ValueError(
            f"{name}: the arrays read back are not those written: "
            f"{first_few(sorted(expected.keys() ^ found.keys()))}; it was not written"
        )
    for leaf, values in expected.items():
        if values.dtype != found[leaf].dtype or not np.array_equal(
            np.ascontiguousarray(values).view(np.uint8),
            np.ascontiguousarray(found[leaf]).view(np.uint8),
        ):
            raise ValueError(f"{name}: {leaf} differs after reading it back; it was not written")


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

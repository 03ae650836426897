"""`export`: write under another name, read back with the real runtimes, prove, rename."""

import contextlib
import importlib.metadata
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from repvgg_jax._version import __version__
from repvgg_jax.export.artefact import Artefact, checksum, size
from repvgg_jax.export.format import Format
from repvgg_jax.export.formats import get_format
from repvgg_jax.export.network import Network
from repvgg_jax.proof import Proof, compare


def export(name: str, network: Network, path: str | Path, *, dtype: str | None = None) -> Artefact:
    """Writes a deploy network in one format, and proves what it wrote.

    The artefact is written beside `path`, opened by every installed runtime of its format and
    compared with the JAX model on the network's images, one alone and the others in batches.
    Only then is it renamed to `path`; where anything fails, nothing is left and what was
    there before stays. A runtime that is not installed leaves the artefact unproven in it,
    which the result says.

    Args:
      name: of the format, one of `FORMATS`.
      network: what to write, and the images to prove it on.
      path: the file or directory to write; an older artefact there is replaced.
      dtype: what the artefact computes in, one of the format's `dtypes`; None for the first.

    Raises:
      ValueError: an unknown format or type, a package that is not installed, a target that
        cannot be written, or an artefact that disagrees with the JAX model.
    """
    form = get_format(name)
    path = Path(path)
    dtype = form.dtype(dtype)
    _check(form, network, path)
    start = time.perf_counter()
    network.reference  # noqa: B018  computed once for all formats, before anything is written
    with _beside(path) as temporary:
        try:
            form.write(network, temporary, dtype)
        except ImportError as error:
            raise ValueError(f"format {form.name}: {error}; {form.remedy}") from error
        proofs, unproven = _prove(form, network, temporary, dtype)
        artefact = Artefact(
            format=form.name,
            path=path,
            dtype=dtype,
            description=network.description(form.input_layout(network)),
            proofs=proofs,
            unproven=unproven,
            versions=_versions(*form.packages, *proofs),
            sha256=checksum(temporary),
            size=size(temporary),
            seconds=round(time.perf_counter() - start, 3),
        )
        if path.is_dir():
            path.rename(temporary.with_name("replaced"))
        temporary.rename(path)
    return artefact


def _check(form: Format, network: Network, path: Path) -> None:
    if network.with_preprocessing and not form.holds_graph:
        raise ValueError(
            f"format {form.name} holds weights and no graph in which preprocessing could travel; "
            "leave out either the format or the preprocessing"
        )
    if form.is_directory:
        ours = path.is_dir() and ((path / "saved_model.pb").exists() or not any(path.iterdir()))
        if path.exists() and not ours:
            raise ValueError(f"{path} exists and is no {form.name} directory; choose another path")
    elif path.is_dir():
        raise ValueError(
            f"{path} is a directory; format {form.name} writes a file, {path / form.filename}, say"
        )


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a directory of its own, beside `path`, that goes at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            yield Path(directory, path.name)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def _prove(
    form: Format, network: Network, path: Path, dtype: str
) -> tuple[dict[str, Proof], dict[str, str]]:
    proofs, unproven = {}, {}
    for runtime in form.runtimes:
        try:
            run = runtime.open(path, network)
        except ImportError as error:
            unproven[runtime.name] = f"{error}; {form.remedy}"
            continue
        proof = compare(
            network.comparable(network.reference),
            network.comparable(network.answers(run)),
            tolerance=form.tolerances[dtype],
        )
        if not proof.holds:
            raise ValueError(
                f"the {dtype} {form.name} artefact in {runtime.name} disagrees with the JAX "
                f"model: {proof}; {path.name} was not written"
            )
        proofs[runtime.name] = proof
        del run  # two runtimes' copies of a large network need not be alive together
    return proofs, unproven


def _versions(*modules: str) -> dict[str, str]:
    """Versions of modules that are imported by now."""
    versions = {"repvgg_jax": __version__}
    for name in modules:
        try:
            versions[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:  # tensorflow comes as tensorflow-cpu, too
            versions[name] = sys.modules[name].__version__
    return versions

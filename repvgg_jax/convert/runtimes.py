"""The artifacts of a deploy directory, run by the runtimes that they are for."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from repvgg_jax.export import FORMATS, Network, Normalize
from repvgg_jax.export.format import Format, Runtime
from repvgg_jax.text import did_you_mean

_ALSO = {"stablehlo": "jax", "litert": "ai_edge_litert", "tflite": "ai_edge_litert"}
_ALSO |= {"onnx": "onnxruntime", "savedmodel": "tensorflow"}

_RUNTIMES = tuple(
    dict.fromkeys(runtime.name for form in FORMATS.values() for runtime in form.runtimes)
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `--runtime` asks for.

    Attributes:
      text: as it was given.
      runtime: the module to import.
      dtype: of the artifact; None for the first there is.
    """

    text: str
    runtime: str
    dtype: str | None

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """A runtime or a format, e.g. `onnxruntime`, `stablehlo` or `openvino:float16`.

        Raises:
          ValueError: there is no such runtime.
        """
        name, _, dtype = text.partition(":")
        runtime = _ALSO.get(name, name)
        if runtime not in _RUNTIMES:
            known = (*_RUNTIMES, *_ALSO)
            raise ValueError(
                f"--runtime={text} is unknown; {did_you_mean(name, known)}there are "
                f"{', '.join(_RUNTIMES)}; a dtype may follow, e.g. onnxruntime:float16"
            )
        return cls(text, runtime, dtype or None)

    def find(self, artifacts: Sequence[Mapping[str, Any]], path: pathlib.Path) -> Mapping[str, Any]:
        """The first artifact that it runs, of those that `proof.json` lists and that are there.

        Raises:
          ValueError: there is none.
        """
        for artifact in artifacts:
            if (
                self.runs(artifact)
                and self.dtype in (None, artifact["dtype"])
                and (path / artifact["path"]).exists()
            ):
                return artifact
        there = [f"{each['format']}:{each['dtype']}" for each in artifacts]
        able = [form.name for form in FORMATS.values() if self._of(form) is not None]
        raise ValueError(
            f"{path} has nothing for --runtime={self.text}, only {', '.join(there) or 'weights'}; "
            f"python convert.py --from {path} --output {path} --format {able[0]} adds it"
        )

    def runs(self, artifact: Mapping[str, Any]) -> bool:
        """Whether an artifact is of a format that the runtime is for."""
        form = FORMATS.get(artifact["format"])
        return form is not None and self._of(form) is not None

    def _of(self, form: Format) -> Runtime | None:
        return next((each for each in form.runtimes if each.name == self.runtime), None)

    def open(
        self,
        path: pathlib.Path,
        artifact: Mapping[str, Any],
        model: Any,
        variables: Any,
        normalize: Normalize,
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Opens an artifact: uint8 images (images, height, width, channels) to probabilities.

        Args:
          path: the deploy directory.
          artifact: its row in `proof.json`.
          model: the network in it.
          variables: of the model.
          normalize: pixels to what the model takes.

        Raises:
          ValueError: the runtime is not installed, or the artifact returns no classes.
        """
        form, about = FORMATS[artifact["format"]], artifact["description"]
        if about["output"] not in ("logits", "probabilities"):
            raise ValueError(f"{path / artifact['path']} returns {about['output']}, not classes")
        inside = about["input_dtype"] == "uint8"
        shape = (*about["image_size"], about["channels"])
        network = Network(
            model,
            variables,
            images=np.zeros((1, *shape), np.uint8),
            normalize=normalize,
            with_preprocessing=inside,
        )
        runtime = self._of(form)
        assert runtime is not None
        try:
            run = runtime.open(path / artifact["path"], network)
        except ImportError as error:
            raise ValueError(f"--runtime={self.text}: {error}; {form.remedy}") from error

        def probabilities(images: np.ndarray) -> np.ndarray:
            if images.shape[1:] != shape and not about["dynamic_size"]:
                raise ValueError(
                    f"images of {images.shape[1]}x{images.shape[2]} pixels, but {artifact['path']} "
                    f"takes {shape[0]}x{shape[1]}"
                )
            outputs = np.asarray(run(images if inside else np.asarray(normalize(images))))
            if about["output"] == "probabilities":
                return outputs
            exponentials = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
            return exponentials / exponentials.sum(axis=-1, keepdims=True)

        return probabilities

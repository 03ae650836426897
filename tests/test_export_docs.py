"""The Python of docs/deploy.md does what the page says, in its own words."""

import re
from pathlib import Path

import numpy as np
import pytest

from repvgg_jax.export import FORMATS, export
from tests import export_networks as nets

PAGE = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
RUNTIMES = {
    "ONNX Runtime": ("onnx", ("onnx", "onnxruntime", "openvino")),
    "OpenVINO": ("onnx", ("onnx", "onnxruntime", "openvino")),
    "Phones": ("tflite", ("tensorflow", "ai_edge_litert")),
    "TensorFlow": ("savedmodel", ("tensorflow",)),
    "JAX without this package": ("stablehlo", ()),
    "From Python": ("onnx", ("onnx", "onnxruntime", "openvino")),
}


def blocks(section: str) -> list[str]:
    """The Python of a section of the page."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_every_section_with_python_is_tested():
    sections = re.findall(r"^## (.*)$", PAGE, re.M)
    assert [name for name in sections if blocks(name)] == list(RUNTIMES)


def test_the_table_lists_every_format():
    rows = re.findall(r"^\| `(\w+)` \| `(\S+?)/?` \|.*?\| (.*?) ?\|$", PAGE, re.M)
    wanted = [
        (form.name, form.filename, f"`{form.remedy}`" if form.extra else "")
        for form in FORMATS.values()
    ]
    assert rows == wanted


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # short examples
@pytest.mark.parametrize("section", RUNTIMES)
def test_the_examples_answer_like_the_train_form(section, tmp_path, monkeypatch):
    name, modules = RUNTIMES[section]
    for module in modules:
        extra = FORMATS[name].extra
        pytest.importorskip(module, reason=f'needs pip install "repvgg-jax[{extra}]"')
    monkeypatch.chdir(tmp_path)
    network = nets.network("plain")
    export(name, network, Path("deploy", FORMATS[name].filename))
    given = {
        "images": nets.images(),
        "network": network,
        "normalised": network.images,
        **{"variant": nets.variant(), "variables": nets.variables("plain")},
        **{"mean": nets.MEAN, "std": nets.STD, "labels": nets.LABELS},
    }
    for block in blocks(section):
        exec(compile(block, f"docs/deploy.md, {section}", "exec"), given)
    if section == "From Python":
        assert sorted(path.name for path in Path("bytes").iterdir()) == [
            "model.onnx",
            "model.stablehlo",
        ]
    else:
        assert isinstance(given["logits"], np.ndarray)
        assert nets.relative(nets.expected("plain"), given["logits"]) <= 1e-5

"""LiteRT and SavedModel: NHWC all the way, any batch size, the same answers."""

import itertools
import json
import zipfile

import jax
import numpy as np
import pytest

from repvgg_jax.export import export
from tests.helpers import export_networks as nets

EXTRA = "needs requirements-tf.txt"
tf = pytest.importorskip("tensorflow", reason=EXTRA)
litert = pytest.importorskip("ai_edge_litert.interpreter", reason=EXTRA)


def operators(path):
    interpreter = litert.Interpreter(
        model_path=str(path),
        # Without the delegate, which hides the operators that it takes over.
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    return [op["op_name"] for op in interpreter._get_ops_details()]


def lite(path):
    return litert.Interpreter(model_path=str(path)).get_signature_runner("serving_default")


def saved(path):
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    return lambda images: {k: v.numpy() for k, v in signature(images=tf.constant(images)).items()}


RUNTIMES = {"tflite": lite, "savedmodel": saved}


@pytest.mark.parametrize("kind", [*nets.KINDS, *nets.ACTIVATED])
@pytest.mark.parametrize("name", RUNTIMES)
def test_float32_is_the_train_form_at_every_batch_size(name, kind):
    network, artifact = nets.network(kind), nets.artifact(name, kind)
    assert artifact.proven
    assert all(proof.relative <= 1e-5 for proof in artifact.proofs.values())
    run = RUNTIMES[name](artifact.path)
    for count in (1, 7):
        found = run(images=network.images[:count])
        assert found.keys() == {"features" if kind == "features" else "logits"}
        (found,) = found.values()
        assert nets.relative(nets.expected(kind)[:count], found) <= 1e-5


@pytest.mark.parametrize("kind", nets.KINDS)
def test_tflite_moves_nothing_about(kind):
    found = operators(nets.artifact("tflite", kind).path)
    # Convolutions stay whole, grouped and dilated ones too; only stride 2 pads by hand.
    gate = ["MEAN", "CONV_2D", "CONV_2D", "LOGISTIC", "MUL"] if kind.startswith("se") else []
    strides = (2, 1, 1, 1, 1, 1) if kind == "dilated" else (2, 2, 1, 2, 1, 1)
    trunk = [[*(["PAD"] if stride == 2 else []), "CONV_2D", *gate] for stride in strides]
    head = ["MEAN"] if kind == "features" else ["MEAN", "FULLY_CONNECTED"]
    # (A ReLU is part of the operator before it.)
    assert found == [*itertools.chain(*trunk), *head]


@pytest.mark.parametrize("kind", ["plain", "se-before"])
def test_tflite_float16_is_close_and_smaller(kind):
    network = nets.network(kind)
    full, half = nets.artifact("tflite", kind), nets.artifact("tflite", kind, "float16")
    found = lite(half.path)(images=network.images)["logits"]
    assert 0 < nets.relative(nets.expected(kind), found) <= 5e-3
    # Two bytes a parameter less, but for the graph, which is a good part of so small a network.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    assert 1.2 * parameters < full.size - half.size <= 2 * parameters


@pytest.mark.parametrize("name", RUNTIMES)
def test_preprocessing_travels_inside(name):
    path = nets.artifact(name, "plain", with_preprocessing=True).path
    found = RUNTIMES[name](path)(images=nets.images())["probabilities"]
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    wanted = nets.softmax(nets.expected("plain"))
    assert nets.relative(nets.log(wanted), nets.log(found)) <= 1e-5


def test_descriptions_travel_along():
    with zipfile.ZipFile(nets.artifact("tflite", "plain").path) as archive:
        inside = json.loads(archive.read("metadata.json"))
        assert archive.read("labels.txt").decode().split() == list(nets.LABELS)
    path = nets.artifact("savedmodel", "plain").path
    assert json.loads((path / "assets.extra/metadata.json").read_text()) == inside
    assert tuple(inside["mean"]) == nets.MEAN
    assert inside["input_layout"] == "NHWC"


def test_savedmodel_replaces_its_like_and_nothing_else(tmp_path):
    network = nets.network("plain")
    first = export("savedmodel", network, tmp_path / "saved")
    (first.path / "leftover").write_text("of the older one")
    again = export("savedmodel", network, first.path)
    assert not (again.path / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not lose")
    with pytest.raises(ValueError, match="not a savedmodel directory"):
        export("savedmodel", network, mine)
    assert (mine / "thesis.txt").exists()

"""Evaluation without training: the same numbers as at the end of training, in both forms."""

import dataclasses
import json
import logging
import shutil
import types

import jax
import numpy as np
import pytest

from repvgg_jax import fuse_params, save_weights
from repvgg_jax.data.batches import eval_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.train import evaluate
from repvgg_jax.train.evaluate import evaluate_only
from repvgg_jax.train.loop import train
from repvgg_jax.train.other_labels import RealLabels
from repvgg_jax.train.restore import load_run
from tests.helpers.runs import SMALL, final_state, rows, small_config


def test_a_run(small_run):
    found = evaluate_only(small_config(), small_run[0])
    last = rows(small_run[0])[-1]
    for name in ("accuracy", "loss", "top5"):
        assert found.trained[name] == pytest.approx(last[f"final/{name}"], rel=1e-6)
        assert found.fused[name] == pytest.approx(last[f"final/{name}_fused"], rel=1e-6)
    lines = found.lines(by_class=True)
    assert lines[0] == f"step 22 of {small_run[0]}: 360 images"
    assert len(lines) == 2 + 4 + 1 + 10


def test_an_earlier_step_at_another_batch(small_run):
    found = evaluate_only(small_config(eval__batch_size=360), small_run[0], step=11)
    row = next(r for r in rows(small_run[0]) if r["step"] == 11 and "eval/loss" in r)
    assert found.trained["accuracy"] == pytest.approx(row["eval/accuracy"], rel=1e-6)


def test_a_file(small_run, tmp_path):
    variables = final_state(small_run[0]).variables
    save_weights(tmp_path / "w.npz", fuse_params(variables), family="flax", variant=SMALL)
    nothing = tmp_path / "nothing"
    found = evaluate_only(small_config(), nothing, init_from=str(tmp_path / "w.npz"))
    last = rows(small_run[0])[-1]
    assert found.fused["accuracy"] == pytest.approx(last["final/accuracy_fused"], rel=1e-6)


def test_a_head_of_other_classes(small_run, tmp_path):
    variables = final_state(small_run[0]).variables
    head = {"kernel": np.zeros((16, 7), np.float32), "bias": np.zeros(7, np.float32)}
    other = {**variables, "params": {**variables["params"], "head": head}}
    save_weights(tmp_path / "w.npz", other, family="flax", variant=SMALL)
    with pytest.raises(ValueError, match=r"no head for the 10 classes of digits"):
        evaluate_only(small_config(), tmp_path / "nothing", init_from=str(tmp_path / "w.npz"))


def test_variances_that_cannot_be(small_run, tmp_path):
    variables = final_state(small_run[0]).variables
    statistics = variables["batch_stats"]["stem"]["bn3x3"]
    statistics["var"] = -np.ones_like(statistics["var"])
    save_weights(tmp_path / "w.npz", variables, family="flax", variant=SMALL)
    with pytest.raises(ValueError, match=r"stem/bn3x3.*-1"):
        evaluate_only(small_config(), tmp_path / "nothing", init_from=str(tmp_path / "w.npz"))


def test_another_network(small_run):
    with pytest.raises(ValueError, match=r"config\.ema\.decay: 0.0 -> 0.9"):
        evaluate_only(small_config(ema__decay=0.9), small_run[0])


def test_another_optimizer_makes_no_difference(small_run):
    other = small_config(optimizer__name="adamw", optimizer__clip_norm=1.0)
    found = evaluate_only(other, small_run[0])
    assert found.trained["accuracy"] == small_run[1].accuracy


def test_a_fine_tuned_run_is_not_what_it_started_from(small_run):
    found = evaluate_only(small_config(init_from="somebody.pth"), small_run[0])
    assert found.source == f"step 22 of {small_run[0]}"
    assert found.trained["accuracy"] == small_run[1].accuracy


def test_a_run_without_a_checkpoint(small_run, tmp_path):
    shutil.copytree(small_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"no checkpoint"):
        evaluate_only(small_config(), tmp_path / "run")


def test_images_that_cannot_be_decoded_are_not_counted(small_run, tmp_path, monkeypatch, caplog):
    def one_is_bad(*args, **options):
        for number, batch in enumerate(eval_batches(*args, **options)):
            bad = np.arange(len(batch["mask"])) == (3 if number == 0 else -1)
            yield {**batch, "mask": batch["mask"] & ~bad}

    monkeypatch.setattr(evaluate, "eval_batches", one_is_bad)
    shutil.copytree(small_run[0], tmp_path / "run")
    found = evaluate_only(small_config(), tmp_path / "run")
    assert found.lines()[0] == f"step 22 of {tmp_path / 'run'}: 359 of 360 images"
    caplog.set_level(logging.INFO, logger="repvgg_jax")
    outcome = train(small_config(), tmp_path / "run")
    assert "fused (359 of 360 images)" in caplog.text
    assert outcome.accuracy == found.trained["accuracy"]
    right = outcome.accuracy * 359
    assert right == pytest.approx(round(right), abs=1e-3)


def test_no_such_step(small_run):
    with pytest.raises(ValueError, match=r"step 5.* 11, 22"):
        evaluate_only(small_config(), small_run[0], step=5)


def test_data_with_other_classes(small_run):
    other = small_config(data__source="fake", data__mean=(0.5,) * 3, data__std=(0.3,) * 3)
    with pytest.raises(ValueError, match=r"fake has other.* 10 classes -> 4"):
        evaluate_only(other, small_run[0])


@pytest.fixture(scope="module")
def evaluation(small_run):
    return evaluate_only(small_config(), small_run[0])


def test_what_an_evaluation_leaves_behind(evaluation, small_run, tmp_path):
    """The worst images and the confused pairs are those of the network, applied here."""
    written = evaluation.write(tmp_path)
    assert [path.name for path in written] == [
        "evaluation.json", "evaluation_confusion.png", "evaluation_worst.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    content = json.loads(written[0].read_text())
    run = load_run(small_run[0])
    source = load(run.settings.data).evaluation
    pixels = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.asarray([source[i]["label"] for i in range(len(source))])
    log = np.asarray(jax.nn.log_softmax(run.model.apply(run.variables, run.normalize(pixels))))
    loss, predicted = -log[np.arange(len(labels)), labels], log.argmax(-1)
    assert content["fused"]["accuracy"] == pytest.approx((predicted == labels).mean())
    assert content["worst"][0]["number"] == loss.argmax()
    assert [row["loss"] for row in content["worst"]] == pytest.approx(
        sorted(loss, reverse=True)[:100], abs=1e-4
    )
    first = content["worst"][0]
    assert first["class"] == str(labels[first["number"]])
    assert first["predicted"] == str(predicted[first["number"]])
    pairs = {(row["class"], row["taken_for"]): row["images"] for row in content["confused"]}
    assert sum(pairs.values()) == (predicted != labels).sum() > 0
    for (of, other), count in pairs.items():
        assert count == ((labels == int(of)) & (predicted == int(other))).sum()
    counts = [row["images"] for row in content["confused"]]
    assert counts == sorted(counts, reverse=True)


def test_classes_whose_names_are_not_utf8(evaluation, tmp_path):
    names = ("caf\udce9", *evaluation.classes[1:])
    written = dataclasses.replace(evaluation, classes=names).write(tmp_path)
    content = json.loads(written[0].read_text(encoding="utf-8"))
    assert content["classes"][0]["class"] == names[0]
    assert len(written) == 3


def test_a_map_of_classes(evaluation, small_run, tmp_path):
    """Classes that become others are counted as those; several may become one."""
    table = {str(digit): (digit + 1) % 10 for digit in range(9)} | {"9": "1"}
    (tmp_path / "map.json").write_text(json.dumps(table))
    found = evaluate_only(small_config(), small_run[0], class_map=str(tmp_path / "map.json"))
    matrix = evaluation.fused["confusion"]
    targets = [*range(1, 10), 1]
    right = sum(matrix[label, target] for label, target in enumerate(targets))
    assert found.fused["accuracy"] == pytest.approx(right / 360)
    assert found.fused["class_images"][1] == matrix[0].sum() + matrix[9].sum()
    same = evaluate_only(small_config(), small_run[0], class_map="numbers")
    assert same.fused["accuracy"] == evaluation.fused["accuracy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": 1}', r"lacks 9 of 10 classes of digits: 1, 2"),
        (json.dumps({str(digit): 10 for digit in range(10)}), r"'0' becomes '10'.* 0 to 9"),
        ("[1, 2]", "JSON object"),
        ("no JSON", r"--class_map=.* cannot be read"),
    ],
)
def test_maps_that_cannot_be_used(small_run, tmp_path, content, message):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_only(small_config(), small_run[0], class_map=str(tmp_path / "map.json"))


def test_sets_of_labels(evaluation, small_run, tmp_path):
    """Any of an image's labels is right; images without labels do not count."""
    predicted, labels = (evaluation.images[name] for name in ("predicted", "label"))
    wrong = int(np.flatnonzero(predicted[1:] != labels[1:])[0]) + 1
    sets = {str(wrong): [int(labels[wrong]), int(predicted[wrong])], "0": []}
    sets |= {str(number): [int(labels[number])] for number in range(1, 360) if number != wrong}
    (tmp_path / "real.json").write_text(json.dumps(sets))
    found = evaluate_only(small_config(), small_run[0], real_labels=str(tmp_path / "real.json"))
    counted = np.arange(360) > 0
    right = (predicted == labels) & counted
    assert found.fused["real_accuracy"] == pytest.approx((right.sum() + 1) / 359)
    assert any(line.startswith("real_accuracy") for line in found.lines())


def test_numbers_of_images_in_words():
    assert evaluate.counted({"images": np.float32(1)}, 1) == "1 image"
    assert evaluate.counted({"images": np.float32(1)}, 2000) == "1 of 2,000 images"
    assert evaluate.counted({"images": np.float32(2000)}, 2000) == "2,000 images"


def test_labels_of_imagenet_by_number():
    """ReaL's list is in the order of the numbers in ImageNet's file names."""
    names = ["val/n1/ILSVRC2012_val_00000002.JPEG", "val/n2/ILSVRC2012_val_00000001_n2.JPEG"]
    source = types.SimpleNamespace(names=np.array([name.encode() for name in names]))
    sets = RealLabels({"ILSVRC2012_val_00000001": {3}, "ILSVRC2012_val_00000002": {4, 5}}, "")
    found = sets.accuracy(source, [np.array([5, 4]), np.array([4, 3])], np.array([True, True]))
    assert found == ([0.5, 1.0], 2)


def test_sets_of_labels_of_other_images(small_run, tmp_path):
    (tmp_path / "real.json").write_text("[[1], [2]]")
    with pytest.raises(ValueError, match=r"real\.json names none of the 360 images"):
        evaluate_only(small_config(), small_run[0], real_labels=str(tmp_path / "real.json"))
    (tmp_path / "real.json").write_text("[[1], [12]]")
    with pytest.raises(ValueError, match=r"the label 12, but the network has 10"):
        evaluate_only(small_config(), small_run[0], real_labels=str(tmp_path / "real.json"))

"""Checkpoint files: every format, and files that are damaged, hostile or something else."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import struct
import types
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import repvgg_jax as rv
from repvgg_jax.weights import archive, files, unpickle
from tests.helpers import pth_writer
from tests.helpers.weights_samples import (
    CLASSES,
    TINY,
    assert_identical,
    random_weights,
    refusal,
)

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def variables():
    return random_weights(TINY)


@pytest.fixture(scope="module")
def state(variables):
    return rv.to_state_dict(variables, variant=TINY)


FORMATS = ("safetensors", "npz", "npz-compressed", "pth", "pth-legacy")


def write(path, state):
    """A file of the format that its name says, without PyTorch."""
    if path.name == "safetensors":
        safetensors.numpy.save_file(state, path)
    elif path.name == "npz":
        with open(path, "wb") as file:
            np.savez(file, **state)
    elif path.name == "npz-compressed":
        with open(path, "wb") as file:
            np.savez_compressed(file, **state)
    elif path.name == "pth":
        pth_writer.write_zip(path, state)
    elif path.name == "pth-legacy":
        pth_writer.write_legacy(path, state)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_detected_by_its_contents(kind, tmp_path, state, variables):
    loaded = rv.load_weights(write(tmp_path / kind, state), variant=TINY)
    assert (loaded.variant, loaded.deploy, loaded.num_classes) == ("tiny", False, CLASSES)
    assert loaded.family == "official"
    assert_identical(loaded.variables, variables)


@pytest.mark.parametrize("kind", ["pth", "pth-legacy"])
def test_wrappers_in_files(kind, tmp_path, state, variables):
    path = tmp_path / "wrapped.pth"
    writer = pth_writer.write_zip if kind == "pth" else pth_writer.write_legacy
    writer(path, state, wrapper="state_dict")
    assert_identical(rv.load_weights(path, variant=TINY).variables, variables)


def test_files_of_big_endian_machines(tmp_path, state, variables):
    path = tmp_path / "big.pth"
    pth_writer.write_zip(path, state, byteorder="big")
    assert_identical(rv.load_weights(path, variant=TINY).variables, variables)


def test_half_precision_is_widened_exactly_and_double_is_rounded(tmp_path, state):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        cast = {k: v.astype(dtype) if v.ndim else v for k, v in state.items()}
        write(tmp_path / "safetensors", cast)
        loaded = rv.load_weights(tmp_path / "safetensors", variant=TINY)
        kernel = loaded.variables["params"]["stem"]["conv3x3"]["kernel"]
        expected = cast["stage0.rbr_dense.conv.weight"].astype(np.float32).transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel, expected, strict=True)


def test_loaded_arrays_are_copies(tmp_path, state):
    path = write(tmp_path / "pth", state)
    loaded = rv.load_weights(path, variant=TINY)
    path.unlink()
    leaf = loaded.variables["params"]["stem"]["bn3x3"]["scale"]
    assert leaf.flags.owndata
    leaf[:] = 0  # neither read-only nor a view of the file


# Variables of any module.


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_variables_of_any_module(suffix, tmp_path):
    tree = {
        "params": {
            "neck": {"conv": {"kernel": np.ones((3, 3, 2, 4), np.float32)}},
            "w": np.ones(2),
        },
        "batch_stats": {"norm": {"mean": np.arange(4, dtype=np.float16)}},
        "counts": {"steps": np.int32(7)},
    }
    path = tmp_path / f"mine{suffix}"
    rv.save_variables(path, jax.tree.map(jnp.asarray, tree) if suffix == ".npz" else tree)
    expected = jax.tree.map(np.asarray, tree)
    if suffix == ".npz":  # as JAX keeps it
        expected["params"]["w"] = expected["params"]["w"].astype(np.float32)
    assert_identical(rv.load_variables(path, like=tree), expected)
    assert_identical(rv.load_variables(path), expected)
    del tree["counts"]
    tree["params"]["w"] = np.ones(3)
    with pytest.raises(ValueError, match=r"1 unexpected \[counts/steps\]; 1 misshaped \[params/w"):
        rv.load_variables(path, like=tree)


def test_variables_that_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="params/a is a str"):
        rv.save_variables(tmp_path / "a.npz", {"params": {"a": "?"}})
    with pytest.raises(ValueError, match="params/a has dtype complex64"):
        rv.save_variables(tmp_path / "a.npz", {"params": {"a": np.complex64(1)}})
    with pytest.raises(ValueError, match=r"params/a has dtype bool; .* int32, int64, uint32$"):
        rv.save_variables(tmp_path / "a.npz", {"params": {"a": np.ones(1, bool)}})
    with pytest.raises(ValueError, match="'params/' has an empty part"):
        rv.save_variables(tmp_path / "a.npz", {"params": {"": np.ones(1, np.float32)}})
    with pytest.raises(ValueError, match="suffix"):
        rv.save_variables(tmp_path / "a.bin", {"params": {"a": np.ones(1)}})
    assert not list(tmp_path.iterdir())
    np.savez(tmp_path / "b.npz", **{"params": np.ones(1), "params/a": np.ones(1)})
    with pytest.raises(ValueError, match="not form a tree"):
        rv.load_variables(tmp_path / "b.npz")
    pth_writer.write_zip(tmp_path / "c.pth", {"a": np.ones(1, np.float32)}, wrapper="model")
    with pytest.raises(ValueError, match="flat mapping"):
        rv.load_variables(tmp_path / "c.pth")


# Damaged files and files of something else.


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95, 0.999])
def test_truncated_files(kind, share, tmp_path, state):
    path = write(tmp_path / kind, state)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert refusal(path)


@pytest.mark.parametrize("kind", ["npz", "npz-compressed", "pth"])
def test_a_flipped_bit_is_detected_if_the_format_has_checksums(kind, tmp_path, state):
    path = write(tmp_path / kind, state)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.compress_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.compress_size // 2 + 150] ^= 0x10
    path.write_bytes(data)
    message = refusal(path)
    assert "checksum" in message or "CRC" in message or "decompress" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>Google Drive", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 99, "an HDF5 file"),
        (b"\x93NUMPY\x01\x00" + b"0" * 99, "a single .npy array"),
        (b"\x00" * 4096, "first bytes are 00 00"),
        (b"PK\x03\x04" + b"\x00" * 100, "not a zip file"),
        (b"\xff" * 8 + b"{}", "not a safetensors, .npz or .pth file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no arrays"),
        (b"\x80\x02K\x01.", "not a PyTorch checkpoint"),
        (b"\x80\x02", "not a safetensors, .npz or .pth file"),
        (b"\x80\x04\x95" + b"\xff" * 20, "damaged pickle"),
    ],
)
def test_files_of_something_else(content, reason, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_paths_without_a_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")
    assert "a directory" in refusal(tmp_path)


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    for path in (tmp_path / "weights.pth", pathlib.Path("/dev/zero")):
        assert "a pipe or a device" in refusal(path)


def test_a_zip_of_something_else(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", b"...")
    assert "holiday.jpg" in refusal(path)


def test_a_compressed_pth_is_refused(tmp_path, state):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pth_writer.state_pickle(state) * 10)
    assert "compressed" in refusal(path)


class Evil:
    """Runs a command when Python's own unpickler reads it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
def test_a_pickle_that_would_run_code_runs_nothing(protocol, container, tmp_path):
    target = tmp_path / "it-ran"
    evil = pickle.dumps({"state_dict": {"a": Evil(target)}}, protocol=protocol)
    path = tmp_path / "weights.pth"
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
    else:
        path.write_bytes(pth_writer.LEGACY + evil if container == "legacy" else evil)
    message = refusal(path)
    if container == "zip":
        assert f"a (a pickled {os.name}.system)" in message
        assert "nothing in the file was run" in message
    assert not target.exists()
    pickle.loads(evil)  # the file would have done it
    assert target.exists()


BESIDE = {
    "args": argparse.Namespace(lr=0.1),
    "config": types.SimpleNamespace(model={"depth": 3}),
    "accuracy": np.float64(71.5),
    "history": np.arange(3),
    "seen": {1, 2},
    "frozen": frozenset("ab"),
    "counts": collections.Counter("aab"),
    "defaults": collections.defaultdict(list, a=[1]),
    "order": collections.OrderedDict(a=1),
    "z": 1j,
    "raw": b"\xff",
    "array": bytearray(b"\xff"),
    "dtype": np.dtype("float32"),
    "path": pathlib.PurePosixPath("runs"),
    "pairs": {(0, 1): "a tuple as key"},
    "when": datetime.datetime(2026, 11, 26, tzinfo=datetime.UTC),
    "class": argparse.Namespace,
    "huge": 1 << 200,
    "none": None,
}
"""What training programs save beside weights."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_lies_beside_the_weights_is_inert_and_listed(protocol, tmp_path, state, variables):
    beside = pickle.dumps({**BESIDE, "evil": Evil(tmp_path / "it-ran")}, protocol=protocol)
    path = tmp_path / "weights.pth"
    pth_writer.write_zip(path, state, wrapper="state_dict", beside=beside)
    loaded = rv.load_weights(path, variant=TINY)
    assert_identical(loaded.variables, variables)
    assert {"argparse.Namespace", f"{os.name}.system"} <= set(loaded.placeholders)
    assert "a dictionary key of type tuple" in loaded.placeholders
    assert loaded.unused == ("beside (a dict)",)
    assert not (tmp_path / "it-ran").exists()


def test_a_weight_that_depends_on_an_object_is_refused(tmp_path, state):
    key = "stage1.0.rbr_dense.conv.weight"
    path = tmp_path / "weights.pth"
    quantized = b"ctorch._utils\n_rebuild_qtensor\n)R"
    pth_writer.write_zip(path, state, replaced={key: quantized})
    message = refusal(path)
    assert f"1 missing [{key}]" in message
    assert f"{key} is a pickled torch._utils._rebuild_qtensor" in message


@pytest.mark.parametrize(
    ("opcodes", "reason"),
    [
        (b"cbuiltins\neval\n", "contains a pickled builtins.eval"),
        (b"cbuiltins\neval\n(VX\ntR", "contains a pickled builtins.eval"),
        (b"(ios\nsystem\n", "contains a pickled os.system"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "contains a pickled os.system"),
        (b"cos\nsystem\n)\x81}b", "contains a pickled os.system"),
        (b"cos\nsystem\n)}\x92", "contains a pickled os.system"),
        (b"ccollections\nOrderedDict\n)\x81", "contains a pickled collections.OrderedDict"),
        (b"\x82\x01", "contains a pickled extension 1"),
        (b"(ccollections\nOrderedDict\no", "contains a pickled collections.OrderedDict"),
        (b"\x8f(K\x01\x90", "contains a pickled builtins.set"),
        (b"K\x01)R", "not a function"),
        (b"ctorch\nFloatStorage\n)R", "contains a pickled torch.FloatStorage"),
        (b"K\x01N\x62", "not an object"),
        (b"}((K\x01tK\x02u", "contains no arrays"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR", "not made of a storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nN)R", "not a function"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nNR", "invalid arguments"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(cos\nx\nNNNtR", "contains a pickled os.x"),
        (b"K\x01K\x02a", "not a list"),
        (b"0", "damaged pickle"),
        (b"h\x07", "damaged pickle"),
        (b"r\xff\xff\xff\xff", "damaged pickle"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged pickle"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x0f", "damaged pickle"),
        (b"\x97", "damaged pickle"),
        (b"I" + b"9" * 9999 + b"\n", "damaged pickle"),
        (b"Np" + b"9" * 99 + b"\n", "a memo index out of range"),
        (b"K\x01Q", "persistent identifier"),
        (b"Pabc\n", "persistent identifier"),
    ],
)
def test_hostile_opcodes(opcodes, reason, tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes + b".")
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("MAX_OPCODES", 50, "more than 50 opcodes"),
        ("MAX_SECONDS", -1, "takes more than -1 s"),
        ("_MAX_CALLS", 10, "more than 5 tensors"),
        ("_MAX_KINDS", 0, "more than 0 classes"),
    ],
)
def test_a_pickle_has_limits(limit, value, reason, tmp_path, state, monkeypatch):
    """Files that really need so much are in tests/helpers/hostile.py."""
    monkeypatch.setattr(unpickle, limit, value)
    path = tmp_path / "weights.pth"
    beside = pickle.dumps([argparse.Namespace(), BESIDE])
    pth_writer.write_zip(path, state, wrapper="state_dict", beside=beside)
    assert reason in refusal(path)


@pytest.mark.parametrize("key", [(1 << 61) - 1, 1 << 4000, "x" * 300, b"x" * 300])
def test_keys_that_could_collide_or_compare_slowly_are_dropped(key):
    content = io.BytesIO(pickle.dumps({key: 1, "a": 2, 3: 4, -5: 6}, protocol=2))
    assert unpickle.unpickle(content, {}).value == {"a": 2, 3: 4, -5: 6}


def test_zip_bombs(tmp_path, state):
    path = tmp_path / "weights.npz"
    with open(path, "wb") as file:
        np.savez_compressed(file, **state, zeros=np.zeros(80 << 18, np.float32))
    assert "expand to" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", b"x" * 999)
    assert "compressed in a way" in refusal(path)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("npz", "_MAX_ARRAYS"), ("safetensors", "_MAX_ARRAYS"), ("safetensors", "_MAX_HEADER")],
)
def test_files_of_more_arrays_than_a_network_has(kind, limit, tmp_path, state, monkeypatch):
    monkeypatch.setattr(files, limit, 5)
    assert "at most 5" in refusal(write(tmp_path / kind, state))


@pytest.mark.parametrize("kind", ["npz", "pth"])
def test_an_archive_with_a_directory_of_many_records(kind, tmp_path, state, monkeypatch):
    monkeypatch.setattr(archive, "_MAX_DIRECTORY", 500)
    assert "directory" in refusal(write(tmp_path / kind, state))


def test_records_that_overlap(tmp_path, state):
    path = write(tmp_path / "pth", state)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as opened:
        start = opened.start_dir
    # Every entry of the directory twice more; the counts are in its end.
    end = data.rindex(b"PK\x05\x06")
    count, size, offset = struct.unpack("<HII", data[end + 10 : end + 20])
    tail = struct.pack("<HHII", 3 * count, 3 * count, 3 * size, offset) + data[end + 20 :]
    path.write_bytes(data[:start] + data[start:end] * 3 + data[end : end + 8] + tail)
    assert "its records take" in refusal(path)


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides", "reason"),
    [
        (4, 0, (5,), (1,), "does not fit into its storage"),
        (4, 2, (3,), (1,), "does not fit into its storage"),
        (4, 0, (2, 2), (3, 1), "does not fit into its storage"),
        (4, 0, (1 << 30, 1 << 30), (0, 0), "does not fit into its storage"),
        (4, -1, (2,), (1,), "invalid tensor offset"),
        (4, 0, (-2,), (1,), "invalid tensor offset"),
        (4, 0, (2,), (-1,), "invalid tensor offset"),
        (4, 0, (2,), (1, 1), "invalid tensor offset"),
        (4, 0, (1 << 80,), (1,), "invalid tensor offset"),
        (4, 0, (1,), (1 << 80,), "invalid tensor offset"),
        (4, 1 << 80, (1,), (1,), "invalid tensor offset"),
        (1 << 30, 0, (2,), (1,), "has 16 bytes, not 1073741824 elements"),
    ],
)
def test_tensors_that_lie_about_their_storage(numel, offset, shape, strides, reason, tmp_path):
    def numbers(values):
        return b"(" + b"".join(map(pth_writer.integer, values)) + b"t"

    storage = b"(" + pth_writer.text("storage") + b"ctorch\nFloatStorage\n"
    storage += pth_writer.text("0") + pth_writer.text("cpu") + pth_writer.integer(numel) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + pth_writer.integer(offset)
    tensor += numbers(shape) + numbers(strides) + b"\x89NtR"
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + tensor + b".")
        archive.writestr("archive/data/0", np.ones(4, np.float32).tobytes())
    assert reason in refusal(path)


def test_npz_records_that_lie_about_their_size(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    )
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("linear.bias.npy", header.getvalue())
    assert "is not an array of shape (1099511627776,), float32" in refusal(path)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.array([Evil(tmp_path / "it-ran")], dtype=object))
    assert "is not an array of shape" in refusal(path)
    assert not (tmp_path / "it-ran").exists()

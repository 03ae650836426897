"""Checkpoint files: every format, and files that are damaged, hostile or something else."""

import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import repvgg_jax as rv
from tests.helpers import pth_writer
from tests.helpers.weights_samples import (
    CLASSES,
    TINY,
    assert_identical,
    random_variables,
    refusal,
)

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def variables():
    return random_variables(TINY)


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
def test_a_pickle_that_would_run_code_is_refused(protocol, container, tmp_path):
    target = tmp_path / "it-ran"
    evil = pickle.dumps({"state_dict": {"a": Evil(target)}}, protocol=protocol)
    path = tmp_path / "weights.pth"
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
    else:
        headers = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        legacy = b"".join(pickle.dumps(header, protocol=2) for header in headers)
        path.write_bytes(legacy + evil if container == "legacy" else evil)
    message = refusal(path)
    if container == "bare" and protocol < 2:
        assert "not a safetensors" in message
    else:
        assert f"its pickle asks for {os.name}.system" in message
        assert "no code was run" in message
    assert not target.exists()
    pickle.loads(evil)  # the file would have done it
    assert target.exists()


@pytest.mark.parametrize(
    ("opcodes", "reason"),
    [
        (b"cbuiltins\neval\n", "asks for builtins.eval"),
        (b"ctorch\nload\n", "asks for torch.load"),
        (b"(ios\nsystem\n", "asks for os.system"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "asks for os.system"),
        (b"ccollections\nOrderedDict\n)\x81", "NEWOBJ"),
        (b"\x82\x01", "EXT1"),
        (b"(ccollections\nOrderedDict\no", "OBJ"),
        (b"K\x01)R", "not a function"),
        (b"ctorch\nFloatStorage\n)R", "not a function"),
        (b"K\x01N\x62", "sets the state of an object"),
        (b"}((K\x01tK\x02u", "a dictionary key of type tuple"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR", "not made of a storage"),
        (b"K\x01K\x02a", "not a list"),
        (b"0", "damaged pickle"),
        (b"h\x07", "damaged pickle"),
        (b"r\xff\xff\xff\xff", "damaged pickle"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged pickle"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x0f", "damaged pickle"),
        (b"I" + b"9" * 9999 + b"\n", "damaged pickle"),
        (b"K\x01Q", "persistent identifier"),
    ],
)
def test_hostile_opcodes(opcodes, reason, tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes + b".")
    assert reason in refusal(path)


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

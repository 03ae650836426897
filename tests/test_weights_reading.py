"""Checkpoints that must load, and everything that must not."""

import io
import os
import pickle
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import repvgg_jax as rv
from tests import pth_writer
from tests.weights_samples import CLASSES, TINY, assert_identical, random_variables


@pytest.fixture(scope="module")
def variables():
    return random_variables(TINY)


@pytest.fixture(scope="module")
def state(variables):
    return rv.to_state_dict(variables, variant=TINY)


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


FORMATS = ("safetensors", "npz", "npz-compressed", "pth", "pth-legacy")


def refusal(source, **options):
    """The one line with which `source` is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        rv.load_weights(source, **{"variant": TINY, **options})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    if isinstance(source, os.PathLike):
        assert message.startswith(str(source))
    return message


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_told_by_its_contents(kind, tmp_path, state, variables):
    loaded = rv.load_weights(write(tmp_path / kind, state), variant=TINY)
    assert (loaded.variant, loaded.deploy, loaded.num_classes) == ("tiny", False, CLASSES)
    assert loaded.family == "official"
    assert_identical(loaded.variables, variables)


def test_a_loaded_checkpoint_runs_and_fuses(state, rng):
    loaded = rv.load_weights(state, variant=TINY)
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    model = rv.create_model(TINY, num_classes=CLASSES)
    logits = model.apply(loaded.variables, images)
    fused = rv.fuse_params(loaded.variables)
    found = model.clone(deploy=True).apply(fused, images)
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    again = rv.load_weights(rv.to_state_dict(fused, variant=TINY), variant=TINY)
    assert again.deploy
    assert_identical(again.variables, fused)


def test_official_variants_are_recognised_by_their_shapes():
    for name in ("A1", "B0"):  # the same widths, other depths
        variables = random_variables(rv.VARIANTS[name], deploy=True, num_classes=7)
        loaded = rv.load_weights(rv.to_state_dict(variables, family="timm"))
        assert (loaded.variant, loaded.deploy, loaded.num_classes) == (name, True, 7)
        assert str(loaded) == f"{name}, deploy form, 7 classes, timm names"


@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model",), ("ema",), ("ema", "model")])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_seen_through(wrappers, prefix, state, variables):
    saved = {prefix + key: array for key, array in state.items()}
    for wrapper in wrappers:
        saved = {"epoch": 119, wrapper: saved, "optimizer": {"state": {}}}
    assert_identical(rv.load_weights(saved, variant=TINY).variables, variables)


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


def test_several_state_dicts_in_one_file_are_a_question(state, variables):
    other = {key: array + 1 for key, array in state.items()}
    both = {"model": other, "ema": state}
    assert "holds weights under model and ema; say which with entry='model'" in refusal(both)
    assert_identical(rv.load_weights(both, variant=TINY, entry="ema").variables, variables)
    assert "holds no mapping 'net'; its keys are [model, ema]" in refusal(both, entry="net")


def test_half_precision_is_widened_exactly_and_double_is_rounded(tmp_path, state):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        cast = {k: v.astype(dtype) if v.ndim else v for k, v in state.items()}
        write(tmp_path / "safetensors", cast)
        loaded = rv.load_weights(tmp_path / "safetensors", variant=TINY)
        kernel = loaded.variables["params"]["stem"]["conv3x3"]["kernel"]
        expected = cast["stage0.rbr_dense.conv.weight"].astype(np.float32).transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel, expected, strict=True)


def test_jax_arrays_are_arrays(state, variables):
    arrays = {key: jnp.asarray(array) for key, array in state.items() if array.ndim}
    assert_identical(rv.load_weights(arrays, variant=TINY).variables, variables)


def test_loaded_arrays_are_their_own(tmp_path, state):
    path = write(tmp_path / "pth", state)
    loaded = rv.load_weights(path, variant=TINY)
    path.unlink()
    for leaf in (loaded.variables["params"]["stem"]["bn3x3"]["scale"],):
        assert leaf.flags.owndata
        leaf[:] = 0  # neither read-only nor a view of the file


def test_another_number_of_classes_says_how_to_load_the_backbone(state, variables):
    message = refusal(state, num_classes=10)
    assert f"tiny has {CLASSES} classes, not 10; num_classes=0 loads the backbone only" in message
    loaded = rv.load_weights(state, variant=TINY, num_classes=0)
    assert loaded.num_classes == 0
    expected = {
        **variables,
        "params": {k: v for k, v in variables["params"].items() if k != "head"},
    }
    assert_identical(loaded.variables, expected)
    backbone = {k: v for k, v in state.items() if not k.startswith("linear")}
    assert "tiny without a classifier; num_classes=0" in refusal(backbone)
    assert_identical(rv.load_weights(backbone, variant=TINY, num_classes=0).variables, expected)


def test_auxiliary_heads_go_with_the_head():
    variant = rv.Variant("aux", (1,), (8,), stem_channels=8, auxiliary=("stage1_block0",))
    state = rv.to_state_dict(random_variables(variant), variant=variant)
    assert "stage1_aux.0.bn.weight" in state
    loaded = rv.load_weights(state, variant=variant, num_classes=0)
    assert loaded.variables["params"].keys() == {"stem", "stage1_block0"}
    assert loaded.variables["batch_stats"].keys() == {"stem", "stage1_block0"}


def test_images_with_another_number_of_channels():
    variables = random_variables(TINY)
    stem = variables["params"]["stem"]
    for conv in ("conv3x3", "conv1x1"):
        stem[conv]["kernel"] = stem[conv]["kernel"][:, :, :1]
    for family in ("official", "flax"):
        state = rv.to_state_dict(variables, family=family, variant=TINY)
        assert_identical(rv.load_weights(state, variant=TINY).variables, variables)


def test_missing_unexpected_and_misshaped_keys_are_listed(state):
    damaged = dict(state)
    del damaged["stage1.0.rbr_dense.conv.weight"]
    del damaged["stage1.0.rbr_1x1.bn.running_var"]
    damaged["stage9.0.rbr_dense.conv.weight"] = state["stage0.rbr_dense.conv.weight"]
    damaged["linear.weight"] = state["linear.weight"].T
    message = refusal(damaged)
    assert "nearest to tiny (official names, training form)" in message
    assert "2 missing [stage1.0.rbr_dense.conv.weight, stage1.0.rbr_1x1.bn.running_var]" in message
    assert "1 unexpected [stage9.0.rbr_dense.conv.weight]" in message
    assert "1 misshaped [linear.weight (12, 5) instead of (5, 12)]" in message


def test_half_a_checkpoint(state):
    keys = list(state)[: len(state) // 2]
    message = refusal({key: state[key] for key in keys})
    assert "nearest to tiny (official names, training form, without a classifier)" in message
    assert " missing [stage2" in message


def test_half_fused_is_no_form(state, variables):
    fused = rv.to_state_dict(rv.fuse_params(variables), variant=TINY)
    stem = {k: v for k, v in fused.items() if k.startswith("stage0.rbr_reparam")}
    assert "2 unexpected [stage0.rbr_reparam.weight" in refusal({**state, **stem})


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"], "a ResNet"),
        (["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"], "a vision transformer"),
        (["features.0.weight", "classifier.0.weight"], "a plain VGG or AlexNet"),
        (["stem.conv_scale.conv.weight", "stem.conv_kxk.0.conv.weight"], "a MobileOne"),
    ],
)
def test_other_architectures_are_called_by_their_names(keys, what):
    message = refusal({key: np.zeros((4, 3, 3, 3), np.float32) for key in keys}, variant=None)
    assert f"the weights of {what}, no RepVGG" in message


def test_unknown_networks_show_their_keys():
    message = refusal({"encoder_a.w": np.zeros(3)}, variant=None)
    assert "no RepVGG's weights: hardly a key is known, they are [encoder_a.w]" in message


def test_another_variant_than_asked_for():
    state = rv.to_state_dict(random_variables(rv.VARIANTS["A1"], deploy=True))
    assert "nearest to B0 (official names, deploy form), but 12 missing" in refusal(
        state, variant="B0"
    )


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_, np.complex64])
def test_weights_of_another_kind_of_number(dtype, state):
    key = "stage1.0.rbr_dense.conv.weight"
    message = refusal({**state, key: state[key].astype(dtype)})
    assert f"{key} is {np.dtype(dtype).name}; weights are float16, bfloat16" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(bad, state):
    key = "stage1.0.rbr_dense.conv.weight"
    damaged = state[key].copy()
    damaged[1, 2, 0, 0] = bad
    assert f"{key}: 1 of {damaged.size} elements are NaN or infinite" in refusal(
        {**state, key: damaged}
    )


def test_doubles_beyond_float32(state):
    key = "linear.bias"
    assert "NaN or infinite" in refusal({**state, key: np.full(CLASSES, 1e300)})


def test_a_negative_variance(state):
    key = next(k for k in state if k.endswith("running_var"))
    assert f"{key} goes down to -1" in refusal({**state, key: -np.ones_like(state[key])})


# Files that are none.


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95, 0.999])
def test_truncated_files(kind, share, tmp_path, state):
    path = write(tmp_path / kind, state)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert refusal(path)


@pytest.mark.parametrize("kind", ["npz", "npz-compressed", "pth"])
def test_a_flipped_bit_is_noticed_where_the_format_has_checksums(kind, tmp_path, state):
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
        (b"\x00" * 4096, "neither safetensors nor .npz nor .pth"),
        (b"PK\x03\x04" + b"\x00" * 100, "not a zip file"),
        (b"\xff" * 8 + b"{}", "neither safetensors"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no arrays"),
        (b"\x80\x02K\x01.", "a pickle, but no PyTorch checkpoint"),
        (b"\x80\x02", "neither safetensors"),
        (b"\x80\x04\x95" + b"\xff" * 20, "damaged pickle"),
    ],
)
def test_files_that_are_something_else(content, reason, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_paths_that_are_no_files(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "absent.pth")
    assert "a directory; give one" in refusal(tmp_path)


def test_a_zip_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", b"...")
    assert "a zip archive but no checkpoint: it holds [holiday.jpg]" in refusal(path)


def test_a_compressed_pth_is_none_of_pytorchs(tmp_path, state):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pth_writer.state_pickle(state) * 10)
    assert "is compressed, which PyTorch never does" in refusal(path)


class Evil:
    """Runs a command when Python's own unpickler reads it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
def test_a_pickle_that_wants_to_run_code_is_refused_by_name(protocol, container, tmp_path):
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
        assert "neither safetensors nor" in message
    else:
        assert f"its pickle asks for {os.name}.system" in message
        assert "nothing of it was run" in message
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
        (b"ccollections\nOrderedDict\n)\x81", "instruction NEWOBJ"),
        (b"\x82\x01", "instruction EXT1"),
        (b"(ccollections\nOrderedDict\no", "instruction OBJ"),
        (b"K\x01)R", "calls something that is no function"),
        (b"ctorch\nFloatStorage\n)R", "calls something that is no function"),
        (b"K\x01N\x62", "sets the state of an object"),
        (b"}((K\x01tK\x02u", "a dictionary key of type tuple"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR", "not made of a storage"),
        (b"K\x01K\x02a", "no list"),
        (b"0", "damaged pickle"),
        (b"h\x07", "damaged pickle"),
        (b"r\xff\xff\xff\xff", "damaged pickle"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged pickle"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x0f", "damaged pickle"),
        (b"I" + b"9" * 9999 + b"\n", "damaged pickle"),
        (b"K\x01Q", "a persistent identifier that PyTorch does not write"),
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
        (4, -1, (2,), (1,), "no such numbers"),
        (4, 0, (-2,), (1,), "no such numbers"),
        (4, 0, (2,), (-1,), "no such numbers"),
        (4, 0, (2,), (1, 1), "no such numbers"),
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


def test_keys_with_line_feeds_stay_on_one_line():
    assert "[a b, c]" in refusal({"a\nb": np.zeros(3), "c": np.zeros(3)})


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["B3", "D2se"])
@pytest.mark.parametrize("kind", ["pth", "pth-legacy"])
def test_the_largest_models_load_within_4_gib_and_a_minute_of_work(name, kind, tmp_path):
    variables = random_variables(rv.VARIANTS[name], num_classes=1000)
    path = write(tmp_path / kind, rv.to_state_dict(variables))
    program = (
        "import resource, sys, time, repvgg_jax\n"
        "start = time.process_time()\n"
        "loaded = repvgg_jax.load_weights(sys.argv[1])\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(loaded.variant, time.process_time() - start, peak / 2**20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    variant, seconds, gib = done.stdout.split()
    assert variant == name
    assert float(seconds) < 60
    assert float(gib) < 4


def test_importing_the_package_imports_no_reader():
    heavy = ("torch", "safetensors", "huggingface_hub", "flax.nnx.bridge", "orbax")
    program = f"import sys, repvgg_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

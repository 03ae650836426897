"""Fuzzing in a process of its own, and networks of full size."""

import argparse
import codecs
import json
import os
import pathlib
import pickle
import random
import resource
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import safetensors.numpy

import repvgg_jax as rv
from repvgg_jax.weights import FAMILIES
from tests.helpers import pth_writer
from tests.helpers.memory import peak_kib
from tests.helpers.weights_samples import assert_identical, has_names, random_weights

VARIANT = rv.Variant("fuzzed", (1,), (4,), stem_channels=4)
SECONDS = 2  # CPU time per file; valid files take milliseconds
MEMORY = 256 << 20  # bytes that all files together may add; valid files have a few kilobytes


class Command:
    """Runs a command when Python's own unpickler reads it."""

    def __reduce__(self):
        return os.system, ("touch it-ran",)


OBJECTS = [Command(), argparse.Namespace(a=1), {1}, np.float64(1), 1j, {(1, 2): 3}, pathlib.Path]

FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir",
    "subprocess.Popen", "socket.connect", "exec", "pickle.find_class", "ctypes.dlopen",
)  # fmt: skip
"""Audit events that reading weights never raises. "compile" is not among them: NumPy parses the
headers of .npy records as literals.
"""


def seeds(directory):
    """One valid file per format."""
    state = rv.to_state_dict(random_weights(VARIANT, num_classes=2), variant=VARIANT)
    paths = [directory / name for name in ("pth", "legacy", "safetensors", "npz", "deflated")]
    # With objects of every kind beside the weights, and one that would run a command.
    pth_writer.write_zip(paths[0], state, wrapper="state_dict", beside=pickle.dumps(OBJECTS, 2))
    pth_writer.write_legacy(paths[1], state)
    safetensors.numpy.save_file(state, paths[2])
    for path, save in zip(paths[3:], (np.savez, np.savez_compressed), strict=True):
        with open(path, "wb") as file:
            save(file, **state)
    return [path.read_bytes() for path in paths]


def damaged(rng, valid):
    """A file with a few errors, mostly in its structure."""
    data = bytearray(rng.choice(valid))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(len(data)) // 8
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, *b"(.)RQtubcosiX\x93\x81"))
        elif kind == 2:  # lengths, offsets, counts
            size = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 3:
            del data[at : at + rng.choice((1, 4, 64, 4096))]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 5:
            other = rng.choice(valid)
            start = rng.randrange(len(other))
            data[at:at] = other[start : start + 128]
        else:
            data[at:] = data[at : at + 256] * 2
        if not data:
            return b"\x00"
    return bytes(data)


def run(count, seed):
    """Reads `count` damaged files; returns how many loaded and how many were refused."""
    events = []
    sys.addaudithook(lambda event, _: events.append(event) if event in FORBIDDEN else None)
    rng = random.Random(seed)
    loaded = refused = 0
    with tempfile.TemporaryDirectory() as directory:
        valid = seeds(pathlib.Path(directory))
        path = pathlib.Path(directory) / "damaged"
        for content in valid:  # everything that imports has imported after this
            path.write_bytes(content)
            rv.load_weights(path, variant=VARIANT)
        for name in ("cp437", "raw_unicode_escape"):  # of zipfile and pickletools
            codecs.lookup(name)
        del events[:]
        before = peak_kib()
        for index in range(count):
            path.write_bytes(damaged(rng, valid))
            start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            try:
                rv.load_weights(path, variant=VARIANT)
                loaded += 1
            except ValueError as error:
                refused += 1
                message = str(error)
                if "\n" in message or len(message) > 2000:
                    raise AssertionError(f"file {index}: {message}") from error
            took = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start
            assert took < SECONDS, (index, took)
            assert not events, (index, events)
        grown = peak_kib() - before
        assert grown * 1024 < MEMORY, f"{grown} KiB"
    return loaded, refused


def fuzz(count, seed):
    """`run` in a process whose address space may grow by 1 GiB."""
    program = (
        "import resource, tests.test_weights_slow as t\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "room = pages * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (room, room))\n"
        f"print(*t.run({count}, {seed}))\n"
    )
    paths = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == count
    return loaded, refused


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as on Linux")
def test_hundreds_of_damaged_files():
    loaded, refused = fuzz(300, seed=0)
    assert refused > 100
    assert loaded > 0  # bits flipped in the numbers of formats without checksums


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as on Linux")
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_damaged_files(seed):
    fuzz(5000, seed)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as on Linux")
def test_files_that_ask_for_much_are_refused_within_2_seconds_and_500_mb(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hostile", str(tmp_path)],
        cwd=pathlib.Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 50
    for name, seconds, grown, message in rows:
        assert seconds < SECONDS, (name, seconds)
        assert grown < 500_000_000, (name, grown)
        assert message != "loaded", name


@pytest.mark.slow
@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("name", ["B3g4", "plus-L2pse"])
def test_full_size_models_are_detected_and_identical(name, deploy):
    variables = random_weights(rv.VARIANTS[name], deploy=deploy, num_classes=1000)
    for family in FAMILIES:
        if has_names(family, rv.VARIANTS[name]):
            loaded = rv.load_weights(rv.to_state_dict(variables, family=family))
            found = (loaded.variant, loaded.deploy, loaded.num_classes, loaded.family)
            assert found == (name, deploy, 1000, family)
            assert_identical(loaded.variables, variables)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("B3", "pth-legacy"), ("D2se", "pth")])
def test_the_largest_models_load_within_4_gib_and_a_minute_of_cpu_time(name, kind, tmp_path):
    variables = random_weights(rv.VARIANTS[name], num_classes=1000)
    path = tmp_path / "weights.pth"
    writer = pth_writer.write_zip if kind == "pth" else pth_writer.write_legacy
    writer(path, rv.to_state_dict(variables))
    program = (
        "import sys, time, repvgg_jax\n"
        "from tests.helpers.memory import peak_kib\n"
        "start = time.process_time()\n"
        "loaded = repvgg_jax.load_weights(sys.argv[1])\n"
        "print(loaded.variant, time.process_time() - start, peak_kib() / 2**20)\n"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, path], cwd=root, capture_output=True, text=True, check=True
    )
    variant, seconds, gib = done.stdout.split()
    assert variant == name
    assert float(seconds) < 60
    assert float(gib) < 4

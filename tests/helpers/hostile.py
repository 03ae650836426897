"""Files that ask for more time or memory than their size suggests, made of a few opcodes each.

`python -m tests.helpers.hostile DIRECTORY` reads every one of them and prints seconds, bytes and
message as JSON.
"""

import functools
import io
import json
import pathlib
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from tests.helpers import pth_writer
from tests.helpers.memory import peak_kib

MODULUS = (1 << 61) - 1  # integers that differ by a multiple of it have the same hash


def tensor(shape: bytes, strides: bytes, key: bytes = pth_writer.text("0")) -> bytes:
    storage = b"(" + pth_writer.text("storage") + b"ctorch\nFloatStorage\n" + key
    storage += pth_writer.text("cpu") + pth_writer.integer(4) + b"tQ"
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + pth_writer.integer(0)
    return head + b"(" + shape + b"t(" + strides + b"t\x89NtR"


def pickles() -> Iterator[tuple[str, bytes]]:
    """Pickles without their header and their STOP."""
    yield (
        "frames",
        b"\x95" + (20 << 20).to_bytes(8, "little") + b"\x95\0\0\0\0\0\0\0\0" * (20 << 17),
    )
    yield "lists in lists", b"]" * (10 << 20) + b"a" * (10 << 20)
    yield "tuples in tuples", b")" + b"\x85" * (20 << 20)
    yield "marks", b"(" * (20 << 20)
    yield "memoized lists", b"]\x94" * (10 << 20)
    yield (
        "one huge integer",
        tensor(pth_writer.integer(1 << (80 << 20)), pth_writer.integer(1 << (80 << 20))),
    )
    many = b"".join(pth_writer.integer(1 << (16 << 20)) for _ in range(8))
    yield "huge integers", tensor(many, many)
    keys = (pth_writer.integer(n * MODULUS) + b"N" for n in range(1, 60_000))
    yield "colliding keys", b"}(" + b"".join(keys) + b"u"
    indices = (b"p" + str(n * MODULUS).encode() + b"\n" for n in range(1, 100_000))
    yield "colliding memo", b"N" + b"".join(indices)
    yield (
        "one huge key",
        b"}" + pth_writer.integer(1 << (40 << 20)) + b"\x94N" + b"sh\0N" * 99_999 + b"s",
    )
    text = b"X" + struct.pack("<I", 10 << 20) + b"x" * (10 << 20)
    long_keys = b"}" + text + b"\x94N" + b"s" + text + b"\x94N" + b"s" + b"h\0Nsh\1Ns" * 50_000
    yield "equal long keys", long_keys
    yield (
        "long storage keys",
        text
        + b"q\0"
        + tensor(b"", b"", b"h\0")
        + b"0"
        + b"".join(tensor(b"", b"", b"h\0") + b"0" for _ in range(20_000)),
    )
    four = b"K\x04"
    once = tensor(four, b"K\x01")
    yield "tensors", b"](" + once * (20 << 13) + b"e"
    # The parts of a call are memoized, and only called again and again.
    function, arguments = once.removesuffix(b"R").split(b"_v2\n")
    parts = function + b"_v2\nq\0" + arguments + b"q\1R"
    yield "memoized tensors", b"](" + parts + b"h\0h\1R" * (4 << 20) + b"e"
    rows = (pth_writer.text(f"stage{n}.0.rbr_dense.conv.weight") + b"h\0" for n in range(300_000))
    kernel = tensor(b"K\1K\1K\1K\1", b"K\1K\1K\1K\1")
    yield "many keys", kernel + b"q\x000}(" + b"".join(rows) + b"u"
    yield (
        "almost too many keys",
        b"}("
        + b"".join(
            pth_writer.text(f"model{m}")
            + b"}("
            + (kernel + b"q\x000" if not m else b"")
            + b"".join(
                pth_writer.text(f"a.stage{n}.0.rbr_dense.conv.weight") + b"h\0"
                for n in range(19_900)
            )
            + b"u"
            for m in range(10)
        )
        + b"u",
    )
    spread = b"(" + b"N" * 500_000 + b"tq\1"
    yield "spread arguments", b"ccollections\ndefaultdict\nq\0" + spread + b"h\0h\1R" * 80_000
    yield "spread text", b"ccollections\ndefaultdict\nq\0" + text + b"q\1" + b"h\0h\1R" * 99_999
    yield "long names", text + b"\x94" + b"h\0h\0\x93" * 200_000
    yield "names", b"".join(b"cm\nn%d\n" % n for n in range(400_000))
    wide = "\U0001f600".encode() + b"x" * (11 << 20)
    yield "wide texts", (b"X" + struct.pack("<I", len(wide)) + wide) * 4
    yield "one wide text", b"X" + struct.pack("<I", 4 * len(wide)) + wide * 4
    yield "one long number", b"F" + b"1" * (20 << 20) + b"\n"
    yield "dictionaries", b"}" * (20 << 20)


def _zipped(content: bytes, path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/data/0", np.ones(4, np.float32).tobytes())


def _legacy(content: bytes, path: pathlib.Path) -> None:
    path.write_bytes(pth_writer.LEGACY + b"\x80\x02" + content + b"." + b"\0" * (1 << 20))


def _npy(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _bomb(path: pathlib.Path, kind: int = zipfile.ZIP_DEFLATED) -> None:
    """2 GB of zeros under the key of a kernel."""
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
        for index in range(8):
            with archive.open(f"stage{index}.rbr_dense.conv.weight.npy", "w") as file:
                file.write(_npy((256 << 20 >> 2,)))
                for _ in range(64):
                    file.write(bytes(4 << 20))


def _bzip2(path: pathlib.Path) -> None:
    """Which `zipfile` expands without a limit, whatever size the record claims."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("stage0.rbr_dense.conv.weight.npy", _npy((1 << 20,)) + bytes(4 << 20))


def _many_arrays(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(40_000):
            archive.writestr(f"{index}.npy", _npy((0,)))


def _many_records(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        for index in range(120_000):
            archive.writestr(f"archive/data/{index}", b"")


def _safetensors(path: pathlib.Path) -> None:
    """A header of 60 MB."""
    row = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(row % index for index in range(1_000_000)) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def _safetensors_keys(path: pathlib.Path) -> None:
    """As many empty kernels as a header of 8 MB holds."""
    about = '{"dtype":"F32","shape":[0,0,0,0],"data_offsets":[0,0]}'
    row = f'"a.stage%d.0.rbr_dense.conv.weight":{about}'
    header = ("{" + ",".join(row % index for index in range(80_000)) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def files() -> Iterator[tuple[str, Callable[[pathlib.Path], None]]]:
    """Names of the files and what writes them."""
    for name, content in pickles():
        yield f"{name}, zip", functools.partial(_zipped, content)
        yield f"{name}, legacy", functools.partial(_legacy, content)
    yield "bomb", _bomb
    yield "bzip2", _bzip2
    yield "many arrays", _many_arrays
    yield "many records", _many_records
    yield "safetensors header", _safetensors
    yield "safetensors keys", _safetensors_keys


def peak() -> int:
    """Bytes of this process's largest resident set since the last call, as Linux counts it."""
    largest = peak_kib() << 10
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return largest


def main(directory: str) -> None:
    import repvgg_jax as rv

    path = pathlib.Path(directory) / "weights"
    for name, write in files():
        write(path)
        write = None  # its content
        peak()
        before = peak()
        start = time.process_time()
        try:
            rv.load_weights(path)
            message = "loaded"
        except ValueError as error:
            message = str(error).removeprefix(f"{path}: ")
        seconds = time.process_time() - start
        grown = peak() - before - path.stat().st_size
        print(json.dumps([name, round(seconds, 2), grown, message[:160]]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""Bytes that a compiled program moves to and from its main memory, and its kernels.

For TPUs: XLA assigns every array of the scheduled program to a memory space, which its text shows
in the layout: `S(1)` is the chip's fast memory (VMEM), and none is the main memory (HBM).
XLA's own "bytes accessed" counts what is copied between the two several times: the copy's start
and its end, in slices whose source counts whole, and the use.

For GPUs: every instruction of the scheduled program is a kernel, or a call of a library, that reads
its operands from the main memory and writes its results there; caches are not considered. `touched`
and `hbm` are then the same.
"""

import collections
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)(.*)")
# The last result of a call of a GPU library: memory that the call may use, which says nothing about
# how much of it is used.
_SCRATCH = re.compile(r", [su]8\[\d+\]\{0\}\)$")
# Names for what is already there, and the ends of copies that are counted where they start.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"} | {
    "copy-done",
    "slice-done",
}


class Traffic(NamedTuple):
    """Bytes of one execution.

    Attributes:
      hbm: read from and written to HBM.
      touched: operands and results of all computations, wherever they lie; copies between
        memories are left out.
      kernels: instructions that compute or copy; on GPUs, kernels and calls of libraries.
      kinds: of these by kind, how many and the bytes they touch, the largest first.
    """

    hbm: int
    touched: int
    kernels: int
    kinds: dict[str, tuple[int, int]]


def count(text: str) -> Traffic:
    """Traffic of the entry computation.

    Every operand and result counts once per instruction, as in XLA's own count; a copy
    between memories counts on the side that is HBM. Arrays count with the padding of their
    layout, by which 48 channels take the room of 128. A called computation, such as a loop,
    counts by its operands. Of what is sliced, only the slice is read.

    Args:
      text: the compiled program, `jax.stages.Compiled.as_text()`.
    """
    lines = text[text.index("\nENTRY ") :].split("\n")[2:]
    shapes: dict[str, str] = {}
    in_hbm = touched = 0
    kinds: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, operation, operands, rest = match.groups()
        shapes[name] = shape
        if operation in _FREE or '"ConcatBitcast"' in rest:
            continue
        if operation == "copy-start":
            in_hbm += _in_hbm(shape)  # destination and source
        elif operation == "slice-start":
            # ((source), destination, ...): only the slice of the source is read.
            arrays = _arrays(shape)
            moved, elsewhere = arrays[-2]
            in_hbm += moved * ((not elsewhere) + (not arrays[0][1]))
        else:
            names = re.findall(r"%([\w.\-]+)", operands)
            if operation == "custom-call":
                shape = _SCRATCH.sub(")", shape)
            used = (shape, *(shapes.get(operand, "") for operand in names))
            if operation == "slice" or name.startswith("wrapped_slice"):
                used = (shape, shape)  # only the slice of the operand is read
            in_hbm += sum(_in_hbm(each) for each in used)
            size = sum(size for each in used for size, _ in _arrays(each))
            touched += size
            kind = _kind(name, operation, rest)
            kinds[kind] = (kinds[kind][0] + 1, kinds[kind][1] + size)
    kernels = sum(number for number, _ in kinds.values())
    largest = dict(sorted(kinds.items(), key=lambda item: -item[1][1]))
    return Traffic(in_hbm, touched, kernels, largest)


def _kind(name: str, operation: str, rest: str) -> str:
    """What an instruction does: the target of a call, a fusion's name without its number."""
    target = re.search(r'custom_call_target="([^"]+)"', rest)
    if target:
        return target[1]
    return re.sub(r"[.\d]+$", "", name) if operation == "fusion" else operation


def _in_hbm(shape: str) -> int:
    return sum(size for size, elsewhere in _arrays(shape) if not elsewhere)


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Bytes of every array of a shape, and whether it lies elsewhere than in HBM."""
    arrays = []
    for kind, sides, layout in _ARRAY.findall(shape):
        bits = _BITS[kind] if kind in _BITS else int(re.sub(r"\D", "", kind))
        count = math.prod(_padded([int(side) for side in sides.split(",") if side], layout))
        arrays.append((count * bits // 8, "S(" in layout))
    return arrays


def _padded(sides: list[int], layout: str) -> list[int]:
    """The sides as they lie in memory, the fastest last: whole tiles of `3,0,2,1:T(8,128)`."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile is None:
        return sides
    tiles = [int(side) for side in tile.group(1).split(",")]
    sides = [sides[int(i)] for i in reversed(order.split(",")) if i]
    sides = [1] * (len(tiles) - len(sides)) + sides
    inner = len(sides) - len(tiles)
    return sides[:inner] + [
        -(-side // whole) * whole for side, whole in zip(sides[inner:], tiles, strict=True)
    ]

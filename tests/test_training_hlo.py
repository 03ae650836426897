"""What `repvgg_jax.train.hlo` counts, on programs small enough to add up by hand."""

import pytest

from repvgg_jax.train import hlo

# One line per instruction, as XLA prints a scheduled TPU program; S(1) is the fast memory.
_PROGRAM = """HloModule jit_run, is_scheduled=true

%inner (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %n = bf16[4,8]{1,0} negate(%p)
}

ENTRY %main.1 (x.1: bf16[4,8], y.1: f32[16]) -> (f32[8], bf16[4,8]) {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %y.1 = f32[16]{0} parameter(1)
INSTRUCTIONS
}
"""


@pytest.mark.parametrize(
    ("instructions", "in_hbm", "touched"),
    [
        # Reads 64 bytes of x, writes 64.
        ("%f = bf16[4,8]{1,0} fusion(%x.1), kind=kLoop, calls=%inner", 128, 128),
        # The result stays in fast memory.
        ("%f = bf16[4,8]{1,0:S(1)} fusion(%x.1), kind=kLoop, calls=%inner", 64, 128),
        # Whole tiles: 24 rows of 128, where the sides are 3, 20 and 5 and 20 is the fastest.
        (
            "%f = bf16[3,20,5]{1,2,0:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, calls=%inner",
            64 + 2 * 24 * 128,
            64 + 2 * 24 * 128,
        ),
        # A scalar and a vector of 4 bytes in tiles of 256 numbers.
        (
            "%f = (f32[]{:T(256)}, f32[1]{0:T(256)}) fusion(%x.1), kind=kLoop, calls=%inner",
            64 + 2 * 1024,
            64 + 2 * 1024,
        ),
        # Several results: 32 + 64 bytes, and x and y are read.
        (
            "%f = (f32[8]{0}, bf16[4,8]{1,0}) fusion(%x.1, %y.1), kind=kOutput, calls=%inner",
            224,
            224,
        ),
        # Names for what is there cost nothing.
        ("%f = bf16[32]{0} bitcast(%x.1)\n  %t = (bf16[32]{0}, f32[16]{0}) tuple(%f, %y.1)", 0, 0),
        # A copy to fast memory reads once; what uses it reads nothing more.
        (
            "%s = (bf16[4,8]{1,0:S(1)}, bf16[4,8]{1,0}, u32[]{:S(2)}) copy-start(%x.1)\n"
            "  %d = bf16[4,8]{1,0:S(1)} copy-done(%s)\n"
            "  %f = bf16[4,8]{1,0:S(1)} fusion(%d), kind=kLoop, calls=%inner",
            64,
            128,
        ),
        # Half of x, 32 bytes, goes to fast memory.
        (
            "%s = ((bf16[4,8]{1,0}), bf16[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x.1), "
            "slice={[0:2], [0:8]}\n"
            "  %d = bf16[2,8]{1,0:S(1)} slice-done(%s)",
            32,
            0,
        ),
    ],
)  # fmt: skip
def test_counts_bytes(instructions: str, in_hbm: int, touched: int) -> None:
    """Operands and results once per instruction: those in HBM, and all but the copies'."""
    program = _PROGRAM.replace("INSTRUCTIONS", "  " + instructions)
    counted = hlo.count(program)
    assert (counted.hbm, counted.touched) == (in_hbm, touched)


# As XLA prints a scheduled GPU program: 2 images of 4x4 pixels and 8 channels in 16 bits.
_GPU_PROGRAM = """HloModule jit_run, is_scheduled=true

%inner (p: bf16[2,4,4,8]) -> bf16[2,4,4,8] {
  %p = bf16[2,4,4,8]{3,2,1,0} parameter(0)
  ROOT %n = bf16[2,4,4,8]{3,2,1,0} negate(%p)
}

ENTRY %main.1 (x.1: bf16[2,4,4,8], k.1: bf16[8,3,3,8]) -> (bf16[2,4,4,8], f32[8]) {
  %x.1 = bf16[2,4,4,8]{3,2,1,0} parameter(0)
  %k.1 = bf16[8,3,3,8]{3,2,1,0} parameter(1)
  %conv.1 = (bf16[2,4,4,8]{3,2,1,0}, u8[64]{0}) custom-call(%x.1, %k.1), custom_call_target="__cudnn$convForward"
  %get-tuple-element.1 = bf16[2,4,4,8]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %loop_add_fusion.7 = bf16[2,4,4,8]{3,2,1,0} fusion(%get-tuple-element.1, %x.1), kind=kLoop, calls=%inner
  %loop_add_fusion = bf16[2,4,4,8]{3,2,1,0} fusion(%loop_add_fusion.7), kind=kLoop, calls=%inner
  %input_reduce_fusion.2 = f32[8]{0} fusion(%loop_add_fusion), kind=kInput, calls=%inner
  %pallas_call.3 = bf16[2,4,4,8]{3,2,1,0} custom-call(%loop_add_fusion, %x.1, %x.1, /*index=3*/%input_reduce_fusion.2), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %tuple.1 = (bf16[2,4,4,8]{3,2,1,0}, f32[8]{0}) tuple(%pallas_call.3, %input_reduce_fusion.2)
}
"""  # noqa: E501


def test_counts_kernels() -> None:
    """Every call and fusion of a GPU's program is a kernel that reads and writes main memory.

    The scratch memory of a call, here 64 bytes, is only what it may use. A kernel of Pallas reads
    its operands and writes its result.
    """
    counted = hlo.count(_GPU_PROGRAM)
    maps, kernel = 2 * 2 * 4 * 4 * 8, 2 * 8 * 3 * 3 * 8
    assert counted.kernels == 5
    assert counted.kinds == {
        "__cudnn$convForward": (1, 2 * maps + kernel),
        "loop_add_fusion": (2, 3 * maps + 2 * maps),
        "input_reduce_fusion": (1, maps + 4 * 8),
        "__gpu$xla.gpu.triton": (1, 4 * maps + 4 * 8),
    }
    assert next(iter(counted.kinds)) == "loop_add_fusion"  # the most first
    assert counted.touched == counted.hbm == sum(size for _, size in counted.kinds.values())

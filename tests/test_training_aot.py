"""Train steps compiled for TPUs that are not attached."""

import importlib.util

import pytest

from repvgg_jax.train.aot import chips_in, compile_ahead
from tests.helpers.runs import small_config

LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
def test_the_step_compiles_for_a_slice_of_tpus():
    program = compile_ahead(small_config(), "v5e:2x2", timeout=300)
    assert program.devices == 4
    assert program.title.startswith("RepVGG small (float32) on v5e:2x2: 4 devices in 1 process,")
    assert program.batch.startswith("global batch 128 = 128/process = 32/device")
    assert program.collectives["all-reduce"] >= 1
    assert 0 < program.arguments < program.peak < program.hbm == 16 * 2**30
    table = str(program).splitlines()
    assert any(line.startswith("memory, peak") and "of 16 GiB" in line for line in table)
    assert any(line.startswith("collectives") and "all-reduce" in line for line in table)


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
def test_options_reach_the_compiler():
    """Arrays that stay out of the fast memory are not copied there, which the count shows."""
    config = small_config()
    as_it_is = compile_ahead(config, "v5e:2x2", timeout=300)
    config.train.compiler_options = ("xla_vf_vmem_memory_space_assignment=false",)
    assert compile_ahead(config, "v5e:2x2", timeout=300).accessed < as_it_is.accessed
    config.train.compiler_options = ("xla_vf_vmem_no_such=false",)
    with pytest.raises(
        ValueError, match=r"on tpu: .*No such compile option: 'xla_vf_vmem_no_such'"
    ):
        compile_ahead(config, "v5e:2x2", timeout=300)


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
def test_too_little_time():
    with pytest.raises(TimeoutError, match=r"v5e:2x2 .* 0 s; .*--compile_timeout"):
        compile_ahead(small_config(), "v5e:2x2", timeout=0.1)


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
def test_a_batch_that_the_slice_cannot_split():
    with pytest.raises(ValueError, match=r"over 256 devices \(64 processes of 4\).*: 256$"):
        compile_ahead(small_config(), "v5e:16x16", timeout=300)


@pytest.mark.skipif(LIBTPU, reason="libtpu is there")
def test_without_libtpu():
    with pytest.raises(ValueError, match="pip install -r requirements-tpu"):
        compile_ahead(small_config(), "v5e:2x2", timeout=300)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:3x3", r"no TPU topology 'v5e:3x3'; v5e has: 1x1, 2x2, .*16x16$"),
        ("v4:2x2", r"v4 has: 2x2x1, "),
        ("v9:2x2", r"one of v4, v5e, v5p, v6e, e.g. v4:16x16x16"),
        ("pod", r"write GENERATION:SHAPE"),
    ],
)
def test_a_topology_that_does_not_exist(topology, message):
    with pytest.raises(ValueError, match=message):
        compile_ahead(small_config(), topology, timeout=1)


def test_chips_of_a_topology():
    assert chips_in("v5e:16x16") == 256
    assert chips_in("v4:4x4x8") == 128
    with pytest.raises(ValueError, match="no TPU topology"):
        chips_in("v5e:2")

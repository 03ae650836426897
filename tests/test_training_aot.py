"""Train steps compiled for TPUs and GPUs that are not attached."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from repvgg_jax.train.aot import compile_ahead
from repvgg_jax.train.targets import Target, gpus
from tests.helpers.runs import SMALL, small_config

LIBTPU = importlib.util.find_spec("libtpu") is not None
CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None


@pytest.fixture(scope="module")
def program():
    """A step for four TPUs."""
    return compile_ahead(small_config(), "v5e:2x2", timeout=300)


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
def test_the_step_compiles_for_a_slice_of_tpus(program):
    assert program.devices == 4
    assert program.title.startswith("RepVGG small (float32) on v5e:2x2: 4 devices in 1 process,")
    assert program.batch.startswith("global batch 128 = 128/process = 32/device")
    assert program.collectives["all-reduce"] >= 1
    assert 0 < program.arguments < program.peak < program.hbm == 16 * 2**30
    table = str(program).splitlines()
    assert any(line.startswith("memory, peak") and "of 16 GiB" in line for line in table)
    assert any(line.startswith("collectives") and "all-reduce" in line for line in table)


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
def test_options_reach_the_compiler(program):
    """Arrays that stay out of the fast memory are not copied there, which the count shows."""
    config = small_config()
    config.train.compiler_options = ("xla_vf_vmem_memory_space_assignment=false",)
    assert compile_ahead(config, "v5e:2x2", timeout=300).accessed < program.accessed
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


@pytest.mark.skipif(not CUDA, reason="needs the CUDA plugin of jaxlib")
def test_the_step_compiles_for_gpus():
    program = compile_ahead(small_config(), "h100x2", timeout=300)
    assert program.devices == 2
    assert program.batch.startswith("global batch 128 = 128/process = 64/device")
    assert program.collectives["all-reduce"] >= 1
    assert 0 < program.arguments < program.peak < program.hbm == gpus()["h100"].memory
    assert program.kernels > 50
    assert program.flops > 1e6
    # Every parameter is read, and written with its momentum.
    assert program.accessed > 3 * 4 * program.parameters


@pytest.mark.skipif(not CUDA, reason="needs the CUDA plugin of jaxlib")
def test_each_gpu_computes_channel_groups_of_its_own_images():
    variant = dataclasses.replace(SMALL, name="grouped", groups=(2, 4))
    one = compile_ahead(small_config(variant, train__batch_size=64), "h100", timeout=300)
    two = compile_ahead(small_config(variant, train__batch_size=128), "h100x2", timeout=300)
    assert "all-gather" not in two.collectives
    assert two.flops == pytest.approx(one.flops, rel=0.01)
    assert two.accessed < 1.1 * one.accessed


@pytest.mark.skipif(not CUDA, reason="needs the CUDA plugin of jaxlib")
def test_deployed_kernels_are_not_transposed_in_every_call_on_gpus():
    benchmarks = pathlib.Path(__file__).parents[1] / "benchmarks"
    job = {"model": "A0", "image_size": 64, "batch": 8, "options": {}, "target": "h100"}
    kinds = {}
    for form in ("deploy", "deploy stored", "deploy constant"):
        command = [sys.executable, benchmarks / "traffic.py", "--job"]
        done = subprocess.run(
            [*command, json.dumps(job | {"form": form})],
            env=os.environ | Target.parse("h100").environment,
            capture_output=True,
            text=True,
            check=True,
        )
        kinds[form] = json.loads(done.stdout.splitlines()[-1])["kinds"]
    assert kinds["deploy"]["wrapped_transpose"][0] == 22  # what there is to save
    for form in ("deploy stored", "deploy constant"):
        assert not [kind for kind in kinds[form] if "transpose" in kind or "copy" in kind]
        assert kinds[form]["__cudnn$convBiasActivationForward"][0] == 22


@pytest.mark.skipif(CUDA, reason="the CUDA plugin is there")
def test_without_the_compiler_for_gpus():
    with pytest.raises(ValueError, match="pip install -r requirements-cuda"):
        compile_ahead(small_config(), "h100", timeout=300)


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


@pytest.mark.parametrize("name", ["h100x0", "h100x9", "b200x16"])
def test_more_gpus_than_a_machine_has(name):
    with pytest.raises(ValueError, match=rf"'{name}' has {name[5:]} GPUs; .* 1 to 8, e.g."):
        Target.parse(name)


@pytest.mark.parametrize("name", ["h100x", "h1000", "h100:8", "x8"])
def test_gpus_that_do_not_exist(name):
    with pytest.raises(ValueError, match=r"a100, h100, h200, b200, e.g. h100x8$"):
        Target.parse(name)


def test_devices_of_a_target():
    assert Target.parse("v5e:16x16").count == 256
    assert Target.parse("v4:4x4x8").count == 128
    assert Target.parse("h100").count == 1
    assert Target.parse("h200x8").count == 8
    assert Target.parse("v5e:2x2").memory == 16 * 2**30
    assert 79 < Target.parse("h100").memory / 2**30 < 80

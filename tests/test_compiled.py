"""Deployed networks as programs that contain their weights, kept on disk."""

import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import repvgg_jax as rv
from tests.helpers.commands import ROOT
from tests.helpers.trees import random_variables

TINY = rv.Variant("tiny", (1, 1), (8, 16), 8, strides=(1, 2), stem_stride=1)


@pytest.fixture(scope="module")
def network():
    model = rv.create_model(TINY, num_classes=3)
    variables = rv.fuse_params(random_variables(model, size=8))
    return model.clone(deploy=True), variables


def test_the_same_outputs_from_images_alone(network, rng):
    model, variables = network
    run = rv.compile_deployed(model, variables, image_shape=(8, 8, 3), batch_size=2)
    images = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    expected = np.asarray(model.apply(variables, images))
    np.testing.assert_allclose(run(images), expected, atol=1e-5 * abs(expected).max())
    assert (run.image_shape, run.batch_size) == ((8, 8, 3), 2)
    assert run.seconds > 0
    # The weights are inside: the program's only argument is the images.
    (given,) = jax.tree.leaves(run._program.in_avals)
    assert given.shape == (2, 8, 8, 3)
    # Other numbers of images compile anew.
    np.testing.assert_allclose(run(images[:1]), expected[:1], atol=1e-5 * abs(expected).max())


def test_what_load_deployed_returns_is_enough(network):
    model, variables = network
    deployment = types.SimpleNamespace(
        model=model, variables=variables, metadata={"image_shape": [8, 8, 3]}
    )
    run = rv.compile_deployed(deployment)
    assert run(np.zeros((1, 8, 8, 3), np.float32)).shape == (1, 3)


def test_what_cannot_be_compiled(network):
    model, variables = network
    with pytest.raises(ValueError, match=r"training form.*fuse_params"):
        rv.compile_deployed(model.clone(deploy=False), variables, image_shape=(8, 8, 3))
    with pytest.raises(ValueError, match=r"image_shape=None .*\(224, 224, 3\)"):
        rv.compile_deployed(model, variables)
    with pytest.raises(ValueError, match="load_deployed"):
        rv.compile_deployed(model)


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax._src import monitoring
import repvgg_jax as rv

events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
jnp.zeros(2).block_until_ready()  # a program before there is a cache
model = rv.create_model(rv.Variant("tiny", (1, 1), (8, 16), 8), num_classes=3, deploy=True)
shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
draw = np.random.default_rng(0).standard_normal
variables = jax.tree.map(lambda leaf: draw(leaf.shape).astype(np.float32), shapes)
run = rv.compile_deployed(model, variables, image_shape=(16, 16, 3), cache=sys.argv[1])
outputs = run(np.ones((1, 16, 16, 3), np.float32))
hits = events.count("/jax/compilation_cache/cache_hits")
print(json.dumps([hits, np.asarray(outputs).tolist()]))
"""


@pytest.mark.system
def test_a_program_is_kept_for_the_next_process(tmp_path):
    """The second process reads what the first compiled, and computes the same."""
    dropped = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "programs")],
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        found.append(json.loads(done.stdout))
    (first, expected), (second, outputs) = found
    assert (first, second > 0) == (0, True)
    assert outputs == expected
    assert list((tmp_path / "programs").iterdir())

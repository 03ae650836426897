import dataclasses

import numpy as np
import pytest

from repvgg_jax import create_model, fuse_params
from repvgg_jax.proof import compare, logits, prove
from tests.helpers.trees import TINY, random_images, random_variables

MODEL = create_model(TINY, num_classes=5)
IMAGES = random_images((10, 32, 32, 3))


def test_a_fused_network_is_proven_equal():
    proof = prove(MODEL, random_variables(MODEL), IMAGES, batch_size=4)
    assert proof.holds
    assert proof.images == 10
    assert proof.argmax_agreement == 1
    assert 0 < proof.max_abs_delta < 1e-4  # not the same program, so not the same bits


def test_another_network_is_not():
    variables = random_variables(MODEL)
    other = fuse_params(random_variables(MODEL, seed=1))
    proof = prove(MODEL, variables, IMAGES, deployed=other)
    assert not proof.holds
    assert proof.relative > 0.01
    assert "> 1e-05" in str(proof)


def test_nan_proves_nothing():
    found = np.full((2, 3), np.nan)
    assert not compare(np.ones((2, 3)), found).holds
    assert not compare(found, found).holds


def test_numbers_of_a_comparison():
    a = np.array([[1.0, -4.0], [2.0, 0.0]])
    b = np.array([[1.0, -4.0], [2.0, 2.5]])
    proof = compare(a, b, tolerance=0.7)
    assert dataclasses.astuple(proof) == (2, 2.5, 4.0, 0.5, 0.7, "logit")
    assert proof.relative == 0.625
    assert proof.as_dict()["holds"] is True


@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_logits_that_cannot_be_compared(a, b):
    with pytest.raises(ValueError, match="shapes"):
        compare(np.zeros(a), np.zeros(b))


def test_batches_give_what_one_batch_gives_and_compile_once():
    variables, traced = random_variables(MODEL), []

    def apply(variables, images):
        traced.append(images.shape)
        return MODEL.apply(variables, images)

    whole = logits(MODEL.apply, variables, IMAGES)
    found = logits(apply, variables, IMAGES, batch_size=4)
    assert compare(whole, found).relative <= 1e-5
    assert traced == [(4, 32, 32, 3)]  # for 4, 4 and 2 images

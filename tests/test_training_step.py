import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from repvgg_jax import create_model
from repvgg_jax.training import config as configs
from repvgg_jax.training.optimizer import decay_mask, schedule, sgd
from repvgg_jax.training.run import Run
from repvgg_jax.training.state import initial_state
from repvgg_jax.training.step import make_eval_step, make_train_step
from repvgg_jax.training.task import Classification
from tests.runs import SMALL, small_config
from tests.trees import TINY_AUXILIARY, paths, random_variables


def train_step_of(run: Run):
    return make_train_step(run.model, run.task, run.optimizer, run.augment, run.config.seed)


def batch_of(run: Run, size: int = 64):
    images = np.stack([run.dataset.train[i]["image"] for i in range(size)])
    labels = np.stack([run.dataset.train[i]["label"] for i in range(size)])
    return {"image": images, "label": labels}


@pytest.mark.parametrize("group_size", [0, 16])
def test_a_step_on_eight_devices_is_a_step_on_one(group_size):
    run = Run.from_config(small_config(bn__group_size=group_size))
    state, batch = jax.device_get((run.initial_state(), batch_of(run)))
    step = jax.jit(train_step_of(run))
    one, one_metrics = step(*jax.device_put((state, batch), jax.devices()[0]))
    eight, eight_metrics = step(
        jax.device_put(state, run.replicated), jax.device_put(batch, run.over_batch)
    )
    chex.assert_trees_all_close(jax.device_get(one), jax.device_get(eight), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        jax.device_get(one_metrics), jax.device_get(eight_metrics), rtol=1e-5
    )


def test_the_step_compiles_once_and_takes_its_own_output():
    run = Run.from_config(small_config())
    step = jax.jit(train_step_of(run), out_shardings=run.replicated, donate_argnums=0)
    state, batch = run.initial_state(), jax.device_put(batch_of(run), run.over_batch)
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
    assert int(state.step) == 3


def test_augmentation_is_a_function_of_seed_and_step():
    run = Run.from_config(small_config())
    step, state, batch = jax.jit(train_step_of(run)), run.initial_state(), batch_of(run)
    later = state.replace(step=state.step + 1)
    first, again, other = (step(s, batch)[1]["loss"] for s in (state, state, later))
    assert first == again
    assert first != other


def test_abstract_state_is_the_states():
    run = Run.from_config(small_config())
    state, abstract = run.initial_state(), run.abstract_state()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert all(
        a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
    )


def test_state_stays_float32_when_computing_in_bfloat16():
    run = Run.from_config(small_config(model__dtype="bfloat16"))
    state, _ = jax.jit(train_step_of(run))(run.initial_state(), batch_of(run))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


def test_the_covariance_form_takes_the_same_step():
    plain, fast = (
        Run.from_config(small_config(model__train_form=form)) for form in ("branches", "covariance")
    )
    state, batch = plain.initial_state(), batch_of(plain)
    (a, a_metrics), (b, b_metrics) = (
        jax.jit(train_step_of(run))(state, batch) for run in (plain, fast)
    )
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(a_metrics, b_metrics, rtol=1e-5)


def test_the_first_bad_gradient_is_named():
    run = Run.from_config(small_config())
    state, batch = run.initial_state(), batch_of(run)
    step = jax.jit(train_step_of(run))
    assert step(state, batch)[1]["first_bad_gradient"] == -1
    head = {**state.params["head"], "bias": state.params["head"]["bias"] * np.inf}
    broken = state.replace(params={**state.params, "head": head})
    assert step(broken, batch)[1]["first_bad_gradient"] == 0


def test_evaluation_counts_what_the_mask_keeps():
    run = Run.from_config(small_config())
    state, batch = run.initial_state(), batch_of(run, 8)
    step = jax.jit(make_eval_step(run.model, run.task, run.normalise))
    some = step(state.variables, {**batch, "mask": np.arange(8) < 3})
    three = {name: values[:3] for name, values in batch.items()}
    alone = step(state.variables, {**three, "mask": np.ones(3, bool)})
    assert some["count"] == 3
    chex.assert_trees_all_close(some, alone, rtol=1e-5)


class TestTask:
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    batch = {"label": np.array([0, 1])}

    def test_smoothed_cross_entropy(self):
        loss, metrics = Classification(3, label_smoothing=0.3).loss(self.logits, {}, self.batch)
        log = np.asarray(jax.nn.log_softmax(self.logits))
        targets = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
        assert loss == pytest.approx(-(targets * log).sum() / 2, rel=1e-6)
        assert metrics["accuracy"] == 0.5

    def test_auxiliary_heads_add_their_weighted_loss(self):
        task = Classification(3, auxiliary_weight=0.1)
        main, _ = task.loss(self.logits, {}, self.batch)
        both, _ = task.loss(self.logits, {"a": self.logits, "b": 0 * self.logits}, self.batch)
        assert float(both) == pytest.approx(1.1 * float(main) + 0.1 * np.log(3), rel=1e-6)

    def test_auxiliary_heads_learn_through_the_step(self):
        run = Run.from_config(small_config(TINY_AUXILIARY, optimizer__warmup_epochs=0.0))
        state = run.initial_state()
        images = {"image": np.zeros((64, 32, 32, 1), np.uint8), "label": np.arange(64) % 10}
        after, _ = jax.jit(train_step_of(run))(state, images)
        head = "aux_stage1_block1"
        for tree in ("params", "batch_stats"):
            before, now = getattr(state, tree)[head], getattr(after, tree)[head]
            moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, now)
            assert all(jax.tree.leaves(moved)), moved


class TestOptimizer:
    def test_warm_up_then_cosine_scaled_by_the_batch(self):
        lr = schedule(learning_rate=0.1, batch_size=512, warmup_steps=10, total_steps=110)
        assert lr(0) == 0
        assert lr(5) == pytest.approx(0.1)
        assert lr(10) == pytest.approx(0.2)
        assert lr(60) == pytest.approx(0.1)
        assert lr(110) == pytest.approx(0, abs=1e-8)
        plain = schedule(learning_rate=0.1, batch_size=256, warmup_steps=0, total_steps=100)
        assert plain(0) == pytest.approx(0.1)

    def test_decay_is_the_papers(self):
        variables = random_variables(create_model(TINY_AUXILIARY, num_classes=5))
        mask = decay_mask(variables["params"])
        decayed = {
            path for path, yes in zip(paths(mask), jax.tree.leaves(mask), strict=True) if yes
        }
        by_shape = {
            path
            for path, leaf in zip(
                paths(variables["params"]), jax.tree.leaves(variables["params"]), strict=True
            )
            if leaf.ndim > 1 or path.endswith("bn_identity/scale")
        }
        assert decayed == by_shape
        assert any(path.endswith("bn_identity/scale") for path in decayed)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_three_steps_by_hand(self, nesterov):
        """PyTorch's rule: g += wd p; m = 0.9 m + g; p -= lr (g + 0.9 m, or m)."""
        optimizer = sgd(
            lambda step: 0.1 / (1 + step), momentum=0.9, nesterov=nesterov, weight_decay=0.01
        )
        params = {"kernel": np.array([[1.0, -2.0]], np.float32)}
        state = optimizer.init(params)
        p, m = params["kernel"].astype(np.float64), 0.0
        for step in range(3):
            grads = {"kernel": params["kernel"] ** 2}
            updates, state = optimizer.update(grads, state, params)
            g = p**2 + 0.01 * p
            m = 0.9 * m + g
            p = p - 0.1 / (1 + step) * (g + 0.9 * m if nesterov else m)
            params = jax.tree.map(lambda a, u: a + u, params, updates)
        np.testing.assert_allclose(params["kernel"], p, rtol=1e-5)


class TestConfig:
    def test_a_variant_survives_the_way_through_json(self):
        config = small_config()
        again = ConfigDict(configs.plain(config))
        assert configs.variant_of(again) == SMALL == configs.variant_of(config)

    def test_differences_name_what_changed(self):
        old, new = configs.plain(small_config()), configs.plain(small_config(seed=3))
        assert configs.differences(old, new) == ["config.seed: 0 -> 3"]
        del new["seed"]
        assert configs.differences(old, new) == ["config.seed: removed"]
        assert configs.differences(old, old) == []

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"train__batch_size": 100}, "train.batch_size=100 .* 8 devices; .* 96 or 104"),
            ({"train__batch_size": 4}, "the nearest that can: 8"),
            ({"eval__batch_size": 30}, "eval.batch_size=30 .* 24 or 32"),
            ({"bn__group_size": 48}, "group_size=48 does not divide .*=128; .* 32 or 64"),
            ({"train__epochs": 0}, "train.epochs=0 must be 1 or more"),
            ({"optimizer__warmup_epochs": 2.0}, "warmup_epochs=2.0 leaves nothing"),
            ({"optimizer__learning_rate": -1.0}, "learning_rate=-1.0 must be 0 or more"),
            ({"train__label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ],
    )
    def test_numbers_that_cannot_work(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            configs.check(small_config(**overrides), devices=8)

    def test_a_mean_for_other_channels(self):
        with pytest.raises(ValueError, match=r"mean=\(0.1, 0.2\) has 2 values, .* 1 channels"):
            Run.from_config(small_config(data__mean=(0.1, 0.2)))

    def test_more_images_a_batch_than_there_are(self):
        with pytest.raises(ValueError, match="batch_size=2000 is more than the 1,437 training"):
            Run.from_config(small_config(train__batch_size=2000))

    def test_unknown_dtype(self):
        with pytest.raises(ValueError, match="dtype='float8'; there are: float32, bfloat16"):
            Run.from_config(small_config(model__dtype="float8"))


def test_initial_state_is_pure():
    run = Run.from_config(small_config())
    a, b = (
        initial_state(run.model, run.optimizer, jax.random.key(s), run.dataset.image_shape)
        for s in (0, 0)
    )
    chex.assert_trees_all_equal(a, b)
    assert jnp.result_type(a.step) == jnp.int32

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import Variant, create_model
from repvgg_jax.reparam import decay_mask, equivalent_l2
from repvgg_jax.train.experiment import REMAT_POLICIES, Experiment, balanced_weights
from repvgg_jax.train.freezing import Frozen
from repvgg_jax.train.loop import train
from repvgg_jax.train.optimizer import make_optimizer, schedule
from repvgg_jax.train.settings import OptimizerSettings, Settings
from repvgg_jax.train.step import Classification, EvalStep
from repvgg_jax.train.validate import check_batches
from tests.helpers.jit import QUICK, quick_jit
from tests.helpers.runs import (
    assert_same,
    in_float64,
    small_config,
    small_experiment,
    small_settings,
)
from tests.helpers.trees import TINY_AUXILIARY, paths, random_variables, randomize


def batch_of(run: Experiment, size: int = 64):
    images = np.stack([run.dataset.train[i]["image"] for i in range(size)])
    labels = np.stack([run.dataset.train[i]["label"] for i in range(size)])
    return {"image": images, "label": labels}


@pytest.mark.parametrize("group_size", ["global", 16])
def test_a_step_on_eight_devices_is_a_step_on_one(group_size):
    with in_float64(small_experiment(bn__group_size=group_size)) as (run,):
        state, batch = jax.device_get((run.initial_state(), batch_of(run)))
        step = quick_jit(run.train_step)
        one = step(*jax.device_put((state, batch), jax.devices()[0]))
        eight = step(jax.device_put(state, run.replicated), jax.device_put(batch, run.over_batch))
        assert_same(one, eight)


def test_the_step_compiles_once_and_takes_its_own_output():
    run = small_experiment()
    step = quick_jit(run.train_step, out_shardings=run.replicated, donate_argnums=0)
    state, batch = run.initial_state(), jax.device_put(batch_of(run), run.over_batch)
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
    assert int(state.step) == 3


def test_augmentation_is_a_function_of_seed_and_step():
    run = small_experiment()
    step, state, batch = quick_jit(run.train_step), run.initial_state(), batch_of(run)
    later = state.replace(step=state.step + 1)
    first, again, other = (step(s, batch)[1]["loss"] for s in (state, state, later))
    assert first == again
    assert first != other


def test_abstract_state_is_the_states():
    run = small_experiment()
    state, abstract = run.initial_state(), run.abstract_state()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert all(
        a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
    )


def test_state_stays_float32_when_computing_in_bfloat16():
    run = small_experiment(model__dtype="bfloat16")
    state, _ = quick_jit(run.train_step)(run.initial_state(), batch_of(run))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.slow
def test_the_covariance_form_takes_the_same_step():
    with in_float64(
        *(small_experiment(model__train_form=form) for form in ("branches", "covariance"))
    ) as runs:
        state, batch = runs[0].initial_state(), batch_of(runs[0])
        assert_same(*(quick_jit(run.train_step)(state, batch) for run in runs))


def test_the_first_bad_gradient_is_named():
    run = small_experiment()
    state, batch = run.initial_state(), batch_of(run)
    step = quick_jit(run.train_step)
    assert step(state, batch)[1]["first_bad_gradient"] == -1
    head = {**state.params["head"], "bias": state.params["head"]["bias"] * np.inf}
    broken = state.replace(params={**state.params, "head": head})
    assert step(broken, batch)[1]["first_bad_gradient"] == 0


def test_evaluation_counts_what_the_mask_keeps():
    run = small_experiment()
    state, batch = run.initial_state(), batch_of(run, 8)
    step = quick_jit(EvalStep(run.model, run.task, run.normalize))
    some = step(state.variables, {**batch, "mask": np.arange(8) < 3})
    three = {name: values[:3] for name, values in batch.items()}
    alone = step(state.variables, {**three, "mask": np.ones(3, bool)})
    assert some["count"] == 3
    chex.assert_trees_all_close(some, alone, rtol=1e-5)


class TestTask:
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    labels = np.array([0, 1])

    def test_smoothed_cross_entropy(self):
        task = Classification(3, label_smoothing=0.3)
        targets = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
        np.testing.assert_allclose(task.targets(self.labels), targets, rtol=1e-6)
        loss, metrics = task.loss(self.logits, {}, task.targets(self.labels))
        log = np.asarray(jax.nn.log_softmax(self.logits))
        assert loss == pytest.approx(-(targets * log).sum() / 2, rel=1e-6)
        assert metrics["accuracy"] == 0.5

    def test_auxiliary_heads_add_their_weighted_loss(self):
        task = Classification(3, auxiliary_weight=0.1)
        targets = task.targets(self.labels)
        main, _ = task.loss(self.logits, {}, targets)
        both, _ = task.loss(self.logits, {"a": self.logits, "b": 0 * self.logits}, targets)
        assert float(both) == pytest.approx(1.1 * float(main) + 0.1 * np.log(3), rel=1e-6)

    def test_top_one_and_top_five_by_sorting(self, rng):
        logits = rng.integers(0, 4, (64, 9)).astype(np.float32)  # many are equal
        batch = {"label": rng.integers(0, 9, 64), "mask": rng.random(64) < 0.8}
        sums = Classification(9).evaluate(logits, batch)
        ranked = np.argsort(-logits, axis=1, kind="stable")
        for k, name in ((1, "accuracy"), (5, "top5")):
            right = (ranked[:, :k] == batch["label"][:, None]).any(1) & batch["mask"]
            assert sums[name] == right.sum()
        assert "top5" not in Classification(5).evaluate(
            logits[:, :5], {**batch, "label": 0 * batch["label"]}
        )

    def test_by_class(self, rng):
        logits = rng.standard_normal((40, 3)).astype(np.float32)
        batch = {"label": rng.integers(0, 3, 40), "mask": np.arange(40) < 30}
        sums = Classification(3).evaluate(logits, batch)
        for label in range(3):
            ours = (batch["label"] == label) & batch["mask"]
            assert sums["class_count"][label] == ours.sum()
            assert sums["class_accuracy"][label] == (ours & (logits.argmax(1) == label)).sum()

    def test_what_is_no_number_is_never_right(self):
        logits = np.array([[np.nan, 1.0], [np.nan, np.nan]], np.float32)
        batch = {"label": np.array([1, 0]), "mask": np.ones(2, bool)}
        assert Classification(2).evaluate(logits, batch)["accuracy"] == 0

    @pytest.mark.slow
    def test_auxiliary_heads_learn_through_the_step(self):
        variant = dataclasses.replace(
            TINY_AUXILIARY, depths=(2,), channels=(8,), auxiliary=("stage1_block1",)
        )
        run = small_experiment(variant, optimizer__warmup_epochs=0.0)
        state = run.initial_state()
        images = {"image": np.zeros((8, 16, 16, 1), np.uint8), "label": np.arange(8)}
        after, _ = quick_jit(run.train_step)(state, images)
        head = "aux_stage1_block1"
        for tree in ("params", "batch_stats"):
            before, now = getattr(state, tree)[head], getattr(after, tree)[head]
            moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, now)
            assert all(jax.tree.leaves(moved)), moved


def settings_of(**overrides):
    return dataclasses.replace(OptimizerSettings(), **overrides)


class TestSchedule:
    def rate(self, batch_size=256, **overrides):
        settings = settings_of(**{"learning_rate": 0.1, "warmup_epochs": 0.0, **overrides})
        return schedule(settings, batch_size=batch_size, steps_per_epoch=10, total_steps=110)

    def test_warm_up_then_cosine_scaled_by_the_batch(self):
        rate = self.rate(512, warmup_epochs=1.0)
        assert rate(0) == 0
        assert rate(5) == pytest.approx(0.1)
        assert rate(10) == pytest.approx(0.2)
        assert rate(60) == pytest.approx(0.1)
        assert rate(110) == pytest.approx(0, abs=1e-8)
        assert self.rate()(0) == pytest.approx(0.1)

    def test_linear(self):
        rate = self.rate(schedule="linear", warmup_epochs=1.0)
        assert [float(rate(s)) for s in (5, 10, 60, 110)] == pytest.approx([0.05, 0.1, 0.05, 0])

    def test_steps_count_from_the_beginning_of_the_run(self):
        rate = self.rate(schedule="step", step_epochs=3.0, step_factor=0.5, warmup_epochs=1.0)
        found = [float(rate(s)) for s in (5, 29, 30, 59, 60, 90)]
        assert found == pytest.approx([0.05, 0.1, 0.05, 0.05, 0.025, 0.0125])

    def test_constant(self):
        assert self.rate(schedule="constant")(109) == pytest.approx(0.1)


def updates(settings, params, gradients, steps=3):
    """Parameters after some steps whose gradients are `gradients(params)`."""
    optimizer = make_optimizer(settings, batch_size=256, steps_per_epoch=1, total_steps=100)
    state = optimizer.init(params)
    for _ in range(steps):
        change, state = optimizer.update(gradients(params), state, params)
        params = jax.tree.map(lambda a, u: a + u, params, change)
    return params


class TestOptimizer:
    params = {"kernel": np.array([[1.0, -2.0]], np.float32), "bias": np.ones(2, np.float32)}

    @staticmethod
    def squares(params):
        return jax.tree.map(lambda p: p**2, params)

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
    def test_three_steps_of_sgd_by_hand(self, nesterov):
        """PyTorch's rule: g += wd p; m = 0.9 m + g; p -= lr (g + 0.9 m, or m)."""
        settings = settings_of(
            learning_rate=0.1,
            schedule="step",
            step_epochs=1.0,
            step_factor=0.5,
            warmup_epochs=0.0,
            nesterov=nesterov,
            weight_decay=0.01,
        )
        found = updates(settings, self.params, self.squares)
        for name, decay in (("kernel", 0.01), ("bias", 0.0)):
            p, m = self.params[name].astype(np.float64), 0.0
            for step in range(3):
                g = p**2 + decay * p
                m = 0.9 * m + g
                p = p - 0.1 * 0.5**step * (g + 0.9 * m if nesterov else m)
            np.testing.assert_allclose(found[name], p, rtol=1e-5)

    def test_three_steps_of_adamw_by_hand(self):
        settings = settings_of(
            name="adamw",
            learning_rate=0.01,
            schedule="constant",
            warmup_epochs=0.0,
            b1=0.8,
            b2=0.9,
            weight_decay=0.1,
        )
        found = updates(settings, self.params, self.squares)
        for name, decay in (("kernel", 0.1), ("bias", 0.0)):
            p, m, v = self.params[name].astype(np.float64), 0.0, 0.0
            for step in range(1, 4):
                g = p**2
                m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
                corrected = m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
                p = p - 0.01 * (corrected + decay * p)
            np.testing.assert_allclose(found[name], p, rtol=1e-5)

    def test_clipping_comes_before_decay(self):
        settings = settings_of(
            learning_rate=1.0,
            schedule="constant",
            warmup_epochs=0.0,
            weight_decay=0.5,
            clip_norm=1.0,
        )
        found = updates(settings, self.params, self.squares, steps=1)
        norm = np.sqrt(sum((p**4).sum() for p in self.params.values()))
        kernel = self.params["kernel"]
        np.testing.assert_allclose(
            found["kernel"], kernel - kernel**2 / norm - 0.5 * kernel, rtol=1e-6
        )


class TestEquivalentL2:
    @pytest.mark.slow
    def test_by_hand_and_in_the_step(self):
        """The gradient is added to that of the loss, and ordinary decay spares the branches."""
        settings = {"weight_decay": 0.3, "warmup_epochs": 0.0, "momentum": 0.0}
        overrides = {f"optimizer__{name}": value for name, value in settings.items()}
        with in_float64(
            *(small_experiment(optimizer__equivalent_l2=on, **overrides) for on in (False, True))
        ) as runs:
            state, batch = runs[0].initial_state(), batch_of(runs[0])
            steps = [quick_jit(run.train_step)(state, batch)[0] for run in runs]
        state, a, b = jax.device_get((state, *steps))
        rate = 0.4 * 128 / 256
        block, stats = state.params["stem"], a.batch_stats["stem"]
        t3, t1 = (
            np.asarray(block[n]["scale"] / np.sqrt(stats[n]["var"] + 1e-5))
            for n in ("bn3x3", "bn1x1")
        )
        k3, k1 = (np.asarray(block[n]["kernel"], np.float64) for n in ("conv3x3", "conv1x1"))
        total = (k3[1, 1] * t3 + k1[0, 0] * t1) / (t3**2 + t1**2)
        expected3, expected1 = k3.copy(), (total * t1)[None, None]
        expected3[1, 1] = total * t3
        for name, kernel, expected in (("conv3x3", k3, expected3), ("conv1x1", k1, expected1)):
            # Both steps have the loss's gradient; one decays the kernel, one the penalty.
            moved = b.params["stem"][name]["kernel"] - a.params["stem"][name]["kernel"]
            np.testing.assert_allclose(moved, rate * 0.3 * (kernel - expected), atol=1e-10)
        assert_same(a.params["head"], b.params["head"])

    def test_of_other_blocks(self):
        """What is penalized instead of decayed is what the network's own blocks add up."""
        variant = Variant("m", (1, 1), (8, 8), 8, strides=(1, 2), block="mobileone")
        run = small_experiment(variant, optimizer__equivalent_l2=True)
        assert run.train_step.blocks == variant.blocks
        shapes = jax.eval_shape(run.model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        variables = randomize(shapes)
        assert float(equivalent_l2(variables)) == 0.0
        assert float(equivalent_l2(variables, blocks=run.train_step.blocks)) > 1.0
        mask = decay_mask(variables["params"], equivalent_l2=True, blocks=variant.blocks)
        updates, _ = run.optimizer.update(
            jax.tree.map(jnp.zeros_like, variables["params"]),
            run.optimizer.init(variables["params"]),
            variables["params"],
        )
        assert not all(jax.tree.leaves(mask["stem"]))
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates["stem"]))

    @pytest.mark.parametrize("block", ["repopt_search", "diracnet", "qarepvgg"])
    def test_blocks_without_one_are_refused(self, block):
        variant = Variant("x", (1, 1), (8, 8), 8, strides=(1, 2), block=block)
        with pytest.raises(ValueError, match="equivalent_l2 has no effect on x"):
            small_settings(variant, optimizer__equivalent_l2=True)

    def test_the_value(self, rng):
        variables = random_variables(create_model(TINY_AUXILIARY, num_classes=5))
        total = 0.0
        for name, block in variables["params"].items():
            if "conv3x3" not in block:
                continue
            k3, k1 = (np.asarray(block[n]["kernel"], np.float64) for n in ("conv3x3", "conv1x1"))
            t3, t1 = (
                block[n]["scale"] / np.sqrt(variables["batch_stats"][name][n]["var"] + 1e-5)
                for n in ("bn3x3", "bn1x1")
            )
            total += (k3**2).sum() - (k3[1, 1] ** 2).sum()
            total += ((k3[1, 1] * t3 + k1[0, 0] * t1) ** 2 / (t3**2 + t1**2)).sum()
        assert float(equivalent_l2(variables)) == pytest.approx(total, rel=1e-5)


class TestAccumulation:
    """Microbatches, one by one, are the batch at once: same groups, same statistics."""

    @pytest.mark.parametrize("unrolled", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_a_step_in_microbatches_is_the_step(self, unrolled):
        config = small_config(bn__group_size=8, model__dtype="float32")
        with in_float64(Experiment.from_config(config)) as (whole,):
            step = dataclasses.replace(whole.train_step, microbatches=4, unrolled=unrolled)
            state, batch = whole.initial_state(), batch_of(whole)
            assert_same(quick_jit(whole.train_step)(state, batch), quick_jit(step)(state, batch))

    @pytest.mark.slow
    def test_microbatches_on_eight_devices(self):
        config = small_config(bn__group_size=4, train__accumulate=2)
        with in_float64(Experiment.from_config(config)) as (run,):
            assert run.train_step.microbatches == 2
            state, batch = jax.device_get((run.initial_state(), batch_of(run)))
            step = quick_jit(run.train_step)
            one = step(*jax.device_put((state, batch), jax.devices()[0]))
            eight = step(
                jax.device_put(state, run.replicated), jax.device_put(batch, run.over_batch)
            )
            assert_same(one, eight)

    @pytest.mark.slow
    @pytest.mark.parametrize("unrolled", [True, False])
    def test_every_device_works_on_every_microbatch(self, unrolled, monkeypatch):
        """Also if each holds one group: microbatches of four groups are then shared by eight."""
        config = small_config(
            train__batch_size=64,
            train__accumulate=2,
            train__compiler_options=QUICK,
            bn__group_size=8,
        )
        check_batches(Settings.from_config(config), devices=8)
        with in_float64(Experiment.from_config(config)) as (run,):
            step = dataclasses.replace(run.train_step, unrolled=unrolled)
            monkeypatch.setattr(Experiment, "train_step", step)
            compiled = run.lower_step().compile()
            images = re.findall(r"= f64\[(\d+),8,8,8\]\S* convolution\(", compiled.as_text())
            assert set(images) == {"4"}
            batch = batch_of(run)
            whole = dataclasses.replace(step, microbatches=1)
            expected = quick_jit(whole)(jax.device_get(run.initial_state()), batch)
            assert_same(
                expected, compiled(run.initial_state(), jax.device_put(batch, run.over_batch))
            )

    def test_the_first_line_says_so(self):
        line = small_experiment(bn__group_size=8, train__accumulate=2).describe()
        fields = dict(field.partition("=")[::2] for field in line.split())
        assert (fields["microbatches"], fields["bn_group"], fields["batch"]) == ("2", "8", "128")
        assert "(16/device)" in line


class TestAverages:
    def test_they_follow_parameters_and_statistics(self):
        run = small_experiment(ema__decay=0.15)
        state, batch = run.initial_state(), batch_of(run)
        chex.assert_trees_all_equal(state.ema, state.variables)
        step = quick_jit(run.train_step)
        expected = jax.device_get(state.variables)
        for count in range(3):
            state, _ = step(state, batch)
            decay = min(0.15, (1 + count) / (10 + count))
            now = jax.device_get(state.variables)
            expected = jax.tree.map(lambda e, v, d=decay: d * e + (1 - d) * v, expected, now)
        chex.assert_trees_all_close(jax.device_get(state.ema), expected, rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_equal(state.result, state.ema)

    def test_without_them_the_result_is_what_was_trained(self):
        state = small_experiment().initial_state()
        assert state.ema == {}
        chex.assert_trees_all_equal(state.result, state.variables)


def test_initial_state_is_a_function_of_the_seed():
    run, other = small_experiment(), small_experiment(seed=1)
    state = run.initial_state()
    chex.assert_trees_all_equal(state, run.initial_state())
    assert jnp.result_type(state.step) == jnp.int32
    kernels = [r.params["stem"]["conv3x3"]["kernel"] for r in (state, other.initial_state())]
    assert (np.asarray(kernels[0]) != np.asarray(kernels[1])).all()


class TestFreezing:
    @pytest.mark.parametrize("options", [{}, {"model__remat": True, "train__accumulate": 3}])
    def test_frozen_blocks_stay_and_compute_as_in_evaluation(self, options):
        run = small_experiment(
            train__freeze=("stem", "stage1"),
            optimizer__weight_decay=0.1,
            optimizer__warmup_epochs=0.0,
            ema__decay=0.9,
            augment__affine__shift=0.0,
            bn__group_size=8 if options else "global",
            train__batch_size=24,
            **options,
        )
        batch, state = batch_of(run, 24), run.initial_state()
        noisy = random_variables(run.model, channels=1, size=8)
        state = state.replace(**noisy, ema=noisy)
        after, metrics = quick_jit(run.train_step)(state, batch)
        for tree in ("params", "batch_stats"):
            for name in ("stem", "stage1_block0"):
                for new, old in (
                    (getattr(after, tree), noisy[tree]),
                    (after.ema[tree], noisy[tree]),
                ):
                    chex.assert_trees_all_equal(new[name], jax.tree.map(np.asarray, old[name]))
        moved = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max()),
            after.params["stage2_block0"],
            noisy["params"]["stage2_block0"],
        )
        assert min(jax.tree.leaves(moved)) > 0
        if options:
            return
        bound = run.model.bind(noisy, mutable=["batch_stats"])
        inner = bound.features(run.normalize(batch["image"]))["stage1"]
        last = bound.stage2_block0(inner, True)
        logits = np.asarray(bound.head(last.mean(axis=(1, 2))))
        wanted, _ = run.task.loss(logits, {}, run.task.targets(batch["label"]))
        np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-4)
        assert metrics["grad_norm"] > 0

    def test_what_names_stand_for(self):
        model = create_model(TINY_AUXILIARY, num_classes=3)
        blocks = [layer.name for layer in model.layers]
        stage = blocks[1].partition("_")[0]
        wanted = tuple(b for b in blocks if b == "stem" or b.startswith(stage))
        assert Frozen.of(model, ("stem", stage), ()) == Frozen(blocks=wanted)
        assert Frozen.of(model, (), ("stem", stage)) == Frozen(statistics=wanted)
        assert Frozen.of(model, (), ("all",)).statistics == ("all",)
        with pytest.raises(ValueError, match=r"train\.freeze: .*'stage9' names no block"):
            Frozen.of(model, ("stage9",), ())
        with pytest.raises(ValueError, match=r"bn\.freeze_statistics: .*'stage9' names no"):
            Frozen.of(model, (), ("stage9",))
        with pytest.raises(ValueError, match="nothing to train"):
            Frozen.of(model, (*blocks, "aux", "head"), ())

    @pytest.mark.parametrize(
        ("form", "names"),
        [
            ("branches", ("all",)),
            ("covariance", ("stem", "stage1")),
            pytest.param("branches", ("stem", "stage1"), marks=pytest.mark.slow),
            pytest.param("covariance", ("all",), marks=pytest.mark.slow),
        ],
    )
    def test_frozen_statistics_are_used_and_kept(self, form, names):
        """The gradient is that of evaluation, or of half of it; to the bit they stay."""
        run = small_experiment(
            bn__freeze_statistics=names,
            bn__group_size=8,
            model__train_form=form,
            train__batch_size=24,
            train__accumulate=3,
            optimizer__warmup_epochs=0.0,
            augment__affine__shift=0.0,
            ema__decay=0.9,
        )
        noisy = random_variables(run.model, channels=1, size=8)
        state, batch = run.initial_state().replace(**noisy, ema=noisy), batch_of(run, 24)
        after, metrics = quick_jit(run.train_step)(state, batch)
        for found in (after.batch_stats, after.ema["batch_stats"]):
            for block, statistics in noisy["batch_stats"].items():
                kept = names == ("all",) or block.startswith(names)
                same = [
                    bool((np.asarray(a) == np.asarray(b)).all())
                    for a, b in zip(*map(jax.tree.leaves, (found[block], statistics)), strict=True)
                ]
                assert all(same) if kept else not any(same)
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.params, noisy["params"])
        assert min(jax.tree.leaves(moved)) > 0
        if names == ("all",):
            logits = run.model.apply(noisy, run.normalize(batch["image"]))
            wanted, _ = run.task.loss(logits, {}, run.task.targets(batch["label"]))
            np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)

    def test_statistics_to_keep_come_from_weights(self, tmp_path):
        config = small_config(bn__freeze_statistics=("all",))
        with pytest.raises(ValueError, match=r"freeze_statistics=.* config\.init_from"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


ONE, *OTHERS = REMAT_POLICIES


@pytest.mark.parametrize(
    "policy", [ONE, *(pytest.param(policy, marks=pytest.mark.slow) for policy in OTHERS)]
)
def test_remat_policies_change_nothing_but_rounding(policy):
    runs = in_float64(
        small_experiment(), small_experiment(model__remat=True, model__remat_policy=policy)
    )
    with runs as (plain, other):
        state, batch = plain.initial_state(), batch_of(plain)
        found = [quick_jit(run.train_step)(state, batch) for run in (plain, other)]
        assert_same(*found)
        assert other.model.remat


class TestClassWeights:
    def test_they_are_one_on_average(self):
        weights = balanced_weights(np.array([30, 10, 0, 60]))
        np.testing.assert_allclose(weights, [100 / 90, 100 / 30, 1, 100 / 180])
        assert np.dot(weights, [30, 10, 0, 60]) == pytest.approx(100)

    def test_the_loss_by_hand(self, rng):
        logits = rng.normal(size=(5, 3)).astype(np.float32)
        labels, weights = np.array([0, 2, 1, 1, 0]), (0.5, 2.0, 3.0)
        task = Classification(3, class_weights=weights, auxiliary_weight=0.25)
        loss, _ = task.loss(logits, {"aux": logits}, task.targets(labels))
        log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        wanted = np.mean([-weights[y] * row[y] for y, row in zip(labels, log, strict=True)])
        np.testing.assert_allclose(loss, 1.25 * wanted, rtol=1e-5)

    def test_the_setting(self):
        task = small_experiment(train__class_weights="balanced").task
        labels = small_experiment().dataset.train.labels
        assert np.mean(np.asarray(task.class_weights)[labels]) == pytest.approx(1)
        assert small_experiment().task.class_weights == ()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_head_has_a_rate_of_its_own(name, rng):
    params = {
        part: {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}
        for part in ("stem", "head", "aux_stem")
    }
    options = {"batch_size": 256, "steps_per_epoch": 1, "total_steps": 9}
    updates = []
    for factor in (1.0, 5.0):
        settings = OptimizerSettings(name=name, head_factor=factor, clip_norm=1.0)
        optimizer = make_optimizer(settings, **options)
        update, _ = optimizer.update(params, optimizer.init(params), params)
        updates.append(update)
    plain, scaled = updates
    np.testing.assert_array_equal(scaled["stem"]["kernel"], plain["stem"]["kernel"])
    for part in ("head", "aux_stem"):
        np.testing.assert_allclose(scaled[part]["kernel"], 5 * plain[part]["kernel"], rtol=1e-6)


def test_what_is_taken_for_what(rng):
    """The confusion matrix counts every image that the mask keeps once."""
    logits = rng.normal(size=(20, 4)).astype(np.float32)
    labels, mask = rng.integers(0, 4, 20), rng.integers(0, 2, 20).astype(bool)
    sums = Classification(4).evaluate(logits, {"label": labels, "mask": mask})
    wanted = np.zeros((4, 4))
    for label, row, kept in zip(labels, logits, mask, strict=True):
        wanted[label, row.argmax()] += kept
    np.testing.assert_array_equal(sums["confusion"], wanted)
    np.testing.assert_array_equal(np.diag(sums["confusion"]), sums["class_accuracy"])
    assert "confusion" not in Classification(1001).evaluate(
        np.zeros((2, 1001), np.float32), {"label": labels[:2], "mask": mask[:2]}
    )

"""What a configuration may say, and what is offered instead of what it may not."""

import itertools
import re

import pytest

from repvgg_jax.train import config as configs
from repvgg_jax.train.loop import train
from repvgg_jax.train.run import Run
from tests.runs import small_config


def config_of(*, batch, group="global", pieces=1, mix=0, mixup=0.2):
    return small_config(
        train__batch_size=batch,
        train__accumulate=pieces,
        bn__group_size=group,
        augment__mixup=mixup,
        augment__mix_group=mix,
    )


def works(batch, devices, group, pieces, mix) -> bool:
    """Written out: whole groups in pieces that all devices share, and whole groups to mix."""
    return (
        batch > 0
        and batch % devices == 0
        and batch % group == 0
        and batch // group % pieces == 0
        and batch % pieces == 0
        and batch // pieces % devices == 0
        and batch % (mix or batch) == 0
    )


def message_of(config, devices) -> str | None:
    config.eval.batch_size = devices
    try:
        configs.check(config, devices=devices)
    except ValueError as error:
        return str(error)
    return None


def offered(message: str) -> list[int]:
    """The batch sizes at the end of a message."""
    last = re.search(r"(\d+)( or (\d+))?$", message)
    return [int(number) for number in last.group(1, 3) if number]


class TestBatchSizes:
    CASES = list(
        itertools.product((1, 3, 6, 8, 12), (1, 8, 20, 32), (1, 2, 3), (0, 16, 24), (1, 97, 252))
    )

    def test_what_is_refused(self):
        for devices, group, pieces, mix, batch in self.CASES:
            config = config_of(batch=batch, group=group, pieces=pieces, mix=mix)
            refused = message_of(config, devices) is not None
            assert refused != works(batch, devices, group, pieces, mix), (config, devices)

    def test_what_is_offered_works_and_is_the_nearest(self):
        refused = 0
        for devices, group, pieces, mix, batch in self.CASES:
            message = message_of(
                config_of(batch=batch, group=group, pieces=pieces, mix=mix), devices
            )
            if message is None:
                continue
            refused += 1
            rest = (devices, group, pieces, mix)
            below = next((b for b in range(batch, 0, -1) if works(b, *rest)), None)
            above = next(b for b in itertools.count(batch) if works(b, *rest))
            assert offered(message) == [b for b in (below, above) if b], (message, rest)
            for size in offered(message):
                config = config_of(batch=size, group=group, pieces=pieces, mix=mix)
                assert message_of(config, devices) is None
        assert refused > 200

    @pytest.mark.parametrize(
        ("settings", "name", "field"),
        [
            ({"batch": 240, "group": 32}, "bn.group_size", "group"),
            ({"batch": 96, "group": 8, "pieces": 5}, "train.accumulate", "pieces"),
            ({"batch": 96, "group": 4, "pieces": 8}, "train.accumulate", "pieces"),
            ({"batch": 96, "group": 8, "mix": 36}, "augment.mix_group", "mix"),
        ],
    )
    def test_what_is_offered_beside_another_batch_works_too(self, settings, name, field):
        message = message_of(config_of(**settings), 8)
        assert message.startswith(f"config.{name}=")
        values = re.search(r"the nearest that work: (\d+) or (\d+), or config\.train", message)
        for value in values.groups():
            assert message_of(config_of(**{**settings, field: int(value)}), 8) is None

    @pytest.mark.parametrize(("devices", "sizes"), [(6, "192 or 288"), (12, "192 or 288")])
    def test_the_paper_batch_on_other_devices(self, devices, sizes):
        config = config_of(batch=256, group=32)
        told = f"=256 cannot be split over {devices} devices; .* config.bn.group_size=32: {sizes}$"
        with pytest.raises(ValueError, match=told):
            configs.check(config, devices=devices)

    def test_the_group_that_is_offered_for_global_with_pieces(self):
        message = message_of(config_of(batch=96, pieces=2), 8)
        assert '"global" and config.train.accumulate=2 exclude each other' in message
        for size in offered(message):
            assert message_of(config_of(batch=96, group=size, pieces=2), 8) is None

    def test_groups_to_mix_count_only_where_images_are_mixed(self):
        assert "mix_group=48 does not divide" in message_of(config_of(batch=64, mix=48), 8)
        assert message_of(config_of(batch=64, mix=48, mixup=0.0), 8) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": -1}, r"config.seed=-1 must be from 0 to 4294967295"),
        ({"seed": 2**32}, r"config.seed=4294967296 must be from 0 to 4294967295"),
        ({"data__sizes": (0, 128)}, r"data.sizes=\(0, 128\) must hold pairs of an epoch and"),
        ({"data__sizes": ((0, 0),)}, r"data.sizes=\(\(0, 0\),\) must hold pairs .* above 0"),
        ({"data__sizes": ((0, 16.5),)}, r"data.sizes=.* must hold pairs"),
        ({"data__sizes": ((0, 16, 3),)}, r"data.sizes=.* must hold pairs"),
        ({"data__sizes": ((0, 16),)}, r"needs config.data.train_size above 0, .* example 16"),
        ({"data__std": (0.0,)}, r"config.data.std=\(0.0,\) must be above 0"),
        ({"data__mean": (float("nan"),)}, "config.data.mean=nan must be a finite number"),
        ({"data__workers": -1}, "config.data.workers=-1 must be 0 or more"),
        ({"data__threads": 0}, "config.data.threads=0 must be 1 or more"),
        ({"data__max_bad": -1}, "config.data.max_bad=-1 must be 0 or more"),
        ({"data__train_size": -1}, "config.data.train_size=-1 must be 0 or more"),
        ({"data__eval_size": -8}, "config.data.eval_size=-8 must be 0 or more"),
        ({"data__eval_crop": 1.5}, "config.data.eval_crop=1.5 must be above 0 and at most 1"),
        ({"data__crop_scale": (0.5, 2.0)}, "config.data.crop_scale=.* at most 1"),
        ({"augment__mixup": -0.2}, "config.augment.mixup=-0.2 must be 0 or more"),
        ({"augment__cutmix": float("inf")}, "config.augment.cutmix=inf must be a finite number"),
        ({"augment__mix_group": -4}, "config.augment.mix_group=-4 must be 0 or more"),
        ({"augment__flip": 1.5}, "config.augment.flip=1.5 must be from 0 to 1"),
        ({"train__epochs": 0}, "config.train.epochs=0 must be 1 or more"),
        ({"train__epochs": -3}, "config.train.epochs=-3 must be 1 or more"),
        ({"train__accumulate": 0}, "config.train.accumulate=0 must be 1 or more"),
        ({"train__label_smoothing": 1.0}, r"train.label_smoothing=1.0 must be in \[0, 1\)"),
        ({"train__auxiliary_weight": -0.1}, "train.auxiliary_weight=-0.1 must be 0 or more"),
        ({"train__compiler_options": ("xla",)}, r"=\('xla',\) must hold texts NAME=VALUE"),
        ({"train__compiler_options": (1,)}, r"=\(1,\) must hold texts NAME=VALUE"),
        ({"optimizer__learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"optimizer__learning_rate": -0.1}, "learning_rate=-0.1 must be 0 or more"),
        ({"optimizer__warmup_epochs": 3.0}, "warmup_epochs=3.0 leaves nothing .*epochs=2"),
        ({"optimizer__step_factor": 0.0}, "optimizer.step_factor=0.0 must be above 0"),
        ({"optimizer__epsilon": 0.0}, "optimizer.epsilon=0.0 must be above 0"),
        ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm=-1.0 must be 0 or more"),
        ({"optimizer__momentum": 1.0}, r"optimizer.momentum=1.0 must be in \[0, 1\)"),
        ({"ema__decay": -0.5}, r"ema.decay=-0.5 must be in \[0, 1\)"),
        ({"eval__batch_size": 0}, r"eval.batch_size=0 cannot be split .* nearest that can: 8$"),
        ({"eval__every_epochs": 0}, "eval.every_epochs=0 must be 1 or more"),
        ({"checkpoint__keep": 0}, "checkpoint.keep=0 must be 1 or more"),
        ({"report__every_steps": 0}, "report.every_steps=0 must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_computed(overrides, message):
    config = small_config(**overrides)

    def begin():  # as training and evaluation do; the data's own settings are read last
        configs.check(config, devices=8)
        Run.from_config(config)

    with pytest.raises(ValueError, match=message) as caught:
        begin()
    assert "\n" not in str(caught.value)


def test_options_of_another_platforms_compiler_stop_only_training(tmp_path):
    config = small_config(train__compiler_options=("xla_no_such=1",))
    Run.from_config(config)  # to evaluate or to convert what it has trained
    told = r"^config.train.compiler_options=\('xla_no_such=1',\) on cpu: .*No such compile option"
    with pytest.raises(ValueError, match=told):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Settings: defaults, limits, and the nearest values that work."""

import dataclasses
import itertools
import json
import re

import jax
import pytest

from repvgg_jax import Variant
from repvgg_jax.data.settings import EraseSettings
from repvgg_jax.settings import Section, setting
from repvgg_jax.text import differences
from repvgg_jax.train.config import default_config
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.loop import train
from repvgg_jax.train.settings import Settings, TrainSettings
from repvgg_jax.train.validate import check_batches
from repvgg_jax.train.workdir import Workdir
from tests.helpers.runs import SMALL, small_config, small_settings


@dataclasses.dataclass(frozen=True)
class InnerSettings(Section, path="config.outer.inner"):
    rate: float = setting(0.5, "a rate", above=0, most=1)


@dataclasses.dataclass(frozen=True)
class OuterSettings(Section, path="config.outer"):
    count: int = setting(3, "a number", least=1)
    kind: str = setting("plain", "a kind", choices=("plain", "fancy"))
    sizes: tuple[int, ...] = setting((), "sizes")
    on: bool = setting(False, "a switch")
    inner: InnerSettings = InnerSettings()


class TestSection:
    def test_values_are_read_and_written(self):
        content = {"count": 4, "sizes": [[1, 2], [3, 4]], "inner": {"rate": 1}}
        section = OuterSettings.from_mapping(content)
        assert section == OuterSettings(4, sizes=((1, 2), (3, 4)), inner=InnerSettings(1.0))
        assert type(section.inner.rate) is float
        assert OuterSettings.from_mapping(section.plain()) == section
        assert hash(section) == hash(OuterSettings.from_mapping(section.plain()))

    def test_missing_values_take_defaults(self):
        assert OuterSettings.from_mapping({}) == OuterSettings()
        assert OuterSettings.from_mapping({"inner": {}}) == OuterSettings()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"cuont": 4}, r"config\.outer\.cuont; did you mean 'count'"),
            ({"inner": {"rat": 4}}, r"config\.outer\.inner\.rat; did you mean 'rate'"),
            ({"count": 0}, r"config\.outer\.count=0 .*1 or more"),
            ({"count": True}, r"config\.outer\.count=True .*int"),
            ({"count": 1.5}, r"config\.outer\.count=1\.5 .*int"),
            ({"on": 1}, r"config\.outer\.on=1 .*bool"),
            ({"kind": "fanci"}, r"config\.outer\.kind='fanci'; did you mean 'fancy'"),
            ({"sizes": 3}, r"config\.outer\.sizes=3 .*tuple"),
            ({"inner": {"rate": 0.0}}, r"config\.outer\.inner\.rate=0\.0 .*above 0"),
            ({"inner": {"rate": float("nan")}}, r"config\.outer\.inner\.rate=nan .*finite"),
            ({"inner": 3}, r"config\.outer\.inner .*mapping.*3"),
            ([], r"config\.outer .*mapping"),
        ],
    )
    def test_mistakes_are_named_in_one_line(self, content, message):
        with pytest.raises(ValueError, match=message) as caught:
            OuterSettings.from_mapping(content)
        assert "\n" not in str(caught.value)

    def test_limits_hold_for_direct_construction(self):
        with pytest.raises(ValueError, match=r"config\.train\.epochs=0"):
            dataclasses.replace(TrainSettings(), epochs=0)


class TestStoredSettings:
    """`config.json`, of this version and of older ones."""

    def test_a_round_trip(self, tmp_path):
        settings = small_settings(bn__group_size=16, data__train_size=8, data__sizes=((0, 8),))
        Workdir(tmp_path / "run").claim(settings)
        again = Workdir(tmp_path / "run").read_settings()
        assert again == settings
        assert again.model.variant == SMALL
        assert Settings.from_config(default_config("B1g4")).as_json()["model"]["variant"] == "B1g4"

    def test_every_setting_may_be_missing(self):
        content = small_settings().as_json()
        assert Settings.from_mapping({}) == Settings()
        for section in list(content):
            rest = {name: value for name, value in content.items() if name != section}
            assert getattr(Settings.from_mapping(rest), section) == getattr(Settings(), section)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"config\.json .*Expecting"),
            ("[]", r"config\.json .*mapping"),
            ('{"train": {"epoch": 3}}', r"config\.json .*config\.train\.epoch; .*'epochs'"),
        ],
    )
    def test_a_damaged_file(self, tmp_path, text, message):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Workdir(tmp_path).read_settings()

    def test_older_spelling_of_a_mode(self):
        assert EraseSettings.from_mapping({"mode": "colour"}).mode == "color"

    def test_differences_name_what_changed(self):
        old, new = small_settings().as_json(), small_settings(seed=3).as_json()
        assert differences(old, new) == ["config.seed: 0 -> 3"]
        del new["seed"]
        assert differences(old, new) == ["config.seed: removed"]
        assert differences(old, old) == []


class TestDefaultConfig:
    def test_it_holds_the_defaults(self):
        assert Settings.from_config(default_config()) == Settings()
        json.dumps(Settings().as_json())  # nothing that JSON does not know

    def test_types_are_kept(self):
        config = default_config(SMALL)
        with pytest.raises(TypeError):
            config.train.epochs = "many"
        config.bn.group_size = 32
        config.bn.group_size = "global"
        config.model.variant.stem_channels = 16
        assert Settings.from_config(config).model.variant == dataclasses.replace(
            SMALL, stem_channels=16
        )

    def test_a_misspelt_setting_of_a_recipe(self):
        config = default_config()
        with config.unlocked():
            config.train.epoch = 3
        with pytest.raises(ValueError, match=r"config\.train\.epoch; did you mean 'epochs'"):
            Settings.from_config(config)

    def test_variants(self):
        assert Settings.from_config(default_config("repvgg_b1g4")).model.variant.name == "B1g4"
        own = Variant("own", (1,), (8,), 8)
        assert Settings.from_config(default_config(own)).model.variant == own
        with pytest.raises(ValueError, match="B9"):
            default_config("B9")


def config_of(*, batch, group="global", microbatches=1, mix=0, mixup=0.2):
    return small_config(
        train__batch_size=batch,
        train__accumulate=microbatches,
        bn__group_size=group,
        augment__mixup=mixup,
        augment__mix_group=mix,
    )


def works(batch, devices, group, microbatches, mix) -> bool:
    """Written out: whole groups in microbatches that all devices share, and whole groups to mix."""
    return (
        batch > 0
        and batch % devices == 0
        and batch % group == 0
        and batch // group % microbatches == 0
        and batch % microbatches == 0
        and batch // microbatches % devices == 0
        and batch % (mix or batch) == 0
    )


def message_of(config, devices) -> str | None:
    config.eval.batch_size = devices
    try:
        check_batches(Settings.from_config(config), devices=devices)
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
        for devices, group, microbatches, mix, batch in self.CASES:
            config = config_of(batch=batch, group=group, microbatches=microbatches, mix=mix)
            refused = message_of(config, devices) is not None
            assert refused != works(batch, devices, group, microbatches, mix), (config, devices)

    def test_what_is_offered_works_and_is_the_nearest(self):
        refused = 0
        for devices, group, microbatches, mix, batch in self.CASES:
            message = message_of(
                config_of(batch=batch, group=group, microbatches=microbatches, mix=mix), devices
            )
            if message is None:
                continue
            refused += 1
            rest = (devices, group, microbatches, mix)
            below = next((b for b in range(batch, 0, -1) if works(b, *rest)), None)
            above = next(b for b in itertools.count(batch) if works(b, *rest))
            assert offered(message) == [b for b in (below, above) if b], (message, rest)
            for size in offered(message):
                config = config_of(batch=size, group=group, microbatches=microbatches, mix=mix)
                assert message_of(config, devices) is None
        assert refused > 200

    @pytest.mark.parametrize(
        ("settings", "name", "field"),
        [
            ({"batch": 240, "group": 32}, "bn.group_size", "group"),
            ({"batch": 96, "group": 8, "microbatches": 5}, "train.accumulate", "microbatches"),
            ({"batch": 96, "group": 4, "microbatches": 8}, "train.accumulate", "microbatches"),
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
        message = rf"=256 .* {devices} devices; .* config.bn.group_size=32: {sizes}$"
        with pytest.raises(ValueError, match=message):
            check_batches(Settings.from_config(config), devices=devices)

    def test_the_group_that_is_offered_for_global_with_microbatches(self):
        message = message_of(config_of(batch=96, microbatches=2), 8)
        assert '"global"' in message
        assert "config.train.accumulate=2" in message
        for size in offered(message):
            assert message_of(config_of(batch=96, group=size, microbatches=2), 8) is None

    def test_groups_to_mix_count_only_where_images_are_mixed(self):
        assert "mix_group=48" in message_of(config_of(batch=64, mix=48), 8)
        assert message_of(config_of(batch=64, mix=48, mixup=0.0), 8) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train__batch_size": 100}, "train.batch_size=100 .* 8 devices; .* 96 or 104"),
        ({"train__batch_size": 4}, "train.batch_size=4 .*: 8$"),
        ({"eval__batch_size": 30}, "eval.batch_size=30 .* 24 or 32"),
        ({"bn__group_size": -2}, 'group_size=-2; .*"global"'),
        ({"bn__group_size": "all"}, "group_size='all'; .*\"global\""),
        ({"train__accumulate": 2}, r'"global" and .*accumulate=2 exclude .* divides 64'),
        (
            {"train__accumulate": 3, "bn__group_size": 16},
            "accumulate=3 does not divide the 8 groups of 16 images .* 2 or 4",
        ),
        ({"bn__group_size": 48}, "group_size=48 does not divide .*=128; .* 32 or 64"),
        ({"data__mean": (0.1, 0.2)}, r"mean=\(0.1, 0.2\) has 2 values, .* 1 channels"),
        ({"train__batch_size": 2000}, "batch_size=2000 is more than the 1,437 training"),
        ({"model__dtype": "float8"}, "dtype='float8'; .*float32, bfloat16"),
        ({"optimizer__name": "lion"}, "optimizer.name='lion'; .*sgd, adamw"),
        ({"optimizer__schedule": "cosin"}, "schedule='cosin'; did you mean 'cosine'"),
        ({"data__sizes": ((1, 16),)}, r"data.sizes=.* epoch 0"),
        ({"seed": -1}, r"config.seed=-1 must be from 0 to 4294967295"),
        ({"seed": 2**32}, r"config.seed=4294967296 must be from 0 to 4294967295"),
        ({"data__train_size": -8}, r"data\.train_size=-8 .*0 or more.*\(height, width\)"),
        ({"data__train_size": (8, 16, 3)}, r"data\.train_size=\(8, 16, 3\) .*\(height, width\)"),
        ({"data__eval_size": (0, 16)}, r"data\.eval_size=\(0, 16\) .* 0 for one"),
        ({"data__eval_size": "big"}, r"data\.eval_size='big' .*pixels"),
        ({"data__sizes": ((0, (8, 0)),)}, r"data\.sizes=.*\(8, 0\).* must hold pairs"),
        ({"data__background": (0, 0)}, r"data\.background=\(0, 0\) .*three"),
        ({"data__background": (0, 0, 256)}, r"data\.background=.*256.*255"),
        ({"data__sizes": (0, 128)}, r"data.sizes=\(0, 128\) must hold pairs of an epoch and"),
        ({"data__sizes": ((0, 0),)}, r"data.sizes=\(\(0, 0\),\) must hold pairs .* above 0"),
        ({"data__sizes": ((0, 16.5),)}, r"data.sizes=.* must hold pairs"),
        ({"data__sizes": ((0, 16, 3),)}, r"data.sizes=.* must hold pairs"),
        ({"data__sizes": ((0, 16),)}, r"needs config.data.train_size above 0, .* 16$"),
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
        ({"bn__freeze_statistics": (1,)}, r"freeze_statistics=\(1,\) .*names"),
        (
            {"bn__freeze_statistics": ("all",), "quantize__qat": True},
            r"freeze_statistics is not for .*quantize\.statistics",
        ),
        ({"model__remat_policy": "convolutions"}, r"remat_policy=.* only with .*remat=True"),
        (
            {"train__class_weights": "balanced", "data__sampling": "balanced"},
            "class_weights and config.data.sampling .* give one",
        ),
        ({"train__label_smoothing": 1.0}, r"train.label_smoothing=1.0 must be in \[0, 1\)"),
        ({"train__auxiliary_weight": -0.1}, "train.auxiliary_weight=-0.1 must be 0 or more"),
        ({"train__compiler_options": ("xla",)}, r"=\('xla',\) must hold strings NAME=VALUE"),
        ({"train__compiler_options": (1,)}, r"=\(1,\) must hold strings NAME=VALUE"),
        ({"optimizer__learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"optimizer__learning_rate": -0.1}, "learning_rate=-0.1 must be 0 or more"),
        ({"optimizer__warmup_epochs": 3.0}, "warmup_epochs=3.0 .*epochs=2"),
        ({"optimizer__step_factor": 0.0}, "optimizer.step_factor=0.0 must be above 0"),
        ({"optimizer__epsilon": 0.0}, "optimizer.epsilon=0.0 must be above 0"),
        ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm=-1.0 must be 0 or more"),
        ({"optimizer__momentum": 1.0}, r"optimizer.momentum=1.0 must be in \[0, 1\)"),
        ({"ema__decay": -0.5}, r"ema.decay=-0.5 must be in \[0, 1\)"),
        ({"eval__batch_size": 0}, r"eval.batch_size=0 must be 1 or more; .*: 8$"),
        ({"eval__every_epochs": 0}, "eval.every_epochs=0 must be 1 or more"),
        ({"checkpoint__keep": 0}, "checkpoint.keep=0 must be 1 or more"),
        ({"report__every_steps": 0}, "report.every_steps=0 must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_computed(overrides, message):
    config = small_config(**overrides)

    def begin():  # as training and evaluation do
        settings = Settings.from_config(config)
        check_batches(settings, devices=8)
        Experiment.from_config(settings)

    with pytest.raises(ValueError, match=message) as caught:
        begin()
    assert "\n" not in str(caught.value)


def test_options_of_the_compiler_may_be_booleans():
    """XLA itself takes neither "true" nor "false"."""
    for value in ("true", "false", "True"):
        options = TrainSettings(compiler_options=(f"xla_cpu_enable_fast_math={value}",))
        assert jax.jit(lambda x: x + 1, compiler_options=options.xla_options)(1) == 2
    tpu = TrainSettings(compiler_options=("xla_tpu_x=true",))
    assert tpu.xla_options == {"xla_tpu_x": "true"}


def test_options_of_another_platforms_compiler_stop_only_training(tmp_path):
    config = small_config(train__compiler_options=("xla_no_such=1",))
    Experiment.from_config(config)  # to evaluate or to convert what it has trained
    message = r"config.train.compiler_options=\('xla_no_such=1',\) on cpu: .*xla_no_such"
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Which settings of a run may change when it is resumed.

Those that say how something is read, evaluated or written always may. With `--extend` so may the
length and the batch: the run then goes on at the same point of the same epoch, and from there on
the learning rate is that of a run which had the new length and batch from its start. So may
settings that trade memory for time and change no more than rounding.
"""

import dataclasses

from repvgg_jax.block import best_train_form
from repvgg_jax.text import differences
from repvgg_jax.train.settings import Settings

FREE = (
    "config.data.source",  # the images must be the same, see `classes.for_resuming`
    "config.data.directory",
    "config.data.workers",
    "config.data.threads",
    "config.data.max_bad",
    "config.data.max_pixels",
    "config.data.allow_empty",
    "config.eval",
    "config.protocol",
    "config.checkpoint",
    "config.report",
    "config.train.compiler_options",  # of one platform; the arithmetic stays the same
)
EXTENDABLE = (
    "config.train.epochs",
    "config.train.batch_size",
    "config.train.accumulate",  # this and the next change rounding and the memory that is needed
    "config.model.remat",
)

_NAMED = 5  # settings that differ, in a message


def check_changes(
    stored: Settings, given: Settings, *, owner: str, extend: bool, known_data: bool
) -> list[str]:
    """Checks what changes when a run is resumed.

    Args:
      stored: of the run.
      given: that it is resumed with.
      owner: the run, for messages.
      extend: whether its length and batch may change.
      known_data: whether the run stored what tells its data from others.

    Returns:
      What changes, a line per setting.

    Raises:
      ValueError: a setting that must not change.
    """
    given = _with_offset(given, stored.train.step_offset)
    given = _with_train_form(given, stored.model.train_form)
    changed = differences(stored.as_json(), given.as_json())
    free = FREE if known_data else FREE[1:]
    refused = [line for line in changed if not line.startswith((*free, *EXTENDABLE))]
    extended = [line for line in changed if line.startswith(EXTENDABLE)]
    if refused or (extended and not extend):
        named = refused or extended
        few = "; ".join(named[:_NAMED])
        few += f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        advice = "Give another --workdir, or the configuration that the run started with"
        if not refused:
            advice = "Give --extend to go on with that"
        raise ValueError(f"{owner} holds a run with another configuration: {few}. {advice}")
    return changed


def resumed(
    stored: Settings, given: Settings, *, step: int, images: int, images_before: int | None = None
) -> Settings:
    """The settings that a run goes on with.

    Args:
      stored: of the run.
      given: that it is resumed with; `check_changes` allows them.
      step: of the newest checkpoint.
      images: number of training images.
      images_before: the same of the run until now; None if it is not known to be another one.

    Raises:
      ValueError: a new length that is already over, or fewer images than a batch.
    """
    given = _with_train_form(given, stored.model.train_form)
    after = images // given.train.batch_size
    if not after:
        raise ValueError(
            f"{images} training images are fewer than a batch of "
            f"config.train.batch_size={given.train.batch_size}"
        )
    before = (images_before or images) // stored.train.batch_size or after
    offset = stored.train.step_offset
    epochs = (step + offset) / before
    if given.train.epochs < epochs and given.train.epochs < stored.train.epochs:
        raise ValueError(
            f"config.train.epochs={given.train.epochs} is over already: the newest checkpoint is "
            f"that of epoch {epochs:g}"
        )
    if before != after:
        offset = round(epochs * after) - step
    return _with_offset(given, offset)


def started(given: Settings, platform: str) -> Settings:
    """The settings of a new run, which may have been read from another one.

    Its training pass is decided here, so that a run is resumed with the one it started with.
    """
    return _with_train_form(_with_offset(given, 0), best_train_form(platform))


def _with_train_form(settings: Settings, form: str) -> Settings:
    """The settings with another training pass instead of `auto`."""
    if settings.model.train_form != "auto":
        return settings
    model = dataclasses.replace(settings.model, train_form=form)
    return dataclasses.replace(settings, model=model)


def _with_offset(settings: Settings, offset: int) -> Settings:
    return dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, step_offset=offset)
    )

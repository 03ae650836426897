"""Run directories that are damaged, and runs that are killed at any instant."""

import contextlib
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest

from repvgg_jax.cluster import lock
from repvgg_jax.train import by_class, evaluate, loop, report
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.manifest import Manifest
from repvgg_jax.train.metrics import MetricsWriter
from repvgg_jax.train.workdir import Workdir
from tests.helpers.instants import recorded
from tests.helpers.runs import final_state, numbers, rows, small_config, small_experiment
from tests.helpers.states import make_state

OTHERS = (None, -1, 10**30, 10**400, 1.5, "x", [], {}, [[]], [1, "x"], {"x": 1}, True)
SAMPLED = 30  # of some 210 instants of a run; resuming takes up to two seconds
OWNER = {"host": "a", "machine": "b", "pid": 7, "began": "2026", "beat": "000000000001"}


@pytest.fixture
def path(small_run, tmp_path):
    """A finished run, to be damaged."""
    shutil.copytree(small_run[0], tmp_path / "run")
    (tmp_path / "run" / lock.FILE).write_text(json.dumps(OWNER))
    return tmp_path / "run"


def damaged(data: bytes, rng: np.random.Generator):
    """Cut, emptied, overwritten and flipped; then other values in place of every value."""
    yield from (b"", data[: len(data) // 2], data + b"\0" * 99, b"\0" * len(data))
    yield from (b"[" * 10**5, b'{"a":' * 10**5, b"3", b"[]", b'"x"', b"null", b"{}", b"\xff")
    for at in rng.choice(len(data), min(40, len(data)), replace=False):
        yield data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :]
    with contextlib.suppress(ValueError):
        top = json.loads(data)
        for keys in _paths(top):
            changed = json.loads(data)
            inner = changed
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = OTHERS[rng.integers(len(OTHERS))]
            yield json.dumps(changed).encode()


def _paths(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (key,)
        if isinstance(item, (dict, list)):
            yield from ((key, *inner) for inner in _paths(item))


def _report(path: pathlib.Path) -> None:
    with MetricsWriter(Workdir(path), small_experiment(), start_step=22) as writer:
        report.write(Workdir(path), title="x", rows=writer._rows, config={})


def _lock(path: pathlib.Path) -> None:
    with lock.locked(path, sleep=lambda seconds: None):
        pass


@pytest.mark.parametrize(
    ("name", "read", "loads"),
    [
        ("config.json", lambda path: Workdir(path).read_settings(), False),
        ("metadata.json", lambda path: Workdir(path).read_metadata(), False),
        ("checkpoints/22/manifest/metadata", lambda path: Manifest.read(path.parents[1]), False),
        (lock.FILE, _lock, True),
    ],
)
def test_a_damaged_file_is_one_line(name, read, loads, path, rng):
    """Or nothing at all, if it is only about another process."""
    file, refused = path / name, []
    data = file.read_bytes()
    for content in damaged(data, rng):
        file.write_bytes(content)
        try:
            read(file if "/" in name else path)
        except ValueError as error:
            refused.append(str(error))
    assert all(len(message) < 700 and "\n" not in message for message in refused)
    assert (not refused) if loads else (len(refused) >= 50)


def test_damaged_rows_are_left_out_and_counted(path, rng, monkeypatch, caplog):
    monkeypatch.setattr(report, "draw_curves", lambda *args, **options: None)
    file = path / "metrics.jsonl"
    data, before = file.read_bytes(), rows(path)
    lines = data.splitlines(keepends=True)
    lines[1:3] = [b"[" * 10**5 + b"\n", b"7\n", b"\0" * 80 + b"\n", b'{"step": "4"}\n', b"{}\n"]
    file.write_bytes(b"".join([*lines, b'{"step": 22, "train/lo']))
    _report(path)
    assert len(caplog.messages) == 1
    assert f"5 of {len(lines)} rows" in caplog.text
    assert rows(path) == [*before[:1], *before[3:-1]]  # the last one is written anew
    for content in damaged(data, rng):
        file.write_bytes(content)
        _report(path)


def test_a_damaged_manifest_is_stepped_back_from(path, caplog):
    file = path / "checkpoints" / "22" / "manifest" / "metadata"
    file.write_bytes(b"[" * 10**6)
    with Checkpoints(path / "checkpoints") as checkpoints:
        assert checkpoints.restore_variables()[0] == 11
        assert "nested" in caplog.text
        assert checkpoints.best() == 11
        checkpoints.tidy()
    assert (path / "unsound" / "22").is_dir()


def test_a_run_directory_that_is_removed_is_named_and_stays_away(tmp_path, monkeypatch):
    path, real = tmp_path / "run", MetricsWriter.show

    def removes(self, step, row):
        if step == 3:
            shutil.rmtree(path)

    monkeypatch.setattr(MetricsWriter, "show", removes)
    with pytest.raises(OSError, match=f"{path} was removed"):
        loop.train(small_config(report__every_steps=1), path)
    assert not path.exists()
    monkeypatch.setattr(MetricsWriter, "show", real)
    with Checkpoints(path / "checkpoints", pause=0.0) as checkpoints:
        with pytest.raises(OSError, match=f"{path}"):
            checkpoints.save(make_state(1), wait=True)
        assert not path.exists()


class TestKilled:
    """A run that is killed and started again ends as one that never was."""

    @pytest.fixture
    def config(self):
        """Nine steps; an older checkpoint is removed whenever a new one is complete."""
        return small_config(
            train__batch_size=472,
            train__epochs=3,
            checkpoint__keep=1,
            report__every_steps=2,
        )

    @pytest.fixture
    def shared(self, config, monkeypatch):
        """What all runs compile is compiled once; pictures are not drawn."""
        experiment = Experiment.from_config(config)
        start, abstract = jax.device_get(experiment.initial_state()), experiment.abstract_state()
        sharding, evaluator = experiment.state_sharding(), evaluate.Evaluator(experiment)
        step = loop.CompiledStep(experiment)
        monkeypatch.setattr(Experiment, "from_config", lambda config, **options: experiment)
        monkeypatch.setattr(
            Experiment, "initial_state", lambda self: jax.device_put(start, sharding)
        )
        monkeypatch.setattr(Experiment, "abstract_state", lambda self: abstract)
        monkeypatch.setattr(loop, "CompiledStep", lambda experiment: step)
        monkeypatch.setattr(loop, "Evaluator", lambda experiment: evaluator)
        monkeypatch.setattr(report, "draw_curves", _draw)
        monkeypatch.setattr(by_class.ByClass, "draw", lambda self, path: _draw(None, path, None))
        monkeypatch.setattr(lock, "TIMEOUT", 0.1)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_at_any_instant(self, config, shared, tmp_path, rng):
        """Before changes in the directory, and in the middle of what was written."""
        with recorded(tmp_path / "run", tmp_path / "instants") as instants:
            loop.train(config, tmp_path / "run")
        assert len(instants.copies) >= SAMPLED
        state, table = final_state(tmp_path / "run", config), numbers(tmp_path / "run")
        files = _listing(tmp_path / "run")
        wrong, sample = [], rng.permutation(len(instants.copies))[:SAMPLED]
        for copy, reason in ((instants.copies[i], instants.reasons[i]) for i in sample):
            try:
                loop.train(config, copy)
                chex.assert_trees_all_equal(final_state(copy, config), state)
                assert numbers(copy) == table
                assert _listing(copy) == files
            except Exception as error:
                wrong.append(f"before {reason}: {type(error).__name__}: {str(error)[:300]}")
            shutil.rmtree(copy)
        assert not wrong, "\n".join(wrong)

    def test_while_the_first_configuration_is_written(self, config, tmp_path):
        settings = small_experiment().settings
        with recorded(tmp_path / "run", tmp_path / "instants") as instants:
            Workdir(tmp_path / "run").claim(settings)
        assert any("half of .config" in reason for reason in instants.reasons)
        for copy in instants.copies:
            with Workdir(copy).claimed(settings):
                names = {entry.name for entry in copy.iterdir()}
                assert names - {lock.FILE} == {"README.txt", "config.json"}

    def test_what_a_killed_run_left_is_removed(self, path):
        """Files and directories; what `claim` refuses stays untouched."""
        settings = Workdir(path).read_settings()
        (path / lock.FILE).unlink()
        before = {entry.name for entry in path.iterdir()}
        for name in (".report.0123abcd.html", ".confusion.0123abcd.png", ".metrics.0123abcd.jsonl"):
            (path / name).write_text("half of it")
        with Workdir(path).claimed(settings):
            pass
        assert {entry.name for entry in path.iterdir()} == before

    def test_what_looks_like_ours_beside_other_files_stays(self, tmp_path):
        names = {".config.0123abcd.json", "thesis.tex"}
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match=r"not a run directory .* thesis\.tex"):
            Workdir(tmp_path).claimed(small_experiment().settings).__enter__()
        assert {entry.name for entry in tmp_path.iterdir()} == names

    @pytest.mark.slow
    def test_while_an_old_checkpoint_is_removed(self, tmp_path):
        """It is gone at once; what is left of its files is removed by the next run."""
        path = tmp_path / "checkpoints"
        with recorded(path, tmp_path / "instants") as instants, Checkpoints(path, keep=1) as saved:
            for step in (11, 22):
                saved.save(make_state(step))
        removing = [
            copy
            for copy, reason in zip(instants.copies, instants.reasons, strict=True)
            if "deleted/11/" in reason
        ]
        assert len(removing) >= 10
        assert not any((copy / "11").exists() for copy in removing)
        for copy in (removing[0], removing[-1]):
            with Checkpoints(copy) as checkpoints:
                assert int(checkpoints.restore(make_state(0)).step) == 22
                checkpoints.tidy()
            assert [entry.name for entry in copy.iterdir()] == ["22"]


def _draw(rows, path, title, **options):
    with report.replacing(path) as temporary:
        temporary.write_bytes(b"a picture")


def _listing(path: pathlib.Path) -> list[str]:
    """All files, except that TensorBoard has one per start and Orbax names arrays at random."""
    found = (file.relative_to(path) for file in path.rglob("*"))
    return sorted(str(file) for file in found if not {"tensorboard", "d"} & set(file.parts))

"""Files on disk are either the old ones or the new ones, whenever the process ends."""

import ctypes
import os
import pathlib

import pytest

from repvgg_jax import files


@pytest.fixture(params=["exchange", "renames"])
def kind(request, monkeypatch):
    """A file system that exchanges two names at once, and one that does not."""
    if request.param == "renames":
        monkeypatch.setattr(files, "_exchange_at_once", lambda first, second: False)
    return request.param


def write(directory: pathlib.Path, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "content").write_text(text)


class TestReplacing:
    def test_a_directory(self, kind, tmp_path, monkeypatch):
        """There is no moment without it, if the file system can exchange names."""
        path, seen = tmp_path / "out", []
        for name in ("replace", "rename"):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *args, real=real: (real(*args), seen.append(path.exists()))
            )
        for text in ("first", "second"):
            with files.replacing(path) as temporary:
                write(temporary, text)
            assert (path / "content").read_text() == text
            assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
        assert all(seen) == (kind == "exchange")

    def test_a_failure_keeps_what_was_there(self, kind, tmp_path, monkeypatch):
        write(tmp_path / "out", "first")
        with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "out") as new:
            write(new, str(1 / 0))
        if kind == "renames":  # the second of the two fails
            real = pathlib.Path.replace

            def replace(self, target):
                if self.name.endswith(".old") or target.name.endswith(".old"):
                    return real(self, target)
                raise OSError("no more ink")

            monkeypatch.setattr(pathlib.Path, "replace", replace)
            with pytest.raises(OSError, match="ink"), files.replacing(tmp_path / "out") as new:
                write(new, "second")
        assert (tmp_path / "out" / "content").read_text() == "first"
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    def test_a_file_system_that_cannot_exchange(self, tmp_path, monkeypatch):
        class Library:
            def __init__(self, name):
                pass

        for name in "ab":
            write(tmp_path / name, name)
        assert files._exchange_at_once(tmp_path / "a", tmp_path / "b")
        assert not files._exchange_at_once(tmp_path / "a", tmp_path / "c")
        assert (tmp_path / "a" / "content").read_text() == "b"
        monkeypatch.setattr(ctypes, "CDLL", Library)
        assert not files._exchange_at_once(tmp_path / "a", tmp_path / "b")

    def test_an_interrupted_exchange_is_undone(self, tmp_path):
        write(tmp_path / ".out.x.01234567.old", "another path")
        write(tmp_path / ".out.01234567.old", "first")
        write(tmp_path / ".out.01234567", "second")
        path = tmp_path / "out"
        assert files.interrupted(path) == tmp_path / ".out.01234567.old"
        assert len(files.leftovers(path)) == 2
        with pytest.raises(KeyError), files.replacing(path):
            raise KeyError
        assert (path / "content").read_text() == "first"
        assert files.interrupted(path) is None

    @pytest.mark.parametrize("directory", [True, False])
    def test_all_is_on_disk_before_the_name_is(self, directory, tmp_path, monkeypatch):
        """And the name after that."""
        done, fsync = [], os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: (fsync(fd), done.append(os.readlink(f"/proc/self/fd/{fd}")))
        )
        path = tmp_path / "out"
        with files.replacing(path) as temporary:
            if directory:
                write(temporary, "first")
                inside = {str(temporary), str(temporary / "content")}
            else:
                temporary.write_text("first")
                inside = {str(temporary)}
        assert set(done[:-1]) == inside
        assert done[-1] == str(tmp_path)


class TestJson:
    @pytest.mark.parametrize("data", [b"", b"[" * 10**6, b"\xff", b'{"a": 1}\0\0', b"\0" * 50])
    def test_damaged_files(self, data, tmp_path):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is json's own
            files.read_json(tmp_path / "x.json")
        assert len(str(caught.value).splitlines()) == 1

    def test_digests(self):
        digest = files.json_digest({"a": [1, 2.5], "b": None})
        assert digest == files.json_digest({"b": None, "a": (1, 2.5)})
        assert digest != files.json_digest({"a": [1, 2.5], "b": 0})

    def test_what_may_never_end_is_not_read(self, tmp_path):
        os.mkfifo(tmp_path / "x.json")
        for path in (tmp_path / "x.json", pathlib.Path("/dev/zero")):
            with pytest.raises(OSError, match="a pipe or a device"):
                files.read_json(path)
            with pytest.raises(OSError, match="a pipe or a device"):
                files.sha256(path)


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("a", True),
        ("a/b..c", True),
        ("..", False),
        ("a/../../b", False),
        ("/a", False),
        ("//a", False),
        ("", False),
        (".", False),
    ],
)
def test_names_below_a_directory(name, below):
    assert files.is_below(name) == below


def test_the_directory_of_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_directory() == tmp_path / "repvgg_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_directory() == tmp_path / ".cache" / "repvgg_jax"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert files.cache_directory() is None

"""The key-value store of jax's coordination service, shared by all processes of a run."""

from typing import Any

# jax has no public name for the client of its coordination service; Orbax uses this one, too.
from jax._src.distributed import global_state

_PREFIX = "repvgg_jax"  # of all keys and barriers of this package
DAY = 86400.0  # seconds; for what may take arbitrarily long


class Folder:
    """A folder of the store. Keys and values are strings."""

    def __init__(self, name: str):
        self._prefix = f"{_PREFIX}.{name}/"

    def put(self, key: str, value: str) -> None:
        """Writes an entry; replaces it if it exists."""
        client().key_value_set(self._prefix + key, value, allow_overwrite=True)

    def wait_for(self, key: str, *, timeout: float = DAY) -> str:
        """Returns a value as soon as a process has written it; `timeout` is in seconds."""
        return client().blocking_key_value_get(self._prefix + key, int(1000 * timeout))

    def entries(self) -> dict[str, str]:
        """All entries."""
        found = client().key_value_dir_get(self._prefix)
        return {key.removeprefix(self._prefix): value for key, value in found}

    def delete(self) -> None:
        """Deletes all entries."""
        client().key_value_delete(self._prefix)


def wait_at_barrier(name: str) -> None:
    """Waits until all processes have called this with the same name; use a name once per run."""
    client().wait_at_barrier(f"{_PREFIX}.{name}", int(1000 * DAY))


def client() -> Any:
    """The connection to the service; None in a single-process run."""
    return global_state.client


def process_id() -> int:
    """Like `jax.process_index()`, but does not initialize jax's backends."""
    return global_state.process_id


def num_processes() -> int:
    """Like `jax.process_count()`, but does not initialize jax's backends."""
    return global_state.num_processes

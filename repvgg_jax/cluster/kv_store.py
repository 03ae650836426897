"""jax's coordination service: which process this is, and a table that all of them share."""

from typing import Any

SPACE = "repvgg_jax"  # what our keys begin with


class Table:
    """The service's key-value store, as a `Watch` needs it."""

    def put(self, key: str, value: str) -> None:
        """Writes an entry, or writes over it."""
        client().key_value_set(f"{SPACE}/{key}", value, allow_overwrite=True)

    def entries(self) -> dict[str, str]:
        """All entries."""
        found = client().key_value_dir_get(f"{SPACE}/")
        return {key.removeprefix(f"{SPACE}/"): value for key, value in found}


def put(key: str, value: str) -> None:
    """Writes an entry that `entries` finds in all processes."""
    client().key_value_set(f"{SPACE}.{key}", value, allow_overwrite=True)


def entries(folder: str) -> dict[str, str]:
    """What the processes have `put` into a folder, by the rest of the key."""
    place = f"{SPACE}.{folder}/"
    return {key.removeprefix(place): value for key, value in client().key_value_dir_get(place)}


def forget(folder: str) -> None:
    """Takes away a folder and all that was `put` there, where there are several processes."""
    if (table := client()) is not None:
        table.key_value_delete(f"{SPACE}.{folder}/")


def client() -> Any:
    """This process's connection to the service; None where it is the only one."""
    # jax offers the store to nobody by a public name; Orbax takes it from the same place.
    from jax._src import distributed

    return distributed.global_state.client


def numbers() -> tuple[int, int]:
    """This process and how many there are, without starting jax's backends."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes


def milliseconds(seconds: float) -> int:
    """As the service counts time."""
    return int(1000 * seconds)

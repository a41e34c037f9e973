"""What the processes of one run do together outside compiled programs. Without `jax.distributed` there is one process.

The key-value store is that of JAX's coordination service, which runs in process 0.
"""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # JAX has no public way to its key-value store (0.10-0.12)
from jax.experimental import multihost_utils

from jaxtrain.errors import EnvironmentMismatchError, JaxtrainError

_HOST_SECONDS = 300.0  # the others may read data or compile meanwhile
_keys = itertools.count()  # every process takes the same numbers in the same order


def count() -> int:
    """How many processes the run has. Unlike `jax.process_count` it starts no backend."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id or 0


def kv_set(key: str, text: str) -> None:
    """Stores `text` under `key`; the first write wins, later ones are ignored."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(RuntimeError):  # the key is set already, or process 0 is gone and nobody reads it
        client.key_value_set(key, text)


def kv_list(folder: str) -> dict[str, str]:
    """The texts stored below `folder`, by the last part of their keys. Raises `RuntimeError` when process 0 is gone."""
    client: Any = distributed.global_state.client
    return {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(folder)}


def kv_delete(folder: str) -> None:
    """Deletes the keys below `folder`."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(RuntimeError):
        client.key_value_delete(folder)


def kv_get(key: str, timeout: float) -> str:
    """The text under `key`, once some process has stored it.

    timeout: in seconds. Raises `RuntimeError` after it, or when process 0 is gone.
    """
    client: Any = distributed.global_state.client
    return client.blocking_key_value_get(key, int(timeout * 1000))


def allgather_str(key: str, text: str, timeout: float) -> list[str]:
    """Gathers a text of every process. Every process calls it once for a key, from any thread.

    Process 0 collects the texts and stores them as one: two requests a process. If each process asked for the text of each
    other, process 0 would have to answer the square of their number.

    Args:
      key: the same on all processes.
      text: this process's.
      timeout: seconds to wait for one of the others.

    Returns:
      The texts in the order of the processes, the same on all.

    Raises:
      RuntimeError: a text did not come in time, or process 0 is gone.
    """
    if count() == 1:
        return [text]
    if index():
        kv_set(f"{key}/{index()}", text)
        return json.loads(kv_get(f"{key}/all", timeout))
    texts = [text, *(kv_get(f"{key}/{process}", timeout) for process in range(1, count()))]
    kv_set(f"{key}/all", json.dumps(texts))
    return texts


def broadcast_str(name: str, text: str, timeout: float) -> str:
    """Process 0's `text`, on every process. Every process calls it, in the same order as other calls.

    Args:
      name: what the text is, for the key.
      text: what process 0 sends; that of other processes is ignored.
      timeout: seconds to wait for process 0.

    Raises:
      RuntimeError: the text did not come in time, or process 0 is gone.
    """
    if count() == 1:
        return text
    key = unique_key(name)
    if index() == 0:
        kv_set(key, text)
        return text
    return kv_get(key, timeout)


def unique_key(name: str) -> str:
    """A key that was not used yet. It is the same on all processes, which ask for keys in the same order."""
    return f"jaxtrain/{name}/{next(_keys)}"


def on_this_host() -> int:
    """How many of the run's processes are on this host, this one included. Every process must call it."""
    host = socket.gethostname()
    return allgather_str(unique_key("hosts"), host, _HOST_SECONDS).count(host)


def first_on_process_zero(
    name: str, action: Callable[[], object], timeout: float, *, every_process: bool = False
) -> None:
    """Runs `action` on process 0, while the others wait until it is done.

    Args:
      name: what the action does, for the key and the error.
      action: called without arguments.
      timeout: seconds that the others wait.
      every_process: runs it on each process instead, and none waits.

    Raises:
      JaxtrainError: what `action` raised on process 0, on every process.
      EnvironmentMismatchError: process 0 was not done in time, or is gone.
    """
    if jax.process_count() == 1 or every_process:
        action()
        return
    client: Any = distributed.global_state.client
    key = unique_key(name)
    if jax.process_index() == 0:
        try:
            action()
        except JaxtrainError as error:
            client.key_value_set(key, f"{type(error).__name__}:{error}")
            raise
        client.key_value_set(key, "done")
        return
    began = time.monotonic()
    try:
        answer = client.blocking_key_value_get(key, int(timeout * 1000))
    except Exception as error:
        waited = time.monotonic() - began
        raise EnvironmentMismatchError(
            f"Process {jax.process_index()} waited {waited:.0f} s for process 0 at {name!r} and got no answer; look at the "
            "log of process 0."
        ) from error
    if answer != "done":
        kind, _, text = answer.partition(":")
        raise next((c for c in JaxtrainError.__subclasses__() if c.__name__ == kind), JaxtrainError)(text)


def broadcast_bool(value: bool) -> bool:
    """Process 0's `value`, on every process: for decisions that depend on a clock. A collective if there are several."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def barrier(name: str) -> None:
    """Returns once every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

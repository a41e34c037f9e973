"""What processes of one run do together outside compiled programs. Without `jax.distributed` there is one process."""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # its key-value store has no public door (jax 0.10-0.12)
from jax.experimental import multihost_utils

from jaxtrain.errors import EnvironmentMismatchError, JaxtrainError

_HOST_SECONDS = 300.0  # the others read data or compile meanwhile
_questions = itertools.count()  # every process asks the same ones in the same order


def count() -> int:
    """How many processes the run has. Unlike `jax.process_count` it starts no backend."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """Which of them this is, from 0."""
    return distributed.global_state.process_id or 0


def kv_set(word: str, text: str) -> None:
    """Says `word`; who says it first is heard."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(RuntimeError):  # said already, or process 0 is gone and nobody hears
        client.key_value_set(word, text)


def kv_list(words: str) -> dict[str, str]:
    """What was published so far below `words`, by word. Raises `RuntimeError` when process 0 is gone."""
    client: Any = distributed.global_state.client
    return {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(words)}


def kv_delete(words: str) -> None:
    """Nobody asks for what is below `words` any more."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(RuntimeError):
        client.key_value_delete(words)


def kv_get(word: str, timeout: float) -> str:
    """What some process has published. Raises `RuntimeError` after `timeout` seconds, or when process 0 is gone."""
    client: Any = distributed.global_state.client
    return client.blocking_key_value_get(word, int(timeout * 1000))


def allgather_str(word: str, mine: str, timeout: float) -> list[str]:
    """What each process says, in their order. Every process calls it once for a word, from any thread.

    Process 0, where the words are kept, collects them and tells the others: two questions a process. If each asked for
    each, process 0 would have to answer the square of their number.
    """
    if count() == 1:
        return [mine]
    if index():
        kv_set(f"{word}/{index()}", mine)
        return json.loads(kv_get(f"{word}/all", timeout))
    said = [mine, *(kv_get(f"{word}/{process}", timeout) for process in range(1, count()))]
    kv_set(f"{word}/all", json.dumps(said))
    return said


def broadcast_str(name: str, mine: str, timeout: float) -> str:
    """What process 0 says. Every process calls it alike. Raises `RuntimeError` after `timeout` seconds."""
    if count() == 1:
        return mine
    word = unique_key(name)
    if index() == 0:
        kv_set(word, mine)
        return mine
    return kv_get(word, timeout)


def unique_key(name: str) -> str:
    """A word that nobody has said yet; the same on all processes, which ask for the same ones in the same order."""
    return f"jaxtrain/{name}/{next(_questions)}"


def on_this_host() -> int:
    """How many of the run's processes share this host, this one among them. Every process asks together with the others."""
    host = socket.gethostname()
    return allgather_str(unique_key("hosts"), host, _HOST_SECONDS).count(host)


def first_on_process_zero(
    name: str, action: Callable[[], object], timeout: float, *, every_process: bool = False
) -> None:
    """Runs `action` on process 0 while the others wait at the barrier `name`, `timeout` seconds at most.

    A `JaxtrainError` of process 0 is raised on every process. With `every_process` each runs it for itself.
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
            f"Process {jax.process_index()} waited {waited:.0f} s for process 0 at {name!r} in vain; look at the log of "
            "process 0."
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
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

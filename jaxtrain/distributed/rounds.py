"""Texts that all processes store from time to time, and process 0 reads a round later: nobody waits for anybody."""

from __future__ import annotations

from jaxtrain.distributed import coordination


class Rounds:
    """Exchanges texts through the key-value store. All processes make one and use it alike."""

    def __init__(self, name: str):
        """name: what the texts are, for the key."""
        self._key = coordination.unique_key(name) if coordination.count() > 1 else ""
        self._rounds = 0  # that this process has stored

    def exchange(self, text: str) -> list[str]:
        """Stores this process's text, and reads the round before on process 0.

        Returns the texts of all processes in that round. The list is empty on other processes than 0, in the first round, with
        one process, and where a process has not stored its text yet.
        """
        if not self._key:
            return []
        coordination.kv_set(f"{self._key}/{self._rounds}/{coordination.index()}", text)
        self._rounds += 1
        if coordination.index() or self._rounds == 1:
            return []
        before = f"{self._key}/{self._rounds - 2}/"
        try:
            texts = list(coordination.kv_list(before).values())
        except RuntimeError:  # the run is ending
            return []
        coordination.kv_delete(before)
        return texts if len(texts) == coordination.count() else []

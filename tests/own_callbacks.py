"""A user's own callback, outside jaxtrain, named as `own_callbacks:Notes` in the config."""

from __future__ import annotations

from jaxtrain import Callback


class Notes(Callback):
    """Writes down what it is told, and keeps it."""

    name = "notes"

    def __init__(self, config=None):
        self.calls: list[list] = []

    def on_start(self, run, state):
        self.begun_at = int(state.step)

    def on_step(self, run, step, metrics):
        self.calls.append(["step", step, metrics["loss"]])

    def on_epoch(self, run, epoch, state, metrics):
        self.calls.append(["epoch", epoch, int(state.step), metrics["loss"]])

    def on_evaluation(self, run, state, results):
        self.calls.append(["evaluation", int(state.step), results["raw"].loss])

    def on_end(self, run, state):
        return {"calls": len(self.calls), "at": int(state.step)}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

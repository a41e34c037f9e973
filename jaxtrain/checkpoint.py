"""Checkpoints: the state tree and the run's position, written asynchronously and atomically. The one module that knows Orbax.

`checkpoints/<step>/` holds `state` (the tree of `TrainState`; every process writes and reads its own shards), `position`
(JSON: examples consumed, epoch, running sums, config) and `metrics` (JSON: what decides which checkpoints are kept).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp

from jaxtrain.errors import CheckpointError, ConfigError
from jaxtrain.parallel.arrays import is_everywhere, to_every_process, view
from jaxtrain.parallel.layout import path_of
from jaxtrain.state import TrainState

PyTree = Any
SCHEMA = 1
log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class Keep:
    """Orbax's preservation policy: the `latest` newest, the best (the first of equals), and every milestone."""

    latest: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer a checkpoint; they come oldest first, with `step` and `metrics` (see `Checkpoints.save`)."""
        metrics = [c.metrics or {} for c in checkpoints]
        best = best_of([(c.step, m) for c, m in zip(checkpoints, metrics, strict=True)])
        newest = {c.step for c in checkpoints[-self.latest :]}
        return [
            c.step in newest or c.step == best or bool(m["milestone"] if m else False)
            for c, m in zip(checkpoints, metrics, strict=True)
        ]


def best_of(steps: Sequence[tuple[int, dict[str, Any]]]) -> int | None:
    """The step with the highest validation accuracy, the earliest of equals; `None` if none was evaluated."""
    scored = [(m["val_accuracy"], -step) for step, m in steps if m and m["val_accuracy"] is not None]
    return -max(scored)[1] if scored else None


class Checkpoints:
    """The checkpoints of one directory. Every process of the run makes the same calls; close it at the end."""

    def __init__(self, directory: Path, keep: int = 1, *, read_only: bool = False):
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Keep(keep),
            best_fn=lambda metrics: metrics["val_accuracy"],  # makes Orbax read the metrics that `Keep` looks at
            create=not read_only,
        )
        # Whole leaves from one replica: splitting them among replicas would compile a slice program for each leaf and
        # device, 9 s in the loop at the first save of a small ResNet on 8 devices (measured).
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "position": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    # ---------------------------------------------------------------------------------------------------------- write

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        *,
        epoch: int,
        val_accuracy: float | None = None,
        milestone: bool = False,
    ) -> None:
        """Starts writing; returns once the state may be donated. `epoch`: epochs completed, -1 inside one.

        An error of an earlier write is raised here or in `wait`, as `CheckpointError`.
        """
        metrics = {"epoch": epoch, "val_accuracy": val_accuracy, "milestone": milestone}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(to_every_process(_tree(state), _mesh(state))),
            position=ocp.args.JsonSave({"schema": SCHEMA, **position}),
        )
        try:
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} was not written: {error}."
            ) from error

    def wait(self) -> None:
        """Returns once everything is on disk."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"A checkpoint in {self.directory} was not written: {error}.") from error

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        self._manager.close()

    # ----------------------------------------------------------------------------------------------------------- read

    def steps(self) -> list[int]:
        """The committed steps, rising."""
        return committed_steps(self.directory)

    def best_step(self) -> int | None:
        """The step with the best validation accuracy."""
        return best_of([(step, self.metrics(step)) for step in self.steps()])

    def metrics(self, step: int) -> dict[str, Any]:
        """What `save` was told beside the state."""
        return _metrics(self.directory, step)

    def position(self, step: int) -> dict[str, Any]:
        """The run's position at `step`. Raises `CheckpointError` if a newer jaxtrain wrote it."""
        try:
            args = ocp.args.Composite(position=ocp.args.JsonRestore())
            position = self._manager.restore(step, args=args)["position"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"The checkpoint {self.directory / str(step)} cannot be read: {error}.") from error
        if position["schema"] > SCHEMA:
            raise CheckpointError(
                f"{self.directory / str(step)} has schema {position['schema']}; this jaxtrain reads up to {SCHEMA}: update it."
            )
        return position

    def restore(self, step: int, template: TrainState, *, allow_changes: bool = False) -> TrainState:
        """The state of `step` with the shapes, dtypes and shardings of `template` (arrays, so that a tree can stay fresh).

        Parameters and statistics of another model are a `CheckpointError`. A differing optimizer state, EMA or loss scale
        is one too, unless `allow_changes`: then that tree keeps the template's values (a fresh EMA takes the restored
        weights).
        """
        stored = self._stored_shapes(step)
        trees, fresh = _tree(template), []
        for name in list(trees):
            difference = _difference(name, stored, trees[name])
            if difference and (name in ("step", "params", "batch_stats") or not allow_changes):
                raise CheckpointError(
                    f"The checkpoint {self.directory / str(step)} does not fit this run's {name}: {difference}. It belongs to "
                    "another model, optimizer or precision; use its settings, or another --workdir."
                )
            if difference:
                fresh.append(name)
                del trees[name]
        restored = self._read(step, trees, _mesh(template))
        for name in fresh:
            log.warning("The checkpoint has another %s; this run starts with a fresh one.", name)
        if "ema" in fresh and template.ema:
            restored["ema"] = {name: jax.tree.map(_copy, restored[name]) for name in template.ema}
        if "opt_state" in fresh:
            restored["opt_state"] = _at_step(template.opt_state, restored["step"])
        return dataclasses.replace(template, **restored)

    def restore_weights(self, step: int, template: TrainState) -> TrainState:
        """`template` with the parameters, statistics and EMA of `step`; its other trees are not read."""
        trees = {name: tree for name, tree in _tree(template).items() if name in ("params", "batch_stats", "ema")}
        return dataclasses.replace(template, **self._read(step, trees, _mesh(template)))

    def _read(self, step: int, trees: dict[str, Any], mesh: Any) -> dict[str, Any]:
        def target(x: jax.Array) -> jax.ShapeDtypeStruct:
            where: Any = x.sharding
            if not is_everywhere(x):  # a stage of other processes: read on all stages, then kept by its own
                where = jax.sharding.NamedSharding(mesh, where.spec)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        abstract = jax.tree.map(target, trees)
        restore = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"The checkpoint {self.directory / str(step)} cannot be read: {error}.") from error
        return jax.tree.map(lambda new, old: new if is_everywhere(old) else view(new, old.sharding), found, trees)

    def _stored_shapes(self, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
        try:
            tree = self._manager.item_metadata(step).state.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"The checkpoint {self.directory / str(step)} cannot be read: {error}.") from error
        return _shapes(tree)


def _mesh(state: TrainState) -> Any:
    """The mesh of the whole run: that of what every stage has."""
    where: Any = state.step.sharding
    return where.mesh


def _copy(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding, may_alias=False)


def _at_step(opt_state: PyTree, step: jax.Array) -> PyTree:
    """A fresh optimizer's state whose learning rate is that of `step`: the schedule counts for itself."""

    def counts(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: node._replace(count=_copy(step)) if counts(node) else node, opt_state, is_leaf=counts
    )


def _tree(state: TrainState) -> dict[str, Any]:
    """The state's trees by name, without the empty ones (Orbax has nothing to write for them)."""
    trees = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _shapes(tree: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {path_of(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _difference(name: str, stored: dict[str, tuple[tuple[int, ...], str]], tree: PyTree) -> str:
    """The first difference between a stored tree and the wanted one, or ''."""
    had = {path: leaf for path, leaf in stored.items() if path == name or path.startswith(name + "/")}
    wanted = _shapes({name: tree})
    # Orbax stores tuples as lists and named tuples as dicts, so the optimizer's paths differ in form: compare its leaves.
    if name == "opt_state":
        had, wanted = ({_numbered(p): leaf for p, leaf in leaves.items()} for leaves in (had, wanted))
    for path, leaf in wanted.items():
        if path not in had:
            return f"it has no {path}"
        if had[path] != leaf:
            return f"{path} is {had[path][1]}{list(had[path][0])}, not {leaf[1]}{list(leaf[0])}"
    extra = sorted(set(had) - set(wanted))
    return f"it has {extra[0]} and {len(extra) - 1} more leaves that this run has not" if extra else ""


def _numbered(path: str) -> str:
    return re.sub(r"(?<=/)\.?(\w+)", r"\1", path)


# ------------------------------------------------------------------------------------------------------- where to start


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint to start from: a directory of checkpoints and a step in it."""

    directory: Path
    step: int


def find_start(directory: Path, resume: str, setting: str = "config.checkpoint.resume") -> Start | None:
    """What `checkpoint.resume` means here; `None` for a fresh run. Raises `CheckpointError` for what is not there.

    setting: where the user wrote `resume`, for the errors.
    """
    if resume == "none":
        return None
    directory = directory.absolute()
    if resume in ("auto", "latest", "best") or resume.isdigit() or re.fullmatch(r"epoch:\d+", resume):
        steps = committed_steps(directory)
        if not steps:
            if resume == "auto":
                return None
            raise CheckpointError(f"{setting}={resume!r}: {directory} holds no checkpoint.")
        return Start(directory, _named_step(directory, steps, resume, setting))
    return _start_at_path(Path(resume).absolute(), setting)


def _named_step(directory: Path, steps: list[int], resume: str, setting: str) -> int:
    if resume in ("auto", "latest"):
        return steps[-1]
    if resume.isdigit():
        if int(resume) in steps:
            return int(resume)
        raise CheckpointError(f"{setting}={resume}: {directory} has only the steps {', '.join(map(str, steps))}.")
    metrics = {step: _metrics(directory, step) for step in steps}
    if resume == "best":
        best = best_of(list(metrics.items()))
        if best is None:
            raise CheckpointError(f"{setting}=best: no checkpoint in {directory} was evaluated.")
        return best
    epoch = int(resume.removeprefix("epoch:"))
    found = [step for step, m in metrics.items() if m["epoch"] == epoch]
    if not found:
        there = ", ".join(str(m["epoch"]) for m in metrics.values() if m["epoch"] >= 0) or "none"
        raise CheckpointError(f"{setting}={resume}: {directory} has checkpoints after epochs {there}.")
    return found[-1]


def _start_at_path(path: Path, setting: str) -> Start:
    if path.name.isdigit() and committed_steps(path.parent).count(int(path.name)):
        return Start(path.parent, int(path.name))
    for directory in (path, path / "checkpoints"):
        if steps := committed_steps(directory):
            return Start(directory, steps[-1])
    raise ConfigError(
        f"{setting}={str(path)!r}: must be auto, latest, best, a step, epoch:N, none, or the path of a "
        "checkpoint or a work directory that exists."
    )


def _metrics(directory: Path, step: int) -> dict[str, Any]:
    path = directory / str(step) / "metrics" / "metrics"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; remove the folder {step} to go on without it."
        ) from None


# A folder gets its name once it is whole, but it is deleted file by file.
_PARTS = ("_CHECKPOINT_METADATA", "metrics/metrics", "position/metadata", "state/_METADATA")


def committed_steps(directory: Path) -> list[int]:
    """Steps whose write was completed, rising. Reads names only, so it needs no manager and no device."""
    if not directory.is_dir():
        return []
    return sorted(
        int(p.name) for p in directory.iterdir() if p.name.isdigit() and all((p / part).is_file() for part in _PARTS)
    )


def discard_unfinished(directory: Path) -> None:
    """Deletes what a killed run left of a write or a deletion: Orbax would refuse to write that step again.

    Only process 0 may call it, before any `Checkpoints` is made to write there.
    """
    committed = committed_steps(directory)
    for path in directory.iterdir() if directory.is_dir() else ():
        step = path.name.removesuffix(".orbax-checkpoint-tmp")
        if step.isdigit() and (step != path.name or int(step) not in committed):
            shutil.rmtree(path)

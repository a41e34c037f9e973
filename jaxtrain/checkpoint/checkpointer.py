"""Checkpoints: the state tree and the run's position, written asynchronously and atomically. The one module that knows Orbax.

`checkpoints/<step>/` holds `state` (the tree of `TrainState`; every process writes and reads its own shards) and, once that
is whole and hashed, `manifest.json` with the run's position (see `checkpoint_files`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp

from jaxtrain.checkpoint import manifest
from jaxtrain.checkpoint.manifest import best_of, manifested_steps
from jaxtrain.checkpoint.resume_point import readable
from jaxtrain.distributed import coordination
from jaxtrain.distributed.coordination import barrier
from jaxtrain.errors import CheckpointError, JaxtrainError, WorkdirError
from jaxtrain.host.backend import versions
from jaxtrain.parallel.arrays import is_everywhere, to_every_process, view
from jaxtrain.step.train_state import TrainState
from jaxtrain.trees import PyTree, path_of

log = logging.getLogger("jaxtrain")
FAILED_SAVES = 3  # in a row end the run
_POLL_SECONDS = 0.02
_ASK_SECONDS = 60.0


class Checkpointer:
    """The checkpoints of one directory. Every process of the run makes the same calls; close it at the end.

    keep: how many of the newest stay, beside the best and the milestones. owner: this start of the run; still_owner: raises
    `WorkdirError` where another run has taken the directory over.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 1,
        *,
        read_only: bool = False,
        owner: str = "",
        still_owner: Callable[[], None] = lambda: None,
    ):
        self.directory, self._keep, self._read_only = directory.absolute(), keep, read_only
        self._owner, self._still_owner = owner, still_owner
        self._manager = self._make_manager()
        self._saving = 0  # the last step that was asked for
        self._commit: threading.Thread | None = None
        self._failure: Exception | None = None  # of the last save; set by the thread that commits it
        self._failures = 0  # in a row

    def _make_manager(self) -> ocp.CheckpointManager:
        # Orbax keeps everything: what may go is decided when the next checkpoint is verified.
        options = ocp.CheckpointManagerOptions(create=not self._read_only)
        # Whole leaves from one replica: splitting them among replicas would compile a slice program for each leaf and
        # device, 9 s in the loop at the first save of a small ResNet on 8 devices (measured).
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        handlers = {"state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

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

        A checkpoint that cannot be written is deleted and warned about, and the run goes on; the third in a row raises
        `WorkdirError`, here, in `check` or in `wait`. Of several processes one that cannot write ends the run.
        """
        self._finish_commit()
        self._saving = step
        if _is_short_of(self.directory, _state_bytes(state)):
            self._failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._give_up(alone=False)
            return
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(to_every_process(_tree(state), _mesh(state))))
        config = json.dumps(position["config"], sort_keys=True)
        fields = {
            "step": step, "position": position, "epoch": epoch, "val_accuracy": val_accuracy, "milestone": milestone,
            "versions": versions(),
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(), "owner": self._owner,
        }  # fmt: skip
        try:
            self._manager.save(step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._failure = error
            self._give_up()
            return
        self._commit = threading.Thread(
            target=self._write_manifest, args=(step, fields), name="checkpoint", daemon=True
        )
        self._commit.start()

    def _write_manifest(self, step: int, fields: dict[str, Any]) -> None:
        """Waits until Orbax has written everything; then process 0 makes it count, and deletes what is old."""
        try:
            while self._manager.is_saving_in_progress():
                time.sleep(_POLL_SECONDS)
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self.directory / str(step)
                manifest.write_manifest(folder, self._still_owner, **fields)
                manifest.delete_old(self.directory, self._keep)
        except Exception as error:  # whatever it is, it must reach the main thread
            self._failure = error

    def check(self) -> None:
        """Raises or warns if the last save has failed by now; costs nothing else. To be called after every step."""
        if self._commit is not None and not self._commit.is_alive():
            self._finish_commit()

    def _finish_commit(self) -> None:
        if self._commit is None:
            return
        self._commit.join()
        self._commit = None
        if self._failure is not None:
            self._give_up()
        else:
            self._failures = 0

    def _give_up(self, *, alone: bool = True) -> None:
        """After a failed save: frees what it took, and warns; the third time in a row it raises.

        alone: whether other processes may have written their part and wait for this one.
        """
        error, self._failure = self._failure, None
        self._failures += 1
        if isinstance(error, JaxtrainError):
            raise error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if any(word in str(error) for word in ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED")):
            reason = os.strerror(errno.ENOSPC)
        text = f"The checkpoint of step {self._saving} in {self.directory} was not written ({reason})"
        if (alone and jax.process_count() > 1) or self._failures == FAILED_SAVES:
            raise WorkdirError(f"{text}; {self._failures} in a row." if self._failures > 1 else f"{text}.") from error
        log.warning(
            "%s; training goes on, and the next save tries again (%d of %d).", text, self._failures, FAILED_SAVES
        )
        if not alone:
            return
        # A new manager: the old one counts the step as saved, and would refuse or skip later ones.
        with contextlib.suppress(Exception):
            self._manager.close()
        manifest.discard_unfinished(self.directory)
        self._manager = self._make_manager()

    def wait(self) -> None:
        """Returns once everything is on disk, and every process knows it."""
        self._finish_commit()
        barrier("checkpoints are written")

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        if self._commit is not None:
            self._commit.join()
        self._manager.close()

    # ----------------------------------------------------------------------------------------------------------- read

    def best_step(self) -> int | None:
        """The step with the best validation accuracy."""
        return best_of(readable(self.directory, manifested_steps(self.directory)))

    def annotate(self, step: int, val_accuracy: float, position: dict[str, Any]) -> None:
        """Adds what was found out about the weights of `step` after they were saved. Only process 0 writes."""
        if jax.process_index() == 0:
            manifest.annotate(self.directory / str(step), val_accuracy=val_accuracy, position=position)

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
            restored["ema"] = _average_of(restored, template)
        if "opt_state" in fresh:
            restored["opt_state"] = _at_step(template.opt_state, restored["step"])
        return dataclasses.replace(template, **restored)

    def restore_weights(self, step: int, template: TrainState) -> TrainState:
        """`template` with the parameters, statistics and EMA of `step`; its other trees are not read.

        Where that step has no EMA, since the run went without one until then, the weights themselves stand in for it.
        """
        trees = {name: tree for name, tree in _tree(template).items() if name in ("params", "batch_stats", "ema")}
        lacks_ema = "ema" in trees and not any(path.startswith("ema/") for path in self._stored_shapes(step))
        if lacks_ema:
            del trees["ema"]
        restored = self._read(step, trees, _mesh(template))
        if lacks_ema:
            log.warning("The checkpoint of step %d has no moving average; its weights are taken for it.", step)
            restored["ema"] = _average_of(restored, template)
        return dataclasses.replace(template, **restored)

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


def check_space(directory: Path, state: TrainState) -> None:
    """Raises `WorkdirError` where the disk has no room for a checkpoint of `state`, or its shapes; warns if not for two."""
    needed, free = _state_bytes(state), shutil.disk_usage(directory).free
    text = f"A checkpoint takes {needed / 2**20:.0f} MiB and {directory} has {free / 2**20:.0f} MiB free"
    if _is_short_of(directory, needed):
        raise WorkdirError(f"{text}; free some, or choose another --workdir.")
    if free < 2 * needed:
        log.warning("%s: too little for two, and the old one goes when the new one is whole.", text)


def _is_short_of(directory: Path, needed: int) -> bool:
    """Whether any process finds less room than that on the directory's disk."""
    short = shutil.disk_usage(directory).free < needed
    return "True" in coordination.allgather_str(
        coordination.unique_key("room for a checkpoint"), str(short), _ASK_SECONDS
    )


def _state_bytes(state: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _average_of(restored: dict[str, Any], template: TrainState) -> dict[str, PyTree]:
    """A moving average that starts here: of the restored weights. A tree without leaves is not stored."""
    return {name: jax.tree.map(_copy, restored.get(name, tree)) for name, tree in template.ema.items()}


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

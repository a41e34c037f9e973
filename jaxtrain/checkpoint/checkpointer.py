"""Checkpoints: the state tree and the run's position, written asynchronously and atomically. The one module that knows Orbax.

`checkpoints/<step>/` holds `state`, the tree of `TrainState`; every process writes and reads its own shards. When all of it is
written and hashed, `manifest.json` is added, with the run's position (see `manifest`).
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
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoint import manifest
from jaxtrain.checkpoint.manifest import best_of, manifested_steps
from jaxtrain.checkpoint.resume_point import readable
from jaxtrain.distributed import coordination
from jaxtrain.distributed.coordination import barrier
from jaxtrain.distributed.exit_report import as_peer_error
from jaxtrain.errors import CheckpointError, PeerError, TakenOverError, WorkdirError
from jaxtrain.host.backend import versions
from jaxtrain.host.files import reading, writing
from jaxtrain.parallel.arrays import is_everywhere, to_every_process, view
from jaxtrain.step.train_state import TrainState
from jaxtrain.trees import PyTree, by_path, nested, path_of

log = logging.getLogger("jaxtrain")
FAILED_SAVES = 3  # so many in a row end the run
_POLL_SECONDS = 0.02
_WEIGHTS = ("step", "params", "batch_stats", "ema")
_NOTHING: Mapping[str, PyTree] = types.MappingProxyType({})
_CALLBACKS = "callbacks"  # the tree beside those of the state
_SPACE_SECONDS = 60.0  # in which every process must say how much room its disk has


class Checkpointer:
    """The checkpoints of one directory. Every process of the run makes the same calls. Close it at the end."""

    def __init__(
        self,
        directory: Path,
        keep: int = 1,
        best_by: str = "val_accuracy",
        *,
        read_only: bool = False,
        owner: str = "",
        still_owner: Callable[[], None] = lambda: None,
    ):
        """Opens the directory.

        Args:
          directory: made if need be, unless `read_only`.
          keep: how many of the newest checkpoints stay, besides the best and the milestones.
          best_by: which figure decides what the best is (`checkpoint.best`).
          read_only: for a run that only restores.
          owner: identifies this start of the run in the manifests.
          still_owner: raises `TakenOverError` if another run has taken over the directory.
        """
        self.directory, self._keep, self._read_only = directory.absolute(), keep, read_only
        self._owner, self._still_owner, self._best_by = owner, still_owner, best_by
        logging.getLogger("absl").addFilter(_is_said_by_nobody_else)
        self._manager = _manager(self.directory, create=not self._read_only)
        self._saving, self._last = 0, False  # the step of the last save, and whether none follows
        self._commit: threading.Thread | None = None
        self._failure: Exception | None = None  # of the last save; set by the thread that commits it
        self._failures, self.completed = 0, -1  # in a row; the step of the last save that is known to be complete

    # ---------------------------------------------------------------------------------------------------------- write

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        *,
        epoch: int,
        figures: Mapping[str, float | None] | None = None,
        milestone: bool = False,
        last: bool = False,
        callbacks: Mapping[str, PyTree] = _NOTHING,
    ) -> None:
        """Starts writing. Returns once the state may be donated.

        A checkpoint that cannot be written is deleted, with a warning, and the run goes on. The third one in a row raises
        `WorkdirError`: here, in `check` or in `wait`. So does the last one, and in a run of several processes the first one.

        Args:
          step: updates done so far.
          state: what to save.
          position: how far the run is, with its config (`Position.to_json`).
          epoch: epochs completed, -1 inside one.
          figures: of a validation after this step, by their names in the manifest.
          milestone: never deletes this checkpoint.
          last: no other save follows, which could try again.
          callbacks: arrays that callbacks keep, by the callback's name.
        """
        self._finish_commit()
        self._still_owner()
        self._saving, self._last = step, last
        if _is_short_of(self.directory, _state_bytes((state, dict(callbacks)))):
            self._failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._handle_failure(alone=False)
            return
        trees = _tree(state) | ({_CALLBACKS: dict(callbacks)} if callbacks else {})
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(to_every_process(trees, _mesh(state))))
        config = json.dumps(position["config"], sort_keys=True)
        fields = {
            "step": step, "position": position, "epoch": epoch, "milestone": milestone, "versions": versions(),
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(), "owner": self._owner, **(figures or {}),
        }  # fmt: skip
        try:
            self._manager.save(step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._failure = error
            self._handle_failure()
            return
        self._commit = threading.Thread(
            target=self._write_manifest, args=(step, fields), name="checkpoint", daemon=True
        )
        self._commit.start()

    def _write_manifest(self, step: int, fields: dict[str, Any]) -> None:
        """Waits until Orbax has written everything. Then process 0 writes the manifest and deletes old checkpoints."""
        try:
            while self._manager.is_saving_in_progress():
                time.sleep(_POLL_SECONDS)
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self.directory / str(step)
                manifest.write_manifest(folder, self._still_owner, **fields)
                _delete_old(self.directory, self._keep, self._best_by)
        except Exception as error:  # any error must reach the main thread
            self._failure = error

    def check(self) -> None:
        """Raises or warns if the last save has failed by now. It is cheap: call it after every step."""
        if self._commit is not None and not self._commit.is_alive():
            self._finish_commit()

    def _finish_commit(self) -> None:
        if self._commit is None:
            return
        self._commit.join()
        self._commit = None
        if self._failure is not None:
            self._handle_failure()
        else:
            self._failures, self.completed = 0, self._saving

    def _handle_failure(self, *, alone: bool = True) -> None:
        """After a failed save: deletes what it wrote, and warns; the third time in a row, or where no save follows, it raises.

        alone: whether this process failed alone, so that others may have written their part and wait for it.
        """
        error, self._failure = self._failure, None
        self._failures += 1
        assert error is not None
        if isinstance(cause := as_peer_error(error), (PeerError, TakenOverError)):
            raise cause
        text = f"The checkpoint of step {self._saving} in {self.directory} was not written ({_reason(error)})"
        if (alone and jax.process_count() > 1) or self._failures == FAILED_SAVES:
            raise WorkdirError(f"{text}; {self._failures} in a row." if self._failures > 1 else f"{text}.") from error
        if self._last:
            raise WorkdirError(f"{text}{_no_other(self.directory)}") from error
        log.warning(
            "%s; training goes on, and the next save tries again (%d of %d).", text, self._failures, FAILED_SAVES
        )
        if not alone:
            return
        # The old manager counts the step as saved, and would refuse or skip later ones.
        with contextlib.suppress(Exception):
            self._manager.close()
        with contextlib.suppress(CheckpointError):  # the next start deletes it
            manifest.discard_unfinished(self.directory)
        self._manager = _manager(self.directory, create=not self._read_only)

    def wait(self) -> None:
        """Returns once the last save is on the disk, on every process."""
        self._finish_commit()
        barrier("checkpoints are written")

    def close(self) -> None:
        """Waits for the last save, and ends Orbax's threads."""
        if self._commit is not None:
            self._commit.join()
        self._manager.close()

    # ----------------------------------------------------------------------------------------------------------- read

    def best_step(self) -> int | None:
        """The step with the best validation, as `checkpoint.best` measures it."""
        return best_of(readable(self.directory, manifested_steps(self.directory)), self._best_by)

    def annotate(self, step: int, figures: Mapping[str, float | None], position: dict[str, Any]) -> None:
        """Adds what became known after a checkpoint was saved. Only process 0 writes, and not through a link.

        Args:
          step: of the checkpoint.
          figures: of its validation, by their names in the manifest.
          position: how far the run is now.
        """
        folder = self.directory / str(step)
        if jax.process_index() == 0 and folder.is_symlink():
            log.warning("%s is a link: the figures of its validation are not added to it.", folder)
        elif jax.process_index() == 0:
            manifest.annotate(folder, position=position, **figures)

    def restore(self, step: int, template: TrainState, *, allow_changes: bool = False) -> TrainState:
        """Reads the state of `step`.

        Args:
          step: of a checkpoint in this directory.
          template: has the shapes, dtypes and shardings; its arrays are the values of a tree that stays fresh.
          allow_changes: lets the optimizer state, the EMA and the loss scale differ. A tree that differs keeps the
            template's values; a fresh EMA takes the restored weights.

        Returns:
          The state, with the shardings of `template`. A `communication` of another number of shards stays the template's.

        Raises:
          CheckpointError: the checkpoint cannot be read, has other trees, or is of another step.
        """
        stored = self.stored_shapes(step)
        trees, fresh = _tree(template), []
        for name in list(trees):
            if not (difference := _difference(name, stored, trees[name])):
                continue
            if name in ("step", "params", "batch_stats") or not (allow_changes or name == "communication"):
                raise CheckpointError(
                    f"The checkpoint {self.directory / str(step)} does not fit this run's {name}: {difference}. It belongs to "
                    "another model, optimizer or precision; use its settings, or another --workdir."
                )
            fresh.append(name)
            del trees[name]
        restored = self._read(step, trees, _mesh(template))
        for name in set(fresh) - {"communication"}:
            log.warning("The checkpoint has another %s; this run starts with a fresh one.", name)
        if "ema" in fresh and template.ema:
            restored["ema"] = _average_of(restored, template)
        if "opt_state" in fresh:
            restored["opt_state"] = _at_step(template.opt_state, restored["step"])
        return dataclasses.replace(template, **restored)

    def restore_weights(self, step: int, template: TrainState) -> TrainState:
        """`template` with the parameters, statistics and EMA of `step`. Other trees are not read.

        If the checkpoint has no EMA, since the run had none by then, the EMA is that of the weights themselves.
        """
        trees = {name: tree for name, tree in _tree(template).items() if name in _WEIGHTS}
        lacks_ema = "ema" in trees and not any(path.startswith("ema/") for path in self.stored_shapes(step))
        if lacks_ema:
            del trees["ema"]
        restored = self._read(step, trees, _mesh(template))
        if lacks_ema:
            log.warning("The checkpoint of step %d has no moving average; its weights are taken for it.", step)
            restored["ema"] = _average_of(restored, template)
        return dataclasses.replace(template, **restored | {"step": template.step})

    def _read(self, step: int, trees: dict[str, Any], mesh: Any) -> dict[str, Any]:
        """The trees as they are stored, the step number among them, which must be that of the manifest."""

        def target(x: jax.Array) -> jax.ShapeDtypeStruct:
            where: Any = x.sharding
            if not is_everywhere(x):  # on a stage of other processes: all stages read it, and that stage keeps it
                where = jax.sharding.NamedSharding(mesh, where.spec)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        abstract = jax.tree.map(target, trees)
        restore = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"The checkpoint {self.directory / str(step)} cannot be read: {error}.") from error
        _require_step(self.directory / str(step), int(restored["step"].addressable_data(0)))
        return jax.tree.map(lambda new, old: new if is_everywhere(old) else view(new, old.sharding), restored, trees)

    def stored_shapes(self, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape and dtype of every leaf of `step`, by its path in the state."""
        try:
            tree = self._manager.item_metadata(step).state.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"The checkpoint {self.directory / str(step)} cannot be read: {error}.") from error
        return _shapes(tree)


def restore_leaves(
    checkpoints: Checkpointer, step: int, targets: Mapping[str, jax.ShapeDtypeStruct], mesh: Any
) -> dict[str, jax.Array]:
    """Reads some leaves of a checkpoint.

    Args:
      checkpoints: the directory.
      step: of the checkpoint.
      targets: the leaves' shapes, dtypes and shardings, by their paths in the state.
      mesh: of all devices that read them.

    Raises:
      CheckpointError: they cannot be read, or the checkpoint is of another step.
    """
    everywhere = jax.sharding.NamedSharding(mesh, P())
    trees = nested({"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), **targets})
    restored = checkpoints._read(step, trees, mesh)
    del restored["step"]
    return by_path(restored)


def holds(checkpoints: Checkpointer, step: int, name: str, tree: PyTree) -> bool:
    """Whether the tree `name` of a checkpoint has the leaves of `tree` (arrays or shapes), and no others."""
    return not _difference(name, checkpoints.stored_shapes(step), tree)


def restore_callbacks(
    checkpoints: Checkpointer, step: int, wanted: Mapping[str, PyTree], state: TrainState
) -> dict[str, PyTree]:
    """The arrays of callbacks, by the callback's name; without those of which the checkpoint has none.

    Args:
      checkpoints: the directory.
      step: of the checkpoint.
      wanted: arrays with the shapes, dtypes and shardings of this run.
      state: of the run.

    Raises:
      CheckpointError: the arrays have other shapes, or cannot be read.
    """
    stored = checkpoints.stored_shapes(step)
    there = {name: tree for name, tree in wanted.items() if any(p.startswith(f"{_CALLBACKS}/{name}/") for p in stored)}
    for name, tree in there.items():
        if difference := _difference(f"{_CALLBACKS}/{name}", stored, tree):
            raise CheckpointError(
                f"The arrays of the callback {name} in {checkpoints.directory / str(step)} are others: {difference}. Give the "
                "callback another `name`, under which it begins anew."
            )
    trees = {"step": state.step, _CALLBACKS: there}
    return checkpoints._read(step, trees, _mesh(state))[_CALLBACKS] if there else {}


def _mesh(state: TrainState) -> Any:
    """The mesh of the whole run, which the step number has: every stage holds it."""
    where: Any = state.step.sharding
    return where.mesh


def check_space(directory: Path, state: TrainState) -> None:
    """Raises `WorkdirError` where the disk has no room for a checkpoint of `state` (arrays or shapes); warns if not for two."""
    needed, free = _state_bytes(state), shutil.disk_usage(directory).free
    text = f"A checkpoint takes {needed / 2**20:.0f} MiB and {directory} has {free / 2**20:.0f} MiB free"
    if _is_short_of(directory, needed):
        raise WorkdirError(f"{text}; free some, or choose another --workdir.")
    if free < 2 * needed:
        log.warning("%s: too little for two, and the old one is deleted only when the new one is complete.", text)


def _manager(directory: Path, *, create: bool) -> ocp.CheckpointManager:
    # Orbax deletes nothing: `manifest.delete_old` does, when the next checkpoint is verified.
    options = ocp.CheckpointManagerOptions(create=create)
    # One replica writes whole leaves. To split them among replicas, Orbax compiles a slice program for each leaf and
    # device: 9 s in the loop at the first save of a small ResNet on 8 devices (measured).
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handlers = {"state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)}
    with writing(directory) if create else reading(directory):
        return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _delete_old(directory: Path, keep: int, best_by: str) -> None:
    """What cannot be deleted stays until the next save: the new checkpoint is there all the same."""
    try:
        manifest.delete_old(directory, keep, best_by)
    except (OSError, CheckpointError) as error:
        log.warning("Old checkpoints in %s were not deleted (%s).", directory, error)


_OF_DISKS = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)))


def _reason(error: Exception | None) -> str:
    """Why a save has failed: the system's own words, where they are somewhere in what tensorstore says."""
    text = str(error).strip() or type(error).__name__
    if any(word in text for word in ("ENOSPC", "RESOURCE_EXHAUSTED")):
        return os.strerror(errno.ENOSPC)
    return next((words for words in _OF_DISKS if words in text), text.splitlines()[0].rstrip("."))


def _require_step(folder: Path, found: int) -> None:
    """Raises `CheckpointError` where the state is that after another step than its folder's and its manifest's."""
    if str(found) != folder.name:
        raise CheckpointError(
            f"{folder} does not hold step {folder.name}: its manifest is of that step, and its state is that after step "
            f"{found}; choose another checkpoint, or move this one away."
        )


def _is_said_by_nobody_else(record: logging.LogRecord) -> bool:
    """A filter for absl's log, where Orbax writes the traceback of a failed save several times over: it is raised as well."""
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def _no_other(directory: Path) -> str:
    """What is said of the last save of a run that fails."""
    steps = manifest.manifested_steps(directory)
    how = f"goes on from step {steps[-1]}" if steps else "begins anew"
    return f", and no other save follows: remove the cause, and the same command {how}."


def _is_short_of(directory: Path, needed: int) -> bool:
    """Whether the directory's disk has less room than `needed` bytes, as any process sees it."""
    try:
        short = shutil.disk_usage(directory).free < needed
    except OSError:  # the save will say what is wrong there
        short = False
    return "True" in coordination.allgather_str(
        coordination.unique_key("room for a checkpoint"), str(short), _SPACE_SECONDS
    )


def _state_bytes(state: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _average_of(restored: dict[str, Any], template: TrainState) -> dict[str, PyTree]:
    """A moving average that starts with the restored weights. A tree without leaves is not stored: the template has it."""
    return {name: jax.tree.map(_copy, restored.get(name, tree)) for name, tree in template.ema.items()}


def _copy(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding, may_alias=False)


def _at_step(opt_state: PyTree, step: jax.Array) -> PyTree:
    """A fresh optimizer state with the learning rate of `step`: the schedule has its own count of steps."""

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
    if name in ("opt_state", "communication"):
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

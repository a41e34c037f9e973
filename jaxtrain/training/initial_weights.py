"""The first weights of a new run, where `model.init_from` names them: what they are taken from, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax

from jaxtrain.distributed import coordination
from jaxtrain.errors import EnvironmentMismatchError, WeightsError
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.pretrained_settings import require_weights
from jaxtrain.training.setup import RunSpec
from jaxtrain.training.weights_source import Source, open_source
from jaxtrain.trees import path_of
from jaxtrain.weights import matching
from jaxtrain.weights.matching import Matched

log = logging.getLogger("jaxtrain")
_SHA_SECONDS = 1800.0  # in which every process must have read the whole file


def weights_of(state: TrainState) -> dict[str, Any]:
    """The leaves that weights may be given for, by path: `params/...` and `batch_stats/...`. state: arrays or shapes."""
    trees = {"params": state.params, "batch_stats": state.batch_stats}
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


def match_weights(run: RunSpec, file: Source, shapes: TrainState) -> Matched:
    """Where the leaves of a run come from in a file of weights.

    Args:
      run: whose model it is.
      file: of weights.
      shapes: of the run's state.
    """
    model = run.config.model
    ours = {path: leaf.shape for path, leaf in weights_of(shapes).items()}
    return matching.match(file, model.name, model.depths, ours)


def initial_weights(run: RunSpec, shapes: TrainState) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The weights of `model.init_from`, where the layout has them.

    Args:
      run: what is trained.
      shapes: of its state, with shardings.

    Returns:
      The leaves by path, for `create_state`, and what the run records of them. Both are empty where a run draws all its
      weights.

    Raises:
      WeightsError: the file is none, has another SHA-256, or does not fit the model.
      EnvironmentMismatchError: the processes see different files.
    """
    if not run.config.model.init_from:
        return {}, {}
    require_weights(run.config)
    with open_source(run.config.model.init_from) as file:
        matched = match_weights(run, file, shapes)
        _check_sha256(file, run.config.model.init_sha256)
        record = record_of(file, matched)
        for line in described(record):
            log.info("%s", line)
        return file.place(matched, weights_of(shapes)), record


def _check_sha256(file: Source, wanted: str) -> None:
    if wanted and file.sha256 != wanted.lower():
        raise WeightsError(
            f"config.model.init_sha256={wanted}: {file.path} has the SHA-256 {file.sha256}; it is another file."
        )
    first = coordination.broadcast_str("the file of weights", file.sha256, _SHA_SECONDS)
    if first != file.sha256:
        raise EnvironmentMismatchError(
            f"Process {coordination.index()} found another file at {file.path} than process 0 (its SHA-256 is "
            f"{file.sha256[:12]}, not {first[:12]}); give all hosts the same one."
        )


def record_of(file: Source, matched: Matched) -> dict[str, Any]:
    """What a run keeps of the weights that it began with, as JSON has it."""
    return {
        "file": str(file.path),
        "sha256": file.sha256,
        "names": matched.label,
        "model": matched.title,
        "loaded": len(matched.of("loaded")),
        **{fate: {m.row.ours: m.note for m in matched.of(fate)} for fate in ("resized", "new")},
        "left_over": list(matched.ignored),
    }


def described(record: Mapping[str, Any]) -> list[str]:
    """The table of `record_of`, in lines for a screen or a log."""
    lines = [f"weights of {record['file']}: {record['model']}, names of {record['names']}"]
    rows = [("loaded", f"{record['loaded']} leaves")]
    for fate in ("resized", "new"):
        rows += [(fate, f"{_some(paths)}: {note}") for note, paths in _by_note(record[fate]).items()]
    if left := record["left_over"]:
        rows.append(("left over", f"{_some(left)}: no weights, or computed again"))
    return lines + [f"  {what:<9} {text}" for what, text in rows]


def _by_note(notes: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, note in notes.items():
        found.setdefault(note, []).append(path)
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")

"""What is in a file of weights, in words: for `jaxtrain weights inspect`."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any

from jaxtrain.weights import matching
from jaxtrain.weights.file import WeightsFile
from jaxtrain.weights.naming import RECOMPUTED
from jaxtrain.weights.pretrained import PretrainedConfig, pretrained_config


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a file holds.

    model: in words; "" for one that is not known. names: whose they are. flags: of the config that such a model needs.
    dtypes: how many tensors of each type. parameters: how many values. leaves: our leaf for each of their names. left: names
    that no leaf takes.
    """

    path: str
    format: str
    bytes: int
    sha256: str
    model: str
    names: str
    flags: list[str]
    classes: int
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    config: PretrainedConfig
    metadata: dict[str, str]
    leaves: dict[str, str]
    left: list[str]

    def to_json(self) -> str:
        """As `--json` prints it."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def inspect(file: WeightsFile) -> Inspection:
    """What a file holds, from its table alone. Raises `WeightsError` where its names and shapes disagree."""
    naming = matching.recognised(file.tensors)
    known: dict[str, Any] = {"model": "", "names": "", "flags": [], "classes": 0, "leaves": {}}
    if matching.has_own_names(file.tensors):
        known |= {
            "model": "weights of jaxtrain",
            "names": matching.OWN,
            "leaves": {name: name for name in file.tensors},
        }
    elif naming is not None:
        found = matching.architecture_in(file, naming)
        rows = naming.rows(found)
        flags = found.flags
        flags += ["--config.model.stem=imagenet"] if found.stem == 7 else []
        flags += [f"--config.model.{name}={value}" for name in ("patch", "window") if (value := getattr(found, name))]
        known = {
            "model": found.title,
            "names": naming.label,
            "flags": flags,
            "classes": found.classes,
            "leaves": {name: row.ours for row in rows for name in row.theirs if name in file.tensors},
        }
    weights = {name: tensor for name, tensor in file.tensors.items() if not name.endswith(RECOMPUTED)}
    return Inspection(
        path=str(file.path),
        format=file.format,
        bytes=len(file.bytes),
        sha256=file.sha256,
        tensors=len(file.tensors),
        parameters=sum(tensor.size for tensor in weights.values()),
        dtypes=dict(collections.Counter(str(tensor.dtype) for tensor in file.tensors.values())),
        config=pretrained_config(file),
        metadata=dict(file.metadata),
        left=[name for name in file.tensors if name not in known["leaves"]],
        **known,
    )

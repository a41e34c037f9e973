"""What a run records about its data set, stored with each checkpoint, and what has changed since then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.data.base import SPLITS, Dataset
from jaxtrain.errors import DataError

Record = Mapping[str, Any]


def record(
    dataset: Dataset, *, image_size: int, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
    """The record of a data set, as JSON stores it.

    Args:
      dataset: the data set.
      image_size: side in pixels that the model sees.
      num_classes: the number of the model's outputs.
      mean: one number a channel, by which the run normalizes pixels in [0, 1].
      std: as `mean`.
    """
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "drawn": list(dataset.drawn),
        "split_rule": dataset.split_rule,
        "splits": {
            split: {"examples": len(getattr(dataset, split)), "fingerprint": dataset.split_fingerprints.get(split, "")}
            for split in SPLITS
        },
        "class_names": list(dataset.class_names),
        "num_classes": num_classes,
        "image_size": image_size,
        "mean": list(mean),
        "std": list(std),
    }


def refuse_other_rule(stored: Record, dataset: Dataset, where: str) -> None:
    """Refuses a data set whose splits were drawn by another rule: the run trained on what is held out now.

    Args:
      stored: the run's record; {} for a run that is older than these records.
      dataset: the data set as it is now.
      where: names the run in the error.

    Raises:
      DataError: the rule is another.
    """
    rule = stored.get("split_rule", "")
    none_drawn = stored.get("drawn", ["unknown"]) == []
    if not dataset.split_rule or rule == dataset.split_rule or none_drawn:
        return
    old = f"the rule {rule!r}" if rule else "an older rule, by the files' positions"
    raise DataError(
        f"The splits of {dataset.name} were drawn by {old} in {where}, and are drawn {dataset.split_rule!r} now, so that what "
        "was held out is not held out any more; start a fresh run (another --workdir), or give the data set folders train, "
        "val and test of its own."
    )


def same_split(stored: Record, dataset: Dataset, split: str) -> bool:
    """Whether a split is known to have the same content as in the record `stored`."""
    if stored.get("fingerprint") == dataset.fingerprint:
        return True
    old = stored.get("splits", {}).get(split, {}).get("fingerprint", "")
    return bool(old) and old == dataset.split_fingerprints.get(split)


def differences(stored: Record, dataset: Dataset) -> list[str]:
    """What differs from the record: a few words for each split and each class; [] where nothing is known to differ."""
    if stored.get("fingerprint") == dataset.fingerprint:  # the classes may have come and gone before
        return []
    changes = []
    for split, old in stored.get("splits", {}).items():
        count = len(getattr(dataset, split))
        if old["examples"] != count:
            changes.append(f"{split} had {old['examples']:,} examples and has {count:,}")
        elif count and not same_split(stored, dataset, split):
            changes.append(f"{split} is another")
    known, present = stored.get("class_names", dataset.class_names), dataset.class_names
    changes += [f"the class {name!r} is gone" for name in known if name not in present][:3]
    changes += [f"the class {name!r} is new" for name in present if name not in known][:3]
    return changes


def changed_sentence(name: str, stored: Record, dataset: Dataset, where: str, remedy: str) -> str:
    """The sentence that refuses a data set that has changed.

    Args:
      name: its name in the config.
      stored: the run's record.
      dataset: the data set as it is now.
      where: what the record belongs to, such as "step 12 of runs/x".
      remedy: the end of the sentence: what to do.
    """
    fingerprints = f"its fingerprint was {stored['fingerprint'][:12]} and is {dataset.fingerprint[:12]}"
    changes = "; ".join([fingerprints, *differences(stored, dataset)])
    return f"The data set {name} has changed since {where} ({changes}); {remedy}"

"""What a run remembers of its data set (stored with each checkpoint), and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.data.base import SPLITS, Dataset
from jaxtrain.data.splits import FILE_RULE
from jaxtrain.errors import DataError

Record = Mapping[str, Any]


def record(
    dataset: Dataset, *, image_size: int, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
    """As JSON holds it. image_size: side that the model sees. num_classes: its outputs. mean, std: as it normalizes."""
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
    """Raises `DataError` where the run's splits were drawn by another rule than these: nothing would be held out any more.

    stored: {} of a run that is older than these records. where: names the run.
    """
    rule = stored.get("split_rule", "")
    none_drawn = stored.get("drawn", ["unknown"]) == []
    if not dataset.split_rule or rule == dataset.split_rule or none_drawn:
        return
    old = f"the rule {rule!r}" if rule else "an older rule, by the files' positions"
    raise DataError(
        f"The splits of {dataset.name} were drawn by {old} in {where}, and are drawn {FILE_RULE!r} now, so that what was held "
        "out is not held out any more; start a fresh run (another --workdir), or give the data set folders train, val and "
        "test of its own."
    )


def same_split(stored: Record, dataset: Dataset, split: str) -> bool:
    """Whether a split is known to hold what it held."""
    if stored.get("fingerprint") == dataset.fingerprint:
        return True
    was = stored.get("splits", {}).get(split, {}).get("fingerprint", "")
    return bool(was) and was == dataset.split_fingerprints.get(split)


def differences(stored: Record, dataset: Dataset) -> list[str]:
    """What differs, a few words for each split and for the classes; [] where nothing is known to."""
    if stored.get("fingerprint") == dataset.fingerprint:  # the classes may have come and gone before
        return []
    found = []
    for split, was in stored.get("splits", {}).items():
        count = len(getattr(dataset, split))
        if was["examples"] != count:
            found.append(f"{split} had {was['examples']:,} examples and has {count:,}")
        elif count and not same_split(stored, dataset, split):
            found.append(f"{split} is another")
    known, now = stored.get("class_names", dataset.class_names), dataset.class_names
    found += [f"the class {name!r} is gone" for name in known if name not in now][:3]
    found += [f"the class {name!r} is new" for name in now if name not in known][:3]
    return found


def changed_sentence(name: str, stored: Record, dataset: Dataset, where: str, remedy: str) -> str:
    """The refusal of a data set that is another than that of `where`, such as "step 12 of runs/x". name: the config's."""
    prints = f"its fingerprint was {stored['fingerprint'][:12]} and is {dataset.fingerprint[:12]}"
    what = "; ".join([prints, *differences(stored, dataset)])
    return f"The data set {name} has changed since {where} ({what}); {remedy}"

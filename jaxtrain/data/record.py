"""What a run records about its data set, stored with each checkpoint, and what has changed since then."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtrain.data.base import SPLITS, Dataset
from jaxtrain.errors import DataError


@dataclasses.dataclass(frozen=True)
class SplitRecord:
    """One split: how many examples it has, and the fingerprint of its content ('' where only that of all is known)."""

    examples: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class DatasetRecord:
    """What a run records of its data set. What an older version of jaxtrain did not record has its default here."""

    name: str = ""
    fingerprint: str = ""
    """Of the whole; '' where nothing is recorded, as before a run's first step."""
    drawn: tuple[str, ...] | None = None
    """The splits that were drawn from training; None where that is not known."""
    split_rule: str = ""
    splits: Mapping[str, SplitRecord] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    """Outputs of the model."""
    image_size: int = 0
    """Side in pixels that the model sees."""
    mean: tuple[float, ...] = ()
    """One number a channel, by which the run normalizes pixels in [0, 1]."""
    std: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, dataset: Dataset, *, image_size: int, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> DatasetRecord:
        """The record of a data set, and of how a run uses it; the arguments are those of the fields."""
        splits = {
            split: SplitRecord(len(getattr(dataset, split)), dataset.split_fingerprints.get(split, ""))
            for split in SPLITS
        }
        return cls(
            name=dataset.name,
            fingerprint=dataset.fingerprint,
            drawn=tuple(dataset.drawn),
            split_rule=dataset.split_rule,
            splits=splits,
            class_names=tuple(dataset.class_names),
            num_classes=num_classes,
            image_size=image_size,
            mean=tuple(mean),
            std=tuple(std),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DatasetRecord:
        """The inverse of `dataclasses.asdict`, also after JSON has made lists of tuples."""
        fields: dict[str, Any] = {
            field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values
        }
        if "splits" in fields:
            fields["splits"] = {split: SplitRecord(**recorded) for split, recorded in fields["splits"].items()}
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields)

    def split_fingerprint(self, split: str) -> str:
        """The fingerprint of one split, '' where it is not recorded."""
        return self.splits[split].fingerprint if split in self.splits else ""

    def part(self, split: str, count: int) -> int:
        """`count` (`train.eval_examples`) where that is a part of the split, 0 where it is the whole."""
        return count if split in self.splits and count < self.splits[split].examples else 0


def refuse_other_rule(stored: DatasetRecord, dataset: Dataset, where: str) -> None:
    """Refuses a data set whose splits were drawn by another rule: the run trained on what is held out now.

    Args:
      stored: the run's record.
      dataset: the data set as it is now.
      where: names the run in the error.

    Raises:
      DataError: the rule is another.
    """
    rule = stored.split_rule
    if not dataset.split_rule or rule == dataset.split_rule or stored.drawn == ():
        return
    old = f"the rule {rule!r}" if rule else "an older rule, by the files' positions"
    raise DataError(
        f"The splits of {dataset.name} were drawn by {old} in {where}, and are drawn {dataset.split_rule!r} now, so that what "
        "was held out is not held out any more; start a fresh run (another --workdir), or give the data set folders train, "
        "val and test of its own."
    )


def same_split(stored: DatasetRecord, dataset: Dataset, split: str) -> bool:
    """Whether a split is known to have the same content as in the record `stored`."""
    if stored.fingerprint == dataset.fingerprint:
        return True
    old = stored.split_fingerprint(split)
    return bool(old) and old == dataset.split_fingerprints.get(split)


def differences(stored: DatasetRecord, dataset: Dataset) -> list[str]:
    """What differs from the record: a few words for each split and each class; [] where nothing is known to differ."""
    if stored.fingerprint == dataset.fingerprint:  # the classes may have come and gone before
        return []
    changes = []
    for split, old in stored.splits.items():
        count = len(getattr(dataset, split))
        if old.examples != count:
            changes.append(f"{split} had {old.examples:,} examples and has {count:,}")
        elif count and not same_split(stored, dataset, split):
            changes.append(f"{split} is another")
    known, present = stored.class_names or dataset.class_names, dataset.class_names
    changes += [f"the class {name!r} is gone" for name in known if name not in present][:3]
    changes += [f"the class {name!r} is new" for name in present if name not in known][:3]
    return changes


def changed_sentence(name: str, stored: DatasetRecord, dataset: Dataset, where: str, remedy: str) -> str:
    """The sentence that refuses a data set that has changed.

    Args:
      name: its name in the config.
      stored: the run's record.
      dataset: the data set as it is now.
      where: what the record belongs to, such as "step 12 of runs/x".
      remedy: the end of the sentence: what to do.
    """
    fingerprints = f"its fingerprint was {stored.fingerprint[:12]} and is {dataset.fingerprint[:12]}"
    changes = "; ".join([fingerprints, *differences(stored, dataset)])
    if stored.name not in ("", name):
        return f"The data set {name} is not the one of {where}, {stored.name} ({changes}); {remedy}"
    return f"The data set {name} has changed since {where} ({changes}); {remedy}"

"""Cuts a data set into train, validation and test, where it does not bring all three."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtrain.config import DataConfig, without_effect
from jaxtrain.data import base, order
from jaxtrain.errors import ConfigError

# The rule by which files are held out. It is part of the fingerprint: a run that went on under another rule would train on
# examples that it had held out.
FILE_RULE = "by file name, version 1"

_TEST_SHARE = 0.2  # of a data set that has neither a validation nor a test split


def cut(
    parts: base.RawSplits, config: DataConfig, needed: str = "", drawable: Sequence[str] | None = None
) -> base.Dataset:
    """Draws the splits that a data set lacks from training; `registry.load` says how.

    Args:
      parts: the data set as it is stored.
      config: the data section.
      needed: the one split that will be read, "" for all.
      drawable: the only splits that may be drawn; None: whatever is missing.

    Raises:
      ConfigError: too few training examples are left.
    """
    lacking = [split for split in _lacks(parts) if drawable is None or split in drawable]
    draw = (_ByFile if parts.files and lacking else _ByPosition)(parts, config)
    drawn: dict[str, np.ndarray] = {}
    train = np.arange(len(parts.train), dtype=np.int64)
    if "test" in lacking:
        train, drawn["test"] = draw.test(train)
    train = draw.ordered(train)
    if "validation" in lacking:
        train, drawn["validation"] = draw.validation(train)
    if needed in ("", "train"):
        _check_train(parts, config, len(train), {split: len(indices) for split, indices in drawn.items()})
    empty = base.Outline(0, parts.train.shape)
    sources: dict[str, base.Source] = {
        "train": base.Subset(parts.train, train[: config.examples or None]),
        "validation": parts.validation or empty,
        "test": parts.test or empty,
        **{split: base.Subset(parts.train, indices) for split, indices in drawn.items()},
    }
    rule = draw.rule if drawn else ""
    return base.Dataset(
        name=config.name,
        train=sources["train"],
        validation=sources["validation"],
        test=sources["test"],
        num_classes=len(parts.class_names),
        class_names=parts.class_names,
        mean=parts.mean,
        std=parts.std,
        fingerprint=_sha256(
            [parts.identity, config.split_seed, config.validation, config.examples, *filter(None, [rule])]
        ),
        split_fingerprints={split: draw.fingerprint(split, source, drawn) for split, source in sources.items()},
        drawn=tuple(lacking),
        split_rule=rule,
        notes=(*parts.notes, *_notes(parts, config, sources, drawn, needed)),
    )


def _lacks(parts: base.RawSplits) -> list[str]:
    """The splits that are to be drawn: the validation where there is none, and the test where there is neither."""
    test = parts.test is None and not len(parts.validation or ())
    return ["test"] * test + ["validation"] * (parts.validation is None)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _ByPosition:
    """Draws positions among the training examples: the splits stay while the examples are the same."""

    parts: base.RawSplits
    config: DataConfig

    rule = ""

    def test(self, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (what is left, what is held out) of the examples `train`, both in rising order."""
        labels = np.zeros(len(train), np.int32) if self.parts.labels is None else self.parts.labels
        held = _stratified(labels, _TEST_SHARE, self.config.split_seed)
        return np.setdiff1d(train, held), held

    def ordered(self, train: np.ndarray) -> np.ndarray:
        """The examples `train`, int64, in split order: `validation` and `config.examples` cut them in this order."""
        return train[order.split_permutation(len(train), self.config.split_seed)]

    def validation(self, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (what is left, what is held out) of the examples `train`, which are in split order."""
        count = round(len(train) * self.config.validation)
        return train[count:], train[:count]

    def fingerprint(self, split: str, source: base.Source, drawn: Mapping[str, np.ndarray]) -> str:
        """SHA-256 of what identifies a split: its stored content, or what it is drawn from and how."""
        parts, config = self.parts, self.config
        if split != "train" and split not in drawn:
            return _sha256(parts.identity_of(split)) if len(source) else ""
        whole = parts.identity_of("train")
        shares = {"train": [config.validation, config.examples], "validation": [config.validation], "test": []}
        return _sha256([whole, split, sorted(drawn), config.split_seed, *shares[split]])


@dataclasses.dataclass(frozen=True)
class _ByFile(_ByPosition):
    """Holds a file out if a hash of its name is below the share, so that an added file moves no other.

    The share is exact only on average. The test, the validation and the order use one word each of one SHA-256.
    """

    rule = FILE_RULE

    @functools.cached_property
    def _words(self) -> np.ndarray:
        """float64 [files, 3] in [0, 1): the three words of each file."""
        start = hashlib.sha256(f"{self.config.split_seed}\n".encode())

        def digest(name: str) -> bytes:
            hashed = start.copy()
            hashed.update(name.encode())
            return hashed.digest()

        words = np.frombuffer(b"".join(digest(name) for name, _ in self.parts.files), ">u8")
        return (words.reshape(-1, 4)[:, :3] >> 11) / 2.0**53

    def test(self, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        held = self._words[train, 0] < _TEST_SHARE
        return train[~held], train[held]

    def ordered(self, train: np.ndarray) -> np.ndarray:
        return train[np.argsort(self._words[train, 2], kind="stable")]

    def validation(self, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        held = self._words[train, 1] < self.config.validation
        return train[~held], train[held]

    def fingerprint(self, split: str, source: base.Source, drawn: Mapping[str, np.ndarray]) -> str:
        """A split that is cut from training is identified by its files alone, since other files do not move them."""
        if not isinstance(source, base.Subset):
            return super().fingerprint(split, source, drawn)
        return _sha256([self.parts.files[index] for index in np.sort(source.indices)])


def _stratified(labels: np.ndarray, share: float, split_seed: int) -> np.ndarray:
    """int64 [n], sorted: `share` of the examples of every class in `labels` (int [N]), at least one of each."""
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(share * len(members)))
        held.append(members[order.split_permutation(len(members), split_seed, role=1 + int(label))[:count]])
    return np.sort(np.concatenate(held))


def _check_train(parts: base.RawSplits, config: DataConfig, left: int, drawn: Mapping[str, int]) -> None:
    """Raises `ConfigError` where too few of the training examples are left."""
    if not left:
        held = " and ".join(f"{count:,} for {split}" for split, count in drawn.items() if count)
        raise ConfigError(
            f"config.data.name={config.name!r}: of {len(parts.train):,} training examples none is left"
            + (f" ({held} held out); add some, or bring splits of your own (config.data.splits)." if held else ".")
        )
    if config.examples > left:
        raise ConfigError(
            f"config.data.examples={config.examples}: {config.name} has {left:,} training examples"
            f" (config.data.validation={config.validation:g} is held out)."
        )


def _notes(
    parts: base.RawSplits,
    config: DataConfig,
    sources: Mapping[str, base.Source],
    drawn: Mapping[str, np.ndarray],
    needed: str,
) -> list[str]:
    """What a user should know about the splits, one sentence each."""
    notes = []
    if parts.test is None and "test" not in drawn:
        notes.append("it has no test split, and none is drawn: its validation split chooses the best weights")
    for split in drawn:
        if not len(sources[split]) and needed in ("", split) and (split == "test" or config.validation):
            notes.append(f"no example was drawn for {split}: there are too few")
    if "validation" not in drawn and config.name != "synthetic":  # it makes as many as `validation` says
        notes += without_effect("data", config, ["validation"], "no validation is drawn from training")
    for split in (needed,) if needed else sources:
        labels = base.labels_of(sources[split])
        if labels is not None and len(labels):
            notes += _without_examples(split, labels, parts.class_names)
    return notes


def _without_examples(split: str, labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """A sentence that names the classes that have no example in a split; [] where all have one."""
    counts = np.bincount(labels, minlength=len(class_names))
    missing = [repr(name) for name, count in zip(class_names, counts, strict=False) if not count]
    if not missing:
        return []
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return [f"{split} has no example of the class{'es' * (len(missing) > 1)} {', '.join(missing[:5])}{more}"]

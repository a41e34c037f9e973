"""Where the time of runs went, and what limited them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxtrain.errors import WorkdirError
from jaxtrain.observability.goodput import Goodput, goodput, read_starts
from jaxtrain.observability.rendering import percent, short_duration
from jaxtrain.reporting.blocks import Bars, Section, Sentences
from jaxtrain.reporting.table import Table
from jaxtrain.runs.record import RunRecord
from jaxtrain.workdir import Workdir

# In the order of their bars; what else a start may have comes behind.
_ORDER = ("training", "input", "evaluation", "checkpoint", "compile", "start", "done again", "down", "profile", "other")
_NAMES = {"training": "steps that count", "start": "starting", "input": "waiting for input"}
_LOOP = ("training", "input", "evaluation", "checkpoint", "done again", "other")
_LIMITS = {
    "training": "compute",
    "input": "input",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "done again": "steps done again",
    "other": "the host",
}
_HELP = {
    "training": "the devices were busy with steps, so more or faster devices would help",
    "input": "steps waited for batches: more data.workers, or data.residency=device, would help",
    "evaluation": "a larger train.eval_every, or train.eval_examples, would help",
    "checkpoint": "a larger checkpoint.every would help",
    "done again": "steps were done again after kills or roll-backs: a smaller checkpoint.every would help",
    "other": "the host was busy between steps: a larger train.log_every, or more CPU, would help",
}


def read_goodput(run: RunRecord) -> Goodput | None:
    """Of all starts of a run; None where their files cannot be read."""
    try:
        return goodput(read_starts(Workdir(Path(run.path)).starts))
    except WorkdirError:
        return None


def times_section(runs: list[RunRecord]) -> tuple[Section, list[str]]:
    """The seconds of each category and run, the bars of their shares, and what limited each; and a sentence for the summary."""
    found = [(run.name, spent) for run in runs if (spent := read_goodput(run)) and spent.wall]
    if not found:
        return Section("Time and bottleneck", ()), []
    names = [name for name in _ORDER if any(spent.seconds.get(name) for _, spent in found)]
    names += [name for name in dict.fromkeys(n for _, s in found for n in s.seconds) if name not in _ORDER]
    seconds = Table.of(
        "Seconds of wall time, over all starts of a run",
        ["run", *(_NAMES.get(name, name) for name in names), "all", "goodput"],
        [
            [
                run,
                *(f"{spent.seconds.get(name) or 0.0:.2f}" for name in names),
                f"{spent.wall:.2f}",
                f"{spent.share:.4f}",
            ]
            for run, spent in found
        ],
    )
    shares = Bars(
        "Where the wall time went",
        "share",
        tuple(
            (run, {_NAMES.get(name, name): (spent.seconds.get(name) or 0.0) / spent.wall for name in names})
            for run, spent in found
        ),
    )
    limits = Table.of(
        "What limited training: shares of the loop's time, without start, compilation and downtime",
        ["run", *(_NAMES.get(name, name) for name in _LOOP), "limited by"],
        [[run, *(percent(share) for share in _loop(spent).values()), _LIMITS[_bound(spent)]] for run, spent in found],
    )
    inside = (
        "How a step's own time divides into compute and communication is not in a run's files; "
        "a profile (config.profile.steps) or jaxtrain scale measures it."
    )
    limited = list(_limited(found))
    return Section("Time and bottleneck", (shares, seconds, limits, Sentences((*limited, inside)))), [
        _useful(found),
        *limited,
    ]


def _useful(found: Sequence[tuple[str, Goodput]]) -> str:
    shares = [spent.share for _, spent in found]
    if len(found) == 1:
        wall = short_duration(found[0][1].wall, 1)
        return f"Goodput is {shares[0]:.4f}: the share of {wall} that went into steps that count."
    return f"Goodput, the share of the wall time that went into steps that count, is {min(shares):.4f} to {max(shares):.4f}."


def _limited(found: Sequence[tuple[str, Goodput]]) -> Iterator[str]:
    """A sentence for each limit, about the runs that had it."""
    for bound in dict.fromkeys(_bound(spent) for _, spent in found):
        having = [(run, _loop(spent)[bound]) for run, spent in found if _bound(spent) == bound]
        shares = [share for _, share in having]
        names = " and ".join(run for run, _ in having)
        if len(having) > 3:
            names = f"{'All' if len(having) == len(found) else f'{len(having)} of'} {len(found)} runs"
        between = percent(shares[0]) if len(having) == 1 else f"{percent(min(shares))} to {percent(max(shares))}"
        yield f"{names} {'was' if len(having) == 1 else 'were'} limited by {_LIMITS[bound]} ({between} of the loop's time): {_HELP[bound]}."


def _loop(spent: Goodput) -> dict[str, float]:
    """The shares of what the loop does, in the order of `_LOOP`."""
    seconds = {name: spent.seconds.get(name) or 0.0 for name in _LOOP}
    total = sum(seconds.values())
    return {name: value / total if total else 0.0 for name, value in seconds.items()}


def _bound(spent: Goodput) -> str:
    shares = _loop(spent)
    return max(shares, key=lambda name: shares[name])

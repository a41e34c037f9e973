"""How a run looks on a screen: lines as functions of what they show and of the width. Nothing here knows a terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.text import Text

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_SPINNER = "|/-\\"
_BAR = (8, 40)  # columns, at least and at most
_GAP = "  "

# ------------------------------------------------------------------------------------------------------------- numbers


def duration(seconds: float) -> str:
    """H:MM:SS, with days in front when there are any: `0:01:05`, `2d 3:00:00`."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    return f"{f'{days}d ' if days else ''}{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def short_duration(seconds: float, digits: int = 0) -> str:
    """Seconds up to 100 (with so many `digits`), then a clock: `3 s`, `4.1 s`, `1:45`, `2:03:00`."""
    seconds = max(seconds, 0.0)
    if seconds < 99.5:
        return f"{seconds:.{digits}f} s"
    return duration(seconds) if seconds >= 3599.5 else duration(seconds).removeprefix("0:").removeprefix("0")


def size(count: int) -> str:
    """Bytes in the largest unit that gives 1 or more: `512 B`, `3.5 MiB`, `29.6 GiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def percent(share: float) -> str:
    """A share in [0, 1] as `98.4 %`."""
    return f"{100 * share:.1f} %"


def rate(per_second: float) -> str:
    """Examples per second, with separators of thousands; slow ones with a decimal."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def loss(value: float) -> str:
    """Four decimals, as long as that takes nine columns."""
    return f"{value:.4f}" if not abs(value) >= 10_000 else f"{value:.3g}"


def gpu_hours(hours: float) -> str:
    """Three digits: `0.0123`, `1.25`, `128`; from 1,000 on without a fraction."""
    return f"{hours:.3g}" if hours < 999.5 else f"{hours:,.0f}"


def cost(money: float | None) -> str:
    """As `gpu_hours`, in the currency of the price; `-` where there is no price."""
    return "-" if money is None else gpu_hours(money)


def learning_rate(value: float) -> str:
    """Four decimals, or two digits and an exponent where these would show less than two digits."""
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


# --------------------------------------------------------------------------------------------------------------- table


class Column(NamedTuple):
    """A column of the table of epochs."""

    key: str
    name: str
    width: int
    rank: int
    """On a narrow screen, columns of the highest rank are left out first."""


def columns(epochs: int, *, parts: bool = False, validates: bool = True, ema: bool = False) -> list[Column]:
    """The table's columns; those of usual runs take less than 80.

    Args:
      epochs: of the run.
      parts: whether rows come between the ends of epochs.
      validates: whether there is a validation split.
      ema: whether the run keeps an average of the weights.
    """
    whole = 2 * len(str(epochs)) + 1
    found = [
        Column("epoch", "epoch", max(whole + 3 * parts, 5), 0),
        Column("loss", "loss", 8, 1),
        Column("accuracy", "acc %", 5, 3),
        Column("val_loss", "val loss", 8, 2),
        Column("val_accuracy", "val acc %", 9, 0),
        Column("ema_accuracy", "EMA acc %", 9, 0),
        Column("throughput", "images/s", 8, 5),
        Column("learning_rate", "lr", 7, 6),
        Column("seconds", "time", 7, 4),
        Column("best", "", 4, 0),
    ]
    absent = ({"val_loss", "val_accuracy", "ema_accuracy", "best"} if not validates else set()) | (
        {"ema_accuracy"} if not ema else set()
    )
    return [column for column in found if column.key not in absent]


def row(numbers: Mapping[str, float], best: bool) -> dict[str, str]:
    """The texts of a row.

    Args:
      numbers: by the column's key; `epochs_done` and `epochs` for the first. What is not there stays empty.
      best: whether these are the best weights so far.
    """
    done = numbers["epochs_done"]
    texts = {
        "epoch": f"{done:.0f}/{numbers['epochs']:.0f}" if done == int(done) else f"{done:.2f}/{numbers['epochs']:.0f}",
        "best": "best" if best else "",
    }
    for key in ("loss", "val_loss"):
        texts[key] = loss(numbers[key]) if key in numbers else ""
    for key in ("accuracy", "val_accuracy", "ema_accuracy"):
        texts[key] = f"{100 * numbers[key]:.1f}" if key in numbers else ""
    texts["throughput"] = rate(numbers["throughput"]) if "throughput" in numbers else ""
    texts["learning_rate"] = learning_rate(numbers["learning_rate"]) if "learning_rate" in numbers else ""
    texts["seconds"] = short_duration(numbers["seconds"], 1) if "seconds" in numbers else ""
    return texts


def table_line(all_columns: Sequence[Column], texts: Mapping[str, str] | None, width: int) -> Text:
    """A row of the table, or its header for None, in fewer than `width` columns where possible."""
    shown = list(all_columns)
    while len(shown) > 1 and sum(column.width for column in shown) + len(_GAP) * (len(shown) - 1) >= width:
        worst = max(shown, key=lambda column: column.rank)
        if not worst.rank:
            break
        shown.remove(worst)
    if texts is None:
        return Text(_GAP.join(column.name.rjust(column.width) for column in shown).rstrip(), style="dim")
    styles = {"best": "bold green", "throughput": "dim", "learning_rate": "dim", "seconds": "dim"}
    pieces = [(texts[column.key].rjust(column.width), styles.get(column.key, "")) for column in shown]
    line = Text()
    for place, piece in enumerate(pieces):
        line.append(_GAP if place else "").append(*piece)
    line.rstrip()
    return line


# ----------------------------------------------------------------------------------------------------------- live line


class Number(NamedTuple):
    """A number beside a bar. On a narrow screen, those of the highest rank are left out first."""

    text: str
    rank: int


@dataclasses.dataclass
class Activity:
    """What a run is doing now. Whoever does it changes these; a thread shows them some times a second."""

    what: str
    began: float
    """Of the clock that `live_line` is given, in seconds."""
    total: int = 0
    """How much there is to do; 0: nobody knows, so that a spinner and the seconds are shown."""
    done: int = 0
    numbers: tuple[Number, ...] = ()
    note: str = ""
    """What else is worth saying."""
    ends: float = math.nan
    """When the run will be done, on the same clock."""
    ends_without: str = ""
    """What `ends` leaves out."""

    def say(self, what: str) -> None:
        """From now on it is doing this."""
        self.what = what


def live_line(activity: Activity, width: int, now: float, *, ascii_only: bool = False) -> Text:
    """The line that is drawn again and again, in fewer than `width` columns.

    Args:
      activity: what is shown.
      width: of the screen.
      now: the clock of `activity`, in seconds.
      ascii_only: the screen's encoding has no other letters.
    """
    elapsed = short_duration(now - activity.began)
    if not activity.total:
        frames = _PLAIN_SPINNER if ascii_only else _SPINNER
        line = Text.assemble((frames[int(10 * now) % len(frames)], "cyan"), " ", activity.what, _GAP, (elapsed, "cyan"))
        line.append(f"{_GAP}{activity.note}" if activity.note else "", "dim")
        line.truncate(width - 1, overflow="ellipsis" if not ascii_only else "crop")
        return line
    numbers = list(activity.numbers)
    if not activity.done and not numbers:
        numbers = [Number(elapsed, 0)]
    if not math.isnan(activity.ends):
        without = f" + {activity.ends_without}" if activity.ends_without else ""
        numbers.append(Number(f"ETA {short_duration(activity.ends - now)}{without}", 1))
    count = f"{activity.done:{len(str(activity.total))}}/{activity.total}"

    def room() -> int:
        taken = sum(len(_GAP) + len(number.text) for number in numbers)
        return width - 1 - len(f"{activity.what}  {count}") - taken

    while numbers and room() < _BAR[0]:
        numbers.remove(max(numbers, key=lambda number: number.rank))
    line = Text(f"{activity.what} ")
    line.append_text(_bar(activity.done / activity.total, min(max(room(), 0), _BAR[1]), ascii_only=ascii_only))
    line.append(f" {count}")
    for number in numbers:
        line.append(_GAP + number.text, "cyan" if number.text.startswith("ETA") else "")
    line.truncate(width - 1, overflow="crop")
    return line


def _bar(share: float, width: int, *, ascii_only: bool) -> Text:
    """A bar of `width` columns; its rest is of another letter, so that it can be seen without colours."""
    full, half, rest = ("#", "#", "-") if ascii_only else ("━", "╸", "─")
    halves = int(2 * width * min(max(share, 0.0), 1.0))
    done = full * (halves // 2) + half * (halves % 2)
    return Text.assemble((done, "green"), (rest * (width - len(done)), "dim"))

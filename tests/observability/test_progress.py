"""What a run shows: lines as functions of their width, and where they go: a terminal, a pipe, a notebook."""

import io
import logging
import os
import re
import sys
import threading
import time
import types

import pytest
from rich.console import Console

from jaxtrain.observability import rendering
from jaxtrain.observability.progress import Progress, erase_line
from jaxtrain.observability.rendering import Activity, Number, duration, live_line, short_duration
from jaxtrain.observability.text_log import FILE_ONLY, NOT_LIVE, TextLog, make_console, to_screen

NUMBERS = {
    "epochs_done": 2,
    "epochs": 20,
    "loss": 0.20673,
    "accuracy": 0.936,
    "val_loss": 0.2297,
    "val_accuracy": 0.972,
    "throughput": 5522.4,
    "learning_rate": 0.0976,
    "seconds": 0.44,
}


def table(width, **more):
    columns = rendering.columns(20, **more)
    lines = (
        rendering.table_line(columns, None, width),
        rendering.table_line(columns, rendering.row(NUMBERS | {"ema_accuracy": 0.986}, best=True), width),
    )
    return [line.plain for line in lines]


def test_the_table_of_epochs_at_80_columns():
    assert table(80) == [
        "epoch      loss  acc %  val loss  val acc %  images/s       lr     time",
        " 2/20    0.2067   93.6    0.2297       97.2     5,522   0.0976    0.4 s  best",
    ]


def test_a_narrow_table_leaves_out_whole_columns_and_never_the_validation():
    assert table(80, ema=True) == [
        "epoch      loss  acc %  val loss  val acc %  EMA acc %  images/s     time",
        " 2/20    0.2067   93.6    0.2297       97.2       98.6     5,522    0.4 s  best",
    ]
    assert table(40) == ["epoch      loss  val acc %", " 2/20    0.2067       97.2  best"]
    assert table(80, validates=False)[1] == " 2/20    0.2067   93.6     5,522   0.0976    0.4 s"
    assert all(len(line) < width for width in range(37, 130) for line in table(width, ema=True))


def test_what_a_row_does_not_know_stays_empty():
    part = rendering.row({"epochs_done": 1.25, "epochs": 2, "val_loss": float("nan"), "val_accuracy": 1.0}, best=False)
    line = rendering.table_line(rendering.columns(2, parts=True), part, 80)
    assert line.plain == "1.25/2                        nan      100.0"
    assert (rendering.loss(123456.0), rendering.learning_rate(1.5e-5), rendering.rate(0.52)) == (
        "1.23e+05",
        "1.5e-05",
        "0.5",
    )


ACTIVITY = Activity(
    "epoch  3/20",
    began=100.0,
    total=61,
    done=47,
    numbers=(Number("loss 0.1140", 2), Number("acc 98.4 %", 4), Number("5,336 images/s", 3)),
    ends=110.2,
)


def test_the_live_line_at_80_columns_and_less():
    assert live_line(ACTIVITY, 80, 107.0).plain == (
        "epoch  3/20 ━━━━━━━━─── 47/61  loss 0.1140  acc 98.4 %  5,336 images/s  ETA 3 s"
    )
    assert live_line(ACTIVITY, 50, 108.0).plain == "epoch  3/20 ━━━━━━╸── 47/61  loss 0.1140  ETA 2 s"
    assert live_line(ACTIVITY, 50, 108.0, ascii_only=True).plain.isascii()
    assert all(live_line(ACTIVITY, width, 107.0).cell_len < width for width in range(10, 220))


def test_an_eta_says_what_it_leaves_out():
    partly = Activity(
        "epoch 1/2", 0.0, total=4, done=1, numbers=(Number("loss 1", 2),), ends=60.0, ends_without="saves"
    )
    assert live_line(partly, 80, 0.0).plain.endswith(" 1/4  loss 1  ETA 60 s + saves")


def test_before_the_first_number_the_seconds_are_shown():
    assert live_line(Activity("epoch 1/2", 0.0, total=4), 40, 12.0).plain == "epoch 1/2 ─────────────────── 0/4  12 s"
    compiling = Activity("compiling the step", 0.0, note="the next start finds it in the compile cache")
    assert live_line(compiling, 80, 12.0).plain == (
        "⠋ compiling the step  12 s  the next start finds it in the compile cache"
    )
    assert live_line(compiling, 30, 12.0).plain == "⠋ compiling the step  12 s  …"


def test_durations_read_as_clocks():
    clocks = ["0:00:00", "0:01:05", "1:00:00", "2d 3:00:00"]
    assert [duration(s) for s in (-3, 65.4, 3600, 2 * 86400 + 3 * 3600)] == clocks
    assert [short_duration(s) for s in (-1, 3.4, 99, 105, 600, 3599.6, 90000)] == [
        "0 s", "3 s", "99 s", "1:45", "10:00", "1:00:00", "1d 1:00:00",
    ]  # fmt: skip
    assert short_duration(4.14, 1) == "4.1 s"


# ------------------------------------------------------------------------------------------------------ where it goes


def say_it_all():
    log = logging.getLogger("jaxtrain")
    log.info("for all")
    log.info("for the file", extra=FILE_ONLY)
    log.info("instead of a line", extra=NOT_LIVE)
    log.warning("beware")
    to_screen("for the screen\x1b[31m")


def test_a_pipe_gets_whole_lines_and_no_control_characters(tmp_path):
    console = Console(file=io.StringIO(), width=40)
    with TextLog(tmp_path / "log", console=console):
        progress = Progress(console)
        with progress.activity("compiling", note="for a long time " * 9), progress.activity("evaluating", 3) as inner:
            inner.done = 2
            say_it_all()
    said = console.file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    assert [line[9:] for line in said.splitlines()] == [
        "for all", "instead of a line", "WARNING: beware", r"for the screen\x1b[31m"
    ]  # fmt: skip
    logged = [line.split(" ", 2)[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert logged == ["for all", "for the file", "instead of a line", "beware"]


def on_a_terminal(monkeypatch, action, **environment):
    """What `action(console)` writes to a terminal of 60 columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    master, slave = os.openpty()
    shown = []

    def read():
        try:
            while data := os.read(master, 65536):
                shown.append(data)
        except OSError:  # Linux ends a closed pty with EIO
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal:
        action(Console(file=terminal, width=60))
    reader.join(10)
    os.close(master)
    return b"".join(shown).decode()


def test_a_terminal_gets_one_line_that_is_drawn_again_below_the_others(tmp_path, monkeypatch):
    def action(console):
        with TextLog(tmp_path / "log", console=console):
            progress = Progress(console)
            with progress.activity("training", 4) as activity:
                activity.done = 2
                progress._display.refresh()
                say_it_all()
                with progress.activity("saving step 2"):
                    logging.getLogger("jaxtrain").info("meanwhile")

    text = on_a_terminal(monkeypatch, action)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    rows = [row.rpartition("\r")[2] for row in plain.replace("\r\n", "\n").split("\n")]
    assert [row for row in rows if row] == ["for all", "WARNING: beware", r"for the screen\x1b[31m", "meanwhile"]
    assert "training ━" in plain
    assert "saving step 2" in plain
    assert "\x1b[33mWARNING: beware" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor was not given back"


def test_without_colours_the_line_is_the_same(monkeypatch):
    def action(console):
        with Progress(console).activity("training", 4):
            console.print("said")

    text = on_a_terminal(monkeypatch, action, NO_COLOR="1")
    assert "training " in text
    assert not re.search(r"\x1b\[(3|9)\d", text)


def test_a_narrower_window_leaves_nothing_of_the_wider_line(monkeypatch):
    """The terminal has wrapped the old line into two rows: both are erased before the new one is drawn."""

    def action(console):
        with Progress(console).activity("training", 4) as activity:
            activity.done = 2
            console.width = 40
            console.print("now")

    assert "\x1b[2K\x1b[1A\r\x1b[2Know" in on_a_terminal(monkeypatch, action)


def test_a_dumb_terminal_and_other_processes_get_no_line(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    for progress in (
        Progress(console),
        Progress(),
        Progress(Console(file=io.StringIO(), force_terminal=True, quiet=True)),
    ):
        with progress.activity("training", 4):
            assert progress._display is None
    assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("term", "shown", "erased"), [("xterm", True, True), ("xterm", False, False), ("dumb", True, False)]
)
def test_a_line_is_erased_where_one_is_shown(monkeypatch, term, shown, erased):
    """Not below the line of another process on the same terminal, and not where nothing can be erased."""
    monkeypatch.setattr("jaxtrain.observability.progress._erased", threading.Event())

    def action(console):
        monkeypatch.setattr(sys, "stderr", console.file)
        with Progress(console if shown else None).activity("training", 4):
            erase_line()
            console.print("failed")
        erase_line()

    text = on_a_terminal(monkeypatch, action, TERM=term)
    assert text.partition("failed")[0].endswith("\r\x1b[2K") == erased
    assert erased or "\x1b" not in text


def test_a_file_is_no_terminal_whatever_the_colours(monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / "err").open("w") as file:
        progress = Progress(console := Console(file=file))
        with TextLog(tmp_path / "log", console=console), progress.activity("training", 4):
            say_it_all()
            assert progress.width == 120
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", (tmp_path / "err").read_text())


def test_a_command_says_what_takes_long(monkeypatch):
    monkeypatch.setattr("jaxtrain.observability.progress._PRINTED_SECONDS", 0.01)
    console = Console(file=io.StringIO())
    with Progress(console, prints=True).activity("tracing"):
        deadline = time.monotonic() + 30
        while not console.file.getvalue() and time.monotonic() < deadline:
            pass
    assert console.file.getvalue().startswith("jaxtrain: tracing, 0 s\n")


@pytest.fixture
def notebook(monkeypatch):
    """A notebook's IPython; the outputs of its cell, each with what it showed one after the other."""
    outputs = []

    def display(bundle, *, raw, display_id):
        assert raw
        assert display_id
        outputs.append([bundle["text/plain"]])
        return types.SimpleNamespace(update=lambda bundle, *, raw: outputs[-1].append(bundle["text/plain"]))

    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr("jaxtrain.observability.text_log.in_notebook", lambda: True)
    monkeypatch.setattr("jaxtrain.observability.progress.in_notebook", lambda: True)
    return outputs


def test_a_notebook_gets_one_output_that_is_replaced(notebook, tmp_path, capsys):
    console = make_console()
    progress = Progress(console)
    with TextLog(tmp_path / "log", console=console):
        with progress.activity("compiling"):
            say_it_all()
        with progress.activity("training", 4):
            pass
    progress.close()
    assert len(notebook) == 1
    assert "compiling  0 s" in notebook[0][0]
    assert notebook[0][-1] == ""
    assert capsys.readouterr().out.splitlines() == ["for all", "WARNING: beware", r"for the screen\x1b[31m"]

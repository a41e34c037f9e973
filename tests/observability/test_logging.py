"""Records, text log, progress, manifest, clock and symptoms, as a train loop and its reader see them."""

import errno
import io
import json
import logging
import os
import random
import re
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxtrain import workdir as wd
from jaxtrain.cli import main as command_line
from jaxtrain.config import Config, DataConfig, flat_keys, to_dict
from jaxtrain.distributed import straggler
from jaxtrain.distributed.straggler import ProcessTime
from jaxtrain.distributed.watchdog import Beat, dump_stacks, read_beat, write_beat
from jaxtrain.errors import WorkdirError
from jaxtrain.host import files
from jaxtrain.host.backend import PACKAGES
from jaxtrain.observability import clock as clocks
from jaxtrain.observability import diagnostics, metrics_writer, start_record
from jaxtrain.observability.goodput import TimesFile
from jaxtrain.observability.merged_logs import Follower
from jaxtrain.observability.metrics_files import EpochRow, MetricsCsv, MetricsJsonl
from jaxtrain.observability.metrics_writer import MetricsWriter, NullMetricsWriter
from jaxtrain.observability.tensorboard import EventFile
from jaxtrain.observability.text_log import TextLog

STEPS_AN_EPOCH = 4


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch):
    """Rows of `metrics.jsonl` are compared byte for byte, and have the time."""
    monkeypatch.setattr(metrics_writer, "_now", lambda: 1.5)


@pytest.fixture
def run(tmp_path):
    return wd.prepare(tmp_path / "run")


def play(run, first, last, *, start=None, finish=False):
    """A loop's records from step `first` (exclusive) to `last`: a row a step, two every fourth, a test at the end.

    Numbers depend on the step alone, as those of an exactly resumed run do.
    """
    start = first if start is None else start
    with MetricsWriter(run, step=start, epochs_done=start // STEPS_AN_EPOCH) as records:
        for step in range(first + 1, last + 1):
            epoch = (step - 1) // STEPS_AN_EPOCH
            loss = np.float32(1 / step)
            records.train_step({"step": step, "epoch": epoch, "loss": loss, "accuracy": 1 - loss, "throughput": 834.5})
            if step % STEPS_AN_EPOCH == 0:
                records.epoch(epoch, "train", 2 / step, 0.5, 834.5, step=step)
                records.epoch(epoch, "val", 3 / step, 0.25, 1000.0, step=step, extra={"top5": 0.75})
        if finish:
            records.epoch((last - 1) // STEPS_AN_EPOCH, "test", 0.125, 0.875, 2000.0, step=last)


def json_rows(run):
    return [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- CSV


def test_csv_bytes(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    assert path.read_bytes() == b"epoch,phase,loss,accuracy,throughput\n"
    table.append(EpochRow(0, "train", 0.8215, 0.7132, 834.5))
    table.append(EpochRow(0, "val", 0.82153712345, 1.0, 12345.678))
    table.append(EpochRow(1, "train", float("nan"), 0.0, 0.0))
    assert path.read_bytes() == (
        b"epoch,phase,loss,accuracy,throughput\n"
        b"0,train,0.8215,0.7132,834.5\n"
        b"0,val,0.821537,1.0000,12345.7\n"
        b"1,train,nan,0.0000,0.0\n"
    )


def test_csv_has_one_row_a_phase_and_epoch_and_one_test_row(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    for row in [(0, "val", 0.9), (0, "train", 0.8), (0, "val", 0.7), (0, "test", 0.6), (1, "test", 0.5)]:
        table.append(EpochRow(*row, accuracy=0.5, throughput=1.0))
    expected = ["0,train,0.8000,0.5000,1.0", "0,val,0.7000,0.5000,1.0", "1,test,0.5000,0.5000,1.0"]
    assert path.read_text().splitlines()[1:] == expected
    assert [str(row) for row in MetricsCsv(path).rows] == expected


def test_csv_is_sorted_after_a_validation_in_the_middle_of_an_epoch(tmp_path):
    table = MetricsCsv(tmp_path / "metrics.csv")
    table.append(EpochRow(0, "val", 0.9, 0.5, 1.0))
    table.append(EpochRow(0, "train", 0.8, 0.5, 1.0))
    assert [line[:7] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]] == ["0,train", "0,val,0"]


def test_csv_drops_a_torn_row_even_when_it_looks_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCsv(path).append(EpochRow(0, "train", 0.5, 0.5, 834.5))
    whole = path.read_bytes()
    path.write_bytes(whole + b"1,train,0.8215,0.7132,8")
    assert [row.epoch for row in MetricsCsv(path).rows] == [0]
    assert path.read_bytes() == whole


def test_csv_of_somebody_else_is_refused_untouched(tmp_path):
    path = tmp_path / "metrics.csv"
    for text in ("epoch,loss\n0,1.0\n", "notes"):
        path.write_text(text)
        with pytest.raises(WorkdirError, match="does not begin with 'epoch,phase,loss,accuracy,throughput'"):
            MetricsCsv(path)
        assert path.read_text() == text


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="phase='valid': must be one of train, val, test"):
        EpochRow(0, "valid", 0.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------------------ JSONL


def test_jsonl_keeps_full_precision_and_stays_json(run):
    third, tiny = 1 / 3, 5e-324
    with MetricsWriter(run) as records:
        records.train_step({"step": 1, "epoch": 0, "loss": third, "grad_norm": float("inf"), "learning_rate": tiny})
        records.train_step({"step": 2, "epoch": 0, "loss": np.float32(third), "data_wait": np.float64("nan")})
    text = run.metrics_jsonl.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    first, second = json_rows(run)
    assert list(first) == ["step", "epoch", "phase", "time", "loss", "grad_norm", "learning_rate"]
    head = {"step": 1, "epoch": 0, "phase": "train", "time": 1.5}
    assert first == head | {"loss": third, "grad_norm": None, "learning_rate": tiny}
    assert second["loss"] == float(np.float32(third))
    assert second["data_wait"] is None


def test_jsonl_row_is_there_at_once(run):
    """A killed process loses no row that it has logged."""
    records = MetricsWriter(run)
    records.train_step({"step": 1, "epoch": 0, "loss": 0.5})
    assert len(json_rows(run)) == 1
    records.close()
    records.close()


def test_flush_syncs_the_rows_to_the_disk(run, monkeypatch):
    records, synced, sync = MetricsWriter(run), [], os.fsync
    records.train_step({"step": 1, "epoch": 0, "loss": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), sync(descriptor)))
        records.flush()
    sinks = [run.metrics_jsonl, *run.tensorboard.glob("*/events*")]
    assert {path.stat().st_ino for path in sinks} == set(synced)
    records.close()


def test_jsonl_torn_at_any_byte_is_read_up_to_the_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "epoch": 0, "phase": "train", "loss": s / 7}) + "\n" for s in (1, 2, 3))
    )
    data = path.read_bytes()
    third = data.rindex(b"{")
    for cut in range(third, len(data) + 1):
        path.write_bytes(data[:cut])
        MetricsJsonl(path, step=9).close()
        # the newline is not needed to know that the object is whole
        assert path.read_bytes() == (data if cut >= len(data) - 1 else data[:third]), cut


def test_a_damaged_line_in_the_middle_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    head = '{"step": 1, "epoch": 0, "phase": "val"'
    damaged = [
        '{"ste\xff',
        '{"step": 2, "phase": "val"}',
        f'{head}, "loss": "low"}}',
        f'{head}, "loss": {"9" * 400}}}',
        "[" * 99_999,
    ]
    whole = [f"{head}}}", '{"step": 3, "epoch": 0, "phase": "train"}']
    path.write_text("".join(f"{line}\n" for line in (whole[0], *damaged, whole[1])), encoding="latin-1")
    with caplog.at_level(logging.WARNING, "jaxtrain"):
        MetricsJsonl(path, step=9).close()
    assert path.read_text().splitlines() == whole
    for number, _ in enumerate(damaged, 2):
        assert f"line {number} is damaged" in caplog.text


def test_no_flipped_bit_of_a_line_ends_in_a_traceback(run):
    play(run, 0, 4)
    data, draw = run.metrics_jsonl.read_bytes(), random.Random(3)
    for _ in range(100):
        flipped, bit = bytearray(data), draw.randrange(8 * len(data))
        flipped[bit // 8] ^= 1 << bit % 8
        run.metrics_jsonl.write_bytes(flipped)
        MetricsWriter(run, step=4, epochs_done=1).close()


# ----------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("saved", [0, 3, 4, 5, 8])
@pytest.mark.parametrize("killed", [8, 9, 11, 12])
def test_resumed_records_equal_the_uninterrupted_ones(tmp_path, saved, killed):
    straight, resumed = wd.prepare(tmp_path / "a"), wd.prepare(tmp_path / "b")
    play(straight, 0, 14, finish=True)
    play(resumed, 0, killed)
    with open(resumed.metrics_jsonl, "ab") as file:
        file.write(b'{"step": 13, "epo')
    play(resumed, saved, 14, finish=True)
    assert resumed.metrics_csv.read_bytes() == straight.metrics_csv.read_bytes()
    assert resumed.metrics_jsonl.read_bytes() == straight.metrics_jsonl.read_bytes()


def test_a_finished_run_that_is_tested_again_has_one_test_row(run):
    play(run, 0, 8, finish=True)
    before = run.metrics_csv.read_bytes(), run.metrics_jsonl.read_bytes()
    play(run, 8, 8, finish=True)
    assert (run.metrics_csv.read_bytes(), run.metrics_jsonl.read_bytes()) == before


def test_a_longer_run_replaces_the_old_test_row(run):
    play(run, 0, 8, finish=True)
    play(run, 8, 12, finish=True)
    tests = [row for row in MetricsCsv(run.metrics_csv).rows if row.phase == "test"]
    assert [row.epoch for row in tests] == [2]
    play(run, 12, 12)
    assert [row for row in MetricsCsv(run.metrics_csv).rows if row.phase == "test"] == tests


def test_an_undone_validation_gives_way_to_the_one_before_it_in_the_same_epoch(run):
    with MetricsWriter(run) as records:
        records.epoch(0, "val", 0.9, 0.1, 10.0, step=1)
        records.epoch(0, "val", 0.8, 0.2, 10.0, step=3)
    assert "0,val,0.8000" in run.metrics_csv.read_text()
    MetricsWriter(run, step=2, epochs_done=0).close()
    assert run.metrics_csv.read_text().splitlines()[1:] == ["0,val,0.9000,0.1000,10.0"]


def test_whole_epochs_outlive_a_lost_step_level_file(run):
    play(run, 0, 9)
    before = run.metrics_csv.read_bytes()
    run.metrics_jsonl.unlink()
    MetricsWriter(run, step=8, epochs_done=2).close()
    assert run.metrics_csv.read_bytes() == before


def test_a_fresh_run_forgets_everything(run):
    play(run, 0, 9)
    MetricsWriter(run).close()
    assert run.metrics_csv.read_text().splitlines() == ["epoch,phase,loss,accuracy,throughput"]
    assert run.metrics_jsonl.read_bytes() == b""


def test_result_is_whole_json(run):
    with MetricsWriter(run) as records:
        records.result({"steps": np.int64(3), "test": {"accuracy": float("nan"), "loss": 0.1}, "devices": (1, 2)})
    expected = {"steps": 3, "test": {"accuracy": None, "loss": 0.1}, "devices": [1, 2]}
    assert json.loads(run.result.read_text()) == expected


def test_a_full_disk_is_a_work_directory_error(run, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records = MetricsWriter(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WorkdirError, match="No space left on device"):
            records.epoch(0, "train", 0.5, 0.5, 1.0, step=4)
    records.close()


def test_other_processes_record_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NullMetricsWriter() as records:
        records.train_step({"step": 1, "epoch": 0, "loss": 0.5})
        records.epoch(0, "train", 0.5, 0.5, 1.0, step=1)
        records.result({})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ TensorBoard


def events(directory: Path):
    """Every event of every file, in TensorBoard's order, read from the record format (length, crc, bytes, crc)."""
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            for begin, end in ((0, 8), (12, 12 + length)):
                assert struct.unpack_from("<I", data, end) == (masked_crc32c(data[begin:end]),)
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_holds_the_scalars_of_each_phase(run):
    with MetricsWriter(run) as records:
        records.train_step({"step": 1, "epoch": 0, "loss": 0.5, "accuracy": None, "learning_rate": float("nan")})
        records.epoch(0, "train", 0.25, 0.75, 10.0, step=4)
        records.epoch(0, "val", 0.125, 0.5, 20.0, step=4, extra={"top5": np.float32(0.75), "split": "validation"})
    shown = {
        phase: {(e.step, v.tag, v.simple_value) for e in events(run.tensorboard / phase) for v in e.summary.value}
        for phase in ("train", "val", "test")
    }
    epoch_means = {(4, "epoch/loss", 0.25), (4, "epoch/accuracy", 0.75), (4, "epoch/throughput", 10.0)}
    assert shown["train"] == {(1, "loss", 0.5), *epoch_means}
    assert shown["val"] == {(4, "loss", 0.125), (4, "accuracy", 0.5), (4, "throughput", 20.0), (4, "top5", 0.75)}
    assert shown["test"] == set()
    assert [e.file_version for e in events(run.tensorboard / "test")] == ["brain.Event:2", ""]


def test_tensorboard_gets_large_steps_long_names_and_numbers_beyond_float32(tmp_path):
    file = EventFile(tmp_path, step=2**40, now=lambda: 1.5e9 + 0.25)
    file.scalars(2**41 + 5, {"loss/" + "x" * 200: -1e300, "": 0.1})
    file.close()
    *_, start, last = events(tmp_path)
    assert (start.step, start.session_log.status, last.step) == (2**40 + 1, 1, 2**41 + 5)
    assert last.wall_time == 1.5e9 + 0.25
    assert {v.tag: v.simple_value for v in last.summary.value} == {
        "loss/" + "x" * 200: -np.inf,
        "": np.float32(0.1),
    }


def test_a_restart_in_the_same_second_or_after_the_clock_went_back_writes_a_later_file(tmp_path):
    for instant in (1000.0, 1000.0, 900.0):
        file = EventFile(tmp_path, step=0, now=lambda instant=instant: instant)
        file.scalars(1, {"loss": 0.5})
        file.close()
        file.close()
    assert [path.name.split(".")[3] for path in sorted(tmp_path.iterdir())] == [
        "0000001000",
        "0000001001",
        "0000001002",
    ]


def test_a_resume_purges_later_steps_only(run):
    play(run, 0, 6)
    MetricsWriter(run, step=5, epochs_done=1).close()
    starts = [e.step for e in events(run.tensorboard / "train") if e.HasField("session_log")]
    assert starts == [0, 6]


def test_tensorboards_own_reader_sees_each_step_once(run):
    play(run, 0, 7)
    play(run, 4, 9)
    seen = EventAccumulator(str(run.tensorboard / "train")).Reload()
    assert [event.step for event in seen.Scalars("loss")] == list(range(1, 10))
    assert seen.Scalars("loss")[8].value == np.float32(1 / 9)
    seen = EventAccumulator(str(run.tensorboard / "val")).Reload()
    assert [event.step for event in seen.Scalars("loss")] == [4, 8]


def shown(run, phase):
    """{step: loss} as TensorBoard's own reader sees them."""
    seen = EventAccumulator(str(run.tensorboard / phase)).Reload()
    return [(e.step, np.float32(e.value)) for e in seen.Scalars("loss")] if "loss" in seen.Tags()["scalars"] else []


def test_what_tensorboard_shows_equals_metrics_jsonl_after_any_kill(run):
    """A kill is a writer that is never closed: what it had not given to the system is gone."""
    killed = []
    for start, last in ((0, 3), (0, 6), (4, 9), (8, 8), (8, 12)):
        records = MetricsWriter(run, step=start, epochs_done=start // STEPS_AN_EPOCH)
        killed.append(records)
        if start == 4:  # a validation that the start before was stopped in
            records.epoch(0, "val", 0.5, 0.25, 1000.0, step=4)
        for step in range(start + 1, last + 1):
            records.train_step({"step": step, "epoch": 0, "loss": 1 / step})
            if step % STEPS_AN_EPOCH == 0:
                records.epoch(0, "val", 3 / step, 0.25, 1000.0, step=step)
        if last in (8, 12):  # the run is made longer afterwards
            records.epoch(0, "test", 1 / last, 0.25, 1000.0, step=last)
        for phase in ("train", "val", "test"):
            rows = [(row["step"], np.float32(row["loss"])) for row in json_rows(run) if row["phase"] == phase]
            assert sorted(shown(run, phase)) == sorted(rows), (start, phase)
    for again in range(2):  # a complete run started again tests again
        records = MetricsWriter(run, step=12, epochs_done=3)
        records.epoch(0, "test", 0.5 + again, 0.25, 1000.0, step=12)
        killed.append(records)
        assert shown(run, "test")[-1] == (12, np.float32(0.5 + again))
        assert [step for step, _ in shown(run, "test")].count(12) == 1


def test_tensorboards_own_reader_sees_the_config(run):
    values = to_dict(Config(data=DataConfig(mean=(0.5,), std=(0.25,))))
    run.write_config(values)
    MetricsWriter(run).close()
    seen = EventAccumulator(str(run.tensorboard)).Reload()
    (shown,) = seen.Tensors("config")
    lines = shown.tensor_proto.string_val[0].decode().splitlines()
    assert seen.SummaryMetadata("config").plugin_data.plugin_name == "text"
    assert len(lines) == 2 + len(flat_keys())
    assert "| `optim.learning_rate` | `0.1` |" in lines
    content = seen.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["optim.learning_rate"].number_value == 0.1
    assert hparams["data.global_batch"].number_value == 128
    assert hparams["model.name"].string_value == "resnet18"
    assert hparams["data.mean"].string_value == "[0.5]"
    assert hparams["train.deterministic"].WhichOneof("kind") == "bool_value"
    assert set(hparams) == set(flat_keys())


# --------------------------------------------------------------------------------------------------------- text log


def pipe_console():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_text_log_goes_to_a_private_file_and_the_console(tmp_path):
    path, console = tmp_path / "logs" / "process_0.log", pipe_console()
    long = "[bold]" + "word " * 30 + ":smile:"
    with TextLog(path, console=console):
        logging.getLogger("jaxtrain").info(long)
        logging.getLogger("jaxtrain.data").warning("look")
        logging.getLogger("jaxtrain").debug("not asked for")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first, second = path.read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO " + re.escape(long), first)
    assert second.endswith("Z WARNING look")
    shown = console.file.getvalue().splitlines()
    assert [line[9:] for line in shown] == [long, "WARNING: look"]
    with TextLog(path, console=console):
        logging.getLogger("jaxtrain").info("again")
    assert len(path.read_text().splitlines()) == 3


def test_other_processes_show_warnings_only(tmp_path):
    console = pipe_console()
    with TextLog(tmp_path / "process_1.log", process=1, console=console):
        logging.getLogger("jaxtrain").info("quiet")
        logging.getLogger("jaxtrain").warning("loud")
    assert "quiet" in (tmp_path / "process_1.log").read_text()
    assert "quiet" not in console.file.getvalue()
    assert "loud" in console.file.getvalue()


def test_the_loggers_of_the_embedding_program_are_left_alone(tmp_path):
    root, ours = logging.getLogger(), logging.getLogger("jaxtrain")
    found = ours.level
    ours.setLevel(logging.ERROR)
    before = root.level, list(root.handlers), ours.level, ours.propagate, list(ours.handlers)
    seen = []
    spy = logging.Handler()
    spy.emit = seen.append
    root.addHandler(spy)
    try:
        log = TextLog(tmp_path / "log", console=pipe_console())
        ours.info("once")
        log.close()
        log.close()
    finally:
        root.removeHandler(spy)
    assert seen == []
    assert (root.level, list(root.handlers), ours.level, ours.propagate, list(ours.handlers)) == before
    ours.setLevel(found)


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(WorkdirError):
        TextLog(tmp_path / "logs" / "process_0.log", console=pipe_console())


def test_a_closed_console_does_not_stop_the_run(tmp_path):
    """`... | head` closes the pipe; rich would raise SystemExit."""
    script = (
        "import logging, sys; from pathlib import Path; from rich.console import Console\n"
        "from jaxtrain.observability.text_log import TextLog\n"
        "with TextLog(Path(sys.argv[1]), console=Console(file=sys.stdout)):\n"
        "    sys.stdin.readline()\n"
        "    for i in range(3): logging.getLogger('jaxtrain').info('line %d', i)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "log"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.close()
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(60) == 0
    text = (tmp_path / "log").read_text()
    assert "line 0" in text
    assert "line 2" in text
    assert text.count("The console is closed") == 1


# --------------------------------------------------------------------------------------------------------- manifest


def test_manifest_has_an_entry_a_start(run):
    start_record.append_start(run.manifest, start_record.environment(0, argv=["main", "--config=a.py"]))
    start_record.append_start(run.manifest, start_record.environment(120))
    first, second = json.loads(run.manifest.read_text())["starts"]
    assert first["command"] == ["main", "--config=a.py"]
    assert second["command"] == start_record.redact(sys.argv)
    assert (first["step"], second["step"]) == (0, 120)
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"]["numpy"] == np.__version__
    assert set(first["versions"]) == set(PACKAGES)
    kinds = first["devices"].pop("kinds")
    assert kinds[jax.devices()[0].device_kind] >= 1
    assert sum(kinds.values()) == jax.device_count()
    backend, processes = jax.default_backend(), jax.process_count()
    assert first["devices"] == {"backend": backend, "count": jax.device_count(), "processes": processes}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["started"])
    assert set(first) >= {"python", "platform", "hostname", "git", "cpus", "environment"}


def test_manifest_holds_no_secret(run):
    canary = "hunter2"
    env = {
        "XLA_FLAGS": "--xla_cpu_use_thunk_runtime=true",
        "JAX_PLATFORMS": "cpu",
        "JAX_API_KEY": canary,
        "JAX_PROXY": f"http://me:{canary}@proxy:80",
        "WANDB_API_KEY": canary,
        "HOME": canary,
    }
    argv = ["main", f"--api_key={canary}", "--token", canary, f"--config.password={canary}", f"https://u:{canary}@h/x"]
    argv += [f"MY_SECRET={canary}", f"--aws-credentials={canary}", "--config.seed=3", "--token", "--verbose"]
    entry = start_record.environment(0, argv=argv, env=env)
    start_record.append_start(run.manifest, entry)
    assert canary not in run.manifest.read_text()
    assert list(entry["environment"]) == ["JAX_API_KEY", "JAX_PLATFORMS", "JAX_PROXY", "XLA_FLAGS"]
    assert entry["environment"]["XLA_FLAGS"] == "--xla_cpu_use_thunk_runtime=true"
    assert entry["command"][1:4] == ["--api_key=[redacted]", "--token", "[redacted]"]
    assert entry["command"][-3:] == ["--config.seed=3", "--token", "--verbose"]


def test_a_damaged_manifest_is_set_aside(run, caplog):
    for text in ("{", "[]", '{"starts": 1}'):
        run.manifest.write_text(text)
        with caplog.at_level(logging.WARNING, "jaxtrain"):
            start_record.append_start(run.manifest, {"step": 0})
        assert json.loads(run.manifest.read_text()) == {"starts": [{"step": 0}]}
        assert (run.path / "manifest.json.damaged").read_text() == text
        assert "set aside" in caplog.text


def test_git_state_is_of_the_source_tree(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    source = tmp_path / "package"
    source.mkdir()
    assert start_record.git_state(source) is None
    git("init")
    assert start_record.git_state(source) is None
    (source / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    clean = start_record.git_state(source)
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"])
    assert clean["dirty"] is False
    (tmp_path / "elsewhere.txt").write_text("not the source")
    assert start_record.git_state(source) == clean
    (source / "a.py").write_text("2")
    assert start_record.git_state(source) == {**clean, "dirty": True}
    (tmp_path / "venv").mkdir()
    assert start_record.git_state(tmp_path / "venv") is None, "an untracked package has no commit"


# ------------------------------------------------------------------------------------------------------------ clock


class Timer:
    """A clock that stands still until told."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def spend(clock, timer, category, seconds):
    with clock.charge(category):
        timer.time += seconds


def test_every_second_has_one_category():
    rng, timer = random.Random(0), Timer()
    clock = clocks.StepClock(timer)
    for _ in range(200):
        timer.time += rng.random()
        with clock.charge(rng.choice(clocks.CATEGORIES)):
            timer.time += rng.random()
            with clock.charge(rng.choice(clocks.CATEGORIES)):
                timer.time += rng.random()
        if rng.random() < 0.5:
            clock.step_done(8)
    span = clock.now()
    assert span.wall == pytest.approx(timer.time - 100.0, rel=1e-12)
    assert all(span.seconds[name] > 0 for name in clocks.CATEGORIES)
    assert sum(map(span.share, clocks.CATEGORIES)) == pytest.approx(1.0)


def test_nested_time_counts_once_and_an_error_ends_a_block():
    timer = Timer()
    clock = clocks.StepClock(timer)
    timer.time += 8

    def evaluation_that_fails():
        with clock.charge("evaluation"):
            timer.time += 1
            spend(clock, timer, "compile", 2)
            timer.time += 4
            raise KeyError

    with pytest.raises(KeyError):
        evaluation_that_fails()
    timer.time += 16
    seconds = clock.now().seconds
    assert (seconds["evaluation"], seconds["compile"], seconds["other"]) == (5, 2, 24)
    with pytest.raises(ValueError, match="category='lunch'"), clock.charge("lunch"):
        pass


def steps(clock, timer, count, *, input_seconds=0.25, step_seconds=0.75):
    for _ in range(count):
        spend(clock, timer, "input", input_seconds)
        spend(clock, timer, "step", step_seconds)
        clock.step_done(32)


def test_throughput_and_step_time_leave_out_warm_up_and_work_between_steps():
    timer = Timer()
    clock = clocks.StepClock(timer)
    spend(clock, timer, "compile", 60)
    assert clock.step_seconds is None
    steps(clock, timer, clocks.WARMUP_STEPS, step_seconds=9.75)
    assert clock.step_seconds is None
    assert clock.now().throughput == pytest.approx(32 / 10), "a run of warm-up alone still has a throughput"
    steps(clock, timer, 4)
    spend(clock, timer, "checkpoint", 30)
    spend(clock, timer, "evaluation", 30)
    steps(clock, timer, 4)
    span = clock.now()
    assert span.throughput == pytest.approx(32.0)
    steps(clock, timer, 1, step_seconds=99.0)
    assert clock.step_seconds == pytest.approx(1.0), "one slow step does not move the median"
    assert (span.steps, span.examples) == (clocks.WARMUP_STEPS + 8, 32 * (clocks.WARMUP_STEPS + 8))


def test_the_steps_of_one_call_share_its_time():
    timer = Timer()
    clock = clocks.StepClock(timer)
    for number in range(clocks.WARMUP_STEPS + 3):
        spend(clock, timer, "step", 40 if number < clocks.WARMUP_STEPS else 4)
        clock.step_done(32, 8)
    span = clock.now()
    assert (span.steps, span.examples) == (8 * (clocks.WARMUP_STEPS + 3), 256 * (clocks.WARMUP_STEPS + 3))
    assert clock.step_seconds == pytest.approx(0.5)
    assert span.throughput == pytest.approx(64.0), "the first calls are warm-up"


def test_a_difference_of_two_instants_is_the_span_between_them():
    timer = Timer()
    clock = clocks.StepClock(timer)
    steps(clock, timer, 5)
    before = clock.now()
    steps(clock, timer, 4, input_seconds=1.0, step_seconds=1.0)
    lap = clock.now() - before
    assert (lap.steps, lap.examples, lap.wall) == (4, 128, pytest.approx(8.0))
    assert lap.throughput == pytest.approx(16.0)
    assert lap.data_wait == pytest.approx(1.0)
    nothing = clock.now() - clock.now()
    assert (nothing.throughput, nothing.data_wait, clocks.explain(nothing)) == (0.0, 0.0, "")


@pytest.mark.parametrize(
    ("category", "advice"),
    [
        ("input", "raise config.data.workers, or keep the data set on the device with config.data.residency=device"),
        ("step", "more devices"),
        ("compile", "compile cache"),
        ("checkpoint", "config.checkpoint.every"),
        ("evaluation", "config.train.eval_every"),
        ("profile", "config.profile.steps"),
        ("other", "config.train.log_every"),
    ],
)
def test_explain_names_the_bound_and_what_would_help(category, advice):
    timer = Timer()
    clock = clocks.StepClock(timer)
    for name in clocks.CATEGORIES:
        spend(clock, timer, name, 6.2 if name == category else 3.8 / (len(clocks.CATEGORIES) - 1))
    text = clocks.explain(clock.now(), "epoch 3")
    name = {"step": "compute", "other": "other work"}.get(category, category)
    assert text.startswith(f"epoch 3 was bound by {name} (62% of 10.0 s); ")
    assert advice in text


# --------------------------------------------------------------------------------------------------------- symptoms


def span_of(**seconds):
    return clocks.Span({name: seconds.get(name, 0.0) for name in clocks.CATEGORIES}, 10, 320, 320, 1.0)


def test_slow_data_is_seen_whatever_else_the_epoch_did():
    assert diagnostics.slow_data(span_of(input=2.0, step=8.0), resident=False) == ""
    assert diagnostics.slow_data(span_of(), resident=False) == ""
    slow = span_of(input=3.0, step=7.0, compile=100.0)
    text = diagnostics.slow_data(slow, resident=False)
    assert "30% of the time (300.0 ms a step)" in text
    assert "config.data.workers" in text
    assert "config.data.residency=device" in text
    assert "config.data" not in diagnostics.slow_data(slow, resident=True)


def test_imbalance_names_the_slow_process():
    def imbalanced(*seconds: float) -> str:
        return straggler.imbalanced(
            [ProcessTime(process, f"host{process}", each) for process, each in enumerate(seconds)]
        )

    assert imbalanced(1.0) == ""
    assert imbalanced(1.0, 1.29) == ""
    assert imbalanced(0.0, 0.0) == ""
    assert imbalanced(0.0001, 0.0015) == ""
    text = "process 0 on host0 needs 1.4 s for its part of a step, 1.4 times the 1 s of the others"
    assert text in imbalanced(1.4, 1.0)
    assert "process 2 on host2" in imbalanced(1.0, 1.1, 1.5, 1.0)
    assert "process 1" in imbalanced(0.0, 1.0)


def test_fp16_underflow_is_said_at_the_floor_only():
    assert diagnostics.loss_scale_at_floor(2.0, 1.0) == ""
    text = diagnostics.loss_scale_at_floor(1.0, 1.0)
    assert "floor (1)" in text
    assert "config.train.precision=bf16" in text


# What others have named: escape codes, a forged entry after each kind of line break, letters that run backwards, half a pair.
FORGED = "2026-01-02T03:04:05.100Z ERROR forged"
HOSTILE = "\x1b[2Jcat" + "".join(f"{end}{FORGED}" for end in "\n\r\x0b\x0c\x1c\x85\u2028\u2029") + "\u202e\udc80\x9b"


def shows_nothing_but_letters(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_a_logged_text_forges_no_entry_and_moves_no_cursor(tmp_path, capsys):
    console = pipe_console()
    log = logging.getLogger("jaxtrain")
    with TextLog(tmp_path / "logs" / "process_0.log", console=console):
        log.warning("class %s", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("failed")
    for text in ((tmp_path / "logs" / "process_0.log").read_text(), console.file.getvalue()):
        assert shows_nothing_but_letters(text)
        assert "class \\x1b[2Jcat" in text
        assert re.search(r"failed\n    Traceback \(most recent call last\):\n      File", text)
        assert not re.search(f"^{FORGED}", text, re.MULTILINE)
    assert command_line(["logs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shows_nothing_but_letters(shown)
    assert len(re.findall(r"^\S", shown, re.MULTILINE)) == 2
    assert command_line(["logs", str(tmp_path), "--json"]) == 0
    assert "forged" not in [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()]


def test_the_log_of_a_stranger_is_shown_as_letters(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "process_0.log").write_text(f"2026-01-02T03:04:05.100Z INFO \x1b[2J\u2028{FORGED}\u202e\n")
    assert command_line(["logs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown == f"2026-01-02T03:04:05.100Z 0 INFO \\x1b[2J\\u2028{FORGED}\\u202e\n"


# ---------------------------------------------------------------------------------------------------------------- links


def test_no_temporary_file_is_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    path = tmp_path / "result.json"
    for plant in (os.symlink, os.link):
        plant(victim, tmp_path / ".result.json.part")
        files.atomic_write(path, "new")
        assert (victim.read_text(), path.read_text()) == ("kept", "new")
    start = tmp_path / "run" / "starts" / "000001.part"
    start.parent.mkdir(parents=True)
    start.symlink_to(victim)
    TimesFile(start.parent, clocks.StepClock(), lambda: 1).close()
    beat = tmp_path / "beat.part"
    beat.symlink_to(victim)
    write_beat(tmp_path / "beat.json", Beat(0.0, 1, "step", 1))
    assert read_beat(tmp_path / "beat.json") is not None
    assert start.with_suffix(".json").is_file()
    assert victim.read_text() == "kept"


def test_nothing_is_appended_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    mode = victim.stat().st_mode
    run = wd.prepare(tmp_path / "run")
    run.log(0).symlink_to(victim)
    with pytest.raises(WorkdirError, match=r"process_0\.log cannot be written \(it is a link, .*; remove it\)"):
        TextLog(run.log(0))
    dump_stacks(run.log(0))
    run.bad_batches.symlink_to(victim)
    with MetricsWriter(run) as records:
        with pytest.raises(WorkdirError, match=r"bad_batches\.jsonl cannot be written \(it is a link"):
            records.bad_batch({"step": 1})
        records.epoch(0, "train", 1.0, 0.5, 10.0, step=1)
        run.metrics_csv.unlink()
        run.metrics_csv.symlink_to(victim)
        with pytest.raises(WorkdirError, match=r"metrics\.csv cannot be written \(it is a link"):
            records.epoch(0, "val", 1.0, 0.5, 10.0, step=1)
    assert (victim.read_text(), victim.stat().st_mode) == ("kept", mode)


def test_an_event_file_is_not_written_through_a_link(tmp_path):
    victim, name = tmp_path / "victim", f"events.out.tfevents.{1000:010d}.{socket.gethostname()}"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).symlink_to(victim)
    EventFile(tmp_path / "train", 0, now=lambda: 1000.0).close()  # takes the next name
    assert len(list((tmp_path / "train").iterdir())) == 2
    assert not victim.exists()


def test_the_directory_of_the_logs_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").symlink_to(tmp_path / "disk")
    run = wd.prepare(tmp_path / "run")
    with TextLog(run.log(0), console=pipe_console()):
        logging.getLogger("jaxtrain").info("there")
    assert "there" in (tmp_path / "disk" / "process_0.log").read_text()


# --------------------------------------------------------------------------------------------------------- merged logs


def test_the_logs_of_all_processes_are_merged_by_time(tmp_path, capsys):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "process_0.log").write_text(
        "2026-01-02T03:04:05.100Z INFO a\n2026-01-02T03:04:07.000Z ERROR b\nTraceback\n  more\n"
    )
    (logs / "process_10.log").write_text("2026-01-02T03:04:06.000Z WARNING c\n2026-01-02T03:04:05.100Z INFO d\n")
    assert command_line(["logs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2026-01-02T03:04:05.100Z 0 INFO a",
        "2026-01-02T03:04:05.100Z 10 INFO d",
        "2026-01-02T03:04:06.000Z 10 WARNING c",
        "2026-01-02T03:04:07.000Z 0 ERROR b",
        "    Traceback",  # no line but an entry's first looks like one
        "      more",
    ]
    assert command_line(["logs", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[-1] == {
        "time": "2026-01-02T03:04:07.000Z", "process": 0, "level": "ERROR", "message": "b\nTraceback\n  more"
    }  # fmt: skip
    assert command_line(["logs", str(tmp_path), "--follow"]) == 0  # of a run that has ended
    assert len(capsys.readouterr().out.splitlines()) == 6
    for more in ([], ["--follow"]):
        assert command_line(["logs", str(tmp_path / "nothing"), *more]) == 73
        assert "holds no logs" in capsys.readouterr().err


def test_logs_are_followed(tmp_path):
    """An entry comes once, whole: not before its last line is written, unless nothing follows."""
    (tmp_path / "logs").mkdir()
    logs = Follower(tmp_path)

    def write(process: int, text: str) -> None:
        with (tmp_path / "logs" / f"process_{process}.log").open("a") as file:
            file.write(text)

    def new(**last: bool) -> list[tuple[int, str]]:
        return [(entry.process, entry.message) for entry in logs.new(**last)]

    assert new() == []
    write(0, "2026-01-02T03:04:05.100Z INFO a\n2026-01-02T03:04:06.000Z ERR")
    assert new() == []
    write(0, "OR b\n    more\n")
    write(1, "2026-01-02T03:04:04.000Z INFO c\n")
    assert new() == [(0, "a")]
    write(0, "    and more\n")
    assert new() == [(1, "c")]
    assert new() == [(0, "b\nmore\nand more")]
    write(0, "2026-01-02T03:04:07.000Z INFO d\n2026-01-02T03:04:08.000Z INFO e")
    assert new(last=True) == [(0, "d"), (0, "e")]
    assert new(last=True) == []

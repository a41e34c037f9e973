"""`jaxtrain dashboard`: who may read it, what it reads, and that its numbers are those of the files."""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dashboards import PATIENCE, Served, append, row, serving, until, write_run

from jaxtrain.cli import main
from jaxtrain.dashboard.access_token import user_token
from jaxtrain.errors import ConfigError
from jaxtrain.jobs.job import Job
from jaxtrain.jobs.queue import Queue
from jaxtrain.runs.series import metrics_of

CANARY = "canary-7f3a"
LAYOUT = {"mesh": {"data": 4}, "zero": 3, "bytes_per_device": {}, "bytes_by_stage": {}, "stages": []}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dashboard") / "runs"


@pytest.fixture(scope="module")
def served(runs) -> Iterator[Served]:
    """A dashboard that the tests of this file share; each makes runs of its own in it."""
    runs.mkdir(exist_ok=True)
    with serving(runs, runs.parent / "state") as served:
        yield served
    text = (runs.parent / "state.err").read_text()
    assert served.token not in text
    assert "Traceback" not in text
    assert served.process.returncode == 0, "Ctrl-C is how one ends it"


def found(served: Served, name: str) -> str:
    """The identifier of a run, as soon as the dashboard shows it."""
    return until(lambda: served.rows().get(name))["id"]


# ------------------------------------------------------------------------------------------------------------- safety


def test_only_the_token_opens_it(served):
    for path in ("/", "/api/runs", "/api/stream", "/static/page.js", "/no/such", "/?token=", "/?token=wrong"):
        answer = served.ask(path)
        assert answer.status == 401, path
        assert "the address that jaxtrain dashboard printed" in answer.json()["error"]
        assert "set-cookie" not in answer.headers
    assert served.ask("/api/runs", Authorization=f"Bearer {served.token[:-1]}").status == 401
    assert served.ask("/api/runs?token=" + served.token).status == 401, "in the address of the page alone"
    assert served.ask("/api/runs", Cookie=f"jaxtrain_x=é; =;x; jaxtrain_{'0' * 12}={served.token}").status == 401
    admitted = served.ask(f"/?token={served.token}&a=b")
    assert (admitted.status, admitted.headers["location"]) == (303, "./?a=b")
    cookie = admitted.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert served.ask("/api/runs", Cookie=f"other=a b; {cookie.partition(';')[0]}").status == 200
    assert served.get("/api/runs").status == 200


def test_the_token_is_kept_from_others(served, tmp_path):
    path = served.state / "dashboard" / "token"
    assert path.read_text() == served.token
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    folder = tmp_path / "kept"
    token = user_token(folder)
    assert user_token(folder) == token, "the same at the next start"
    (folder / "token").chmod(0o640)
    with pytest.raises(ConfigError, match="could be read by others"):
        user_token(folder)
    (folder / "token").unlink()
    (folder / "token").symlink_to(path)
    with pytest.raises(ConfigError, match="it is a link"):
        user_token(folder)
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="could be read by others"):
        user_token(folder)


def test_a_foreign_host_is_refused_whatever_its_port(served):
    for host in ("evil.example", f"evil.example:{served.port}", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        answer = served.ask("/api/runs", Host=host, Authorization=f"Bearer {served.token}")
        assert answer.status == 400, host
    for host in ("localhost", "localhost:8080", "127.0.0.1:3001", f"[::1]:{served.port}", "LOCALHOST:1"):
        assert served.ask("/api/runs", Host=host, Authorization=f"Bearer {served.token}").status == 200, host
    assert served.ask("/api/runs", Host="localhost@evil.example", Authorization=f"Bearer {served.token}").status == 400


def test_it_is_read_only_and_says_so(served):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        answer = served.ask("/api/runs", method, Authorization=f"Bearer {served.token}")
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD"), method
    head = served.ask("/api/runs", "HEAD", Authorization=f"Bearer {served.token}")
    assert (head.status, head.body) == (200, b"")
    head = served.ask("/api/stream", "HEAD", Authorization=f"Bearer {served.token}")
    assert (head.status, head.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert head.headers["content-length"] == "0", "it ends"


def test_every_answer_has_the_headers_that_keep_a_page_apart(served):
    answers = [
        served.get("/"),
        served.get("/api/runs"),
        served.get("/nothing"),
        served.ask("/"),
        served.ask("/", "POST"),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        for part in ("default-src 'none'", "script-src 'self';", "frame-ancestors 'none'", "base-uri 'none'"):
            assert part in policy, answer
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "server" not in answer.headers
    assert answers[0].headers["content-type"].startswith("text/html")
    assert served.get("/charts/uPlot.iife.min.js").headers["content-type"].startswith("text/javascript")


def test_it_listens_on_the_loopback_interface_alone(served):
    listening = [each for each in psutil.Process(served.process.pid).net_connections() if each.status == "LISTEN"]
    assert [(each.laddr.ip, each.laddr.port) for each in listening] == [("127.0.0.1", served.port)]


def test_no_path_leads_out_of_the_runs(served, runs):
    """An address names a run by a digest and a file by its name: no path is made of either."""
    write_run(runs / "paths")
    run = found(served, "paths")
    for path in (
        "/static/../access_token.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd",
        "/static/%2fetc%2fpasswd", "/charts/__init__.py", "/static/index.html%00", "/../../etc/passwd",
        "/api/runs/..", "/api/runs/%2e%2e%2f", "/api/runs//etc", f"/api/runs/{run}/../{run}/config.json",
        f"/api/runs/{run}/evaluation/..%2f..%2fconfig", f"/api/runs/{run}/evaluation/%2e%2e", f"/api/runs/{run}%00",
        f"/api/runs/{run}/evaluation/%00", "/api/runs/paths", "/docs", "/openapi.json",
    ):  # fmt: skip
        answer = served.get(path)
        assert answer.status == 404, path
        assert b"root:" not in answer.body


def test_links_pipes_and_directories_in_place_of_files_are_not_followed(served, runs, tmp_path):
    """And nothing hangs: a pipe that nobody writes to would block who opens it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text(json.dumps({"schedule": CANARY}))
    (outside / "process_0.log").write_text(f"2026-01-01T00:00:00.000Z INFO {CANARY}\n")
    (outside / "test.json").write_text(json.dumps({"classes": [CANARY]}))
    write_run(outside / "run", [row(1, canary=7)])
    (write_run(runs / "linked evaluation") / "evaluation").symlink_to(outside, target_is_directory=True)
    (runs / "link").symlink_to(outside / "run", target_is_directory=True)
    for name, place in (("layout", "layout.json"), ("schedule", "schedule.svg"), ("report", "evaluation/test.json")):
        run = write_run(runs / f"linked {name}")
        (run / place).parent.mkdir(exist_ok=True)
        (run / place).symlink_to(outside / "secret.json")
    write_run(runs / "linked logs" / "run")
    shutil.rmtree(runs / "linked logs" / "run" / "logs")
    (runs / "linked logs" / "run" / "logs").symlink_to(outside, target_is_directory=True)
    for name in ("metrics.jsonl", "manifest.json", "lock.json", "metrics.csv"):
        run = write_run(runs / f"pipe {name}")
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    run = write_run(runs / "directory")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    os.mkfifo(write_run(runs / "pipe log") / "logs" / "process_0.log")
    os.mkfifo(write_run(runs / "pipe events") / "events.jsonl")
    found(served, "pipe events")
    rows = served.rows()
    assert "link" not in rows
    for name in ("pipe metrics.jsonl", "pipe manifest.json", "pipe lock.json", "directory"):
        assert rows[name]["state"] == "damaged", name
    for name, each in rows.items():
        at = f"/api/runs/{each['id']}"
        series = f"{at}/series?columns=train/loss,train/canary"
        for path in (at, series, f"{at}/events", f"{at}/logs", f"{at}/schedule.svg", f"{at}/evaluation/test"):
            answer = served.get(path)
            assert answer.status in (200, 404, 422), (name, path, answer)
            assert CANARY.encode() not in answer.body, (name, path)
    linked = rows["linked logs/run"]
    assert linked["state"] == "done", "logs may lie on another disk, and hide nothing else"
    assert served.json(f"/api/runs/{linked['id']}")["problems"] == ["logs is a link, and none is followed."]
    assert "a link" in served.json(f"/api/runs/{rows['linked layout']['id']}")["problems"][0]
    assert served.get(f"/api/runs/{rows['linked schedule']['id']}/schedule.svg").status == 422
    for name in (
        "pipe metrics.jsonl",
        "pipe manifest.json",
        "pipe lock.json",
        "pipe metrics.csv",
        "pipe log",
        "pipe events",
    ):
        shutil.rmtree(runs / name)


def test_secrets_are_left_out(served, runs):
    config = {"sinks": {"api_key": CANARY, "url": f"https://me:{CANARY}@host/x"}, "deep": [{"token": CANARY}]}
    run = write_run(runs / "secrets", **config)
    entry = {
        "command": ["x", "--config", "a.py"],
        "environment": {"JAX_SECRET": CANARY},
        "origins": {"sinks.api_key": "flag"},
    }
    (run / "manifest.json").write_text(json.dumps({"starts": [entry]}))
    (run / "layout.json").write_text(json.dumps(LAYOUT | {"warnings": [f"s3://a:{CANARY}@b"]}))
    (run / "result.json").write_text(json.dumps({"password": CANARY}))
    event = {"time": 1.0, "step": 1, "kind": "end", "message": f"http://a:p@{CANARY}@b"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    (run / "logs" / "process_0.log").write_text(f"2026-01-01T00:00:00.000Z INFO to https://u:{CANARY}@h\n")
    at = f"/api/runs/{found(served, 'secrets')}"
    for path in (at, f"{at}/events", f"{at}/logs", "/api/runs", f"/api/compare?runs={at.rpartition('/')[2]}"):
        answer = served.get(path)
        assert answer.status == 200, path
        assert CANARY.encode() not in answer.body, path
    values = {each["key"]: each["value"] for each in served.json(at)["config"]}
    assert values["sinks.api_key"] == "[redacted]"
    assert {each["key"]: each["origin"] for each in served.json(at)["config"]}["sinks.api_key"] == "flag"
    assert values["sinks.url"] == "https://[redacted]@host/x"


def test_markup_in_a_run_stays_data(served, runs):
    """The page puts it in as text; here it must come as JSON that says it is JSON."""
    name = "<script>alert(1)</script>"
    run = write_run(runs / name.replace("/", "-"), code=76)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "test.json").write_text(json.dumps({"classes": [name]}))
    (run / "logs" / "process_0.log").write_text(f"2026-01-01T00:00:00.000Z ERROR {name}\n")
    at = f"/api/runs/{found(served, name.replace('/', '-'))}"
    for path in ("/api/runs", f"{at}/logs", f"{at}/evaluation/test"):
        answer = served.get(path)
        assert answer.headers["content-type"] == "application/json"
        assert b"script>" in answer.body
    assert served.json(f"{at}/evaluation/test") == {"classes": [name]}
    error = served.get("/api/runs/<script>")
    assert (error.status, error.headers["content-type"]) == (404, "application/json")


def test_a_picture_can_run_nothing(served, runs):
    (write_run(runs / "staged") / "schedule.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>")
    answer = served.get(f"/api/runs/{found(served, 'staged')}/schedule.svg")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert answer.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'; sandbox"


def test_wrong_parameters_are_named(served, runs):
    write_run(runs / "asked")
    run = found(served, "asked")
    for path, said in (
        (f"/api/runs/{run}/series", "columns: takes 1 to 64 names"),
        (f"/api/runs/{run}/series?columns=a&points=1", "points=1: must be a whole number from 2 to 20000"),
        (f"/api/runs/{run}/series?columns=a&x=moon", "x=moon: must be one of step, epoch"),
        (f"/api/runs/{run}/series?columns=a&from=nan", "from=nan: must be a number"),
        (f"/api/runs/{run}/logs?level=LOUD", "level=LOUD: must be one of DEBUG"),
        (f"/api/runs/{run}/logs?since=x", "the cursor of an earlier answer"),
        (f"/api/runs/{run}/logs?before=0.-5", "the cursor of an earlier answer"),
        ("/api/compare?runs=", "runs: takes 1 to 32 names"),
    ):
        answer = served.get(path)
        assert answer.status == 400, path
        assert said in answer.json()["error"], path
    for path in (
        "/api/runs/none",
        "/api/compare?runs=none",
        "/api/stream?run=none",
        f"/api/runs/{run}/evaluation/test",
    ):
        assert served.get(path).status == 404, path


# ------------------------------------------------------------------------------------------------- numbers of the files


def test_the_overview_says_how_each_run_is(served, runs):
    good = write_run(runs / "sweep" / "good", [row(10, accuracy=0.5), row(20, "val", accuracy=0.75)], seed=3)
    (good / "metrics.csv").write_text(
        "epoch,phase,loss,accuracy,throughput\n0,val,1.0,0.8,1\n1,val,1.0,0.75,1\n2,val,1.0,0.9"
    )
    entry = {"command": ["jaxtrain", "train", "--config=configs/big.py:zero3"], "devices": {"kinds": {"H100": 8}}}
    (good / "manifest.json").write_text(json.dumps({"starts": [entry]}))
    write_run(runs / "sweep" / "bad", code=76)
    write_run(runs / "sweep" / "live", code=None)
    found(served, "sweep/live")
    rows = served.rows()
    assert {name: rows[f"sweep/{name}"]["state"] for name in ("good", "bad", "live")} == {
        "good": "done", "bad": "failed", "live": "running"
    }  # fmt: skip
    assert rows["sweep/bad"]["reason"] == "As it ended."
    shown = {
        name: rows["sweep/good"][name] for name in ("step", "last_step", "accuracy", "val_accuracy", "best", "seed")
    }
    assert shown == {"step": 50, "last_step": 100, "accuracy": 0.5, "val_accuracy": 0.75, "best": 0.8, "seed": 3}
    shown = {name: rows["sweep/good"][name] for name in ("devices", "recipe", "group", "model", "dataset", "epochs")}
    assert shown == {
        "devices": "8 x H100", "recipe": "big", "group": "sweep", "model": "mlp", "dataset": "digits", "epochs": 10
    }  # fmt: skip


def test_a_job_that_waits_is_a_row_until_it_has_a_run(served, runs):
    entry = Queue(served.state / "queue").submit(Job("later", str(runs), config="quickstart", workdir="jobs/later"))
    waiting = until(lambda: served.rows().get(entry.id))
    assert (waiting["kind"], waiting["state"], waiting["job"]) == ("job", "waiting", entry.id)
    assert served.get(f"/api/runs/{waiting['id']}").status == 404
    write_run(runs / "jobs" / "later", code=None)
    rows = until(served.rows, lambda rows: entry.id not in rows and "jobs/later" in rows)
    assert (rows["jobs/later"]["state"], rows["jobs/later"]["job"]) == ("running", entry.id)


def test_curves_are_those_of_the_file(served, runs):
    rows = [row(step, learning_rate=0.1 * step) | {"device0/utilization": 0.5} for step in range(100)]
    rows[7]["loss"] = None  # NaN
    rows += [row(99, "val", ema_accuracy=0.25, accuracy=1), row(100, odd="text", listed=[1])]
    run = write_run(runs / "curves", rows)
    with open(run / "metrics.jsonl", "a") as file:
        file.write("no JSON\n[1]\n" + '{"step": 101, "phase": "train", "loss": 9.')  # a line that is being written
    at = f"/api/runs/{found(served, 'curves')}"
    columns = "train/loss,train/device0/utilization,val/ema_accuracy,val/loss,test/loss,train/odd,nothing"
    answer = served.json(f"{at}/series?columns={columns}")
    assert answer["series"]["train/loss"] == {
        "x": [*range(101)],
        "y": [*(None if step == 7 else 2.0 / (1 + step) for step in range(101))],
        "rows": 101,
        "downsampled": False,
        "sampled": False,
    }
    assert answer["series"]["train/device0/utilization"]["y"] == [0.5] * 100
    assert (answer["series"]["val/ema_accuracy"]["x"], answer["series"]["val/ema_accuracy"]["y"]) == ([99], [0.25])
    assert answer["missing"] == ["test/loss", "train/odd", "nothing"]
    assert set(served.json(at)["columns"]["val"]) == {"step", "epoch", "loss", "time", "ema_accuracy", "accuracy"}
    for axis, factor in (("examples", 64.0), ("epoch", 0.1)):
        places = served.json(f"{at}/series?columns=train/loss&x={axis}")["series"]["train/loss"]["x"]
        assert places == pytest.approx([step * factor for step in range(101)]), axis
    part = served.json(f"{at}/series?columns=train/loss&x=time&from=1010&to=1020.5")["series"]["train/loss"]
    assert part["x"] == [1000.0 + step for step in range(10, 21)]


def test_the_extremes_of_a_long_curve_stay(served, runs):
    values = [math.sin(step / 50) for step in range(20_000)]
    values[4321], values[15_000] = 50.0, -50.0
    write_run(
        runs / "long",
        [{"step": step, "epoch": 0, "phase": "train", "loss": value} for step, value in enumerate(values)],
    )
    at = f"/api/runs/{found(served, 'long')}/series?columns=train/loss"
    curve = served.json(f"{at}&points=100")["series"]["train/loss"]
    assert len(curve["x"]) <= 104
    assert (curve["rows"], curve["downsampled"]) == (20_000, True)
    assert (curve["x"][0], curve["x"][-1]) == (0, 19_999)
    assert dict(zip(curve["x"], curve["y"], strict=True)) == {step: values[int(step)] for step in curve["x"]}
    assert max(curve["y"]) == 50.0
    assert min(curve["y"]) == -50.0
    zoomed = served.json(f"{at}&from=4300&to=4340")["series"]["train/loss"]
    assert zoomed["y"] == values[4300:4341]


def test_a_file_that_is_written_cut_replaced_and_deleted_meanwhile(served, runs):
    run = write_run(runs / "living", [row(1), row(2)], code=None)
    at = f"/api/runs/{found(served, 'living')}/series?columns=train/loss,val/accuracy"

    def ask(cursor: str) -> tuple[list[float], bool, str]:
        answer = served.json(f"{at}&since={cursor}" if cursor else at)
        series = answer["series"]
        return (series["train/loss"]["x"] if "train/loss" in series else []), answer["reset"], answer["cursor"]

    steps, reset, cursor = ask("")
    assert (steps, reset) == ([1, 2], False)
    assert ask(cursor) == ([], False, cursor)
    append(run, [row(3)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "epoch": 0, "phase": "train", "lo')  # half a row
    steps, reset, cursor = ask(cursor)
    assert (steps, reset) == ([3], False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('ss": 0.5}\n')
    steps, reset, cursor = ask(cursor)
    assert (steps, reset) == ([4], False)
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(text[:2]))  # cut, in the same file
    steps, reset, cursor = ask(cursor)
    assert (steps, reset) == ([1, 2], True)
    append(run, [row(step) for step in (30, 40, 50, 60, 70)])  # longer than before
    steps, reset, cursor = ask(cursor)
    assert (steps, reset) == ([30, 40, 50, 60, 70], False)
    (run / "new").write_text("".join(text[:3]))
    (run / "new").replace(run / "metrics.jsonl")  # as a resumed run does it
    steps, reset, cursor = ask(cursor)
    assert (steps, reset) == ([1, 2, 3], True)
    (run / "metrics.jsonl").write_text("")
    (run / "metrics.jsonl").write_text("".join(reversed(text)))  # the same file, another content, longer
    assert ask(cursor)[:2] == ([4, 3, 2, 1], True)
    (run / "metrics.jsonl").unlink()
    assert ask(cursor) == ([], True, "")
    assert ask("nothing") == ([], True, "")
    shutil.rmtree(run)
    until(lambda: served.get(at).status, lambda status: status == 404)


def test_a_huge_file_is_sampled_and_a_zoom_reads_all_of_its_part(tmp_path):
    """More than is read whole; the evaluations, few among many rows, are all found."""
    rows = [row(step) for step in range(60_000)]
    for step in range(999, 60_000, 1000):
        rows[step] = row(step, "val", accuracy=step / 60_000)
    run = write_run(tmp_path / "huge", rows)
    log = metrics_of(run, whole_bytes=1 << 20)
    log.refresh()
    while log.complete < 1:
        log.refresh()
    found = log.series(["train/loss", "val/accuracy"], points=10**6)
    assert found["train/loss"].sampled
    assert not found["val/accuracy"].sampled
    assert found["val/accuracy"].x.tolist() == list(range(999, 60_000, 1000))
    steps = found["train/loss"].x
    assert steps[0] == 0
    assert steps[-1] == 59_998
    assert (steps[1:] > steps[:-1]).all()
    assert found["train/loss"].y.tolist() == [2.0 / (1 + step) for step in steps]
    assert log.nbytes < os.path.getsize(run / "metrics.jsonl")
    part = log.series(["train/loss", "val/accuracy"], first=30_100, last=31_100, points=10**6)
    assert part["train/loss"].x.tolist() == [step for step in range(30_100, 31_101) if step != 30_999]
    assert not part["train/loss"].sampled
    assert part["val/accuracy"].x.tolist() == [30_999]


def test_a_run_shows_its_starts_config_checkpoints_and_commands(served, runs):
    run = write_run(runs / "with a space", code=75)
    entry = {"command": ["jaxtrain"], "origins": {"seed": "flag"}, "python": "3.11"}
    (run / "manifest.json").write_text(json.dumps({"starts": [{}, entry]}))
    for step in (20, 100):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        (run / "checkpoints" / str(step) / "manifest.json").write_text(
            json.dumps({"files": {"a": [5, "x"], "b": [7, "y"]}})
        )
    (run / "checkpoints" / "110").mkdir()  # being written
    (run / "result.json").write_text(json.dumps({"best": {"step": 20}}))
    (run / "layout.json").write_text(json.dumps(LAYOUT))
    answer = served.json(f"/api/runs/{found(served, 'with a space')}")
    origins = {each["key"]: each["origin"] for each in answer["config"]}
    assert (origins["seed"], origins["model.name"]) == ("flag", "default")
    assert [(each["step"], each["bytes"], each["best"]) for each in answer["checkpoints"]] == [
        (20, 12, True),
        (100, 12, False),
    ]
    assert answer["layout"] == LAYOUT
    assert answer["environment"] == {"command": ["jaxtrain"], "python": "3.11"}
    assert answer["starts"][0]["seconds"] == {"start": 3.0, "compile": 7.0, "step": 90.0}
    assert answer["starts"][0]["end"]["code"] == 75
    assert answer["goodput"]["seconds"]["training"] == 90.0
    assert answer["commands"]["resume"] == f"jaxtrain resume '{run}'"
    assert answer["problems"] == []
    old = served.json(f"/api/runs/{found(served, 'curves')}") if (runs / "curves").exists() else answer
    assert old["has_schedule"] is False


def test_damaged_files_are_named_and_hide_nothing_else(served, runs):
    run = write_run(runs / "damaged")
    for name, text in (("manifest.json", '{"starts": 3}'), ("layout.json", "[" * 10**5), ("result.json", "[]")):
        (run / name).write_text(text)
    (run / "events.jsonl").write_text('{"time": 1, "step": 2, "kind": "end", "message": "x"}\n{"time": "x"}\n[]\n{"ti')
    at = f"/api/runs/{found(served, 'damaged')}"
    answer = served.json(at)
    assert [text.partition(" is damaged")[0] for text in answer["problems"]] == ["layout.json", "result.json"]
    assert answer["config"]
    assert served.json(f"{at}/events")["events"] == [{"time": 1.0, "step": 2, "kind": "end", "message": "x"}]
    assert served.json(f"{at}/series?columns=train/loss")["series"]["train/loss"]["rows"] == 10
    (run / "layout.json").write_text(json.dumps(LAYOUT | {"stages": 4}))
    answer = served.json(at)
    assert answer["layout"] is None
    assert "layout.json is damaged (it describes no layout)." in answer["problems"]
    (run / "config.json").write_text("{")
    (run / "starts" / "000001.json").write_text("{")
    until(lambda: served.rows()["damaged"], lambda each: each["state"] == "damaged")
    assert "starts/000001.json cannot be read" in " ".join(served.json(at)["problems"])


def test_what_json_does_not_have_breaks_no_answer(served, runs):
    """NaN, an infinity, half of a surrogate pair, a name in another encoding, numbers of 400 digits, endless nesting."""
    run = write_run(Path(os.fsdecode(os.fsencode(runs) + b"/caf\xe9")), [row(1), row(2, grad_norm=10**400)])
    (run / "result.json").write_text('{"a": NaN, "b": [1e999], "c": "\\ud800"}')
    (run / "events.jsonl").write_text(json.dumps({"time": 10**400, "step": 1, "kind": "end", "message": "x"}) + "\n")
    deep = write_run(runs / "deep")
    (deep / "layout.json").write_text('{"a":' * 700 + "1" + "}" * 700)
    at = f"/api/runs/{found(served, 'deep')}"
    assert served.get(at).status in (200, 422)
    at = f"/api/runs/{next(each['id'] for name, each in served.rows().items() if name.startswith('caf'))}"
    assert served.json(at)["result"] == {"a": None, "b": [None], "c": "\ud800"}
    assert served.json(f"{at}/events")["events"] == []
    assert served.json(f"{at}/series?columns=train/loss,train/grad_norm")["missing"] == ["train/grad_norm"]
    assert served.get(f"{at}/logs").status == 200


def test_runs_are_compared_and_those_of_other_seeds_averaged(served, runs):
    for name, seed, rate, factor in (("a", 0, 0.1, 1.0), ("b", 1, 0.1, 3.0), ("c", 0, 0.2, 5.0)):
        rows = [row(step, "val", accuracy=factor * step) for step in (10, 20, 30)]
        write_run(runs / "compared" / name, rows, seed=seed, optim={"learning_rate": rate})
    a, b, c = (found(served, f"compared/{name}") for name in "abc")
    answer = served.json(f"/api/compare?runs={a},{b},{c}&column=val/accuracy")
    assert answer["differences"] == [{"key": "optim.learning_rate", "values": {a: 0.1, b: 0.1, c: 0.2}}]
    assert {each["id"]: each["series"]["y"] for each in answer["runs"]} == {
        a: [10, 20, 30], b: [30, 60, 90], c: [50, 100, 150]
    }  # fmt: skip
    (group,) = answer["groups"]
    assert (group["runs"], group["seeds"], group["settings"]) == ([a, b], [0, 1], {"optim.learning_rate": 0.1})
    assert (group["x"], group["mean"], group["count"]) == ([10, 20, 30], [20, 40, 60], [2, 2, 2])
    assert [high - mean for high, mean in zip(group["high"], group["mean"], strict=True)] == pytest.approx(
        [step * math.sqrt(2) for step in (10, 20, 30)]
    )
    missing = served.json(f"/api/compare?runs={a}&column=test/accuracy")
    assert (missing["runs"][0]["series"], missing["groups"], missing["differences"]) == (None, [], [])


# --------------------------------------------------------------------------------------------------------- logs, events


def test_logs_of_all_processes_are_paged_both_ways_searched_and_followed(served, runs):
    run = write_run(runs / "logged", code=None)

    def line(second: int, text: str, level: str = "INFO") -> str:
        return f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000Z {level} {text}\n"

    pad = 400 * "x"  # so that a file is read in several pieces
    with open(run / "logs" / "process_0.log", "w") as zero, open(run / "logs" / "process_1.log", "w") as one:
        for second in range(0, 600, 2):
            zero.write(line(second, f"zero {second} {pad}"))
            one.write(line(second + 1, f"one {second + 1} {pad}", "WARNING" if second == 100 else "INFO"))
        zero.write(line(700, "first line") + "    second <b> line\n")
    at = f"/api/runs/{found(served, 'logged')}/logs?limit=100"
    page = served.json(at)
    assert page["entries"][-1]["message"] == "first line\nsecond <b> line"
    assert page["processes"] == 2
    seconds, pages = [], [page]
    while page["older"]:
        page = served.json(f"{at}&before={page['older']}")
        pages.append(page)
    entries = [entry for each in reversed(pages) for entry in each["entries"]]
    seconds = [int(entry["message"].split()[1]) for entry in entries[:-1]]
    assert seconds == list(range(600)), "each once, in order"
    assert [entry["process"] for entry in entries[:4]] == [0, 1, 0, 1]
    assert all(entry["message"].endswith(f" {pad}") for entry in entries[:-1])
    warnings = served.json(f"{at}&level=WARNING")
    assert [entry["message"] for entry in warnings["entries"]] == [f"one 101 {pad}"]
    searched = served.json(f"{at}&query=ZERO%2030")["entries"]
    assert [int(entry["message"].split()[1]) for entry in searched] == [30, *range(300, 310, 2)]
    newer = pages[0]["newer"]
    assert served.json(f"{at}&since={newer}")["entries"] == []
    with open(run / "logs" / "process_1.log", "a") as one:
        one.write(line(800, "Traceback") + "      more")
    with open(run / "logs" / "process_2.log", "w") as two:
        two.write(line(750, "two begins"))
    page = served.json(f"{at}&since={newer}")
    assert [entry["message"] for entry in page["entries"]] == ["two begins", "Traceback"]
    with open(run / "logs" / "process_1.log", "a") as one:
        one.write(" of it\n")
    page = served.json(f"{at}&since={page['newer']}")
    assert [(entry["message"], entry["continues"]) for entry in page["entries"]] == [("  more of it", True)]
    (run / "logs" / "process_0.log").write_text(line(900, "anew"))
    assert served.json(f"{at}&since={page['newer']}")["reset"] is True


def test_events_come_by_cursor_and_an_older_run_has_those_of_its_starts(served, runs):
    run = write_run(runs / "events", code=0)
    at = f"/api/runs/{found(served, 'events')}/events"
    answer = served.json(at)
    assert (answer["recorded"], [each["kind"] for each in answer["events"]]) == (False, ["start", "end"])
    event = {"time": 5.0, "step": 3, "kind": "checkpoint", "message": "saved"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    answer = served.json(at)
    assert (answer["recorded"], answer["events"]) == (True, [event])
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(event | {"step": 4}) + "\n" + json.dumps(event | {"step": 5})[:20])
    answer = served.json(f"{at}?since={answer['cursor']}")
    assert ([each["step"] for each in answer["events"]], answer["reset"]) == ([4], False)
    (run / "events.jsonl").write_text("")
    assert served.json(f"{at}?since={answer['cursor']}")["reset"] is True


class Stream:
    """A stream of server-sent events."""

    def __init__(self, served: Served, path: str):
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
        self.connection.request("GET", path, headers={"Authorization": f"Bearer {served.token}"})
        self.response = self.connection.getresponse()

    def next(self, name: str) -> dict:
        """The data of the next event of that name."""
        named = ""
        while line := self.response.readline().decode().strip("\n") or "-":
            if line.startswith("event: "):
                named = line.removeprefix("event: ")
            elif line.startswith("data: ") and named == name:
                return json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream has ended")

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_a_stream_says_what_is_new(served, runs):
    run = write_run(runs / "streamed", code=None)
    identifier = found(served, "streamed")
    stream = Stream(served, f"/api/stream?run={identifier}")
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    stream.next("hello")
    append(run, [row(60, loss=0.125)])
    assert "metrics" in stream.next("changed")["what"]
    (run / "logs" / "process_0.log").write_text("2026-01-01T00:00:00.000Z INFO x\n")
    while "logs" not in stream.next("changed")["what"]:
        pass
    write_run(runs / "streamed too")
    news = stream.next("runs")
    while "streamed too" not in [each["name"] for each in news["rows"]]:
        news = stream.next("runs")
    shutil.rmtree(run)
    while identifier not in news["gone"]:
        news = stream.next("runs")
    stream.close()


def test_a_run_that_is_taken_away_is_gone_and_not_said_to_have_died(served, runs):
    kept = [write_run(runs / f"taken {number}", code=None) for number in range(4)]
    names = {found(served, run.name): run for run in kept}
    stream = Stream(served, "/api/stream")
    stream.next("hello")
    for run in kept:
        run.rename(run.with_name(f".{run.name}"))
        time.sleep(0.3)  # so that looks of all kinds come between
    gone: set[str] = set()
    while not names.keys() <= gone:
        news = stream.next("runs")
        gone.update(news["gone"])
        assert {each["state"] for each in news["rows"] if each["id"] in names} <= {"running"}
    stream.close()


def test_streams_are_few_and_end_with_their_clients(served):
    streams = []
    while (stream := Stream(served, "/api/stream")).response.status == 200:
        stream.next("hello")
        streams.append(stream)
        assert len(streams) <= 32
    assert (stream.response.status, len(streams)) == (503, 32)
    stream.close()
    for each in streams:
        each.close()
    until(lambda: (again := Stream(served, "/api/stream")).response.status == 200 and (again.close() or True))


# --------------------------------------------------------------------------------------------------------- the command


def test_it_ends_at_once_behind_a_prefix_and_with_a_stream_open(runs, tmp_path):
    runs.mkdir(exist_ok=True)
    with serving(runs, tmp_path / "state", "--prefix", "/jax", "--allow-host", "gpu.example") as served:
        assert f":{served.port}/jax/?token=" in served.address
        for path in ("/jax/api/runs", "/api/runs"):  # whether the proxy takes the prefix out or not
            assert served.get(path).status == 200
        assert served.get("/jaxx/api/runs").status == 404
        answer = served.get("/jax")
        assert (answer.status, answer.headers["location"]) == (308, "/jax/")
        assert "Path=/jax/;" in served.ask(f"/jax/?token={served.token}").headers["set-cookie"]
        assert served.ask("/api/runs", Host="gpu.example", Authorization=f"Bearer {served.token}").status == 200
        stream = Stream(served, "/jax/api/stream")
        stream.next("hello")
        began = time.monotonic()
        served.process.terminate()
        served.process.wait(PATIENCE)
        assert time.monotonic() - began < PATIENCE / 2
        stream.close()


def test_another_interface_only_with_a_warning(runs, tmp_path):
    runs.mkdir(exist_ok=True)
    with serving(runs, tmp_path / "state", "--host", "0.0.0.0") as served:
        assert "warning: --host 0.0.0.0 lets other machines in" in (tmp_path / "state.err").read_text()
        assert served.address.startswith(f"http://{socket.gethostname()}:{served.port}/?token=")
        assert served.ask("/api/runs", Host=socket.gethostname()).status == 401
        for host in ("evil.example", "192.0.2.1", "0.0.0.1"):  # of these the request did not come to any
            assert served.ask("/api/runs", Host=host).status == 400


def test_what_cannot_be_served_is_one_sentence(served, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_STATE_DIR", str(tmp_path))
    for arguments, code, said in (
        (
            ["--root", str(runs), "--port", str(served.port)],
            64,
            f"--port {served.port}: is taken on 127.0.0.1; choose another",
        ),
        (["--root", str(tmp_path / "none")], 73, "none is no directory; choose another --root."),
        (["--port", "70000"], 64, "--port 70000: must be from 0 to 65535"),
        (["--prefix", "jax"], 64, "--prefix jax: must be a path such as /jax"),
        (
            ["--root", str(tmp_path / "none"), "--allow-host", "gpu.example:80"],
            64,
            "--allow-host gpu.example:80: must be",
        ),
        (
            ["--root", str(runs), "--host", "no.such.host.invalid"],
            64,
            "--host no.such.host.invalid --port 3001: cannot be",
        ),
    ):
        assert main(["dashboard", *arguments]) == code, arguments
        said_now = capsys.readouterr().err
        assert said in said_now
        assert said_now.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["dashboard"]) == 64
    assert "pip install 'jaxtrain[dashboard]'" in capsys.readouterr().err


def test_ss_shows_the_loopback_interface_alone(served):
    """As an administrator would look."""
    if not shutil.which("ss"):
        pytest.skip("this machine has no ss")
    lines = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout.splitlines()
    own = [line.split()[3] for line in lines if line.split()[3].endswith(f":{served.port}")]
    assert own == [f"127.0.0.1:{served.port}"]


def test_a_directory_without_root_is_answered_with_how_to_name_it(tmp_path, capsys):
    assert main(["dashboard", str(tmp_path)]) == 64
    assert f"Did you mean --root {tmp_path}?" in capsys.readouterr().err

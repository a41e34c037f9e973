"""`jaxtrain report`: numbers are those of the runs' files, nothing from a file is mark-up, and a browser draws it all."""

from __future__ import annotations

import base64
import json
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import runs

from jaxtrain import report
from jaxtrain.cli import main
from jaxtrain.errors import WorkdirError
from jaxtrain.observability.goodput import goodput, read_starts

EVIL = "</script><script>alert(1)</script><!-- \u2028 & \"'"
PIXEL = base64.b64encode(b"\x89PNG\r\n").decode()
EVALUATION = {
    "examples": 30, "accuracy": 0.75, "top5": 1.0, "loss": 0.5, "confusion": [[5, 5, 0], [0, 10, 0], [1, 1, 8]],
    "classes": [{"class": name, "examples": 10, "accuracy": a} for name, a in ((EVIL, 0.5), ("sane", 1.0), ("both", 0.8))],
    "calibration": {"expected_calibration_error": 0.0625, "bins": []},
    "worst": [
        {"label": EVIL, "predicted": "sane", "loss": 2.5, "picture": f"data:image/png;base64,{PIXEL}"},
        {"label": "sane", "predicted": "sane", "loss": None, "picture": "https://example.org/x.png"},
    ],
}  # fmt: skip
LAYOUT = {
    "parameters": 12345, "devices": 4, "zero": 2, "microbatches": 2, "mesh": {"stage": 2, "data": 2}, "warnings": [EVIL],
    "bytes_per_device": {"params": 2048, "opt_state": 1024}, "stages": ["stage 0: layers_00", "stage 1: layers_01"],
    "bytes_by_stage": {"params": {"0": 512, "1": 1536}, "opt_state": {"0": 512, "1": 512}},
}  # fmt: skip
SCALING = {
    "title": "Scaling of mlp", "fits": ["serial share 0.125"], "bottleneck": "On 2 processes input takes 30 % of a step.",
    "advice": [EVIL], "tables": [
        {"kind": "measured", "caption": "strong scaling; real", "columns": ["process", "examples/s", "ideal examples/s"],
         "rows": [[1, 640.0, 640.0], [2, 1111.0, 1280.0]]},
        {"kind": "modelled", "caption": "strong scaling; formulas", "columns": ["GPUs", "fits"], "rows": [[8, None]]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two seeds of two learning rates, really trained; one of them with everything that a run may hold, another killed."""
    root = tmp_path_factory.mktemp("report")
    for rate in (0.1, 0.2):
        for seed in (0, 1):
            runs.here(root / f"runs/{rate}-{seed}", runs.SMALL, optim__learning_rate=rate, seed=seed)
    first = root / "runs/0.1-0"
    (first / "evaluation").mkdir()
    (first / "evaluation/test.json").write_text(json.dumps(EVALUATION))
    (first / "layout.json").write_text(json.dumps(LAYOUT))
    (first / "schedule.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>x</script></svg>"
    )
    evil = shutil.copytree(root / "runs/0.2-1", root / "runs" / EVIL.replace("/", "\\"))
    (evil / "starts/000001.json").write_text(
        (evil / "starts/000001.json").read_text().replace("is complete", f"{'<b>'}")
    )
    (evil / "result.json").write_text("[1, 2")
    (evil / "manifest.json").write_text('{"starts": [{"git": 3, "devices": {"kinds": 5}}]}')
    (evil / "layout.json").write_text('{"mesh": {}}')
    (root / "study").mkdir()
    (root / "study/scaling.json").write_text(json.dumps(SCALING))
    return root


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    """`report.json`."""
    found = report([folder / "runs", folder / "study"], folder / "out", title=f"Title {EVIL}")
    assert found.html == folder / "out/report.html"
    return json.loads((folder / "out/report.json").read_text())


def table(made: dict[str, Any], section: str, caption: str) -> list[dict[str, str]]:
    """The rows of a table by their columns."""
    blocks = next(each["blocks"] for each in made["sections"] if each["title"] == section)
    found = next(each for each in blocks if each["kind"] == "table" and caption in each["caption"])
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def row(rows: list[dict[str, str]], run: str) -> dict[str, str]:
    return next(each for each in rows if each["run"] == run)


def result(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / run / "result.json").read_text())


def test_numbers_are_those_of_the_files(folder, made):
    for name in ("0.1-0", "0.1-1", "0.2-0", "0.2-1"):
        found, wanted = row(table(made, "Summary", "Runs"), name), result(folder, name)
        assert found["val/accuracy"] == f"{wanted['best']['validation']['accuracy']:.4f}"
        assert found["test/accuracy"] == f"{wanted['best']['test']['accuracy']:.4f}"
        spent = goodput(read_starts(folder / "runs" / name / "starts"))
        times = row(table(made, "Time and bottleneck", "Seconds"), name)
        assert (times["steps that count"], times["all"]) == (f"{spent.seconds['training']:.2f}", f"{spent.wall:.2f}")
        assert times["goodput"] == f"{spent.share:.4f}"
    accuracies = [result(folder, f"0.1-{seed}")["best"]["validation"]["accuracy"] for seed in (0, 1)]
    wanted = f"{statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}"
    results = table(made, "Comparison", "Results")
    assert next(each for each in results if each["learning_rate"] == "0.1")["val/accuracy"] == wanted


def test_curves_are_the_rows(folder, made):
    plots = next(each["blocks"] for each in made["sections"] if each["title"] == "Curves")
    plot = next(each for each in plots if each["kind"] == "plot" and each["title"] == "Training: loss")
    losses = {seed: [each["loss"] for each in runs.rows(folder / f"runs/0.1-{seed}")] for seed in (0, 1)}
    curve = next(each for each in plot["curves"] if each["label"] == "0.1-1")
    assert (curve["x"], curve["y"]) == ([float(step) for step in range(1, 13)], losses[1])
    mean = next(each for each in plot["together"] if each["label"] == "learning_rate=0.1 (2 seeds)")
    assert mean["y"] == pytest.approx([(a + b) / 2 for a, b in zip(*losses.values(), strict=True)], rel=1e-12)
    assert (mean["low"], mean["high"]) == (
        list(map(min, *losses.values())),
        list(map(max, *losses.values())),
    )


def test_layout_scaling_classes_and_environment(folder, made):
    layout = next(each for each in table(made, "Layout", "Layouts") if each["runs"] == "0.1-0")
    assert (layout["mesh"], layout["ZeRO"], layout["params, a device"]) == ("stage 2 x data 2", "2", "2.0 KiB")
    assert [each["params"] for each in table(made, "Layout", "each stage")] == ["512 B", "1.5 KiB"]
    assert table(made, "Scaling", "measured: strong scaling")[1]["examples/s"] == "1,111"
    assert table(made, "Scaling", "modelled")[0] == {"GPUs": "8", "fits": "-"}
    assert SCALING["bottleneck"] in made["summary"]
    assert [each["accuracy"] for each in table(made, "Classes", "worst classes")] == ["0.5000", "0.8000", "1.0000"]
    assert any("0.5000 of 10 examples" in text for text in made["summary"])
    assert "optim.learning_rate" in {each["setting"] for each in table(made, "Environment", "not the defaults")}
    versions = runs.starts(folder / "runs/0.1-0")[0]["versions"]
    environment = json.dumps(next(each for each in made["sections"] if each["title"] == "Environment"))
    assert versions["jax"] in environment


def test_damaged_files_are_named_and_left_out(folder, made):
    evil = EVIL.replace("/", "\\").replace("\u2028", "\\u2028")
    found = row(table(made, "Summary", "Runs"), evil)
    assert "result.json is damaged" in found["what is wrong"]
    texts = json.dumps([each for each in made["sections"] if each["title"] == "Summary"])
    assert "layout.json is damaged" in texts
    assert "manifest.json is damaged" in texts


class _Page(HTMLParser):
    """Counts elements, and keeps the addresses in them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "style")]


def test_nothing_from_a_file_is_mark_up_and_nothing_is_fetched(folder, made):
    text = (folder / "out/report.html").read_text()
    page = _Page(text)
    assert page.tags.count("script") == 3  # the theme, the numbers, the program
    assert "b" not in page.tags
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses), page.addresses
    assert sum(address.startswith("data:") for address in page.addresses) == 2  # not that of a host elsewhere
    assert "alert(1)</script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    markdown = (folder / "out/report.md").read_text()
    assert "<script" not in markdown
    assert "## Comparison" in markdown


def test_one_run_has_its_phases_in_one_plot(folder, tmp_path):
    made = report(folder / "runs/0.1-0", tmp_path)
    curves = next(section for section in made.to_json()["sections"] if section["title"] == "Curves")
    plot = next(block for block in curves["blocks"] if block["kind"] == "plot")
    assert [curve["label"] for curve in plot["curves"]] == ["training", "validation"]
    assert "12 steps" in made.summary[0]


def test_the_commands_write_the_three_files(folder, tmp_path, capsys):
    assert main(["report", str(folder / "runs/0.2-*"), "--output", str(tmp_path / "a/b")]) == 0
    assert "that differ in nothing but the seed" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"report.html", "report.md", "report.json"}
    assert main(["report", str(folder / "study"), "--output", str(tmp_path / "study")]) == 0
    assert SCALING["bottleneck"] in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 73
    command = [sys.executable, "benchmarks/analyze.py", "--input", folder / "runs", "--output", tmp_path / "c"]
    subprocess.run(command, cwd=runs.ROOT, check=True, capture_output=True, timeout=runs.SECONDS)
    assert (tmp_path / "c/report.html").is_file()


def test_a_browser_draws_every_plot_and_asks_for_nothing(folder, made):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("there is no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `test`")
    said, asked = [], []
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "out/report.html").as_uri())
        page.get_by_label("log scale").check()
        page.get_by_label("seeds as mean and range").uncheck()
        ink = page.evaluate(
            """() => [...document.querySelectorAll("[data-plot]")].map((plot) => {
              const canvas = plot.querySelector("canvas");
              const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
              return new Set(new Uint32Array(pixels.buffer)).size;
            })"""
        )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.get_by_role("cell", name="<script>").count()
        assert page.get_by_text("learning_rate=0.1 (2 seeds)").count() == 0
        chromium.close()
    plots = [block for section in made["sections"] for block in section["blocks"] if block["kind"] == "plot"]
    assert len(ink) == len(plots) > 5
    assert min(ink) > 20, ink  # colours, with those of the smoothed edges of lines and letters
    assert said == []
    assert [url for url in asked if not re.match("file:|data:", url)] == []


def test_a_report_of_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for names, said in (([], "No run was named"), ("", "'' is no run")):  # and not the current directory
        with pytest.raises(WorkdirError, match=said):
            report(names, tmp_path / "out")
    assert not (tmp_path / "out").exists()

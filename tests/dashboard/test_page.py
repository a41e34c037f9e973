"""The dashboard's page in a real browser: its figures are the files', it keeps up, and it can be used by everybody."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards import PATIENCE, Served, append, row, serving, until, write_run
from runs import SMALL, here

from jaxtrain.host.files import read_json

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed here")

expect = sync_api.expect
MARKUP = "<script>alert(1)</script>"
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
    )
).decode()


@dataclasses.dataclass
class Open:
    """The page in a browser, on runs that tests may change."""

    page: Any
    served: Served
    root: Path
    complaints: list[str] = dataclasses.field(default_factory=list)
    """Errors of the console, of scripts, and requests that left the host."""

    def go(self, view: str) -> None:
        """Opens a view by its link, as in a new tab."""
        self.page.goto("about:blank")
        self.page.goto(f"http://127.0.0.1:{self.served.port}/{view}")

    def identifier(self, name: str) -> str:
        return until(lambda: self.served.rows().get(name))["id"]

    def run(self, name: str, tab: str = "curves", **more: Any) -> None:
        """Opens a run."""
        parameters = "".join(f"&{key}={value}" for key, value in more.items())
        self.go(f"#/run/{self.identifier(name)}?tab={tab}{parameters}")

    def plot(self, title: str) -> Any:
        return self.page.locator(f'[data-plot="{title}"]')

    def values(self, title: str) -> str:
        """What a plot says for screen readers: the last values of its curves."""
        return self.plot(title).locator(".chart-canvas").get_attribute("aria-label")

    def overflows(self) -> list[str]:
        """What sticks out to the right of the window."""
        return self.page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('body *')]"
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => `${e.tagName} ${e.className}`)"
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two live runs, a dead one, one that ended in an error, a real one with four stages, and one full of markup."""
    root = tmp_path_factory.mktemp("page") / "runs"
    rows = [
        row(step, accuracy=step / 100, grad_norm=1.0 / (1 + step), throughput=500.0 + step) for step in range(0, 50, 5)
    ]
    rows += [row(step, "val", accuracy=step / 200) for step in (20, 40)]
    rows.sort(key=lambda each: each["step"])
    write_run(root / "live-a", rows, code=None)
    write_run(root / "live-b", rows[:4], code=None, seed=1)
    write_run(root / "failed", rows[:6], code=76)
    dead = write_run(root / "dead", rows[:6])
    start = dead / "starts" / "000001.json"
    start.write_text(json.dumps(read_json(start) | {"end": None}))
    here(
        root / "pipeline",
        SMALL | {"train.epochs": 1, "model.depths": "(4,)", "layout.stages": 4, "layout.microbatches": 4},
        devices=4,
    )
    _write_markup(root)
    return root


def _write_markup(root: Path) -> None:
    """A run in which every text from outside is markup."""
    path = write_run(root / "mark <b>up<", [row(5)], code=1, model={"name": MARKUP})
    start = path / "starts" / "000001.json"
    times = read_json(start)
    start.write_text(json.dumps(times | {"end": times["end"] | {"message": f"Refused: {MARKUP}"}}))
    (path / "logs" / "process_0.log").write_text(f"2026-01-01T00:00:00.000Z ERROR {MARKUP}\n")
    event = {"time": 1000.0, "step": 5, "kind": "anomaly", "message": MARKUP}
    (path / "events.jsonl").write_text(json.dumps(event) + "\n")
    worst = {"index": 0, "file": "", "label": MARKUP, "predicted": "b", "confidence": 0.9, "loss": 3.0}
    report = {
        "examples": 4, "accuracy": 0.5, "top5": None, "loss": 1.0, "confusion": [[1, 1], [1, 1]],
        "classes": [{"class": name, "examples": 2, "accuracy": 0.5} for name in (MARKUP, "b")],
        "calibration": {"expected_calibration_error": 0.25, "bins": []},
        "worst": [worst | {"picture": f"data:image/png;base64,{PIXEL}"}],
    }  # fmt: skip
    (path / "evaluation").mkdir()
    (path / "evaluation" / "test.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(root) -> Iterator[Served]:
    with serving(root, root.parent / "state") as served:
        yield served


@pytest.fixture
def visit(browser, served, root) -> Iterator[Callable[..., Open]]:
    """Opens the page in a browser that knows nothing yet. At the end nothing may have gone wrong in it."""
    opened: list[Open] = []

    def visit(**options: Any) -> Open:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        one = Open(context.new_page(), served, root)
        one.page.set_default_timeout(PATIENCE * 1000)
        one.page.on("console", lambda said: said.type in ("error", "warning") and one.complaints.append(said.text))
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        one.page.on("dialog", lambda dialog: one.complaints.append(dialog.message))
        one.page.on("request", lambda request: _local(request.url, served.port) or one.complaints.append(request.url))
        opened.append(one)
        one.page.goto(served.address)
        one.page.wait_for_selector(".runs tbody tr")
        return one

    yield visit
    for one in opened:
        one.page.context.close()
        assert one.complaints == []


def _local(url: str, port: int) -> bool:
    return url.startswith((f"http://127.0.0.1:{port}/", "data:image/png;base64,", "about:"))


def shown(value: float, digits: int = 4) -> str:
    """A number as the page writes it: so many significant digits, without zeros at the end."""
    if value == 0:
        return "0"
    text = f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def rows_of(path: Path, phase: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["phase"] == phase]


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_overview_has_the_figures_of_the_files(visit, root):
    one = visit()
    states = {"live-a": "running", "failed": "failed", "dead": "died", "pipeline": "done"}
    for name, state in states.items():
        line = one.page.locator(".runs tbody tr", has=one.page.get_by_role("link", name=name, exact=True))
        last = rows_of(root / name, "train")[-1]
        expect(line.locator(".state")).to_have_text(state)
        expect(line.locator('[data-label="Loss"]')).to_have_text(shown(last["loss"]))
        expect(line.locator('[data-label="Accuracy"]')).to_have_text(f"{shown(100 * last['accuracy'])} %")
        if validation := rows_of(root / name, "val"):
            expect(line.locator('[data-label="Validation"]')).to_have_text(
                f"{shown(100 * validation[-1]['accuracy'])} %"
            )
    failed = one.page.locator(".row-failed", has_text="As it ended.")
    expect(failed.locator(".cell-progress")).to_contain_text("50 of 100")
    expect(failed.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "50")


def test_the_curves_have_the_figures_of_the_file(visit, root):
    one = visit()
    one.run("pipeline")
    training, validation = (rows_of(root / "pipeline", phase) for phase in ("train", "val"))
    expect(one.plot("Loss")).to_be_visible()
    assert f"training {shown(training[-1]['loss'])}" in one.values("Loss")
    assert f"validation {shown(validation[-1]['loss'])}" in one.values("Loss")
    assert f"training {shown(training[-1]['grad_norm'])}" in one.values("Gradient norm")
    titles = one.page.locator(".chart-title").all_inner_texts()
    assert titles[:3] == ["Loss", "Accuracy", "Top-5 accuracy"]
    assert not {"step", "epoch", "time"} & set(titles)
    canvas = one.plot("Gradient norm").locator(".chart-canvas")
    canvas.focus()
    for _ in range(60):  # to the first row
        one.page.keyboard.press("ArrowLeft")
    expect(canvas).to_have_attribute(
        "aria-label", re.compile(re.escape(f"step {training[0]['step']}: training {shown(training[0]['grad_norm'])}"))
    )


def test_four_stages_are_drawn(visit):
    one = visit()
    one.run("pipeline", "layout")
    expect(one.page.locator(".device")).to_have_count(4)
    expect(one.page.get_by_text("Stage 3").first).to_be_visible()
    picture = one.page.locator(".picture img")
    expect(picture).to_be_visible()
    until(lambda: picture.evaluate("image => image.naturalWidth"))


def test_every_side_of_a_run_is_there(visit, root):
    one = visit()
    one.run("pipeline", "time")
    start = read_json(root / "pipeline" / "starts" / "000001.json")
    expect(one.page.get_by_text("The run is complete.")).to_be_visible()
    assert f"0 \u2013 {start['step']}" in one.page.locator("#panel").inner_text()
    one.page.get_by_role("tab", name="Config").click()
    one.page.get_by_label("Search settings").fill("layout.stages")
    expect(one.page.locator("#panel table").first).to_contain_text("4")
    one.page.get_by_role("tab", name="Commands").click()
    expect(one.page.locator(".command").first).to_contain_text("jaxtrain resume")
    one.page.get_by_role("tab", name="Evaluation").click()
    expect(one.page.get_by_text("not evaluated in detail yet")).to_be_visible()
    one.page.get_by_role("tab", name="Logs").click()
    expect(one.page.locator(".log li").first).to_be_visible()
    one.page.get_by_label("Search the logs").fill("no line has this")
    expect(one.page.get_by_text("No line is like that here.")).to_be_visible()


def test_a_number_that_is_none_is_not_hidden_behind_an_older_one(visit, root):
    """And what curves are drawn over is no curve."""
    write_run(root / "diverged", [row(5, loss=0.25), row(10, loss=None)])
    one = visit()
    one.run("diverged")
    expect(one.plot("Loss").locator(".chart-canvas")).to_have_attribute(
        "aria-label", re.compile("step 10: training \u2013")
    )
    assert one.page.locator("[data-plot]").evaluate_all("plots => plots.map(plot => plot.dataset.plot)") == ["Loss"]


def test_files_of_another_shape_are_named_as_damaged(visit, root):
    path = write_run(root / "odd")
    event = {"time": 1e99, "step": 5, "kind": "anomaly", "message": "of no time"}
    (path / "events.jsonl").write_text(json.dumps(event) + "\n")
    (path / "evaluation").mkdir()
    (path / "evaluation" / "test.json").write_text("[]")
    one = visit()
    one.run("odd")
    expect(one.page.get_by_role("row").filter(has_text="of no time")).to_contain_text("\u2013")
    one.page.get_by_role("tab", name="Evaluation").click()
    expect(one.page.get_by_text("evaluation/test.json is damaged")).to_be_visible()


# -------------------------------------------------------------------------------------------------------------- alive


def test_what_is_new_comes_by_itself(visit, root):
    overview, run = visit(), visit()
    run.run("live-b")
    expect(run.plot("Loss")).to_be_visible()
    append(root / "live-b", [row(60, accuracy=0.875, loss=0.0625)])
    line = overview.page.locator(".runs tbody tr", has_text="live-b")
    expect(line.locator('[data-label="Loss"]')).to_have_text("0.0625", timeout=PATIENCE * 1000)
    expect(run.plot("Loss").locator(".chart-value").first).to_have_text("0.0625", timeout=PATIENCE * 1000)
    with open(root / "live-b" / "logs" / "process_0.log", "a") as file:
        file.write("2026-01-01T00:00:00.000Z INFO one\n")
    run.page.get_by_role("tab", name="Logs").click()
    expect(run.page.locator(".log li")).to_have_count(1)
    with open(root / "live-b" / "logs" / "process_0.log", "a") as file:
        file.write("2026-01-01T00:00:01.000Z WARNING two\n")
    expect(run.page.locator(".log .level-warning")).to_contain_text("two")


def test_a_run_that_is_cut_and_deleted_says_so_and_the_page_goes_on(visit, root):
    path = write_run(root / "vanishing", [row(step) for step in range(10)], code=None)
    one = visit()
    one.run("vanishing")
    expect(one.plot("Loss").locator(".chart-at")).to_have_text("step 9")
    (path / "metrics.jsonl").write_text(json.dumps(row(3, loss=0.5)) + "\n")
    expect(one.page.locator(".notice", has_text="was cut or written anew")).to_be_visible()
    expect(one.plot("Loss").locator(".chart-value").first).to_have_text("0.5")
    shutil.rmtree(path)
    expect(one.page.get_by_text("directory is gone")).to_be_visible()
    expect(one.plot("Loss")).to_be_visible()  # what was read stays
    one.page.get_by_role("link", name="All runs").first.click()
    expect(one.page.get_by_role("link", name="live-a")).to_be_visible()
    expect(one.page.get_by_role("link", name="vanishing")).to_have_count(0)
    one.complaints[:] = [
        each for each in one.complaints if "404" not in each
    ]  # the browser's word for a run that is gone


def test_without_a_token_it_says_where_one_is(browser, served):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{served.port}/")
    expect(page.locator("body")).to_contain_text("jaxtrain dashboard")
    page.goto(served.address)
    expect(page.locator(".runs tbody tr").first).to_be_visible()
    page.context.clear_cookies()
    page.get_by_role("link", name="live-a").click()
    expect(
        page.get_by_text("This browser has not shown the token.")
    ).to_be_visible()  # once, in words, not as an empty page
    page.close()


def test_a_server_that_is_gone_is_named(browser, root, tmp_path):
    (tmp_path / "runs").mkdir()
    page = browser.new_page()
    with serving(tmp_path / "runs", tmp_path / "state") as served:
        page.goto(served.address)
        expect(page.get_by_text("There is no run below")).to_be_visible()
        expect(page.locator("#connection")).to_have_text("live")
    expect(page.locator("#connection")).to_contain_text("stale since", timeout=PATIENCE * 1000)
    page.close()


# ------------------------------------------------------------------------------------------------------------- markup


@pytest.mark.parametrize("tab", ["curves", "logs", "config", "evaluation", "time"])
def test_markup_from_a_run_is_text(visit, tab):
    one = visit()
    expect(one.page.get_by_text(f"Refused: {MARKUP}")).to_be_visible()
    one.run("mark <b>up<", tab)
    expect(one.page.get_by_role("heading", name="mark <b>up<")).to_be_visible()
    expect(one.page.locator("#panel").get_by_text(MARKUP).first).to_be_visible()
    assert one.page.locator("script").count() == one.page.locator("head script").count()


# ------------------------------------------------------------------------------------------------------------- people


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone(visit, theme):
    one = visit(viewport={"width": 390, "height": 800}, color_scheme=theme)
    assert one.page.evaluate("document.documentElement.dataset.theme") == theme
    cells = one.page.get_by_role("row").filter(has_text="As it ended.").first.locator(".cell-devices, .cell-seen")
    assert len(set(cells.evaluate_all("all => all.map(each => each.getBoundingClientRect().top)"))) == 1, "on one line"
    assert one.overflows() == []
    for tab in ("curves", "machine", "time", "layout", "logs", "config", "commands"):
        one.run("pipeline", tab)
        expect(one.page.locator("#panel .card").first).to_be_visible()
        assert one.overflows() == [], tab
    one.run("mark <b>up<", "evaluation")
    expect(one.page.locator(".matrix")).to_be_visible()
    assert one.overflows() == []
    one.go(f"#/compare?runs={one.identifier('live-a')},{one.identifier('live-b')}")
    expect(one.plot("Loss, training")).to_be_visible()
    assert one.overflows() == []


@pytest.mark.parametrize("width", [720, 1100, 1200, 1350])
def test_all_columns_fit_every_window(visit, width):
    one = visit(viewport={"width": width, "height": 800})
    assert one.overflows() == []
    one.run("pipeline")
    expect(one.plot("Loss")).to_be_visible()
    assert one.overflows() == []


def test_the_chosen_theme_is_kept(visit):
    one = visit(color_scheme="light")
    one.page.get_by_role("button", name="Dark colours").click()
    one.page.reload()
    expect(one.page.get_by_role("button", name="Light colours")).to_be_visible()
    assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(243, 245, 248)"


def test_by_keyboard_alone_from_the_overview_to_a_run_and_to_a_comparison(visit):
    one = visit()
    keys = one.page.keyboard
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"

    def tab_to(text: str) -> None:
        for _ in range(60):
            if text == one.page.evaluate(focused):
                return
            keys.press("Tab")
        pytest.fail(f"no way to {text} by the Tab key")

    keys.press("/")
    keys.type("live")
    expect(one.page.locator(".runs tbody tr")).to_have_count(2)
    tab_to("Choose live-a")
    keys.press("Space")
    tab_to("live-b")
    keys.press("Enter")
    expect(one.page.get_by_role("heading", name="live-b")).to_be_visible()
    tab_to("Curves")
    keys.press("ArrowRight")
    expect(one.page.get_by_role("tab", name="Devices and host")).to_have_attribute("aria-selected", "true")
    one.page.go_back()
    expect(one.page.get_by_role("checkbox", name="Choose live-a")).to_be_checked()
    tab_to("Choose live-b")
    keys.press("Space")
    tab_to("Compare")
    keys.press("Enter")
    expect(one.page.get_by_role("heading", name="2 runs compared")).to_be_visible()
    expect(one.page.get_by_role("region", name="Settings that differ")).to_contain_text("seed")


def test_a_link_holds_the_view(visit):
    one = visit()
    one.go(f"#/compare?runs={one.identifier('live-a')},{one.identifier('live-b')}")
    one.page.get_by_role("radio", name="examples").check(force=True)
    one.page.get_by_label("Log scale").check()
    one.page.get_by_role("slider").fill("0.5")
    expect(one.plot("Loss, training").locator(".chart-at")).to_contain_text("examples")
    link = one.page.url
    again = visit()
    again.page.goto("about:blank")
    again.page.goto(link)
    expect(again.page.get_by_role("radio", name="examples")).to_be_checked()
    expect(again.page.get_by_label("Log scale")).to_be_checked()
    expect(again.page.get_by_role("slider")).to_have_value("0.5")
    expect(again.plot("Loss, training").locator(".chart-at")).to_contain_text("examples")
    assert again.values("Loss, training") == one.values("Loss, training")


def test_a_range_is_chosen_with_the_mouse_and_left_with_a_double_click(visit):
    one = visit()
    one.run("live-a")
    plot = one.plot("Loss").locator(".u-over")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    one.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
    one.page.mouse.down()
    one.page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 40, steps=5)
    one.page.mouse.up()
    expect(one.page).to_have_url(re.compile("from=1"))
    expect(one.page.get_by_role("button", name="Whole range")).to_be_visible()
    one.page.reload()
    expect(one.page.get_by_role("button", name="Whole range")).to_be_visible()
    one.plot("Loss").locator(".u-over").dblclick()
    expect(one.page).not_to_have_url(re.compile("from="))
    expect(one.page.get_by_role("button", name="Whole range")).to_be_hidden()


def test_a_plot_is_saved_as_a_picture(visit, tmp_path):
    one = visit()
    one.run("live-a")
    with one.page.expect_download() as download:
        one.page.get_by_role("button", name="Save Loss as PNG").click()
    assert download.value.suggested_filename == "live-a-Loss.png"
    download.value.save_as(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

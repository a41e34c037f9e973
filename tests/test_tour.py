"""The tour of docs/: script and notebook are one text, and all that it claims holds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
SCRIPT, NOTEBOOK = ROOT / "docs" / "tour.py", ROOT / "docs" / "tour.ipynb"


def test_the_notebook_is_that_of_the_script():
    """If it is not: python docs/notebook.py."""
    written = json.loads(NOTEBOOK.read_text())["cells"]
    script = jupytext.reads(SCRIPT.read_text(), fmt="py:percent").cells
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in written] == [
        (cell.cell_type, cell.source) for cell in script
    ]


ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<>-])/[A-Za-z_]\w*/\w")


def shown_data(data):
    return {kind: value for kind, value in data.items() if kind != "image/png"}  # whose letters mean nothing


def test_the_notebook_has_been_run_and_can_be_shown():
    """Every code cell once, in order and without an error; with its pictures, and nothing of the machine that made it."""
    text = NOTEBOOK.read_text()
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        source, outputs = "".join(cell["source"]), cell["outputs"]
        assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
        kinds = [kind for output in outputs for kind in output.get("data", {})]
        assert kinds.count("image/png") == source.count("plt.show()")
        assert kinds.count("image/svg+xml") == source.count("SVG(svg(")
        shown = json.dumps([output["text"] if "text" in output else shown_data(output["data"]) for output in outputs])
        assert not ABSOLUTE_PATH.findall(shown + source)
        assert "Warning: " not in shown
    assert len(text) < 1_000_000


@pytest.mark.parity
def test_all_that_the_tour_claims_holds(tmp_path):
    """The script as a reader runs it, from another folder: an `assert` beside each claim. Its network needs no data set."""
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(SCRIPT)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("every claim on this page was computed\n")
    assert not list(tmp_path.iterdir())  # its runs are gone

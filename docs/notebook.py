"""Makes docs/tour.ipynb from docs/tour.py: runs every cell, and keeps its text, numbers and pictures. From the root:

    python docs/notebook.py

Needs the extra `notebook`. The script is the source (jupytext's percent format): change it, then run this.
`tests/test_tour.py` compares the cells of both, and runs the script.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent
SCRIPT, NOTEBOOK = DOCS / "tour.py", DOCS / "tour.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LARGEST = 1_000_000  # bytes of the notebook; a code host shows none that is much larger


def cells_of_script() -> nbformat.NotebookNode:
    """The script as a notebook without outputs, with the same text for the same script."""
    notebook = jupytext.reads(SCRIPT.read_text(), fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.NotebookNode()
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL)
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a new kernel, in the folder of the documents; raises where one fails."""
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()  # times of day
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL)


def problems(text: str) -> list[str]:
    """What must not be in a notebook that others read: names of this machine, warnings, too many bytes."""
    private = (str(DOCS.parent), str(Path.home()), tempfile.gettempdir(), socket.gethostname())
    found = [f"it names {name}" for name in private if re.search(rf"\b{re.escape(name.strip(os.sep))}\b", text)]
    found += ["a cell warns"] * ("Warning: " in text)
    return found + [f"it has {len(text):,} bytes, more than {LARGEST:,}"] * (len(text) > LARGEST)


def main() -> None:
    """Writes the notebook, unless something is wrong with it."""
    notebook = cells_of_script()
    execute(notebook)
    text = nbformat.writes(notebook) + "\n"
    if wrong := problems(text):
        raise SystemExit(f"{NOTEBOOK.name} was not written: {'; '.join(wrong)}.")
    NOTEBOOK.write_text(text)


if __name__ == "__main__":
    main()

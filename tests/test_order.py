"""The order in which the suite is run (conftest.py)."""

from pathlib import Path

import conftest


def test_the_order_names_files_that_are_there():
    here = Path(__file__).parent
    known = {path.stem for path in here.rglob("test_*.py")} | {path.name for path in here.iterdir() if path.is_dir()}
    assert set(conftest.DEAREST + conftest.FAULTS + conftest.WORDS) <= known

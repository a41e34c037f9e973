"""Analyzes what runs have measured: the report of `jaxtrain report`, under the options of the trainers that this one follows.

python benchmarks/analyze.py --input metrics/ --output reports/
"""

from __future__ import annotations

import argparse
import sys

from jaxtrain.cli import main


def parse() -> argparse.Namespace:
    """--input and --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="a directory with runs in it, or with a study of scaling")
    parser.add_argument("--output", required=True, help="where report.html, report.md and report.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    sys.exit(main(["report", options.input, "--output", options.output]))

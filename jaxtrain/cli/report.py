"""Write a report of runs: one page of HTML that fetches nothing, Markdown, and JSON.

Curves, where the time went and what limited it, which settings differ and which are best, scaling, layouts, classes, versions.
"""

import argparse

from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable
from jaxtrain.reporting.report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN ..., --output, --by, --title."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a work directory, a directory with runs in it, a pattern ('runs/lr*'), or what `jaxtrain scale --output` wrote",
    )
    parser.add_argument(
        "--output",
        default="reports",
        metavar="DIR",
        help="where report.html, report.md and report.json are written (default: reports)",
    )
    parser.add_argument("--by", default="", metavar="FIGURE", help="what decides, as in `jaxtrain compare`")
    parser.add_argument(
        "--title", default="", metavar="TEXT", help="of the report (default: the run's name, or how many they are)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the three files and prints the summary. Raises `JaxtrainError`."""
    require_local(arguments.output, f"--output {arguments.output}", ConfigError)
    made = report(arguments.runs, arguments.output, by=arguments.by, title=arguments.title)
    for text in made.summary:
        print(printable(text))
    print(printable(made.html))

"""Check this machine: what would break a run here, and how to fix it; --write stores the facts in machine.json."""

import argparse
import dataclasses
import json
from pathlib import Path

from jaxtrain.doctor.checks import Check, examine, write
from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.host.compile_cache import clear
from jaxtrain.host.files import writing
from jaxtrain.host.paths import compile_cache, is_address
from jaxtrain.host.text import printable
from jaxtrain.workdir import named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--write, --json, --workdir, --clear-cache."""
    parser.add_argument("--write", action="store_true", help="store the facts in DIR/machine.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--workdir", default=".", metavar="DIR", help="where runs will write; default: the current directory"
    )
    parser.add_argument(
        "--clear-cache", action="store_true", help="first delete all compiled programs of the compile cache"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the result of each check as it ends. Raises `EnvironmentMismatchError` naming the problems."""
    directory = named(arguments.workdir)
    if arguments.clear_cache:
        _clear_cache(quiet=arguments.json)
    found = examine(directory, (lambda check: None) if arguments.json else _show)
    problems = [check for check in found.checks if check.state == "problem"]
    if arguments.json:
        checks = [dataclasses.asdict(check) for check in found.checks]
        print(json.dumps({"ok": not problems, "checks": checks, "machine": found.machine.facts()}, indent=2))
    if arguments.write:
        path = write(found.machine, directory)
        if not arguments.json:
            print(printable(path))
    if problems:
        why = "; ".join(f"{check.name}: {check.found}" for check in problems)
        raise EnvironmentMismatchError(f"{len(problems)} of {len(found.checks)} checks found a problem ({why}).")


def _clear_cache(*, quiet: bool) -> None:
    cache = compile_cache()
    if is_address(cache):
        raise ConfigError(f"--clear-cache: {cache} is on another machine; delete it there.")
    with writing(Path(cache)):
        count = clear(Path(cache))
    if not quiet:
        print(printable(f"deleted {count} programs from {cache}"))


def _show(check: Check) -> None:
    print(printable(f"{check.state:9}{check.name}: {check.found}"), flush=True)
    if check.fix:
        print(printable(f"{'':9}fix: {check.fix}"), flush=True)

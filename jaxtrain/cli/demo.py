"""Check in a minute that this machine can train: a short run on synthetic images on all devices, and four checks."""

import argparse
import dataclasses
import json

from jaxtrain.cli import start
from jaxtrain.errors import JaxtrainError
from jaxtrain.host.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, devices."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the result of each check as it ends. Raises `JaxtrainError` naming the checks that failed."""
    start.check_devices(arguments)
    progress = start.progress()
    with progress.activity("starting the devices"):
        start.start_devices(arguments)
        from jaxtrain.doctor.demo import Check, run_demo  # noqa: PLC0415  wrong arguments are refused before that

    def show(check: Check) -> None:
        print(printable(f"{'ok' if check.passed else 'FAILED':8}{check.name}: {check.found}"), flush=True)

    checks = run_demo(arguments.devices, (lambda check: None) if arguments.json else show, progress)
    failed = [check for check in checks if not check.passed]
    if arguments.json:
        print(json.dumps({"passed": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    if failed:
        why = "; ".join(f"{check.name!r}, {check.found}" for check in failed)
        raise JaxtrainError(f"{len(failed)} of the demo's {len(checks)} checks failed: {why}.")

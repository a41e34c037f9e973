"""Two processes whose link is throttled: the step of a real run by the link's rate, for several ways to send gradients.

    python -m benchmarks.cpu.slow_link [--ways WAY ...] [--rates MBIT ...] [--record]      # as root, about 15 minutes

A way is fields of the config, such as `optim.compress=int8` or `layout.reduce=tree,optim.ema=0.9`. With --record its rows go
into benchmarks/results/slow_link.json, in place of those that this way had there; the table and the crossovers are printed
from all rows of the file.

Each process is in a network namespace of its own (`ip netns`); a veth pair joins them, and `tc tbf` limits both directions. So
it needs root. Within one run the rate is changed again and again, and the runs of the ways take turns, so that all see the same
noise. The first row after a change is left out. The bytes are those that the interface counted, with TCP's and IP's headers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread, machine

WAYS = ("layout.reduce=auto", "layout.reduce=ring", "optim.compress=bf16", "optim.compress=int8")
RATES = (0, 1000, 100, 10)  # Mbit/s; 0 is no limit
BATCH, BLOCK = 16, 4  # examples of both processes; steps of a row of the metrics
RUN: dict[str, Any] = {
    "data.name": "synthetic",
    "data.examples": 2048,
    "data.image_size": 32,
    "data.global_batch": BATCH,
    "model.name": "resnet18",
    "model.width": 16,
    "model.bn_groups": 2,  # each process has its own statistics, so that gradients alone are sent
    "optim.schedule": "constant",
    "train.steps": 1_000_000,  # it is stopped
    "train.precision": "f32",
    "train.log_every": BLOCK,
    "train.eval_every": 0,
    "checkpoint.every": 0,
}
ROUNDS, CYCLES, LEFT_OUT, KEPT = (
    2,
    2,
    1,
    2,
)  # runs of each way; through the rates in a run; rows after a change of the rate
RESULTS = ROOT / "benchmarks" / "results" / "slow_link.json"
_ADDRESSES, _PORT, _INTERFACE = ("10.77.0.1", "10.77.0.2"), 61440, "veth0"


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was seen of `BLOCK` steps: seconds, and the bytes that one process sent, of a step."""

    seconds: float
    sent: float


def main() -> None:
    """Parses the arguments, measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=WAYS, metavar="WAY", help="KEY=VALUE[,KEY=VALUE...]")
    parser.add_argument("--rates", nargs="+", type=int, default=RATES, metavar="MBIT", help="a second; 0: no limit")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each way")
    parser.add_argument("--record", action="store_true", help="write the result file")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of the file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces are deleted all the same
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if not arguments.table:
        rows = measure(arguments.ways, arguments.rates, arguments.rounds)
        kept = [row for row in results["rows"] if row["way"] not in arguments.ways]
        command = " ".join(["python -m benchmarks.cpu.slow_link", *sys.argv[1:]])
        results = {"machine": machine() | {"command": command}, "run": RUN, "rows": kept + rows}
        if arguments.record:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["rows"]))
    for line in crossovers(results["rows"]):
        print(line)


def measure(ways: Sequence[str], rates: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each way and rate: `seconds` of a step, and the bytes that a process `sent` in one."""
    found: dict[tuple[str, int], list[Sample]] = {(way, rate): [] for way in ways for rate in rates}
    for number, way in itertools.product(range(rounds), ways):
        print(f"round {number + 1} of {rounds}: {way}", file=sys.stderr, flush=True)
        for rate, sample in samples(way, rates):
            found[way, rate].append(sample)
    return [
        {
            "way": way,
            "mbit": rate,
            "seconds": dataclasses.asdict(Spread.of([each.seconds for each in seen])),
            "sent": statistics.median(each.sent for each in seen),
        }
        for (way, rate), seen in found.items()
    ]


def samples(way: str, rates: Sequence[int]) -> Iterator[tuple[int, Sample]]:
    """Of one run of a way: rates, and a sample of each row of the metrics that counts."""
    fields = RUN | dict(field.split("=", 1) for field in way.split(","))
    with throttled() as namespaces, Training(namespaces, fields) as run:
        seen = len(run.rows(2))  # the first rows have what is compiled
        for rate in [rate for _ in range(CYCLES) for rate in rates]:
            for namespace in namespaces:
                limit(namespace, rate)
            seen = len(run.rows(seen + LEFT_OUT))
            for _ in range(KEPT):
                before = sent_bytes(namespaces[0])
                rows = run.rows(seen + 1)
                step = statistics.fmean(BATCH / row["throughput"] for row in rows[seen:])
                yield rate, Sample(step, (sent_bytes(namespaces[0]) - before) / BLOCK / (len(rows) - seen))
                seen = len(rows)


# ------------------------------------------------------------------------------------------------------------- the link


@contextlib.contextmanager
def throttled() -> Iterator[tuple[str, str]]:
    """Two network namespaces that a veth pair joins, by name; gone at the end.

    gloo takes the interface that the host's name leads to. So each has a file of hosts where that is its own address
    (`ip netns exec` puts /etc/netns/NAME/hosts in place of /etc/hosts).
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        raise SystemExit("slow_link makes network namespaces: it needs root, and ip and tc (the package iproute2).")
    first, second = (f"jaxtrain-{os.getpid()}-{i}" for i in range(2))
    with contextlib.ExitStack() as stack:
        for name, address in zip((first, second), _ADDRESSES, strict=True):
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
            folder = Path("/etc/netns", name)
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {os.uname().nodename}\n")
        _run("ip", "link", "add", _INTERFACE, "netns", first, "type", "veth", "peer", _INTERFACE, "netns", second)
        for name, address in zip((first, second), _ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", _INTERFACE)
            for interface in ("lo", _INTERFACE):
                _run("ip", "-n", name, "link", "set", interface, "up")
        yield first, second


def limit(namespace: str, mbit: int) -> None:
    """Limits what leaves the namespace to so many Mbit/s; 0 is no limit.

    The limit before is deleted, with the packets that wait there: one that is larger than the new burst would wait for ever.
    """
    delete = ["tc", "-n", namespace, "qdisc", "delete", "dev", _INTERFACE, "root"]
    subprocess.run(delete, capture_output=True, check=False)  # there may be none
    if mbit:
        burst = max(32_000, mbit * 125)  # bytes, of a millisecond
        tbf = ("tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms")
        _run("tc", "-n", namespace, "qdisc", "add", "dev", _INTERFACE, "root", *tbf)


def sent_bytes(namespace: str) -> int:
    """What the namespace has sent so far."""
    found = subprocess.run(
        ["ip", "-n", namespace, "-s", "-j", "link", "show", _INTERFACE], capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout)[0]["stats64"]["tx"]["bytes"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


# -------------------------------------------------------------------------------------------------------------- the run


class Training:
    """`jaxtrain train` in both namespaces, each process on a core. Leaving the block kills it: nothing of the run is kept."""

    def __init__(self, namespaces: Sequence[str], fields: Mapping[str, Any]) -> None:
        """fields: of the config."""
        self._folder = tempfile.TemporaryDirectory()
        folder, cores = self._folder.name, sorted(os.sched_getaffinity(0))
        Path(folder, "fields.yaml").write_text("{}\n")
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        self._processes: list[subprocess.Popen[bytes]] = []
        for index, namespace in enumerate(namespaces):
            command = [
                "ip", "netns", "exec", namespace, "taskset", "-c", str(cores[index % len(cores)]),
                sys.executable, "-m", "jaxtrain", "train", "--yaml", f"{folder}/fields.yaml", *flags,
                "--workdir", f"{folder}/run", "--simulate-devices", "1", "--coordinator", f"{_ADDRESSES[0]}:{_PORT}",
                "--num-processes", "2", "--process-id", str(index),
            ]  # fmt: skip
            with open(f"{folder}/{index}.log", "w") as log:
                self._processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The rows of the metrics once there are so many or more. Raises `RuntimeError` where the run ended before."""
        metrics = Path(self._folder.name, "run", "metrics.jsonl")
        while all(process.poll() is None for process in self._processes):
            whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""  # a line may be half written
            if len(lines := whole.splitlines()) >= count:
                return [json.loads(line) for line in lines]
            time.sleep(0.01)
        raise RuntimeError(Path(self._folder.name, "0.log").read_text())


# -------------------------------------------------------------------------------------------------------------- results


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each way, and for each rate the step, measured and modelled (`modelled`)."""
    rates = sorted({row["mbit"] for row in rows}, key=lambda rate: (rate > 0, -rate))
    titles = [f"{rate} Mbit/s" if rate else "no limit" for rate in rates]
    lines = [f"| ms a step | KB sent | {' | '.join(titles)} |", "| -- " * (len(rates) + 2) + "|"]
    for way, found in _by_way(rows).items():
        cells = []
        for rate in rates:
            if rate not in found:
                cells.append("")
                continue
            measured = 1e3 * found[rate]["seconds"]["median"]
            model = f" ({1e3 * modelled(found, rate):.0f})" if rate and 0 in found else ""
            cells.append(f"{measured:.0f}{model}")
        sent = statistics.median(row["sent"] for row in found.values())
        lines.append(f"| `{way}` | {sent / 1e3:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def modelled(found: Mapping[int, Mapping[str, Any]], mbit: float) -> float:
    """Seconds of a step of a way by the model of `parallel.collective_cost`: the step without a limit, and bytes / bandwidth.

    The latency of the messages is in the step without a limit. found: rows by rate.
    """
    sent = statistics.median(row["sent"] for row in found.values())
    return found[0]["seconds"]["median"] + sent / (mbit * 1e6 / 8)


def crossovers(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For each way but the first a line: below which rate it is faster than the first, as measured and as modelled."""
    first, *others = _by_way(rows).items()
    base_way, base = first
    for way, found in others:
        common = sorted(rate for rate in base if rate and rate in found)
        faster = [rate for rate in common if found[rate]["seconds"]["median"] < base[rate]["seconds"]["median"]]
        line = f"{way} is faster than {base_way} at {', '.join(map(str, faster)) or 'none'} of {common} Mbit/s"
        if 0 in base and 0 in found:
            slower = modelled(found, 1e12) - modelled(base, 1e12)
            saved = 8e-6 * statistics.median(base[rate]["sent"] - found[rate]["sent"] for rate in common)  # Mbit
            below = f"below {saved / slower:,.0f} Mbit/s" if slower > 0 else "at any rate"
            line += f"; modelled: {below}" if saved > 0 else "; modelled: it sends no less"
        yield line


def _by_way(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["way"], {})[row["mbit"]] = row
    return found


if __name__ == "__main__":
    main()

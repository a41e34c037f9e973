"""Our training step against PyTorch's on one GPU: a few commands of minutes each, into one result file.

python -m benchmarks.gpu.suite probe                      # does everything work here? the machine's ceilings: a minute
python -m benchmarks.gpu.suite cnn224|swin224|cifar       # or one case, such as resnet50_224
python -m benchmarks.gpu.suite flags --case resnet18_32   # XLA's flags and variants of the step, each against the defaults
python -m benchmarks.gpu.suite merge FILE ...             # takes the sessions of other result files in
python -m benchmarks.gpu.suite table                      # benchmarks/README.md
python -m benchmarks.gpu.suite cifar --smoke --backend aot_eager      # the same path on a CPU, with tiny models

Each side is compiled twice, each time in a process of its own: alone and with empty caches, then again for the comparison,
when both are there and take turns. What fails is written down and passed over; what would begin too late is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import Child, ChildError
from benchmarks.gpu.parts import (
    CASES,
    FLAGS,
    GROUPS,
    OWN_GRAPH,
    PLAIN,
    RESULTS,
    ROOT,
    VARIANTS,
    Budget,
    Case,
    Row,
    Session,
    merge,
    rates,
    read_results,
    spread,
    steps_for,
    write_results,
    write_table,
)

INSIDE = (
    "a uint8 batch on the device; pad-crop, flip, normalise; forward, backward, loss and correct answers, optimizer. "
    "Ours also: norms of gradients, weights and update, and no update that is not finite."
)
BLOCK_SECONDS, TURNS = 1.5, 7
PROFILED_STEPS = 5
# Shares of the device's memory: each side's while both are there, and of one that is alone.
TOGETHER, ALONE = 0.45, 0.9
# How a case is tried: the share of the memory, and of the batch. The next way is taken when memory runs out.
WAYS = ((TOGETHER, 1), (ALONE, 1), (TOGETHER, 2))
# A case is given up when less than this is left, and a further candidate or variant is begun only if it can be paid for.
LEAST_SECONDS = 45.0


@dataclasses.dataclass(frozen=True)
class Suite:
    """What the commands share. scratch: logs and compile caches."""

    session: Session
    budget: Budget
    scratch: Path
    smoke: bool
    ceiling: float | None
    backend: str
    began: float = dataclasses.field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """A line of progress."""
        passed, left = time.monotonic() - self.began, self.budget.left
        print(f"{time.strftime('%H:%M:%S')} +{passed:4.0f} s, {left:4.0f} s left  {text}", flush=True)

    def ours(self, cache: str, fraction: float, flags: str = "") -> Child:
        """A process with jaxtrain's step. cache: the compile cache's name; flags: of XLA."""
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / f"xla-{cache}"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(fraction),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
            "JAX_PLATFORMS": "cpu" if self.smoke else "cuda",
        }
        return Child("ours", self.scratch / f"ours-{cache}.log", environment)

    def peer(self, cache: str) -> Child:
        """A process with PyTorch's."""
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / f"inductor-{cache}"),
            "TRITON_CACHE_DIR": str(self.scratch / f"triton-{cache}"),
            "GPU_SUITE_TORCH_DEVICE": "cpu" if self.smoke else "cuda",
            "HF_HUB_OFFLINE": "1",
        }
        return Child("peer", self.scratch / f"peer-{cache}.log", environment)


def main() -> None:
    """Parses the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["probe", *GROUPS, "flags", "merge", "table"])
    parser.add_argument("files", nargs="*", type=Path, help="merge: the result files to take in")
    parser.add_argument(
        "--case", choices=list(CASES), default="resnet18_32", help="flags: the case that they are tried on"
    )
    parser.add_argument("--only", default="", help="flags: a part of the names of those to try")
    parser.add_argument("--budget-seconds", type=float, default=520.0, help="nothing is begun that would end later")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, help="keep the processes' logs, as one file in this directory")
    parser.add_argument("--commit", default="", help="of the source, where there is no git")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with tiny models")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager needs no C++ compiler")
    arguments = parser.parse_args()
    if arguments.command in ("merge", "table"):
        sessions = merge(each for path in (arguments.results, *arguments.files) for each in read_results(path))
        if arguments.command == "merge":
            write_results(arguments.results, sessions)
        write_table(ROOT / "benchmarks" / "README.md", sessions)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
    began = time.monotonic()
    results = (
        Path(tempfile.gettempdir()) / "gpu-smoke.json"
        if arguments.smoke and arguments.results == RESULTS
        else arguments.results
    )
    with contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True))
        )
        if arguments.logs:
            arguments.logs.mkdir(parents=True, exist_ok=True)
            stack.callback(_keep_logs, scratch, arguments.logs)
        session = Session(results, machine(arguments.commit, arguments.smoke))
        ceiling = _known_ceiling(results, session)
        suite = Suite(
            session,
            Budget(arguments.budget_seconds, began),
            scratch,
            arguments.smoke,
            ceiling,
            arguments.backend,
            began,
        )
        if arguments.command == "probe":
            probe(suite)
        elif arguments.command == "flags":
            sweep(suite, arguments.case, arguments.only)
        else:
            names = GROUPS[arguments.command]
            for index, name in enumerate(names):
                share = suite.budget.share(len(names) - index)
                if share.left < LEAST_SECONDS:
                    session.leave_out(name, f"{share.left:.0f} s were left")
                    continue
                compare(dataclasses.replace(suite, budget=share), name)
        suite.say(f"results: {results}")


def _keep_logs(scratch: Path, logs: Path) -> None:
    """The end of each process's log, in one file: some machines give only a few files back."""
    with open(logs / "suite.log", "wb") as file:
        for path in sorted(scratch.glob("*.log")):
            file.write(f"\n==> {path.name}\n".encode() + path.read_bytes()[-1_000_000:])


# ------------------------------------------------------------------------------------------------------------- machine


def machine(commit: str, smoke: bool) -> Row:
    """Hardware, driver, versions, command, commit."""
    found = _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"])
    name, driver, memory, power = ([*found.split(", "), "", "", "", ""])[:4]
    return {
        "device": "CPU (self-check)" if smoke else name,
        "driver": driver,
        "memory": memory,
        "power_limit": power,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": sys.version.split()[0]},
        "commit": commit or _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "command": " ".join(["python -m benchmarks.gpu.suite", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _output(command: list[str]) -> str:
    """The first line that `command` prints, or '' where it cannot be run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return (found.strip().splitlines() or [""])[0]


def _known_ceiling(results: Path, session: Session) -> float | None:
    """FLOP/s of the matrix product, from an earlier `probe` on the same kind of device."""
    device = session.machine["device"]
    rows = [row for each in read_results(results) if each["machine"]["device"] == device for row in each["rows"]]
    found = [row["matrix_tflops"] for row in rows if row["kind"] == "ceiling" and "matrix_tflops" in row]
    return found[-1] * 1e12 if found else None


def probe(suite: Suite) -> None:
    """Starts both sides, and measures a large product and a large copy; a step of the smallest case on each."""
    row: Row = {"kind": "ceiling", "name": "8192 x 8192 x 8192 product in bf16; copy of 1 GiB in f32"}
    with suite.ours("probe", TOGETHER) as ours, suite.peer("probe") as peer:
        for name, side in (("ours", ours), ("peer", peer)):
            try:
                row[name] = side.ask("info", 120)
                suite.session.machine["versions"] |= row[name]["versions"]
                suite.say(f"{name}: {row[name]}")
            except ChildError as error:
                row[name] = {"error": str(error)}
                suite.say(f"{name}: {error}")
        try:
            row |= ours.ask("ceilings", suite.budget.left, size=256 if suite.smoke else 8192)
        except ChildError as error:
            row["error"] = str(error)
        suite.session.put(row)
        suite.say(f"ceilings: {row.get('error') or row}")
        quick: Row = {"kind": "probe", "name": "a step of resnet18_32"}
        builds: dict[str, Callable[[], Row]] = {
            "ours": lambda: _build_ours(suite, ours, "resnet18_32", CASES["resnet18_32"].batch),
            "peer": lambda: _build_peer(suite, peer, "resnet18_32", CASES["resnet18_32"].batch, "default", TOGETHER),
        }
        whole = suite
        for name, build in builds.items():
            side = ours if name == "ours" else peer
            # A side that hangs leaves the other's time.
            suite = dataclasses.replace(whole, budget=Budget(min(whole.budget.left, 150)))
            try:
                quick[name] = build()
                seconds = side.ask("block", suite.budget.left, steps=3, **({} if name == "ours" else {"bare": False}))[
                    "seconds"
                ]
                quick[name] |= {
                    "seconds_a_step": seconds,
                    "profile": side.ask("profile", 60, steps=3, step_seconds=seconds),
                }
                quick[name] |= side.ask("memory", 60)
            except ChildError as error:
                quick[name] = {"error": str(error)}
            suite.say(f"{name}: {quick[name]}")
            suite.session.put(quick)


# ----------------------------------------------------------------------------------------------------------- comparison


def _build_ours(suite: Suite, child: Child, name: str, batch: int, changes: Mapping[str, Any] | None = None) -> Row:
    return child.ask("build", suite.budget.left, case=name, batch=batch, smoke=suite.smoke, changes=dict(changes or {}))


def _build_peer(suite: Suite, child: Child, name: str, batch: int, candidate: str, fraction: float) -> Row:
    fields = {"case": name, "batch": batch, "smoke": suite.smoke, "candidate": candidate, "fraction": fraction}
    fields["backend"] = suite.backend
    return child.ask("build", suite.budget.left, **fields)


def compare(suite: Suite, name: str) -> None:
    """One case: in the first of `WAYS` for which the memory is enough."""
    case = CASES[name].shrunk() if suite.smoke else CASES[name]
    for fraction, divisor in WAYS:
        sized = dataclasses.replace(case, batch=case.batch // divisor)
        suite.say(f"{name}: batch {sized.batch}, {fraction:.0%} of the memory each")
        if not _Comparison(suite, name, sized, fraction).run():
            return
        suite.say(f"{name}: out of memory")


class _Comparison:
    """One try of a case. Its row is written as it grows."""

    def __init__(self, suite: Suite, name: str, case: Case, fraction: float):
        self.suite, self.name, self.case, self.fraction = suite, name, case, fraction
        self.out_of_memory = False
        self.row: Row = {
            "kind": "compare",
            "name": name,
            "batch": case.batch,
            "inside": INSIDE,
            "interleaved": fraction == TOGETHER,
            "memory_fraction": fraction,
            "ours": {},
            "peer": {"backend": suite.backend, "candidates": {}},
        }

    def run(self) -> bool:
        """Whether memory ran out."""
        with contextlib.ExitStack() as stack:
            # Both are started at once, since importing takes seconds, and used one after the other.
            ours = self._ours(stack)
            first = self._peer(stack, self.case.candidates[0])
            self._try("ours", lambda: self._alone(ours))
            ours.close()
            if self.out_of_memory:
                return True
            self._candidates(first, stack)
        if self.out_of_memory and not self._best():
            return True
        self.out_of_memory = False
        if self.fraction == TOGETHER:
            self._together()
        else:
            self._apart()
        return self.out_of_memory and self.fraction == TOGETHER and "ratio" not in self.row

    def _try(self, side: str, work: Callable[[], None]) -> None:
        try:
            work()
        except ChildError as error:
            self.out_of_memory |= error.out_of_memory
            self.row[side]["error"] = str(error)
            self.suite.say(f"{self.name}, {side}: {error}")
        self.suite.session.put(self.row)

    def _learn(self, child: Child, side: str) -> None:
        found = child.ask("info", 120)
        self.row[side]["device"] = found["device"]
        self.suite.session.machine["versions"] |= found["versions"]

    def _ours(self, stack: contextlib.ExitStack) -> Child:
        return stack.enter_context(self.suite.ours(self._cache, self.fraction))

    def _peer(self, stack: contextlib.ExitStack, candidate: str) -> Child:
        compiled = PLAIN if candidate == OWN_GRAPH else candidate  # a graph of what was compiled there
        return stack.enter_context(self.suite.peer(f"{self._cache}-{compiled}"))

    @property
    def _cache(self) -> str:
        return f"{self.name}-{self.case.batch}-{self.fraction}"

    def _alone(self, child: Child) -> None:
        """Our cold start."""
        self._learn(child, "ours")
        built = _build_ours(self.suite, child, self.name, self.case.batch)
        block = child.ask("block", self.suite.budget.left, steps=3)
        self.row["ours"] |= {"cold_seconds": built["seconds"], "parameters": built["parameters"]}
        self.row["ours"] |= {"alone_seconds": block["seconds"], "temporary_bytes": built["temporary_bytes"]}
        self.suite.say(f"{self.name}, ours: cold {built['seconds']:.1f} s, {1e3 * block['seconds']:.2f} ms a step")

    def _candidates(self, first: Child, stack: contextlib.ExitStack) -> None:
        """The peer's ways, as many as half of the budget pays for, each alone and with an empty cache.

        Its one graph of the whole step is of what `PLAIN` has compiled before, so that is its cold start.
        """
        budget, found = self.suite.budget, self.row["peer"]["candidates"]
        dearest = 0.0
        for index, candidate in enumerate(self.case.candidates[: 1 if self.suite.smoke else None]):
            began = budget.left
            price = dearest * (0.5 if candidate == OWN_GRAPH else 1.2)
            if index and began - price < 0.45 * budget.seconds:
                found[candidate] = {"left_out": f"{began:.0f} s were left"}
                continue
            child = first if index == 0 else self._peer(stack, candidate)
            found[candidate] = self._candidate(child, candidate)
            if candidate == OWN_GRAPH and "cold_seconds" in found[candidate] and "cold_seconds" in found[PLAIN]:
                found[candidate]["cold_seconds"] = found[PLAIN]["cold_seconds"]
            child.close()
            dearest = max(dearest, began - budget.left)
            self.suite.session.put(self.row)
        if best := self._best():
            self.row["peer"] |= {"best": best, "cold_seconds": found[best]["cold_seconds"]}

    def _candidate(self, child: Child, candidate: str) -> Row:
        try:
            self._learn(child, "peer")
            # What hangs here must leave time to measure ours.
            budget = Budget(self.suite.budget.left - 0.3 * self.suite.budget.seconds)
            suite = dataclasses.replace(self.suite, budget=budget)
            built = _build_peer(suite, child, self.name, self.case.batch, candidate, self.fraction)
            probed = child.ask("block", self.suite.budget.left, steps=3, bare=False)["seconds"]
            steps = steps_for(BLOCK_SECONDS / 2, probed)
            seconds = min(
                child.ask("block", self.suite.budget.left, steps=steps, bare=False)["seconds"] for _ in range(2)
            )
        except ChildError as error:
            self.out_of_memory |= error.out_of_memory
            self.suite.say(f"{self.name}, peer, {candidate}: {error}")
            return {"error": str(error)}
        self.row["peer"]["parameters"] = built["parameters"]
        self.suite.say(f"{self.name}, peer, {candidate}: cold {built['seconds']:.1f} s, {1e3 * seconds:.2f} ms a step")
        return {"cold_seconds": built["seconds"], "seconds": seconds}

    def _best(self) -> str:
        timed = {name: each for name, each in self.row["peer"]["candidates"].items() if "seconds" in each}
        return min(timed, key=lambda name: timed[name]["seconds"]) if timed else ""

    def _start_ours(self, stack: contextlib.ExitStack) -> Child:
        child = self._ours(stack)
        built = _build_ours(self.suite, child, self.name, self.case.batch)
        self.row["ours"] |= {"warm_seconds": built["seconds"], "cache_hits": built["cache_hits"]}
        return child

    def _start_peer(self, stack: contextlib.ExitStack) -> Child:
        child = self._peer(stack, self._best())
        built = _build_peer(self.suite, child, self.name, self.case.batch, self._best(), self.fraction)
        self.row["peer"] |= {"warm_seconds": built["seconds"]}
        return child

    def _together(self) -> None:
        """Both in turns."""
        with contextlib.ExitStack() as stack:
            sides: dict[str, Child] = {}
            for side, start in (("ours", self._start_ours), ("peer", self._start_peer)):
                if side == "ours" or self._best():
                    self._try(side, lambda side=side, start=start: sides.update({side: start(stack)}))
            if self.out_of_memory:
                return
            blocks: dict[str, list[float]] = {side: [] for side in (*sides, "bare")}
            steps = {side: self._steps(side) for side in sides} | {
                "bare": self._steps("peer") if "peer" in sides else 0
            }
            for turn in range(TURNS if not self.suite.smoke else 2):
                for side in [*sides, *(["bare"] if "peer" in sides and turn % 2 else [])]:
                    self._try(
                        side if side != "bare" else "peer", lambda side=side: self._block(sides, side, steps, blocks)
                    )
            self._conclude(blocks)
            for side, child in sides.items():
                self._try(side, lambda side=side, child=child: self._look(side, child))

    def _apart(self) -> None:
        """One after the other, where the memory does not hold both."""
        blocks: dict[str, list[float]] = {"ours": [], "peer": [], "bare": []}
        for side, start in (("ours", self._start_ours), ("peer", self._start_peer)):
            if side == "peer" and not self._best():
                continue

            def work(side: str = side, start: Callable[[contextlib.ExitStack], Child] = start) -> None:
                with contextlib.ExitStack() as stack:
                    child = start(stack)
                    for each in (side, *(["bare"] if side == "peer" else [])):
                        for _ in range(TURNS):
                            self._block({side: child}, each, {each: self._steps(side)}, blocks)
                    self._conclude(blocks)
                    self._look(side, child)

            self._try(side, work)

    def _steps(self, side: str) -> int:
        if side == "ours":
            known = self.row["ours"].get("alone_seconds", 0.1)
        else:
            known = self.row["peer"]["candidates"][self._best()]["seconds"]
        return 2 if self.suite.smoke else steps_for(BLOCK_SECONDS, known)

    def _block(
        self, sides: Mapping[str, Child], side: str, steps: Mapping[str, int], blocks: dict[str, list[float]]
    ) -> None:
        """One block; the first of a side warms up."""
        child = sides["peer" if side == "bare" else side]
        more = {} if side == "ours" else {"bare": side == "bare"}
        if not blocks[side] and not self.suite.smoke:
            child.ask("block", self.suite.budget.left, steps=min(5, steps[side]), **more)
        answer = child.ask("block", self.suite.budget.left, steps=steps[side], **more)
        blocks[side].append(answer["seconds"])
        if side != "bare":
            self.row[side]["loss"] = answer["loss"]

    def _conclude(self, blocks: Mapping[str, list[float]]) -> None:
        for side in ("ours", "peer"):
            if blocks.get(side):
                self.row[side]["step_seconds"] = spread(blocks[side])
                median = self.row[side]["step_seconds"]["median"]
                self.row[side] |= rates(self.case, median, self.row[side].get("device", ""), self.suite.ceiling)
        for key, side in (("ratio", "peer"), ("ratio_to_peer_without_augmentation", "bare")):
            if blocks.get("ours") and blocks.get(side):
                median = self.row["ours"]["step_seconds"]["median"]
                pairs = zip(blocks["ours"], blocks[side], strict=False)
                self.row[key] = spread(
                    [b / a for a, b in pairs] if side == "peer" else [b / median for b in blocks[side]]
                )
        self.suite.session.put(self.row)
        for key in ("ratio", "ratio_to_peer_without_augmentation"):
            if key in self.row:
                self.suite.say(f"{self.name}: {key} {self.row[key]}")

    def _look(self, side: str, child: Child) -> None:
        """Memory and profile."""
        self.row[side] |= child.ask("memory", 60)
        self.suite.session.put(self.row)
        if "step_seconds" not in self.row[side]:
            return
        seconds = self.row[side]["step_seconds"]["median"]
        steps = 2 if self.suite.smoke else PROFILED_STEPS
        self.row[side]["profile"] = child.ask(
            "profile", min(120, self.suite.budget.left), steps=steps, step_seconds=seconds
        )
        self.suite.say(f"{self.name}, {side}: profiled")


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep(suite: Suite, name: str, only: str) -> None:
    """Each of `FLAGS` and `VARIANTS` in a process of its own, in turns with one that has the defaults."""
    case = CASES[name]
    tried = {label: (flags, {}) for label, flags in FLAGS.items()} | {
        label: ("", each) for label, each in VARIANTS.items()
    }
    tried = {label: each for label, each in tried.items() if only in label}
    with suite.ours("defaults", TOGETHER) as plain:
        try:
            suite.session.machine["versions"] |= plain.ask("info", 120)["versions"]
            built = _build_ours(suite, plain, name, case.batch)
            probed = plain.ask("block", suite.budget.left, steps=3)["seconds"]
        except ChildError as error:
            suite.session.leave_out(f"flags on {name}", str(error))
            suite.say(f"defaults: {error}")
            return
        suite.say(f"defaults: {built['seconds']:.1f} s to the first step, {1e3 * probed:.2f} ms a step")
        steps = 2 if suite.smoke else steps_for(BLOCK_SECONDS / 2, probed)
        dearest = built["seconds"] + 25
        for index, (label, (flags, changes)) in enumerate(tried.items()):
            if suite.budget.left < 1.2 * dearest:
                suite.session.leave_out(f"{name}: {label}", f"{suite.budget.left:.0f} s were left")
                continue
            began = suite.budget.left
            row: Row = {"kind": "sweep", "name": f"{name}: {label}", "flags": flags, "changes": changes}
            try:
                with suite.ours(f"variant-{index}", TOGETHER, flags) as child:
                    row["cold_seconds"] = _build_ours(suite, child, name, case.batch, changes)["seconds"]
                    pairs = []
                    for turn in range(2 if suite.smoke else 6):
                        asked = [
                            each.ask("block", suite.budget.left, steps=steps)["seconds"] for each in (plain, child)
                        ]
                        pairs += [asked] if turn else []  # the first turn warms up
                    row["ratio"] = spread([a / b for a, b in pairs])
                    row |= {
                        "step_seconds": spread([b for _, b in pairs]),
                        "defaults_seconds": spread([a for a, _ in pairs]),
                    }
                    row |= child.ask("memory", 60)
            except ChildError as error:
                row["error"] = str(error)
            suite.session.put(row)
            suite.say(f"{label}: {row.get('error') or row['ratio']}")
            dearest = max(dearest, began - suite.budget.left)


if __name__ == "__main__":
    main()

"""Our training step against PyTorch's on one GPU: a few commands of minutes each, into one result file.

python -m benchmarks.gpu.suite probe                      # does everything start? the machine's ceilings: a minute
python -m benchmarks.gpu.suite cnn224|swin224|cifar       # or one case, such as resnet50_224
python -m benchmarks.gpu.suite flags --case resnet18_32   # XLA's flags and variants of the step, each against the defaults
python -m benchmarks.gpu.suite merge FILE ...             # takes the sessions of other result files in
python -m benchmarks.gpu.suite table                      # benchmarks/README.md
python -m benchmarks.gpu.suite cifar --smoke              # the same path on a CPU, with tiny models and a stand-in for the peer

Both sides compile at the same time, each in a process of its own. Ours stays; with each way to run the peer it takes turns,
as soon as that is compiled. So there is a ratio after the first way, and the budget's end cuts off only further ones. What
fails is written down and passed over, and makes the exit code 1; what would begin too late is left out.
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
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu.child import Child, ChildError
from benchmarks.gpu.parts import (
    CASES,
    EAGER,
    FLAGS,
    GROUPS,
    MEMORY_SHARE,
    OWN_GRAPH,
    PLAIN,
    RESULTS,
    ROOT,
    VARIANTS,
    Budget,
    Case,
    Row,
    Session,
    add_options,
    merge,
    rates,
    read_results,
    scratch_folder,
    spread,
    steps_for,
    write_results,
    write_table,
)

INSIDE = (
    "a uint8 batch on the device; pad-crop, flip, normalise; forward, backward, loss and correct answers, optimizer. "
    "Ours also: norms of gradients, weights and update, and no update that is not finite."
)
BLOCK_SECONDS, TURNS, PROFILED_STEPS = 1.5, 7, 5
# A case is given up when less than this is left, and a further candidate or variant is begun only if it can be paid for.
LEAST_SECONDS = 45.0
# Shares of a budget that a first build leaves: the peer's leaves time for a peer that is not compiled, ours for turns.
PEER_LEAVES, OURS_LEAVES = 0.3, 0.1
# Seconds for memory and profile.
LOOK_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Suite:
    """What the commands share. scratch: logs and compile caches."""

    session: Session
    budget: Budget
    scratch: Path
    smoke: bool
    ceiling: float | None
    began: float = dataclasses.field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """A line of progress."""
        passed, left = time.monotonic() - self.began, self.budget.left
        print(f"{time.strftime('%H:%M:%S')} +{passed:4.0f} s, {left:4.0f} s left  {text}", flush=True)

    def cache(self, name: str) -> Path:
        """A folder for compiled programs and what was tuned."""
        return self.scratch / "caches" / name

    def ours(self, cache: str, flags: str = "") -> Child:
        """A process with jaxtrain's step. cache: the compile cache's name; flags: of XLA."""
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache(cache) / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(MEMORY_SHARE),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
            "JAX_PLATFORMS": "cpu" if self.smoke else "cuda",
        }
        return Child("ours", self.scratch / f"ours-{cache}.log", environment)

    def peer(self, cache: str) -> Child:
        """A process with PyTorch's."""
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache(cache) / "inductor"),
            "TRITON_CACHE_DIR": str(self.cache(cache) / "triton"),
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
    add_options(parser)
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
    with scratch_folder(arguments.scratch) as scratch:
        session = Session(results, machine(arguments.commit, arguments.smoke))
        ceiling = _known_ceiling(results, session)
        budget = Budget(arguments.budget_seconds, began)
        suite = Suite(session, budget, scratch, arguments.smoke, ceiling, began)
        if arguments.command == "probe":
            probe(suite)
        elif arguments.command == "flags":
            sweep(suite, arguments.case, arguments.only)
        else:
            names = GROUPS[arguments.command]
            for index, name in enumerate(names):
                share = budget.share(len(names) - index)
                if share.left < LEAST_SECONDS and index:
                    session.leave_out(name, f"{share.left:.0f} s were left")
                    continue
                compare(dataclasses.replace(suite, budget=share), name)
        failures = session.failures
        suite.say(f"results: {results}" + (f"; failed: {', '.join(failures)}" if failures else ""))
    sys.exit(1 if failures else 0)


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
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _output(command: list[str]) -> str:
    """The first line that `command` prints, or '' where it cannot be run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
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
    """Starts both sides, and measures a large product and a large copy."""
    row: Row = {"kind": "ceiling", "name": "8192 x 8192 x 8192 product in bf16; copy of 1 GiB in f32"}
    with suite.ours("probe") as ours, suite.peer("probe") as peer:
        try:
            for name, side in (("ours", ours), ("peer", peer)):
                row[name] = side.ask("info", suite.budget.left)
                suite.session.machine["versions"] |= row[name]["versions"]
                suite.say(f"{name}: {row[name]}")
            row |= ours.ask("ceilings", suite.budget.left, size=256 if suite.smoke else 8192)
        except ChildError as error:
            row["error"] = str(error)
    suite.session.put(row)
    suite.say(f"ceilings: {row.get('error') or row}")


# ----------------------------------------------------------------------------------------------------------- comparison


def compare(suite: Suite, name: str) -> None:
    """One case: with its batch, or a half or a quarter of it where the memory is too little."""
    case = CASES[name].shrunk() if suite.smoke else CASES[name]
    for divisor in (1, 2, 4):
        sized = dataclasses.replace(case, batch=case.batch // divisor)
        suite.say(f"{name}: batch {sized.batch}, {MEMORY_SHARE:.0%} of the memory each")
        comparison = _Comparison(suite, name, sized)
        comparison.run()
        if "ratio" in comparison.row or not comparison.out_of_memory:
            return
        suite.say(f"{name}: out of memory")


class _Comparison:
    """One try of a case. Its row is written as it grows."""

    def __init__(self, suite: Suite, name: str, case: Case):
        self.suite, self.name, self.case, self.budget = suite, name, case, suite.budget
        self.out_of_memory = False
        self.found: dict[str, Row] = {}  # of each way to run the peer
        # aot_eager needs no C++ compiler
        self.peer: Row = {"backend": "aot_eager" if suite.smoke else "inductor", "candidates": self.found}
        self.row: Row = {"kind": "compare", "name": name, "batch": case.batch, "inside": INSIDE}
        self.row |= {"ours": {}, "peer": self.peer}

    def run(self) -> None:
        """Ours, and one way after the other to run the peer; then both once more, with filled caches."""
        dearest, kind = 0.0, self._kind("")
        with self.suite.ours(self._cache("")) as ours:
            self._send(ours, "")
            ways = list(self.case.candidates[: 1 if self.suite.smoke else None])
            while ways:
                candidate = ways.pop(0)
                price = dearest * (0.5 if candidate == OWN_GRAPH else 1.2) + LOOK_SECONDS
                late, alone = self._best and self.budget.left < price, self.found and "error" in self.row["ours"]
                if late or alone:
                    why = "nothing to compare with" if alone else f"{self.budget.left:.0f} s were left"
                    self.found[candidate] = {"left_out": why}
                    continue
                began = self.budget.left
                self._candidate(ours, kind, candidate)
                if self.out_of_memory and not self._best:
                    return
                if not self._best and EAGER not in self.found:
                    ways.insert(0, EAGER)
                dearest = max(dearest, began - self.budget.left)
            if not self._best and "error" not in self.row["ours"]:
                self._turns(ours, None, "")
            if "step_seconds" in self.row["ours"]:
                self.row["ours"] |= self._look(ours, self.row["ours"]["step_seconds"]["median"])
        self._again()

    def _candidate(self, ours: Child, kind: str, candidate: str) -> None:
        """Builds a way to run the peer, at the first time beside ours, and takes turns. kind: of our own build."""
        of_peer = self._kind(candidate)
        entry = self.found.setdefault(candidate, {})
        with self.suite.peer(self._cache(candidate)) as peer:
            self._send(peer, candidate)
            if "parameters" not in self.row["ours"]:
                self._ours_is_built(ours, kind)
            try:
                left, spare = self.budget.left, 0.0 if self._best else PEER_LEAVES * self.budget.seconds
                built = peer.answer(max(left - spare, 0.6 * left))  # ours may have taken long
                entry |= {of_peer: built["seconds"], "parameters": built["parameters"]}
                self._learn(peer, "peer")
            except ChildError as error:
                self._failed(candidate, error)
                return
            self.suite.say(f"{self.name}, peer, {candidate}: {of_peer.replace('_', ' ')} {built['seconds']:.1f}")
            self._turns(None if "error" in self.row["ours"] else ours, peer, candidate)
            if self._best == candidate:
                entry |= self._look(peer, entry["step_seconds"]["median"])
                self._summarize()

    def _ours_is_built(self, ours: Child, kind: str) -> None:
        try:
            built = ours.answer(self.budget.left - OURS_LEAVES * self.budget.seconds)
            self._learn(ours, "ours")
        except ChildError as error:
            self._failed("", error)
            return
        self.row["ours"] |= {kind: built["seconds"], "cache_hits": built["cache_hits"]}
        self.row["ours"] |= {key: built[key] for key in ("parameters", "temporary_bytes")}
        self.suite.say(f"{self.name}, ours: {kind.replace('_', ' ')} {built['seconds']:.1f}")
        self.suite.session.put(self.row)

    def _cache(self, candidate: str) -> str:
        """The name of the compile cache of a way to run the peer, or of ours ("")."""
        compiled = PLAIN if candidate == OWN_GRAPH else candidate  # a graph of what was compiled there
        return f"{self.name}-{self.case.batch}-{compiled or 'ours'}"

    def _kind(self, candidate: str) -> str:
        """What the seconds of a build are that begins now."""
        return "warm_seconds" if self.suite.cache(self._cache(candidate)).exists() else "cold_seconds"

    def _send(self, child: Child, candidate: str) -> None:
        """Begins a build; a child that has ended says so in its answer."""
        fields: Row = {"case": self.name, "batch": self.case.batch, "smoke": self.suite.smoke}
        fields |= {"candidate": candidate, "backend": self.peer["backend"]} if candidate else {"changes": {}}
        with contextlib.suppress(ChildError):
            child.send("build", **fields)

    def _learn(self, child: Child, side: str) -> None:
        found = child.ask("info", 30)
        self.row[side]["device"] = found["device"]
        self.suite.session.machine["versions"] |= found["versions"]

    def _failed(self, candidate: str, error: ChildError) -> None:
        """Of a way to run the peer, or of ours ("")."""
        self.out_of_memory |= error.out_of_memory
        (self.found[candidate] if candidate else self.row["ours"])["error"] = str(error)
        self.suite.say(f"{self.name}, {candidate or 'ours'}: {error}")
        self.suite.session.put(self.row)

    @property
    def _best(self) -> str:
        """The fastest way to run the peer so far, or ''."""
        timed = {name: each["step_seconds"]["median"] for name, each in self.found.items() if "step_seconds" in each}
        return min(timed, key=lambda name: timed[name]) if timed else ""

    def _turns(self, ours: Child | None, peer: Child | None, candidate: str) -> None:
        """Blocks of each side in turns, with a ratio after each; a way that is slower than the best is soon given up."""
        children = {side: child for side, child in (("ours", ours), ("peer", peer)) if child}
        bare = {"bare": peer} if peer else {}
        blocks: dict[str, list[float]] = {"ours": [], "peer": [], "bare": []}
        steps: dict[str, int] = {}
        side = ""
        try:
            for side, child in (children | bare).items():  # the first block warms up
                steps[side] = self._steps(self._block(child, side, 3)["seconds"])
            for turn in range(2 if self.suite.smoke else TURNS):
                began = self.budget.left
                for side, child in (children | (bare if turn % 2 else {})).items():
                    answer = self._block(child, side, steps[side])
                    blocks[side].append(answer["seconds"])
                    if side != "bare":
                        (self.row["ours"] if side == "ours" else self.found[candidate])["loss"] = answer["loss"]
                self._conclude(candidate, blocks)
                if self.budget.left < 2 * (began - self.budget.left) or (turn == 1 and self._best != candidate):
                    break
        except ChildError as error:
            self._failed("" if side == "ours" else candidate, error)
        if "ratio" in self.row:
            self.suite.say(f"{self.name}, {candidate}: {self.found[candidate].get('ratio')}; best {self._best}")

    def _steps(self, seconds: float) -> int:
        return 2 if self.suite.smoke else steps_for(min(BLOCK_SECONDS, self.budget.left / 20), seconds)

    def _block(self, child: Child, side: str, steps: int) -> Row:
        return child.ask("block", self.budget.left, steps=steps, **({} if side == "ours" else {"bare": side == "bare"}))

    def _conclude(self, candidate: str, blocks: Mapping[str, list[float]]) -> None:
        """What the blocks so far say of this way to run the peer, or of ours without a peer ("")."""
        entry = self.found[candidate] if candidate else {}
        for side, key in (("peer", "step_seconds"), ("ours", "ours_step_seconds")):
            if blocks[side]:
                entry[key] = spread(blocks[side])
        if blocks["ours"] and blocks["peer"]:
            entry["ratio"] = spread(b / a for a, b in zip(blocks["ours"], blocks["peer"], strict=True))
            if blocks["bare"]:
                median = entry["ours_step_seconds"]["median"]
                entry["ratio_to_peer_without_augmentation"] = spread(b / median for b in blocks["bare"])
        if candidate:
            self._summarize()
        else:
            self._rate(self.row["ours"], entry["ours_step_seconds"])

    def _summarize(self) -> None:
        """The row's own figures are those of the best way to run the peer, and of ours in the same turns."""
        best = self.found[self._best]
        if self._best == OWN_GRAPH:  # it is of what was compiled there
            self.peer |= {key: each for key, each in self.found[PLAIN].items() if key == "cold_seconds"}
        self.peer |= {key: each for key, each in best.items() if "ours" not in key and "ratio" not in key}
        self.peer["best"] = self._best
        self._rate(self.peer, best["step_seconds"])
        if "ratio" in best:
            self.row |= {key: each for key, each in best.items() if "ratio" in key}
            self._rate(self.row["ours"], best["ours_step_seconds"])
        self.suite.session.put(self.row)

    def _rate(self, side: Row, seconds: Row) -> None:
        side["step_seconds"] = seconds
        side |= rates(self.case, seconds["median"], side.get("device", ""), self.suite.ceiling)

    def _look(self, child: Child, step_seconds: float) -> Row:
        """Memory and profile, if there is time."""
        if self.budget.left < LOOK_SECONDS:
            return {}
        try:
            found = child.ask("memory", 10)
            steps = 2 if self.suite.smoke else PROFILED_STEPS
            profile = child.ask("profile", min(60, self.budget.left), steps=steps, step_seconds=step_seconds)
        except ChildError as error:
            return {"profile": {"error": str(error)}}
        return found | {"profile": profile}

    def _again(self) -> None:
        """Seconds to the first step with filled caches, of each side alone, if there is time."""
        for side, candidate, start in (("ours", "", self.suite.ours), ("peer", self._best, self.suite.peer)):
            cold, known = self.row[side].get("cold_seconds"), "warm_seconds" in self.row[side]
            if cold is None or known or self.budget.left < cold + LOOK_SECONDS:
                continue
            with start(self._cache(candidate)) as child, contextlib.suppress(ChildError):
                self._send(child, candidate)
                built = child.answer(self.budget.left)
                self.row[side] |= {"warm_seconds": built["seconds"]}
                self.suite.say(f"{self.name}, {side}: warm seconds {built['seconds']:.1f}")
        self.suite.session.put(self.row)


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep(suite: Suite, name: str, only: str) -> None:
    """Each of `FLAGS` and `VARIANTS` in a process of its own, in turns with one that has the defaults."""
    case = CASES[name].shrunk() if suite.smoke else CASES[name]
    fields: Row = {"case": name, "batch": case.batch, "smoke": suite.smoke}
    few = 1 if suite.smoke else None
    tried = [(label, flags, {}) for label, flags in FLAGS.items()][:few]
    tried += [(label, "", dict(changes)) for label, changes in VARIANTS.items()][:few]
    with suite.ours("defaults") as plain:
        try:
            built = plain.ask("build", suite.budget.left, **fields, changes={})
            probed = plain.ask("block", suite.budget.left, steps=3)["seconds"]
            suite.session.machine["versions"] |= plain.ask("info", 30)["versions"]
        except ChildError as error:
            suite.session.put({"kind": "sweep", "name": f"flags on {name}", "error": str(error)})
            suite.say(f"defaults: {error}")
            return
        suite.say(f"defaults: {built['seconds']:.1f} s to the first step, {1e3 * probed:.2f} ms a step")
        dearest = built["seconds"] + (5 if suite.smoke else 25)
        for label, flags, changes in tried:
            if only not in label:
                continue
            if suite.budget.left < 1.2 * dearest:
                suite.session.leave_out(f"{name}: {label}", f"{suite.budget.left:.0f} s were left")
                continue
            began = suite.budget.left
            row: Row = {"kind": "sweep", "name": f"{name}: {label}", "flags": flags, "changes": changes}
            with suite.ours(label.replace(" ", "-"), flags) as child:
                try:
                    built = child.ask("build", suite.budget.left, **fields, changes=changes)
                    row |= {"first_step_seconds": built["seconds"]} | _in_turns(suite, plain, child, probed)
                except ChildError as error:
                    row["error"] = str(error)
            suite.session.put(row)
            suite.say(f"{label}: {row.get('error') or row['ratio']}")
            dearest = max(dearest, began - suite.budget.left)


def _in_turns(suite: Suite, plain: Child, child: Child, probed: float) -> Row:
    """The defaults' time over the variant's. probed: seconds of a step with the defaults."""
    steps = 2 if suite.smoke else steps_for(BLOCK_SECONDS / 2, probed)
    pairs = []
    for _ in range(2 if suite.smoke else 6):
        pairs.append([each.ask("block", suite.budget.left, steps=steps)["seconds"] for each in (plain, child)])
    del pairs[0]  # the first turn warms up
    found: Row = {"ratio": spread(a / b for a, b in pairs), "step_seconds": spread(b for _, b in pairs)}
    return found | {"defaults_seconds": spread(a for a, _ in pairs)} | child.ask("memory", 30)


if __name__ == "__main__":
    main()

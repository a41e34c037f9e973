"""Our train step against the same step in PyTorch, on this CPU: processes in turns, and the ratio of neighbours.

Both sides: f32, one fixed batch of random bytes (normalized in the step), training statistics, cross entropy, SGD with
momentum and weight decay (AdamW for Swin), the model of the same size (the parameters are counted). PyTorch has its best
of eager and `torch.compile`, channels last, its fused optimizer; ours reports loss, accuracy and norms besides.

python -m benchmarks.cpu.peers MODEL                          # ours alone: prints the parameters and seconds a step
python -m benchmarks.cpu.peers_torch MODEL eager|compiled     # PyTorch's alone
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from typing import Any

import jax

from benchmarks.common import ROOT, Spread, block_seconds, settings, start, synthetic
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig

# name: (model, batch, steps a block)
MODELS: dict[str, tuple[ModelConfig, int, int]] = {
    "mlp": (ModelConfig("mlp", dropout=0.0), 128, 100),
    "resnet18": (ModelConfig("resnet18"), 32, 3),
    "resnet50": (ModelConfig("resnet50"), 16, 2),
    "swin_tiny": (ModelConfig("swin_tiny", patch=2, window=4, drop_path=0.0), 16, 5),
}
BLOCKS, TURNS = 3, 3  # blocks a process, after one that warms up; processes of each kind
CLASSES = 10
OPTIMIZERS = {"swin_tiny": OptimConfig("adamw", learning_rate=1e-4, weight_decay=0.05, schedule="constant")}
SGD = OptimConfig("sgd", learning_rate=0.01, weight_decay=5e-4, schedule="constant")


def measure() -> list[dict[str, Any]]:
    """Per model: seconds a step of both, and theirs over ours in neighbouring processes."""
    if importlib.util.find_spec("torch") is None:
        print("peers: skipped, PyTorch is not installed; pip install -e '.[parity]' brings it.")
        return []
    return [_compare(name) for name in MODELS]


def _compare(name: str) -> dict[str, Any]:
    found: dict[str, list[float]] = {"ours": [], "eager": [], "compiled": []}
    counts = set()
    for _ in range(TURNS):
        for kind, seconds in list(found.items()):
            program = ["benchmarks.cpu.peers", name] if kind == "ours" else ["benchmarks.cpu.peers_torch", name, kind]
            command = [sys.executable, "-m", *program]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if process.returncode and kind == "compiled":  # torch.compile needs a C++ compiler
                print(f"peers: {name}: torch.compile does not work here; eager PyTorch is the peer.")
                del found[kind]
                continue
            if process.returncode:
                raise RuntimeError(process.stderr)
            answer = json.loads(process.stdout.splitlines()[-1])
            counts.add(answer["parameters"])
            seconds.append(Spread.of(answer["seconds"]).median)
    if len(counts) > 1:
        raise RuntimeError(f"{name}: the two models have different numbers of parameters: {sorted(counts)}.")
    best = min((kind for kind in found if kind != "ours"), key=lambda kind: Spread.of(found[kind]).median)
    ratios = [theirs / ours for theirs, ours in zip(found[best], found["ours"], strict=True)]
    return {
        "name": name,
        "batch": MODELS[name][1],
        "peer": f"torch {best}",
        "ours": dataclasses.asdict(Spread.of(found["ours"])),
        "theirs": dataclasses.asdict(Spread.of(found[best])),
        "theirs_over_ours": dataclasses.asdict(Spread.of(ratios)),
    }


def ours(name: str) -> tuple[int, list[float]]:
    """The compiled step of `jaxtrain`."""
    model, batch, steps = MODELS[name]
    data = DataConfig(global_batch=batch, augmentation="none")
    config = synthetic(Config(data=data, model=model, optim=OPTIMIZERS.get(name, SGD)))
    with settings(config):
        run, engine, state = start(config)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        return parameters, block_seconds(run, engine, state, steps, BLOCKS)


if __name__ == "__main__":
    count, spread = ours(sys.argv[1])
    print(json.dumps({"parameters": count, "seconds": spread}))

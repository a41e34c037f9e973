"""Predicting 1,000 JPEGs: `jaxtrain predict`'s own loop beside a PyTorch loop over a DataLoader, in turns on the same cores.

Both: ResNet-18 of width 16 with the stem for small images, 64 pixels, f32, batches of 64; the shorter side resized (bilinear),
the centre square, normalised; the five best classes of each file. Ours includes loading the compiled program from the compile
cache. Ours decodes a JPEG at a reduced size (Pillow's `draft`), as evaluation reads a folder; the DataLoader's loop decodes all
of it, as torchvision's folders are read. Needs PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.common import ROOT, settings
from benchmarks.cpu.inputs import spread
from jaxtrain.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxtrain.training.inference import load_trained
from jaxtrain.training.prediction import predict
from jaxtrain.training.session import train

FILES, SIZE, SIDE, TURNS = 1000, (500, 375), 64, 3


def measure() -> list[dict[str, Any]]:
    """About two minutes."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as name, _torch() as ask:
        directory = Path(name)
        files = _draw(directory)
        config = Config(
            data=DataConfig(name="synthetic", image_size=SIDE, global_batch=8, examples=64),
            model=ModelConfig("resnet18", width=16, stem="cifar"),
            train=TrainConfig(steps=1, precision="f32", eval_every="0"),
        )
        train(config, directory / "run", num_devices=1, quiet=True)
        ways: dict[str, Callable[[], float]] = {
            f"DataLoader, workers {workers}": lambda workers=workers: ask({"files": files, "workers": workers})
            for workers in (0, 1, 2)
        }
        with settings(config):
            model = load_trained(directory / "run", checkpoint="latest", devices=jax.devices()[:1])
            ways = {"ours": lambda: _ours(model, files), **ways}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(TURNS + 1):
                for way, run in ways.items():
                    found = run()
                    seconds[way] += [found] if turn else []  # the first one warms up
    theirs = min((way for way in ways if way != "ours"), key=lambda way: float(np.median(seconds[way])))
    ratios = [a / b for a, b in zip(seconds[theirs], seconds["ours"], strict=True)]
    rows = [{"name": way, "seconds": spread(found)} for way, found in seconds.items()]
    return [*rows, {"name": f"{theirs}, over ours", "ratio": spread(ratios)}]


def _draw(directory: Path) -> list[str]:
    """JPEGs with the detail and the noise of a photo."""
    random, files = np.random.default_rng(0), []
    (width, height) = SIZE
    for k in range(FILES):
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
        large = np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), np.float32)
        noisy = large + random.normal(0, 3, (height, width, 3)).astype(np.float32)
        files.append(str(directory / f"{k}.jpg"))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(files[-1], quality=85)
    return files


def _ours(model: Any, files: list[str]) -> float:
    began = time.perf_counter()
    found = list(predict(model, files))
    seconds = time.perf_counter() - began
    assert len(found) == len(files)
    assert not any(each.error for each in found)
    return seconds


@contextlib.contextmanager
def _torch() -> Iterator[Callable[[dict[str, Any]], float]]:
    command = [sys.executable, "-m", "benchmarks.cpu.torch_predict"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def ask(question: dict[str, Any]) -> float:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            return float(stdout.readline())

        yield ask
        stdin.close()

"""Input: images/s that reach the device, a core, beside PyTorch's DataLoader doing the same work; what a step waits for it.

Ours is confined to one core with all that it starts, threads of JAX included. A DataLoader's rate with w workers is divided
by max(w, 1): its own process, which only receives then, is not counted against it. Both are read in turns, block by block;
a ratio is over the best DataLoader of the same work. Where PyTorch is not installed, its rows are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered

from benchmarks.common import ROOT, Spread, batches, settings, start, timed
from benchmarks.cpu import cores
from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data import base, registry, tfds_sets
from jaxtrain.data.augment import Preprocess, train_inputs
from jaxtrain.data.spec import data_dir
from jaxtrain.errors import DataError
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.training.input_pipeline import InputPipeline, make_input_pipeline

BATCH, TURNS = 64, 3  # images a batch; blocks of each kind
SIDE, STORED = 224, 256
CIFAR_IMAGES = 10_000
PHOTOS = {"500 x 375": ((500, 375), 200), "2048 x 1536": ((2048, 1536), 32)}  # size, how many files
Read = Callable[[int], float]  # a core's seconds for so many batches


def measure() -> list[dict[str, Any]]:
    """All of it: about three minutes."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as name, _torch() as ask:
        if ask is None:
            rows.append({"name": "PyTorch is not installed: the DataLoader's rows are left out"})
        directory = Path(name)
        images, records, kind = _cifar(directory)
        rows += _cifar_rows(directory, images, records, kind, ask)
        for size in PHOTOS:
            rows += _folder_rows(_photos(directory / size.replace(" ", ""), images, size), size, ask)
        rows += _waits(kind, directory)
    rows += [{"name": f"augmentation {name}, jitted, {cores.total()} cores", **_augmentation(name)} for name in
             ("light", "heavy", "random_resized_crop")]  # fmt: skip
    rows += [_crop_over_light(side) for side in (32, SIDE)]
    return rows


# ------------------------------------------------------------------------------------------------------- what is read


def _cifar(directory: Path) -> tuple[np.ndarray, base.Source, str]:
    """Images uint8 [n, 32, 32, 3], the same as array_record, and where they are from."""
    try:
        root = data_dir(DataConfig(name="cifar10"))
        tfds_sets.load_cifar("cifar10", root)
        records = tfds_sets.TfdsSource(tfds_sets.cifar_directory("cifar10", root), "train")
        return records.read(np.arange(CIFAR_IMAGES))[0], records, "CIFAR-10"
    except DataError:
        small = np.random.default_rng(0).integers(0, 256, (CIFAR_IMAGES, 6, 6, 3), np.uint8)
        images = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in small])
        builder = Smooth(images, data_dir=directory)
        builder.download_and_prepare(file_format="array_record")
        return images, tfds_sets.TfdsSource(Path(builder.data_dir), "train"), "random images of CIFAR's shape"


with registered.skip_registration():  # only the benchmark makes it

    class Smooth(tfds.core.GeneratorBasedBuilder):
        """`images` as PNG in array_record."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, images: np.ndarray, **options: Any):
            self._images = images
            super().__init__(**options)

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for k, image in enumerate(self._images):
                yield k, {"image": Image.fromarray(image), "label": k % 10}


def _photos(directory: Path, images: np.ndarray, size: str) -> Path:
    """A folder of JPEGs, each of 16 small images enlarged, with the noise of a camera: about 1 bit a pixel."""
    (width, height), count = PHOTOS[size]
    random = np.random.default_rng(0)
    noise = random.normal(0, 3, (height, width, 3)).astype(np.float32)
    for k in range(count):
        chosen = images[random.integers(0, len(images), 16)].reshape(4, 4, 32, 32, 3)
        mosaic = Image.fromarray(chosen.transpose(0, 2, 1, 3, 4).reshape(128, 128, 3))
        large = np.asarray(mosaic.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        path = directory / str(k % 2) / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(large + noise, 0, 255).astype(np.uint8)).save(path, quality=85)
    return directory


# ---------------------------------------------------------------------------------------------------- a core of each


def _cifar_rows(
    directory: Path, images: np.ndarray, records: base.Source, kind: str, ask: Ask | None
) -> list[dict[str, Any]]:
    labels = np.zeros(len(images), np.int32)
    np.save(directory / "images.npy", images)
    np.save(directory / "labels.npy", labels)
    np.savez(directory / "cifar.npz", images=images, labels=labels)
    arrays = base.MappedSource(directory / "images.npy", directory / "labels.npy")
    inputs = _preprocess("resize_crop", SIDE)
    ours: dict[str, tuple[Read, int]] = {
        "resident": (_reader(_feed(arrays, "device")), 200),
        "streamed, decoded once": (_reader(_feed(arrays, "stream")), 200),
        "streamed, PNGs of array_record": (_reader(_feed(records, "stream")), 20),
        "streamed, then resized, cropped, flipped and normalised by XLA on this core": (
            _reader(_feed(arrays, "stream"), inputs), 4),
    }  # fmt: skip
    theirs = {
        f"{how}, workers {workers}": ({"work": "cifar", "path": str(directory / "cifar.npz"), "how": how,
                                       "workers": workers}, 4)
        for how, workers in itertools.product(("pil", "tensor", "batch"), (0, 1, 2))
    }  # fmt: skip
    return _compare(f"{kind} for a model at {SIDE}", ours, theirs, ask)


def _folder_rows(path: Path, size: str, ask: Ask | None) -> list[dict[str, Any]]:
    config = DataConfig(name=f"folder:{path}", validation=0.0, augmentation="resize_crop")
    dataset = registry.load(config, image_size=SIDE)
    large = dataset.train.shape[0] and "2048" in size
    some, batches_ = (16, 2) if large else (BATCH, 4)
    ours: dict[str, tuple[Read, int]] = {"streamed": (_reader(_feed(dataset.train, "stream"), batch=some), batches_)}
    if (count := cores.total()) > 1:
        threaded = dataclasses.replace(_feed(dataset.train, "stream"), threads=count)
        ours[f"streamed, {count} threads on {count} cores"] = (
            _reader(threaded, batch=some, used=count),
            count * batches_,
        )
    theirs = {
        f"pil, workers {workers}": ({"work": "folder", "path": str(path), "how": "pil", "workers": workers}, batches_)
        for workers in (0, 1, 2)
    }
    return _compare(f"JPEGs of {size} at {SIDE}", ours, theirs, ask, some)


def _compare(
    work: str,
    ours: dict[str, tuple[Read, int]],
    theirs: dict[str, tuple[dict[str, Any], int]],
    ask: Ask | None,
    batch: int = BATCH,
) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for name, (read, count) in ours.items():
            rates.setdefault(name, []).append(count * batch / read(count))
        for name, (question, count) in theirs.items() if ask is not None else ():
            assert ask is not None
            workers = question["workers"]
            asked = {**question, "batch": batch, "batches": count, "cores": 1 if workers == 0 else cores.total()}
            rate = count * batch / ask(asked) / max(workers, 1)
            rates.setdefault(f"DataLoader, {name}", []).append(rate)
    if ask is not None:
        ask(None)
    rows = [{"name": f"{work}, a core: {name}", "images_per_second": spread(found)} for name, found in rates.items()]
    if ask is not None:
        best = max((name for name in rates if name.startswith("DataLoader")), key=lambda n: Spread.of(rates[n]).median)
        for name in ours:
            ratios = [a / b for a, b in zip(rates[name], rates[best], strict=True)]
            rows.append({"name": f"{work}, a core: {name}, over {best}", "ratio": spread(ratios)})
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Of repeats, for a results file."""
    return dataclasses.asdict(Spread.of(values))


def _layout() -> Layout:
    return Layout(make_mesh(LayoutConfig(), jax.devices()[:1]), LayoutConfig())


def _feed(source: base.Source, residency: str) -> InputPipeline:
    none = base.Subset(source, np.arange(0))
    dataset = base.Dataset("bench", source, none, none, 10, ("",) * 10, (0.5,) * 3, (0.25,) * 3, "")
    return dataclasses.replace(make_input_pipeline(dataset, _layout(), residency, 0), threads=1)


def _reader(feed: InputPipeline, inputs: Callable[..., Any] | None = None, batch: int = BATCH, used: int = 1) -> Read:
    """Reads on from where it stopped, on `used` cores; what was read ahead meanwhile is passed over, untimed.

    Gives the seconds of a core: those that passed, times `used`.
    """
    stream: list[Iterator[Any]] = []

    def read(count: int) -> float:
        cores.pin(used)
        if not stream:
            order: dict[str, Any] = {
                "seed": 0,
                "global_batch": batch,
                "first_step": 0,
                "first_example": 0,
                "steps": 10**6,
            }
            stream.append(feed.train(schedule=optax.constant_schedule(0.1), weight_decay=0.0, **order))
        seconds = 0.0
        ahead = 2 + used
        for number in range(count + ahead):
            began = time.perf_counter()
            got = next(stream[0])
            if inputs is not None:
                got = inputs(got.images[0], got.labels[0])
            jax.block_until_ready(got)
            seconds += time.perf_counter() - began if number >= ahead else 0.0
        cores.pin(0)
        return seconds * used

    return read


def _preprocess(augmentation: str, side: int) -> Callable[..., Any]:
    pre = Preprocess(
        image_size=side, augmentation=augmentation, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10,
        dtype=jnp.dtype(jnp.float32),
    )  # fmt: skip
    return jax.jit(
        lambda images, labels: train_inputs(
            pre, images, labels, jnp.arange(len(labels), dtype=jnp.int32), jax.random.key(0)
        )
    )


# --------------------------------------------------------------------------------------------------- PyTorch's process

Ask = Callable[[dict[str, Any] | None], float]  # a question of torch_inputs, or None to end its workers


@contextlib.contextmanager
def _torch() -> Iterator[Ask | None]:
    if importlib.util.find_spec("torch") is None:
        yield None
        return
    command = [sys.executable, "-m", "benchmarks.cpu.torch_inputs"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def ask(question: dict[str, Any] | None) -> float:
            stdin.write("close\n" if question is None else json.dumps(question) + "\n")
            stdin.flush()
            answer = stdout.readline()
            if not answer:
                raise RuntimeError("benchmarks.cpu.torch_inputs ended")
            return 0.0 if question is None else float(answer)

        yield ask
        stdin.close()


# ---------------------------------------------------------------------------------------------------- beside a real step

STEPS = 40  # a block


def _waits(kind: str, directory: Path) -> list[dict[str, Any]]:
    """A small ResNet-18 on all cores: blocks of streamed batches and of one cached batch, in turns."""
    rows = []
    cifar = "cifar10" if kind == "CIFAR-10" else "synthetic"
    folder = directory / next(iter(PHOTOS)).replace(" ", "")
    for name, side, batch, steps in ((cifar, 32, 64, STEPS), (f"folder:{folder}", SIDE, 8, STEPS // 4)):
        config = Config(
            data=DataConfig(name=name, image_size=side, global_batch=batch, residency="stream", augmentation="light"),
            model=ModelConfig("resnet18", width=8),
            optim=OptimConfig(learning_rate=0.01, schedule="constant"),
            train=TrainConfig(steps=10**6, precision="f32"),
        )
        with settings(config):
            run, engine, state = start(config)
            stream: Any = batches(run, engine, 0, 10**6)
            cached = next(stream)
            seconds: dict[str, list[float]] = {"cached": [], "streamed": []}
            shares = []
            for _ in range(TURNS + 1):
                for which, block in seconds.items():
                    waited, began, before = 0.0, time.perf_counter(), None
                    for _ in range(steps):
                        asked = time.perf_counter()
                        got = next(stream) if which == "streamed" else cached
                        waited += time.perf_counter() - asked
                        state, metrics = engine.step(state, got, engine.inputs.resident)
                        jax.block_until_ready(before)  # a step behind, as the trainer reads them
                        before = metrics
                    jax.block_until_ready(before)
                    block.append(time.perf_counter() - began)
                    if which == "streamed":
                        shares.append(waited / block[-1])
            stream.close()
        what = "CIFAR-10 at 32" if side == 32 else f"JPEGs of {next(iter(PHOTOS))} at {SIDE}"
        if name == "synthetic":
            what = "synthetic images at 32"
        ratios = [a / b for a, b in zip(seconds["streamed"][1:], seconds["cached"][1:], strict=True)]
        what = f"ResNet-18 of width 8, batch {batch}, streamed {what}, {cores.total()} cores"
        milliseconds = 1e3 * Spread.of(seconds["cached"][1:]).median / steps
        rows.append({"name": f"{what}: a step over one of {milliseconds:.1f} ms on a cached batch",
                     "ratio": spread(ratios)})  # fmt: skip
        rows.append({"name": f"{what}: share of the step that waits for data", "share": spread(shares[1:])})
    return rows


def _crop_over_light(side: int) -> dict[str, Any]:
    """What random boxes cost an image, over `light` at the same size: blocks of both in turns."""
    random, count = np.random.default_rng(0), 256 if side == 32 else 16
    stored = side if side == 32 else round(side / 0.875)
    labels = jnp.zeros(count, jnp.int32)
    runs, seconds = {}, {"light": [], "random_resized_crop": []}
    for name, source in (("light", side), ("random_resized_crop", stored)):
        images = jnp.asarray(random.integers(0, 256, (count, source, source, 3), np.uint8))
        runs[name] = functools.partial(_preprocess(name, side), images, labels)
        jax.block_until_ready(runs[name]())
    for _ in range(TURNS):
        for name, run in runs.items():
            seconds[name].append(timed(run, 3).median)
    ratios = [b / a for a, b in zip(seconds["light"], seconds["random_resized_crop"], strict=True)]
    one = 1e3 * Spread.of(seconds["random_resized_crop"]).median / count
    what = f"random_resized_crop of {stored} px to {side}, {one:.3f} ms an image on {cores.total()} cores"
    return {"name": f"{what}: over light at {side}", "ratio": spread(ratios)}


def _augmentation(name: str) -> dict[str, Any]:
    random = np.random.default_rng(0)
    images, labels = jnp.asarray(random.integers(0, 256, (256, 32, 32, 3), np.uint8)), jnp.zeros(256, jnp.int32)
    run = _preprocess(name, 32)
    jax.block_until_ready(run(images, labels))
    seconds = timed(lambda: run(images, labels), 20)
    return {"images_per_second": dataclasses.asdict(Spread(*(256 / s for s in (seconds.median, seconds.most,
                                                                               seconds.least))))}  # fmt: skip

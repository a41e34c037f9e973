"""Input: images/s that reach the device, streamed through Grain and resident, and the augmentation alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Spread, settings, timed
from jaxtrain.config import Config, DataConfig, LayoutConfig, TrainConfig
from jaxtrain.data.augment import Preprocess, train_inputs
from jaxtrain.data.sources import load
from jaxtrain.feed import Feed, make_feed
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import make_mesh

BATCH, STEPS, REPEATS = 256, 100, 5


def measure() -> list[dict[str, Any]]:
    """CIFAR-shaped bytes; the figures are of the whole machine's cores, and of one."""
    config = Config(
        data=DataConfig(name="synthetic", image_size=32, examples=20_000), train=TrainConfig(precision="f32")
    )
    with settings(config):
        dataset = load(config.data, image_size=32)
        layout = Layout(make_mesh(LayoutConfig(), jax.devices()[:1]), LayoutConfig())
        rows = [
            {"name": "resident: row numbers", **_rate(_read(make_feed(dataset, layout, "device", 0)))},
            {"name": "streamed, workers 0", **_rate(_read(make_feed(dataset, layout, "stream", 0)))},
            {"name": "streamed, workers 2", **_rate(_read(make_feed(dataset, layout, "stream", 2)))},
        ]
        rows += [{"name": f"augmentation {name}, jitted", **_augmentation(name)} for name in ("light", "heavy")]
    return rows


def _read(feed: Feed) -> Callable[[int], None]:
    stream = feed.train(seed=0, global_batch=BATCH, first_step=0, first_example=0, steps=STEPS * (REPEATS + 1))

    def read(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(next(stream))

    return read


def _rate(read: Callable[[int], None]) -> dict[str, Any]:
    read(STEPS)  # workers start
    rates = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        read(STEPS)
        rates.append(STEPS * BATCH / (time.perf_counter() - began))
    return {"images_per_second": dataclasses.asdict(Spread.of(rates))}


def _augmentation(name: str) -> dict[str, Any]:
    pre = Preprocess(
        image_size=32, augmentation=name, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10, dtype=jnp.dtype(jnp.float32)
    )
    random = np.random.default_rng(0)
    images = jnp.asarray(random.integers(0, 256, (BATCH, 32, 32, 3), np.uint8))
    labels, example = jnp.zeros(BATCH, jnp.int32), jnp.arange(BATCH, dtype=jnp.int32)
    run = jax.jit(lambda key: train_inputs(pre, images, labels, example, key))
    jax.block_until_ready(run(jax.random.key(0)))
    seconds = timed(lambda: run(jax.random.key(1)), REPEATS * 4)
    spread = Spread(BATCH / seconds.median, BATCH / seconds.most, BATCH / seconds.least)
    return {"images_per_second": dataclasses.asdict(spread)}

"""Predicts the classes of image files: decoded in threads, beside one compiled program over all devices."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data.augment import eval_inputs
from jaxtrain.data.images import EXTENSIONS
from jaxtrain.errors import DataError
from jaxtrain.host.cpus import usable_cpus
from jaxtrain.models.layers import Context
from jaxtrain.parallel.mesh import batch_ways
from jaxtrain.step.eval_step import IN_FLIGHT
from jaxtrain.step.layer_wrap import layer_wrapper
from jaxtrain.training.trained import Trained
from jaxtrain.trees import PyTree

BATCH = 64
"""Images that the devices are given at once."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of one file."""

    file: str
    error: str = ""
    """Why the file cannot be read, as a sentence; the other fields are then empty."""
    classes: tuple[int, ...] = ()
    """The most probable first; of equally probable ones the lowest number."""
    probabilities: tuple[float, ...] = ()
    """Those of `classes`."""
    features: np.ndarray | None = None
    """float32 [D]: what the head's last linear map takes; where it was asked for."""


def image_files(words: Iterable[str]) -> tuple[list[str], int]:
    """The files that `words` name, folders with all below them by name, and how many files there are no images.

    In a folder a file is an image by its extension. Hidden ones, and folders that are links, are passed by.
    """
    files, others = [], 0
    for word in words:
        if not os.path.isdir(word):
            files.append(word)
            continue
        for folder, below, names in os.walk(word):
            below[:] = sorted(name for name in below if not name.startswith("."))
            shown = sorted(name for name in names if not name.startswith("."))
            found = [name for name in shown if name.lower().endswith(EXTENSIONS)]
            files += [os.path.join(folder, name) for name in found]
            others += len(shown) - len(found)
    return files, others


def predict(
    model: Trained,
    files: Sequence[str],
    *,
    top: int = 5,
    features: bool = False,
    strict: bool = False,
) -> Iterator[Prediction]:
    """Predicts the classes of files, in their order. The program is compiled once: the last batch is padded.

    Args:
      model: a trained one.
      files: paths.
      top: how many classes a file gets, at most as many as there are.
      features: whether it gets its embedding.
      strict: raise for a file that cannot be read; else its prediction says why.

    Yields:
      One prediction for each file.

    Raises:
      DataError: with `strict`, a file cannot be read.
    """
    if not files:
        return
    ways = batch_ways(model.layout.mesh)
    size = -(-min(BATCH, len(files)) // ways) * ways
    shape = (size, model.preprocess.side, model.preprocess.side, model.preprocess.channels)
    program = _compile(model, shape, min(top, len(model.class_names)), features)
    in_flight: collections.deque[tuple[list[_Decoded], Any]] = collections.deque()
    with ThreadPoolExecutor(usable_cpus(), "decode") as pool:
        for group in _groups(_decoded(pool, model, files, 2 * size), size, strict=strict):
            in_flight.append((group, program(_batch(group, shape))))
            if len(in_flight) > IN_FLIGHT:
                yield from _predictions(*in_flight.popleft())
        while in_flight:
            yield from _predictions(*in_flight.popleft())


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """A file's pixels, uint8 [side, side, C], or why there are none."""

    file: str
    pixels: np.ndarray | None
    error: str = ""


def _decoded(pool: ThreadPoolExecutor, model: Trained, files: Sequence[str], ahead: int) -> Iterator[_Decoded]:
    """The files in their order, so many decoded ahead."""

    def read(file: str) -> _Decoded:
        try:
            return _Decoded(file, model.preprocess.square(file))
        except DataError as error:
            return _Decoded(file, None, str(error))

    waiting: collections.deque[Future[_Decoded]] = collections.deque()
    try:
        for file in files:
            waiting.append(pool.submit(read, file))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _groups(decoded: Iterable[_Decoded], size: int, *, strict: bool) -> Iterator[list[_Decoded]]:
    """Runs of files, of which `size` (in the last one at most so many) could be read."""
    group: list[_Decoded] = []
    for each in decoded:
        if strict and each.error:
            raise DataError(each.error)
        group.append(each)
        if sum(one.pixels is not None for one in group) == size:
            yield group
            group = []
    if group:
        yield group


def _batch(group: Sequence[_Decoded], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of those that could be read, uint8 `shape`, and zeros behind them."""
    batch, read = np.zeros(shape, np.uint8), [each.pixels for each in group if each.pixels is not None]
    for row, pixels in enumerate(read):
        batch[row] = pixels
    return batch


def _compile(model: Trained, shape: tuple[int, ...], top: int, features: bool) -> Callable[[np.ndarray], Any]:
    """The program: images uint8 `shape` -> (classes int32 [B, top], their probabilities, features [B, D] or None)."""
    layout, weights = model.layout, model.variables
    function = jax.jit(functools.partial(_answer, model, top, features), out_shardings=layout.sharding())
    images: Any = jax.ShapeDtypeStruct(shape, np.uint8, sharding=layout.examples)
    compiled = function.lower(weights["params"], weights["batch_stats"], images).compile()

    def program(batch: np.ndarray) -> Any:
        with jax.transfer_guard_host_to_device("allow"):
            placed = jax.device_put(batch, layout.examples)
        return compiled(weights["params"], weights["batch_stats"], placed)

    return program


def _answer(
    model: Trained, top: int, features: bool, params: PyTree, batch_stats: PyTree, images: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    inputs = eval_inputs(model.preprocess.inputs, images)
    context = Context(example=jnp.arange(images.shape[0], dtype=jnp.int32))
    wrap = layer_wrapper(model.layout, params, "none")
    embedding = None
    if features:
        logits, embedding = model.classifier.embed(params, batch_stats, inputs, context, wrap=wrap)
    else:
        logits, _ = model.classifier.apply(params, batch_stats, inputs, context, wrap=wrap)
    _, classes = jax.lax.top_k(logits, top)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), classes, -1)
    return classes, probabilities, None if embedding is None else embedding.astype(jnp.float32)


def _predictions(group: Sequence[_Decoded], answers: Any) -> Iterator[Prediction]:
    classes, probabilities, features = jax.device_get(answers)
    row = 0
    for each in group:
        if each.pixels is None:
            yield Prediction(each.file, each.error)
            continue
        embedding = None if features is None else features[row]
        yield Prediction(each.file, "", tuple(classes[row].tolist()), tuple(map(float, probabilities[row])), embedding)
        row += 1

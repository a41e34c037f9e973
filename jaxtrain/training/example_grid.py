"""The first examples of a run as its model sees them: augmented, in a grid."""

from __future__ import annotations

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxtrain.data.augment import train_images
from jaxtrain.data.order import batch_indices
from jaxtrain.step.train_state import AUGMENT, role_key
from jaxtrain.training.setup import RunSpec


def first_examples(run: RunSpec, count: int) -> np.ndarray:
    """The first `count` examples of the first update, augmented as there: uint8 [count, S, S, C].

    Computed on one device of this process. There are no more than a batch has.
    """
    config, pre = run.config, run.task.preprocess
    count = min(count, config.data.global_batch)
    together = min(count + count % 2, config.data.global_batch)  # mixup has partners
    images, _ = run.dataset.train.read(batch_indices(len(run.dataset.train), config.seed, 0, together))
    mean, std = (np.asarray(values, np.float32) for values in (pre.mean, pre.std))

    def augmented(images: jax.Array) -> jax.Array:
        key = jax.random.fold_in(role_key(config.seed, AUGMENT), 0)
        seen = train_images(pre, images, jnp.arange(together, dtype=jnp.int32), key).astype(jnp.float32)
        return jnp.clip(jnp.round(255 * (seen * std + mean)), 0, 255).astype(jnp.uint8)

    with jax.default_device(run.layout.mesh.local_devices[0]), jax.transfer_guard_host_to_device("allow"):
        return np.asarray(jax.jit(augmented)(images))[:count]


def grid_png(images: np.ndarray) -> tuple[bytes, tuple[int, int]]:
    """Images uint8 [N, S, S, C] side by side, as near to a square as they go: a PNG, and its width and height in pixels."""
    count, side, _, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.zeros((rows * columns, side, side, 3), np.uint8)
    tiles[:count] = images[..., :3] if channels >= 3 else images[..., :1]
    grid = tiles.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    file = io.BytesIO()
    Image.fromarray(grid).save(file, "PNG")
    return file.getvalue(), (columns * side, rows * side)

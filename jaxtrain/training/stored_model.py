"""A trained model without its data set: the weights of a checkpoint, and what its run has recorded of its images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.manifest import unless_deleted
from jaxtrain.config import Config, LayoutConfig, flatten, to_dict
from jaxtrain.data.record import DatasetRecord
from jaxtrain.errors import CheckpointError, ConfigError
from jaxtrain.host.files import closing
from jaxtrain.models import registry as models
from jaxtrain.models.classifier import Classifier
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.plugins import refuse_code
from jaxtrain.precision import precision_policy
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.evaluate import find_stored
from jaxtrain.trees import PyTree
from jaxtrain.workdir import named


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model with its weights on one device.

    config: of its run. images: what the run has recorded of them: size, normalization, class names. step: the
    checkpoint's. weights: `raw`, or `ema` for their moving average.
    """

    config: Config
    images: DatasetRecord
    model: Classifier
    params: PyTree
    batch_stats: PyTree
    step: int
    weights: str


def read_model(
    workdir: str | Path, *, checkpoint: str = "best", ema: bool | None = None, trust: bool = False
) -> StoredModel:
    """Reads the model of a checkpoint of the run in `workdir`; its data set is not touched.

    Args:
      workdir: the run's work directory.
      checkpoint: `best`, `latest`, a step, `epoch:N` or a path.
      ema: whether to take the moving average of the weights; None: where the run keeps one.
      trust: run the code that the run's config names.

    Raises:
      CheckpointError: the run has no such checkpoint, or one of an older version that did not record its images.
      ConfigError: the run keeps no average, or its config names code and `trust` is not set.
    """
    start, position, config = find_stored(named(workdir), checkpoint)
    folder, images = start.directory / str(start.step), position.dataset
    if not trust:
        refuse_code(flatten(to_dict(config)) | {"data.name": ""}, folder)
    if ema and not config.optim.ema:
        raise ConfigError(f"{workdir} keeps no moving average of the weights (config.optim.ema=0).")
    if not images.mean:
        raise CheckpointError(
            f"{folder} is of an older version of jaxtrain, which did not record what its images were."
        )
    ema = bool(config.optim.ema) if ema is None else ema
    shape = (images.image_size, images.image_size, len(images.mean))
    types = precision_policy(config.train.precision)
    section = dataclasses.replace(config.model, attention="plain")  # which every device computes
    model = models.build(section, shape, images.num_classes, types.compute_dtype, types.param_dtype)
    where = Layout(make_mesh(LayoutConfig(), jax.local_devices()[:1]), LayoutConfig()).sharding()

    def fresh() -> TrainState:
        params, stats = model.init(jax.random.key(0), (1, *shape), types.compute_dtype)
        average = {"params": params, "batch_stats": stats} if ema else ()
        return TrainState(jnp.zeros((), jnp.int32), params, stats, (), average, ())

    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), jax.eval_shape(fresh)
    )
    with closing(Checkpointer(start.directory, read_only=True)) as checkpoints, unless_deleted(folder):
        state = checkpoints.restore_weights(start.step, shapes)
    found = state.ema if ema else {"params": state.params, "batch_stats": state.batch_stats}
    which = "ema" if ema else "raw"
    return StoredModel(config, images, model, found["params"], found["batch_stats"], start.step, which)

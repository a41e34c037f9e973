"""A trained model as one program with its weights inside, for processes that have JAX and nothing of jaxtrain."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxtrain.data.augment import eval_inputs
from jaxtrain.host.files import atomic_write, writing
from jaxtrain.models.layers import Context
from jaxtrain.precision import precision_policy
from jaxtrain.training.trained import Trained

PLATFORMS = ("cpu", "cuda")


def to_stablehlo(model: Trained) -> tuple[bytes, dict[str, Any]]:
    """The program, as `jax.export` serializes it, and what its user must know, for a JSON file.

    It maps images, uint8 [b, side, side, channels] for any b, to logits [b, classes]. The centre crop of `resize_crop` and the
    normalization are inside; its user resizes the shorter side to `side`, and takes the centre square. The same program runs
    on `PLATFORMS`.

    Args:
      model: on one device.
    """
    weights = jax.device_get(model.variables)
    products = precision_policy(model.config.train.precision).products

    def logits_of(images: jax.Array) -> jax.Array:
        inputs = eval_inputs(model.preprocess.inputs, images)
        context = Context(example=jnp.arange(images.shape[0], dtype=jnp.int32))
        with jax.default_matmul_precision(products):
            logits, _ = model.classifier.apply(weights["params"], weights["batch_stats"], inputs, context)
        return logits

    side, channels = model.preprocess.side, model.preprocess.channels
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, side, side, channels), np.uint8)
    exported = export.export(jax.jit(logits_of), platforms=PLATFORMS)(images)
    inputs = model.preprocess.inputs
    about = {
        "input": {"type": "uint8", "shape": ["b", side, side, channels]},
        "output": {"type": str(exported.out_avals[0].dtype), "shape": ["b", len(model.class_names)], "is": "logits"},
        "resize": f"the shorter side to {side} pixels, bilinear and antialiased; then the centre square",
        "inside": {"image_size": inputs.image_size, "mean": list(inputs.mean), "std": list(inputs.std)},
        "class_names": list(model.class_names),
        "platforms": list(PLATFORMS),
        "model": model.config.model.name,
        "step": model.step,
        "weights": model.weights,
        "jax": importlib.metadata.version("jax"),
    }
    return bytes(exported.serialize()), about


def write_stablehlo(model: Trained, out: Path) -> str:
    """Writes the program to `out`, and beside it `out` + ".json" with what its user must know. Returns what it is, in words.

    Raises `WorkdirError` where a file cannot be written.
    """
    program, about = to_stablehlo(model)
    part = out.with_name(f".{out.name}.part")
    with writing(out):
        part.write_bytes(program)
        part.replace(out)
    atomic_write(out.with_name(f"{out.name}.json"), json.dumps(about, indent=1) + "\n")
    side, channels = model.preprocess.side, model.preprocess.channels
    return f"a program for {' and '.join(PLATFORMS)}: uint8 images [b, {side}, {side}, {channels}] to logits"

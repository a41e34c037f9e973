"""Memory of a run that begins with weights from a file: VGG-19 of width 32 under ZeRO-3, on four simulated devices.

python -m benchmarks.cpu.weights
"""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, TrainConfig
from jaxtrain.data import registry
from jaxtrain.step.train_state import create_state, state_shapes
from jaxtrain.training.initial_weights import initial_weights, weights_of
from jaxtrain.training.setup import make_run_spec
from jaxtrain.weights.writing import rows_for

DEVICES = 4


def _memory(field: str) -> int:
    """Bytes of a field of this process's status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure() -> dict[str, int]:
    """Bytes: of the file, counted on the devices and on the host while it is read, and of the process."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg19.safetensors"
        data = DataConfig("synthetic", global_batch=8, image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
        model = ModelConfig("vgg19", width=32, num_classes=10, init_from=str(path))
        config = Config(data=data, model=model, layout=LayoutConfig(zero=3), train=TrainConfig(precision="f32"))
        outline = registry.outline(data, image_size=224)
        run = make_run_spec(config, outline, jax.devices())
        shapes = state_shapes(run.init, run.layout)
        ours = {name: leaf.shape for name, leaf in weights_of(shapes).items()}
        rows, _ = rows_for("torchvision", model.name, (), ours)
        tensors = {row.theirs[0]: np.ones(row.form_of(ours[row.ours]).theirs, np.float32) for row in rows}
        safetensors.numpy.save_file(tensors, path)
        del tensors
        before = _memory("RssAnon")
        tracemalloc.start()
        given, _ = initial_weights(run, shapes)
        counted = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        jax.block_until_ready(given)
        read = _memory("RssAnon")
        largest = max(int(np.prod(shape)) * 4 for shape in ours.values())
        on_device = [sum(s.data.nbytes for leaf in given.values() for s in leaf.addressable_shards if s.device == d)
                     for d in jax.devices()]  # fmt: skip
        state = jax.block_until_ready(create_state(run.init, run.layout, 0, given))
        del given
        return {
            "file": path.stat().st_size, "largest leaf": largest, "weights on a device": max(on_device),
            "weights on all devices": sum(on_device), "host arrays, peak": counted, "process, by the weights": read - before,
            "process, with the state": _memory("RssAnon") - before,
            "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))

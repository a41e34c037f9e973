"""Runs drawn at random, each under a layout drawn at random and on one device: their numbers must agree (parity.py).

    JAXTRAIN_DATA_DIR=DIR python tests/parity/random_layouts.py SEED COUNT [FIRST]

On real CIFAR-10 images, in f64, on 3, 5, 6 or 12 simulated devices. Every model meets every optimizer in 36 draws. A line
each; ends with 1 if one differed by more than 1e-12. `SEED 1 INDEX` gives the run of one line again.

What is not drawn, because its numbers would be rounding and little else:

- A parameter whose gradient is zero whatever the images, under an optimizer that divides a gradient by its size: the bias in
  front of a BatchNorm (those optimizers get VGG without it), and an attention's bias of the keys, which a softmax does not
  see (Swin does not get Lion; the others' `eps` is far above that rounding).
- An `eps` as small as the gradients are here: Adam would multiply their rounding by the rate over `eps`, 1e5 by default.
- BatchNorm over two or three values, at the end of a small image: whatever they are, two come out as 1 and -1, and their
  gradient is what rounding leaves of it.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

DEVICES = (3, 5, 6, 12)
os.environ["JAXTRAIN_TEST_DEVICES"] = str(max(DEVICES))

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: E402, F401  the devices, and XLA's flags
import parity  # noqa: E402

from jaxtrain.config import LayoutConfig  # noqa: E402

TOLERANCE = 1e-12

RESNET = {"model.name": "resnet18", "model.depths": (1, 1, 1, 1), "model.width": 12}
SWIN = {"model.name": "swin_tiny", "model.depths": (2, 1, 1, 1), "model.width": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"model.width": 36, "model.depths": (5,)}),
    "resnet": ("resnet", RESNET | {"data.image_size": 16}),
    "resnet imagenet": ("resnet", RESNET | {"data.image_size": 32, "model.stem": "imagenet"}),
    "vgg": ("vgg", {"model.depths": (), "model.width": 6}),
    "convnet": ("convnet", {"model.width": 6, "data.image_size": 32}),
    "swin": ("swin", SWIN | {"data.image_size": 16}),
}
# Rates at which a few steps move the numbers and do not blow up the rounding.
RATES = {"sgd": 0.05, "adamw": 1e-3, "lamb": 1e-3, "lars": 2.0, "lion": 1e-4, "muon": 0.02}
DIVIDES_BY_SIZE = ("adamw", "lamb", "lion", "muon")


def draw(seed: int, index: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The key of `parity.MODELS`, the layout's fields and the run's, of run `index`."""
    chance = random.Random(f"{seed} {index}")
    names, optimizers = list(MODELS), list(RATES)
    name = names[index % len(names)]
    optimizer = optimizers[(index + index // len(names)) % len(optimizers)]
    if name == "swin" and optimizer == "lion":
        optimizer = chance.choice([other for other in optimizers if other != "lion"])
    model, fields = MODELS[name][0], dict(MODELS[name][1])
    if model == "vgg":
        fields["model.name"] = chance.choice(["vgg11", "vgg13"]) + ("" if optimizer in DIVIDES_BY_SIZE else "_bn")
    batch_norm = model in ("resnet", "convnet") or fields.get("model.name", "").endswith("_bn")

    devices = chance.choice(DEVICES)
    stages = chance.choice([n for n in (1, 1, 2, 3, 4) if devices % n == 0])
    tensor = chance.choice([n for n in (1, 1, 1, 2) if devices // stages % n == 0])
    ways = devices // stages // tensor
    replica = chance.choice([n for n in (1, 1, 2, 3) if ways % n == 0])
    layout: dict[str, Any] = {"stages": stages, "tensor": tensor, "replica": replica, "data": ways // replica}
    layout["zero"] = chance.randrange(4) if layout["data"] > 1 else 0
    layout["microbatches"] = parts = chance.choice((1, 2, 3, 3, 5) if stages == 1 else (stages, 2 * stages, 3))
    if stages > 1:
        interleaved = parts % stages == 0 and stages < 4  # of 4 x 2 chunks some models have too few layers
        layout["schedule"] = chance.choice(("gpipe", "1f1b") + ("interleaved_1f1b",) * interleaved)
        layout["chunks"] = 2 if layout["schedule"] == "interleaved_1f1b" else 1
        if chance.random() < 0.5:
            layout["boundaries"] = tuple(sorted(chance.sample(range(1, 6), stages * layout["chunks"] - 1)))

    mixes = chance.choice(({}, {}, {"data.mixup": 0.4}, {"data.cutmix": 1.0}, {"data.mixup": 0.2, "data.cutmix": 1.0}))
    part = ways * chance.choice([n for n in (1, 3, 5, 7) if n * ways >= 4 and n * ways * parts <= 72] or [5])
    if part % 2 and mixes and parts > 1:
        part *= 2  # partners share a microbatch
    batch = part * parts
    groups = [parts * n for n in range(1, part // 4 + 1) if part % n == 0]
    fields |= {
        "seed": chance.randrange(1000),
        "data.name": "parity:cifar",
        "data.examples": 0,
        "data.global_batch": batch,
        "data.augmentation": chance.choice(("none", "light", "light", "heavy", "resize_crop")),
        "data.mixup": 0.0,
        **mixes,
        "model.dropout": chance.choice((0.0, 0.1)),
        "optim.name": optimizer,
        "optim.learning_rate": RATES[optimizer],
        "optim.lr_reference_batch": batch,
        "optim.eps": 1e-6,
        "optim.nesterov": chance.random() < 0.3,
        "optim.ema": chance.choice((0.9, 0.99)),
        "optim.clip_norm": chance.choice((0.0, 1.0)),
        "train.steps": 3,
    }
    fields["model.bn_groups"] = chance.choice(groups) if batch_norm else 1
    if chance.random() < 0.3:
        fields |= {"data.mean": (0.5,) * 3, "data.std": (0.5,) * 3}
    return model, layout, fields


def main(seed: int, indices: range) -> int:
    """Prints a line for each run and one for all; 1 if any differs."""
    worst, failed = 0.0, 0
    for index in indices:
        model, layout, fields = draw(seed, index)
        one, other = (
            parity.numbers(parity.run(model, LayoutConfig(**where), **fields)) for where in ({"data": 1}, layout)
        )
        errors = parity.errors(other, one)
        key = max(errors, key=lambda key: errors[key])
        worst, failed = max(worst, errors[key]), failed + (not errors[key] <= TOLERANCE)
        print(f"{index}: {errors[key]:.1e} {key} | {model} {layout} {fields}", flush=True)
    print(f"seed {seed}: {len(indices)} layouts, {failed} differ, worst relative error {worst:.1e}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    seed, count, first = map(int, [*sys.argv[1:], "0"][:3])
    sys.exit(main(seed, range(first, first + count)))

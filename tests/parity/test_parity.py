"""The contract of every layout: the same numbers (docs/architecture.md). In f64, where a wrong scale cannot hide."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

import jaxtrain.data.augment
import jaxtrain.step.gradients
import jaxtrain.step.train_step
from jaxtrain.checkpoint.resume_point import Position, ResumePoint
from jaxtrain.config import DataConfig, LayoutConfig
from jaxtrain.data import registry, tfds_sets
from jaxtrain.models.layers import Context
from jaxtrain.recipes import LAYOUTS as LAYOUT_ARGUMENTS
from jaxtrain.recipes import change, resolve
from jaxtrain.training.compiled import compile_run
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.setup import load_data, make_run_spec

ROOT = Path(__file__).parents[2]
ONE = LayoutConfig(data=1)

LAYOUTS = {
    "data2": LayoutConfig(data=2),
    "data8": LayoutConfig(data=8),
    "accumulate4": LayoutConfig(data=1, microbatches=4),
    "data2-accumulate2": LayoutConfig(data=2, microbatches=2),
    "zero1": LayoutConfig(data=8, zero=1),
    "zero2-accumulate2": LayoutConfig(data=4, zero=2, microbatches=2),
    "zero3": LayoutConfig(data=8, zero=3),
    "zero3-accumulate4": LayoutConfig(data=2, zero=3, microbatches=4),
    "hybrid": LayoutConfig(data=2, replica=2, zero=3),
    "hybrid-zero1-accumulate2": LayoutConfig(data=4, replica=2, zero=1, microbatches=2),
    "tensor2": LayoutConfig(data=1, tensor=2),
    "tensor2-data2-zero3": LayoutConfig(data=2, tensor=2, zero=3),
    "tensor2-data2-zero2-accumulate2": LayoutConfig(data=2, tensor=2, zero=2, microbatches=2),
    "ring8": LayoutConfig(data=8, reduce="ring"),
    "tree4-zero2-accumulate2": LayoutConfig(data=4, zero=2, microbatches=2, reduce="tree", reduce_bucket=0.001),
    "hierarchical-zero3": LayoutConfig(data=4, replica=2, zero=3, reduce="hierarchical"),
    "hierarchical-tensor2-zero1": LayoutConfig(data=2, replica=2, tensor=2, zero=1, reduce="hierarchical"),
}


@functools.cache
def reference(model: str) -> dict[str, np.ndarray]:
    return parity.numbers(parity.run(model, ONE))


# By default each kind of layout with the cheapest model; of the others what differs in kind (BatchNorm, split channels).
DEFAULT = {
    "mlp": ("data8", "accumulate4", "zero1", "zero2-accumulate2", "zero3", "hybrid", "tensor2-data2-zero3", "ring8"),
    "resnet": ("zero3-accumulate4", "tensor2-data2-zero2-accumulate2", "hierarchical-tensor2-zero1"),
    "vgg": (),
    "convnet": ("zero2-accumulate2",),
    "swin": (),
}
# Reductions of our own see no layers but BatchNorm: of the dear models one each, and the rest in the slow group.
FEW = {
    "mlp": None,
    "resnet": ("ring8", "hierarchical-tensor2-zero1"),
    "vgg": (),
    "convnet": (),
    "swin": ("hierarchical-zero3",),
}
CASES = [
    pytest.param(model, layout, marks=pytest.mark.slow)
    if LAYOUTS[layout].reduce != "auto" and FEW[model] is not None and layout not in FEW[model]
    else parity.case(model, layout, default=layout in DEFAULT[model])
    for model in parity.MODELS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_layout_changes_no_number(model, layout):
    found = parity.numbers(parity.run(model, LAYOUTS[layout]))
    parity.assert_equal(found, reference(model), 1e-12)


@pytest.mark.parametrize("model", [parity.case(model, default=bool(DEFAULT[model])) for model in parity.MODELS])
def test_the_reference_learns(model):
    losses = reference(model)["loss"]
    assert len(losses) >= 6
    # Behind whitening and BatchNorm six steps move convnet less, at any rate: 0.039 measured.
    assert np.ptp(losses) / losses[0] >= (0.03 if model == "convnet" else 0.05)


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["data8", "zero2-accumulate2"])
@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_in_f32_rounding_alone_differs(model, layout):
    small = {"train.precision": "f32", "optim.learning_rate": 1e-4}
    found, wanted = (parity.numbers(parity.run(model, each, **small)) for each in (LAYOUTS[layout], ONE))
    for key in ("loss", "test", "test_ema"):
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("resnet", "tensor2-data2-zero2-accumulate2"),
        pytest.param("resnet", "zero3-accumulate4", marks=pytest.mark.parity),
        pytest.param("mlp", "zero2-accumulate2", marks=pytest.mark.parity),
    ],
)
def test_what_a_gpu_computes_instead_changes_no_number(model, layout, monkeypatch):
    wanted = reference(model)

    def gpus_choice(*arguments, default, cuda=None, cpu=None):
        del cpu
        return (cuda or default)(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", gpus_choice)
    parity.assert_equal(parity.numbers(parity.run(model, LAYOUTS[layout])), wanted, 1e-12)


# ---------------------------------------------------------------------------------------------------------------- ties

# The models with a max-pool, on images with areas that are flat or rise by whole levels; `data.mean` makes the colours'
# differences tie as well. Noise, which `synthetic` is made of, has no ties.
POOLED = {"convnet": {}, "vgg": {}, "resnet": {"model.stem": "imagenet", "optim.learning_rate": 0.1}}
IMAGES = {
    "plain": {"data.mixup": 0.0},
    "mixed": {"data.mixup": 0.4, "data.mean": (0.5,) * 3, "data.std": (0.5,) * 3},
}
THREE = {
    "data3": LayoutConfig(data=3),
    "accumulate3": LayoutConfig(data=1, microbatches=3),
    "data3-accumulate3-zero2": LayoutConfig(data=3, zero=2, microbatches=3),
    "ring3": LayoutConfig(data=3, reduce="ring"),
}


def on_flat_areas(source: str, model: str, images: str, layout: LayoutConfig) -> dict[str, np.ndarray]:
    """A short run on the data set `source` of parity.py."""
    fields = {
        "data.name": f"parity:{source}",
        "data.examples": 0,
        "data.global_batch": 18,
        "data.image_size": 32,
        "data.augmentation": "light",
    }
    fields |= {"optim.lr_reference_batch": 18, "model.bn_groups": 3, "train.steps": 3}
    return parity.numbers(parity.run(model, layout, **fields, **POOLED[model], **IMAGES[images]))


flat_reference = functools.cache(functools.partial(on_flat_areas, layout=ONE))

TIED = [
    ("convnet", "plain", "data3"),
    ("convnet", "plain", "accumulate3"),
    ("convnet", "mixed", "data3-accumulate3-zero2"),
    ("convnet", "mixed", "ring3"),
    ("vgg", "plain", "data3-accumulate3-zero2"),
    ("resnet", "plain", "data3-accumulate3-zero2"),
]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("source", "model", "images", "layout"),
    [
        parity.case(source, *tied, default=(source, *tied) == ("flat", *TIED[2]))
        for source in ("flat", "cifar")
        for tied in TIED
    ],
)
def test_ties_of_a_max_pool_change_no_number(source, model, images, layout):
    if source == "cifar":
        need_cifar()
    found = on_flat_areas(source, model, images, THREE[layout])
    parity.assert_equal(found, flat_reference(source, model, images), 1e-12)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_layouts():
    """JAXTRAIN_PARITY_SEED=7 JAXTRAIN_PARITY_COUNT=40 python -m pytest tests/parity/test_parity.py -k random -m slow -n0 -s"""
    need_cifar()
    seed, count = (os.environ.get(f"JAXTRAIN_PARITY_{key}", value) for key, value in (("SEED", "1"), ("COUNT", "40")))
    subprocess.run([sys.executable, Path(__file__).with_name("random_layouts.py"), seed, count], check=True)


def need_cifar() -> None:
    root = Path(os.environ.get("JAXTRAIN_DATA_DIR", "/nowhere"))
    if not (root / "downloads" / "manual").is_dir() and not tfds_sets.cifar_directory("cifar10", root).is_dir():
        pytest.skip(f"cifar10 is not in $JAXTRAIN_DATA_DIR={root}")
    registry.prepare(DataConfig(name="cifar10"))


# ------------------------------------------------------------------------------------------------------ planted faults


def drop_a_microbatch(monkeypatch):
    call = jaxtrain.step.train_step.MeshTrainStep.__call__

    def fewer(self, *args):
        object.__setattr__(self, "microbatches", self.microbatches[:1])
        return call(self, *args)

    monkeypatch.setattr(jaxtrain.step.train_step.MeshTrainStep, "__call__", fewer)


def sum_gradients(monkeypatch):
    gradients = jaxtrain.step.gradients.microbatch_gradients

    def summed(task, layout, *args):
        sums = gradients(task, layout, *args)
        parts = layout.config.microbatches
        return sums.replace(gradients=jax.tree.map(lambda g: g * parts, sums.gradients))

    monkeypatch.setattr(jaxtrain.step.train_step, "microbatch_gradients", summed)


def normalize_per_device(monkeypatch):
    def context(bn_groups, **more):
        return Context(bn_groups=bn_groups * 2, **more)

    monkeypatch.setattr(jaxtrain.step.gradients, "Context", context)


def drop_the_same_on_every_device(monkeypatch):
    def context(example, **more):
        return Context(example=example % (example.shape[0] // 2), **more)

    monkeypatch.setattr(jaxtrain.step.gradients, "Context", context)


def mix_across_the_batch(monkeypatch):
    monkeypatch.setattr(jaxtrain.data.augment, "_partners", lambda x: jnp.flip(x, 0))


FAULTS = [drop_a_microbatch, sum_gradients, normalize_per_device, drop_the_same_on_every_device, mix_across_the_batch]


@pytest.mark.parametrize("fault", parity.planted(FAULTS, default=drop_a_microbatch))
def test_a_planted_fault_shows(fault, monkeypatch):
    """Each breaks only what a layout does: the reference was computed before, without it."""
    wanted = reference("resnet")
    fault(monkeypatch)
    found = parity.numbers(parity.run("resnet", LAYOUTS["data2-accumulate2"]))
    with pytest.raises(AssertionError, match="relative error"):
        parity.assert_equal(found, wanted, 1e-12)


# ------------------------------------------------------------------------------------------------------------- recipes

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
SWINS = ("swin_tiny_cifar10", "transformer_pipeline_zero")


@functools.cache
def recipe_losses(name: str, argument: str) -> list[float]:
    """The recipe's own optimizer, rate, augmentation and model family, shrunk to what a test can pay for."""
    devices = jax.devices()[: 4 if argument else 1]
    shrunk = {
        "data.name": "synthetic",
        "data.examples": 64,
        "data.image_size": {"mlp_synthetic": 0, "vgg19_cifar10": 32, "resnet_fast_cifar10": 9}.get(
            name, 16 if name in SWINS else 8
        ),
        "data.global_batch": 16,
        "optim.lr_reference_batch": 16,
        "optim.warmup": "0",
        "model.width": 16 if name in SWINS else 4,
        "model.depths": {"mlp_synthetic": (7,), "vgg19_cifar10": (), "resnet_fast_cifar10": (1, 1, 1)}.get(
            name, (1, 1, 1, 1)
        ),
        "model.bn_groups": 2,
        "train.precision": "f64",
        "train.steps": 6,
        # where the accumulator is what zero2 shards; the pipelines choose for themselves
        "layout.microbatches": {"zero2": 2, "pipeline2": 0, "pipeline4": 0}.get(argument, 1),
    }
    if not argument:
        shrunk["layout.stages"] = 1
    resolved = resolve(f"{ROOT / 'configs' / name}.py:{argument}").config
    run_config = change(resolved, **shrunk)
    with settings(run_config):
        run = make_run_spec(run_config, load_data(run_config.data), devices)
        engine, state = compile_run(run, ResumePoint(None, Position(), None))
        losses = []
        for batch in engine.batches(first_step=0, first_example=0, steps=6):
            state, metrics = engine.step(state, batch, engine.inputs.resident)
            losses.append(float(metrics["loss"]))
    return losses


def _group(recipe: str, argument: str) -> list[pytest.MarkDecorator]:
    """By default one argument of the cheapest recipe, in `parity` all of one and two of each. The layouts are tested above."""
    if (recipe, argument) == ("mlp_synthetic", "tensor2"):
        return []
    wide = recipe == "resnet18_cifar10" or argument in ("hybrid", "pipeline2")
    return [pytest.mark.parity if wide else pytest.mark.slow]


ARGUMENTS = [
    pytest.param(recipe, argument, marks=_group(recipe, argument))
    for recipe in RECIPES
    for argument in LAYOUT_ARGUMENTS
]


@pytest.mark.parametrize(("recipe", "argument"), ARGUMENTS)
def test_layout_arguments_of_recipes(recipe, argument):
    np.testing.assert_allclose(recipe_losses(recipe, argument), recipe_losses(recipe, ""), rtol=1e-12)

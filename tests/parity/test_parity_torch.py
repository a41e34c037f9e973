"""Logits and one step's gradients against PyTorch modules that carry the same weights.

ResNet and Swin are those of `transformers`, built from their configs without a download; VGG is written out below as in
torchvision. All weights, BatchNorm statistics and bias tables are random. The reference is PyTorch in f64. jaxtrain
must be as near as 1e-9 in f64, and 1e-5 in f32 with matrix products at highest precision: relative to the largest
logit, and for gradients and new running statistics to the largest value of the leaf.

The f32 gradients are those with running statistics. With batch statistics of so few examples a ResNet-50 is chaotic in
f32: PyTorch's own f32 gradients are then up to 20 % off its f64 ones (and 3e-6 with running statistics).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest

from jaxtrain.config import ModelConfig
from jaxtrain.models import registry, vgg
from jaxtrain.models.classifier import layer_name
from jaxtrain.models.layers import Context

torch: Any = None
transformers: Any = None


@pytest.fixture(scope="module", autouse=True)
def _references() -> None:
    """Imports both when a test needs them: they take 300 MB, and every process of the suite collects this file."""
    reasons = {"torch": "PyTorch is the reference", "transformers": "its ResNet and Swin are the reference"}
    for name, reason in reasons.items():
        setattr(sys.modules[__name__], name, pytest.importorskip(name, reason=f"{reason}; install jaxtrain[parity]"))


CLASSES, BATCH = 10, 2
TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-9}


# ------------------------------------------------------------------------------------------ the references, in PyTorch


def torch_resnet50(depths):
    config = transformers.ResNetConfig(num_labels=CLASSES, depths=list(depths))
    return transformers.ResNetForImageClassification(config)


def torch_swin(image_size, patch, window, depths):
    config = transformers.SwinConfig(
        num_labels=CLASSES,
        image_size=image_size,
        patch_size=patch,
        window_size=window,
        depths=list(depths),
        drop_path_rate=0.0,
        attn_implementation="sdpa",  # the eager one takes its softmax in f32, also under f64
    )
    model = transformers.SwinForImageClassification(config)
    side = image_size // patch
    for stage in model.swin.encoder.layers:
        for block in stage.blocks:
            # A map smaller than the window has a table of the map's size in the original; transformers keeps the
            # window's, and fails.
            old = block.attention.relative_position_bias
            new = type(old)(old.relative_position_bias_table.shape[1], (min(window, side),) * 2)
            block.attention.relative_position_bias = new
        side = -(-side // 2)
    return model


def torch_vgg(depths, batch_norm, width):
    nn, hidden = torch.nn, 64 * width
    layers, channels = [], 3
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            outputs = width * min(2**stage, 8)
            layers += [nn.Conv2d(channels, outputs, 3, padding=1)]
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers += [nn.ReLU()]
            channels = outputs
        layers += [nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    layers += [nn.Linear(channels * 49, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, CLASSES))


def randomize(model, rng):
    """Fills every parameter and statistic with values that f32 holds exactly, far from the initial ones."""
    for name, tensor in model.state_dict().items():
        if not tensor.dtype.is_floating_point:
            continue
        noise = rng.standard_normal(tensor.shape, np.float32)
        if name.endswith("bias_table"):
            values = noise
        elif tensor.ndim > 1:
            values = noise * np.float32(np.prod(tensor.shape[1:]) ** -0.5)
        elif name.endswith(("running_var", "weight")):
            values = rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32)
        else:
            values = noise * np.float32(0.1)
        tensor.copy_(torch.from_numpy(values))


# -------------------------------------------------------- PyTorch's names and shapes -> ours; gradients go the same way


class Import:
    """Moves PyTorch's tensors (weights, or their gradients) into our trees; each must be taken exactly once."""

    def __init__(self, tensors):
        self.left = dict(tensors)
        self.params, self.stats = {}, {}

    def put(self, tree, path, value):
        *parents, name = path
        for key in parents:
            tree = tree.setdefault(layer_name(key) if isinstance(key, int) else key, {})
        assert name not in tree
        tree[name] = value

    def leaf(self, path, name, change=lambda value: value):
        if name in self.left:
            self.put(self.params, path, change(self.left.pop(name)))

    def conv(self, path, name):
        self.leaf((*path, "kernel"), f"{name}.weight", lambda value: value.transpose(2, 3, 1, 0))
        self.leaf((*path, "bias"), f"{name}.bias")

    def linear(self, path, name):
        self.leaf((*path, "kernel"), f"{name}.weight", np.transpose)
        self.leaf((*path, "bias"), f"{name}.bias")

    def norm(self, path, name):
        self.leaf((*path, "scale"), f"{name}.weight")
        self.leaf((*path, "bias"), f"{name}.bias")
        for ours in ("mean", "var"):
            if f"{name}.running_{ours}" in self.left:
                self.put(self.stats, (*path, ours), self.left.pop(f"{name}.running_{ours}").copy())


def resnet_import(tensors, depths):
    trees = Import(tensors)

    def unit(index, suffix, name, prefix=""):
        trees.conv((index, f"{prefix}conv{suffix}"), f"{name}.convolution")
        trees.norm((index, f"{prefix}bn{suffix}"), f"{name}.normalization")

    unit(0, "", "resnet.embedder.embedder")
    index = 1
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"resnet.encoder.stages.{stage}.layers.{block}"
            for i in range(3):
                unit(index, str(i + 1), f"{name}.layer.{i}")
            if block == 0:
                unit(index, "", f"{name}.shortcut", "shortcut_")
            index += 1
    trees.linear((index, "linear"), "classifier.1")
    return trees


def vgg_import(tensors, depths, batch_norm):
    trees, index, theirs = Import(tensors), 0, 0
    for depth in depths:
        for _ in range(depth):
            trees.conv((index, "conv"), str(theirs))
            if batch_norm:
                trees.norm((index, "bn"), str(theirs + 1))
            index, theirs = index + 1, theirs + (3 if batch_norm else 2)
        theirs += 1
    theirs += 2
    # We flatten [H, W, C], PyTorch [C, H, W].
    first = trees.left[f"{theirs}.weight"]
    hidden = len(first)
    trees.left[f"{theirs}.weight"] = first.reshape(hidden, -1, 7, 7).transpose(0, 2, 3, 1).reshape(hidden, -1)
    for i in range(3):
        trees.linear((index + i, "linear"), str(theirs + 2 * i))
    return trees


def swin_import(tensors, depths):
    trees = Import(tensors)
    trees.conv((0, "conv"), "swin.embeddings.patch_embeddings.projection")
    trees.norm((0, "norm"), "swin.embeddings.norm")
    index = 1
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"swin.encoder.layers.{stage}.blocks.{block}"
            attention = f"{name}.attention"
            table = f"{attention}.relative_position_bias.relative_position_bias_table"
            heads = trees.left[table].shape[1]
            kernels = [trees.left.pop(f"{attention}.{part}_proj.weight").T for part in "qkv"]
            biases = [trees.left.pop(f"{attention}.{part}_proj.bias") for part in "qkv"]
            channels = len(kernels[0])
            kernel = np.stack([value.reshape(channels, heads, -1) for value in kernels], 1)
            trees.put(trees.params, (index, "attn", "qkv", "kernel"), kernel)
            bias = np.stack([value.reshape(heads, -1) for value in biases])
            trees.put(trees.params, (index, "attn", "qkv", "bias"), bias)
            split = (heads, channels // heads, channels)
            proj = (index, "attn", "proj")
            trees.leaf((*proj, "kernel"), f"{attention}.o_proj.weight", lambda value, s=split: value.T.reshape(s))
            trees.leaf((*proj, "bias"), f"{attention}.o_proj.bias")
            trees.leaf((index, "attn", "bias_table"), table)
            trees.norm((index, "norm1"), f"{name}.layernorm_before")
            trees.norm((index, "norm2"), f"{name}.layernorm_after")
            trees.linear((index, "fc1"), f"{name}.mlp.fc1")
            trees.linear((index, "fc2"), f"{name}.mlp.fc2")
            index += 1
        if stage < len(depths) - 1:
            name = f"swin.encoder.layers.{stage}.downsample"
            trees.norm((index, "norm"), f"{name}.norm")
            trees.linear((index, "linear"), f"{name}.reduction")
            index += 1
    trees.norm((index, "norm"), "swin.layernorm")
    trees.linear((index, "linear"), "classifier")
    return trees


# --------------------------------------------------------------------------------------------------------- comparisons


@dataclasses.dataclass(frozen=True)
class Case:
    config: ModelConfig
    image_size: int
    build: Callable  # () -> the PyTorch module
    convert: Callable  # {PyTorch's name: array} -> Import
    seed: int = 0
    f32: bool = True


def resnet_case(depths, f32=True):
    config = ModelConfig(name="resnet50", depths=depths)
    return Case(config, 64, lambda: torch_resnet50(depths), lambda tensors: resnet_import(tensors, depths), f32=f32)


def swin_case(image_size, patch, window, depths, f32=True):
    config = ModelConfig(name="swin_tiny", patch=patch, window=window, depths=depths, drop_path=0.0)
    reference = (image_size, patch, window, depths)
    build, convert = lambda: torch_swin(*reference), lambda tensors: swin_import(tensors, depths)
    return Case(config, image_size, build, convert, f32=f32)


def vgg_case(name, image_size, width, seed=0, f32=True):
    depths, batch_norm = vgg.DEPTHS[name.removesuffix("_bn")], name.endswith("_bn")
    config = ModelConfig(name=name, stem="imagenet", width=width, dropout=0.0)

    def build():
        with torch.device("meta"):  # leaves out the initialisation of 140M weights
            model = torch_vgg(depths, batch_norm, width)
        return model.to_empty(device="cpu")

    return Case(config, image_size, build, lambda tensors: vgg_import(tensors, depths, batch_norm), seed, f32)


# By default the short and the narrow ones. VGG's layers at full width would take 5 GB, of which most is one matrix.
CASES = {
    "resnet50": resnet_case((3, 4, 6, 3)),
    "resnet50, short": resnet_case((2, 1, 1, 1), f32=False),
    "vgg19": vgg_case("vgg19", 64, 16, seed=2),
    "vgg11_bn, narrow": vgg_case("vgg11_bn", 96, 8, f32=False),
    # As at 224 px with window 7: 8, 4, 2 and 1 windows a side.
    "swin_tiny": swin_case(96, 4, 3, (2, 2, 6, 2)),
    # As at 32 px by itself: the last map, 2 x 2, is smaller than the window.
    "swin_tiny, cifar": swin_case(32, 2, 4, (2, 2, 2, 2)),
    # Maps of 28, 14, 7 and 4 a side: patches, windows and merged squares that need padding.
    "swin_tiny, padded": swin_case(55, 2, 4, (1, 1, 2, 1), f32=False),
}


def arrays(tensors):
    return {name: value.detach().numpy() for name, value in tensors if value.dtype.is_floating_point}


def pytorch_step(case, model, images, labels, train):
    """(logits, gradients, new statistics), in f64 and in our names and shapes."""
    model.train(train).zero_grad()
    logits = model(torch.from_numpy(images).double().permute(0, 3, 1, 2))
    logits = getattr(logits, "logits", logits)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    gradients = case.convert(arrays((name, value.grad) for name, value in model.named_parameters()))
    assert not gradients.left
    stats = case.convert(arrays(model.state_dict().items())).stats if train else {}
    return logits.detach().numpy(), gradients.params, stats


def our_step(case, trees, dtype, train):
    """`(images, labels) -> the same`, by the jaxtrain model with the parameters and statistics `trees`."""
    shape = (case.image_size, case.image_size, 3)
    model = registry.build(case.config, shape, CLASSES, dtype, dtype)
    own = jax.eval_shape(lambda key: model.init(key, (1, *shape), dtype), jax.random.key(0))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, trees)
    params, stats = jax.tree.map(lambda value: jnp.asarray(value, dtype), trees)

    def loss(params, stats, images, labels):
        context = Context(jnp.arange(BATCH), train=train)
        logits, stats = model.apply(params, stats, images, context)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, stats)

    # XLA's level 0 (conftest.py) computes some values twice, rounded differently: a gradient that looks for the values
    # equal to a maximum finds none there.
    step = jax.jit(jax.grad(loss, has_aux=True))

    def run(images, labels):
        with jax.default_matmul_precision("highest"):
            gradients, (logits, new_stats) = step(params, stats, jnp.asarray(images, dtype), labels)
        return jax.device_get((logits, gradients, new_stats if train else {}))

    return run


def largest(array):
    return max(array.max(), -array.min())


def errors(expected, got):
    """{path: largest difference / largest value in the leaf} over two (logits, gradients, new statistics)."""
    # The gradient of a bias before a BatchNorm is nothing but rounding errors.
    floor = 1e-3 * max(largest(leaf) for leaf in jax.tree.leaves(expected[1]))

    def error(a, b):
        return largest(a - b) / max(largest(a), floor)

    return {jax.tree_util.keystr(path): e for path, e in jax.tree.leaves_with_path(jax.tree.map(error, expected, got))}


DEFAULT = ("resnet50, short", "vgg11_bn, narrow", "swin_tiny, padded")


@pytest.mark.parametrize("name", [parity.case(name, default=name in DEFAULT) for name in CASES])
def test_logits_gradients_and_statistics_are_those_of_pytorch(name):
    case = CASES[name]
    rng = np.random.default_rng(case.seed)
    model = case.build()
    randomize(model, rng)
    model = model.double()
    start = case.convert(arrays(model.state_dict().items()))
    assert not start.left

    def compare(dtype, train, batches=1):
        """The errors, each the smallest of up to so many batches."""
        ours, found = our_step(case, (start.params, start.stats), dtype, train), []
        for _ in range(batches):
            images = rng.standard_normal((BATCH, case.image_size, case.image_size, 3), np.float32)
            labels = rng.integers(CLASSES, size=BATCH)
            found.append(errors(pytorch_step(case, model, images, labels, train), ours(images, labels)))
            if max(found[-1].values()) <= TOLERANCE[dtype]:
                break
        return {path: min(batch[path] for batch in found) for path in found[0]}

    found = {}
    if case.f32:
        # One ReLU whose input is within rounding of 0 moves all gradients before it by 1e-3. A fault spares no batch.
        found["f32"] = compare(jnp.float32, train=False, batches=4)
    with jax.enable_x64(True):
        if start.stats:
            found["f64, running statistics"] = compare(jnp.float64, train=False)
        found["f64, training"] = compare(jnp.float64, train=True)  # last: it moves PyTorch's running statistics
    for kind, by_path in found.items():
        worst = max(by_path, key=by_path.__getitem__)
        print(f"{name}: {kind}: {by_path[worst]:.1e} in {worst}")
        assert by_path[worst] <= TOLERANCE[jnp.float32 if kind == "f32" else jnp.float64], (kind, worst)

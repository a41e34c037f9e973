"""Logits and one step's gradients against PyTorch modules that carry the same weights.

ResNet and Swin are those of `transformers`, built from their configs without a download; VGG is written out below with
torchvision's names. Weights go through a safetensors file and jaxtrain's own tables, under the names of each program that
has the model: the tests rename them by tables of their own. All weights, BatchNorm statistics and bias tables are random.
The reference is PyTorch in f64. jaxtrain must be as near as 1e-9 in f64, and 1e-5 in f32 with matrix products at highest
precision: relative to the largest logit, and for gradients and new running statistics to the largest value of the leaf.

The f32 gradients are those with running statistics. With batch statistics of so few examples a ResNet-50 is chaotic in
f32: PyTorch's own f32 gradients are then up to 20 % off its f64 ones (and 3e-6 with running statistics).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import runs

from jaxtrain.config import ModelConfig
from jaxtrain.models import registry, vgg
from jaxtrain.models.layers import Context
from jaxtrain.training.inference import load_trained
from jaxtrain.trees import path_of
from jaxtrain.weights import matching, reading
from jaxtrain.weights.file import open_weights

torch: Any = None
transformers: Any = None
safetensors_torch: Any = None


@pytest.fixture(scope="module", autouse=True)
def _references() -> None:
    """Imports both when a test needs them: they take 300 MB, and every process of the suite collects this file."""
    reasons = {"torch": "PyTorch is the reference", "transformers": "its ResNet and Swin are the reference"}
    for name, reason in reasons.items():
        setattr(sys.modules[__name__], name, pytest.importorskip(name, reason=f"{reason}; install jaxtrain[parity]"))
    sys.modules[__name__].safetensors_torch = importlib.import_module("safetensors.torch")


CLASSES, BATCH = 10, 2
TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-9}


# ------------------------------------------------------------------------------------------ the references, in PyTorch


def torch_resnet(depths, bottleneck, width):
    sizes = [width * 2**stage * (4 if bottleneck else 1) for stage in range(4)]
    config = transformers.ResNetConfig(
        num_labels=CLASSES,
        depths=list(depths),
        embedding_size=width,
        hidden_sizes=sizes,
        layer_type="bottleneck" if bottleneck else "basic",
    )
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
    model = nn.Sequential()
    model.features, model.avgpool, model.flatten = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7), nn.Flatten()
    first, second = nn.Linear(channels * 49, hidden), nn.Linear(hidden, hidden)
    rates = [nn.Dropout(0.0) for _ in range(2)]
    model.classifier = nn.Sequential(
        first, nn.ReLU(), rates[0], second, nn.ReLU(), rates[1], nn.Linear(hidden, CLASSES)
    )
    return model


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


# ------------------------------------------------------- the names of each program: tables of the tests' own, by patterns


def renamed(tensors, patterns):
    """Tensors under other names: each by the first pattern that its whole name fits; one that fits none is an error."""
    found = {}
    for name, value in tensors.items():
        to = next(re.sub(pattern, to, name) for pattern, to in patterns if re.fullmatch(pattern, name))
        assert to not in found
        found[to] = value
    return found


def resnet_of_torchvision(tensors):
    """Stages there are counted from 1, and so are the convolutions of a block."""
    counted = {
        re.sub(r"stages\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.", name): value for name, value in tensors.items()
    }
    counted = {
        re.sub(r"\.layer\.(\d)\.", lambda m: f".layer.{int(m[1]) + 1}.", name): value for name, value in counted.items()
    }
    return renamed(
        counted,
        [
            (r"resnet\.embedder\.embedder\.convolution\.(.*)", r"conv1.\1"),
            (r"resnet\.embedder\.embedder\.normalization\.(.*)", r"bn1.\1"),
            (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution\.(.*)", r"layer\1.\2.conv\3.\4"),
            (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization\.(.*)", r"layer\1.\2.bn\3.\4"),
            (
                r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution\.(.*)",
                r"layer\1.\2.downsample.0.\3",
            ),
            (
                r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization\.(.*)",
                r"layer\1.\2.downsample.1.\3",
            ),
            (r"classifier\.1\.(.*)", r"fc.\1"),
        ],
    )


def fused(tensors):
    """Queries, keys and values as one tensor, in this order, as all but transformers have them."""
    found = dict(tensors)
    for name in tensors:
        if ".q_proj." in name:
            parts = [found.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            found[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return found


BLOCK = r"swin\.encoder\.layers\.(\d)\.blocks\.(\d+)\."
IN_A_BLOCK = [
    (r"attention\.qkv\.(.*)", r"attn.qkv.\3"),
    (r"attention\.o_proj\.(.*)", r"attn.proj.\3"),
    (r"attention\.relative_position_bias\.(relative_position_bias_table|relative_position_index)", r"attn.\3"),
    (r"layernorm_before\.(.*)", r"norm1.\3"),
    (r"layernorm_after\.(.*)", r"norm2.\3"),
]


def swin_of_timm(tensors, *, old):
    """old: as in the original, and in timm before 0.9: a merging of patches belongs to the stage before it."""
    patterns = [
        (r"swin\.embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
        (r"swin\.embeddings\.norm\.(.*)", r"patch_embed.norm.\1"),
        *((BLOCK + inner, rf"layers.\1.blocks.\2.{to}") for inner, to in IN_A_BLOCK),
        (BLOCK + r"mlp\.(.*)", r"layers.\1.blocks.\2.mlp.\3"),
        (r"swin\.encoder\.layers\.(\d)\.downsample\.(.*)", r"layers.\1.downsample.\2"),
        (r"swin\.layernorm\.(.*)", r"norm.\1"),
        (r"classifier\.(.*)", r"head.\1" if old else r"head.fc.\1"),
    ]
    found = renamed(fused(tensors), patterns)
    if old:
        return found
    later = re.compile(r"layers\.(\d)\.downsample")
    return {later.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample", name): value for name, value in found.items()}


def swin_of_torchvision(tensors):
    """Patches, stages and mergings are counted together."""
    patterns = [
        (r"patch_embed\.proj\.(.*)", r"features.0.0.\1"),
        (r"patch_embed\.norm\.(.*)", r"features.0.2.\1"),
        (r"layers\.(\d)\.blocks\.(.*)\.mlp\.fc1\.(.*)", r"features.<\1>.\2.mlp.0.\3"),
        (r"layers\.(\d)\.blocks\.(.*)\.mlp\.fc2\.(.*)", r"features.<\1>.\2.mlp.3.\3"),
        (r"layers\.(\d)\.blocks\.(.*)", r"features.<\1>.\2"),
        (r"layers\.(\d)\.downsample\.(.*)", r"features.<<\1>>.\2"),
        (r"(norm|head)\.(.*)", r"\1.\2"),
    ]
    found = renamed(swin_of_timm(tensors, old=True), patterns)
    after = {re.sub("<<(.)>>", lambda m: str(2 * int(m[1]) + 2), name): value for name, value in found.items()}
    return {re.sub("<(.)>", lambda m: str(2 * int(m[1]) + 1), name): value for name, value in after.items()}


def swin_of_transformers(tensors):
    """As `save_pretrained` writes them, and as they are published."""
    parts = {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "o_proj": "output.dense"}
    patterns = [
        *((f"(.*)\\.attention\\.{ours}\\.(.*)", rf"\1.attention.{theirs}.\2") for ours, theirs in parts.items()),
        (r"(.*)\.attention\.relative_position_bias\.(.*)", r"\1.attention.self.\2"),
        (r"(.*)\.mlp\.fc1\.(.*)", r"\1.intermediate.dense.\2"),
        (r"(.*)\.mlp\.fc2\.(.*)", r"\1.output.dense.\2"),
        (r"(.*)", r"\1"),
    ]
    return renamed(tensors, patterns)


def vgg_of_timm(tensors):
    """The hidden layers are convolutions there."""
    shapes = {"classifier.0.weight": (-1, 7, 7), "classifier.3.weight": (-1, 1, 1)}
    theirs = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    found = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        found[f"{theirs.get(module, module)}.{leaf}"] = (
            value.reshape(len(value), *shapes[name]) if name in shapes else value
        )
    return found


NAMES = {
    "resnet": {"transformers": dict, "torchvision": resnet_of_torchvision},
    "vgg": {"torchvision": dict, "timm": vgg_of_timm},
    "swin": {
        "transformers 5": dict,
        "transformers": swin_of_transformers,
        "timm": lambda tensors: swin_of_timm(tensors, old=False),
        "timm before 0.9": lambda tensors: swin_of_timm(tensors, old=True),
        "torchvision": swin_of_torchvision,
    },
}


# --------------------------------------------------------------------------------------------------------- comparisons


@dataclasses.dataclass(frozen=True)
class Case:
    config: ModelConfig
    image_size: int
    build: Callable  # () -> the PyTorch module
    seed: int = 0
    f32: bool = True

    @property
    def names(self) -> dict[str, Callable]:
        """{whose names: PyTorch's tensors by name -> theirs}."""
        return next(names for family, names in NAMES.items() if self.config.name.startswith(family))


def resnet_case(name, depths, width=64, f32=True):
    config = ModelConfig(name=name, depths=depths, width=width)
    bottleneck = name not in ("resnet18", "resnet34")
    return Case(config, 64, lambda: torch_resnet(depths, bottleneck, width), f32=f32)


def swin_case(image_size, patch, window, depths, f32=True):
    config = ModelConfig(name="swin_tiny", patch=patch, window=window, depths=depths, drop_path=0.0)
    return Case(config, image_size, lambda: torch_swin(image_size, patch, window, depths), f32=f32)


def vgg_case(name, image_size, width, seed=0, f32=True):
    depths, batch_norm = vgg.DEPTHS[name.removesuffix("_bn")], name.endswith("_bn")
    config = ModelConfig(name=name, stem="imagenet", width=width, dropout=0.0)

    def build():
        with torch.device("meta"):  # leaves out the initialisation of 140M weights
            model = torch_vgg(depths, batch_norm, width)
        return model.to_empty(device="cpu")

    return Case(config, image_size, build, seed, f32)


# By default the short and the narrow ones. VGG's layers at full width would take 5 GB, of which most is one matrix.
CASES = {
    "resnet18": resnet_case("resnet18", (2, 2, 2, 2)),
    "resnet50": resnet_case("resnet50", (3, 4, 6, 3)),
    "resnet101, narrow": resnet_case("resnet101", (3, 4, 23, 3), width=16, f32=False),
    "resnet50, short": resnet_case("resnet50", (2, 1, 1, 1), f32=False),
    "vgg16": vgg_case("vgg16", 64, 8, f32=False),
    "vgg19": vgg_case("vgg19", 64, 16, seed=2),
    "vgg19_bn, narrow": vgg_case("vgg19_bn", 64, 8, f32=False),
    "vgg11_bn, narrow": vgg_case("vgg11_bn", 96, 8, f32=False),
    # As at 224 px with window 7: 8, 4, 2 and 1 windows a side.
    "swin_tiny": swin_case(96, 4, 3, (2, 2, 6, 2)),
    # As at 32 px by itself: the last map, 2 x 2, is smaller than the window.
    "swin_tiny, cifar": swin_case(32, 2, 4, (2, 2, 2, 2)),
    # Maps of 28, 14, 7 and 4 a side: patches, windows and merged squares that need padding.
    "swin_tiny, padded": swin_case(55, 2, 4, (1, 1, 2, 1), f32=False),
}


def ours(case, tensors, folder, whose=""):
    """(parameters, statistics) from PyTorch's tensors by name: through a file with `whose` names, as jaxtrain reads it."""
    whose = whose or next(iter(case.names))
    path = folder / "weights.safetensors"
    named = {name: value.detach().contiguous() for name, value in case.names[whose](tensors).items()}
    safetensors_torch.save_file(named, path)
    shapes, structure = own_shapes(case)
    with open_weights(path) as file:
        matched = matching.match(file, case.config.name, case.config.depths, shapes)
        assert (matched.label, len(matched.of("loaded"))) == (whose, len(shapes))
        read = {m.row.ours: reading.read(file, m, tuple(map(slice, m.shape)), np.dtype(float)) for m in matched.matches}
    trees = structure.unflatten([read[p] for p in shapes])
    return trees["params"], trees["batch_stats"]


@functools.cache
def own_shapes(case):
    """The shapes of our leaves by path, in the order of the trees, and the trees' structure."""
    shape = (case.image_size, case.image_size, 3)
    model = registry.build(case.config, shape, CLASSES, jnp.float32, jnp.float32)
    own = jax.eval_shape(lambda key: model.init(key, (1, *shape), jnp.float32), jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(dict(zip(("params", "batch_stats"), own, strict=True)))
    return {path_of(path): leaf.shape for path, leaf in leaves}, structure


def floats(named_tensors):
    return {name: value for name, value in named_tensors if value.dtype.is_floating_point}


def pytorch_step(case, model, images, labels, train, folder):
    """(logits, gradients, new statistics), in f64 and in our names and shapes."""
    model.train(train).zero_grad()
    logits = model(torch.from_numpy(images).double().permute(0, 3, 1, 2))
    logits = getattr(logits, "logits", logits)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    state = floats(model.state_dict().items())
    gradients, stats = ours(case, state | {name: value.grad for name, value in model.named_parameters()}, folder)
    return logits.detach().numpy(), gradients, stats if train else {}


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
def test_logits_gradients_and_statistics_are_those_of_pytorch(name, tmp_path):
    case = CASES[name]
    rng = np.random.default_rng(case.seed)
    model = case.build()
    randomize(model, rng)
    model = model.double()
    start = ours(case, floats(model.state_dict().items()), tmp_path)
    for whose in case.names:
        trees = ours(case, dict(model.state_dict()), tmp_path, whose)
        assert all(map(np.array_equal, jax.tree.leaves(trees), jax.tree.leaves(start))), whose

    def compare(dtype, train, batches=1):
        """The errors, each the smallest of up to so many batches."""
        ours, found = our_step(case, start, dtype, train), []
        for _ in range(batches):
            images = rng.standard_normal((BATCH, case.image_size, case.image_size, 3), np.float32)
            labels = rng.integers(CLASSES, size=BATCH)
            found.append(errors(pytorch_step(case, model, images, labels, train, tmp_path), ours(images, labels)))
            if max(found[-1].values()) <= TOLERANCE[dtype]:
                break
        return {path: min(batch[path] for batch in found) for path in found[0]}

    found = {}
    if case.f32:
        # One ReLU whose input is within rounding of 0 moves all gradients before it by 1e-3. A fault spares no batch.
        found["f32"] = compare(jnp.float32, train=False, batches=4)
    with jax.enable_x64(True):
        if start[1]:
            found["f64, running statistics"] = compare(jnp.float64, train=False)
        found["f64, training"] = compare(jnp.float64, train=True)  # last: it moves PyTorch's running statistics
    for kind, by_path in found.items():
        worst = max(by_path, key=by_path.__getitem__)
        print(f"{name}: {kind}: {by_path[worst]:.1e} in {worst}")
        assert by_path[worst] <= TOLERANCE[jnp.float32 if kind == "f32" else jnp.float64], (kind, worst)


# --------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parity
def test_trained_weights_are_exported_to_pytorch(tmp_path):
    """From PyTorch, two steps, and back: both give the same logits. The mean and std are those of the weights."""
    rng = np.random.default_rng(0)
    model = torch_resnet((1, 1, 1, 1), False, 8)
    with torch.no_grad():
        randomize(model, rng)
    path, out, run = tmp_path / "in.safetensors", tmp_path / "out.safetensors", tmp_path / "run"
    metadata = {"pretrained_cfg": json.dumps({"mean": [0.5] * 3, "std": [0.25] * 3})}
    safetensors_torch.save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, path, metadata
    )
    fields = {
        "data.name": "synthetic", "data.global_batch": 8, "data.examples": 16, "data.image_size": 64, "model.width": 8,
        "model.name": "resnet18", "model.depths": "(1,1,1,1)", "model.init_from": str(path), "train.steps": 2,
        "train.precision": "f64", "optim.warmup": "0", "train.eval_every": "0",
    }  # fmt: skip
    with jax.enable_x64(True):
        runs.here(run, runs.SMALL | fields)
        command = ["export", str(run), "--naming", "transformers", "--checkpoint", "latest", "--out", str(out)]
        assert runs.command_line(command) == 0
        stored = load_trained(run, checkpoint="latest", devices=jax.devices()[:1])
        images = rng.standard_normal((BATCH, 64, 64, 3))
        weights = stored.variables["params"], stored.variables["batch_stats"]
        logits, _ = stored.classifier.apply(*weights, jnp.asarray(images), Context(jnp.arange(BATCH)))
    assert (stored.preprocess.inputs.mean, stored.preprocess.inputs.std) == ((0.5,) * 3, (0.25,) * 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = model.double()
    missing = model.load_state_dict(safetensors_torch.load_file(out), strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert not torch.equal(before["classifier.1.weight"].double(), model.state_dict()["classifier.1.weight"])
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.numpy()
    assert largest(np.asarray(logits) - expected) <= TOLERANCE[jnp.float64] * largest(expected)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7), (4, 7), (7, 2)])
def test_a_table_is_resized_as_pytorch_resizes_it(old, new):
    table = np.random.default_rng(0).standard_normal(((2 * old - 1) ** 2, 3))
    square = torch.from_numpy(table).T.reshape(1, 3, 2 * old - 1, 2 * old - 1)
    expected = torch.nn.functional.interpolate(square, size=(2 * new - 1,) * 2, mode="bicubic")
    found = reading.resized_table(table, (2 * new - 1) ** 2)
    np.testing.assert_allclose(found, expected.reshape(3, -1).T.numpy(), rtol=0, atol=1e-12)

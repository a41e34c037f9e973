"""Logits and one step's gradients against PyTorch modules that carry the same weights.

ResNet and Swin are those of `transformers`, built from their configs without a download; VGG is written out below as in
torchvision. All weights, BatchNorm statistics and bias tables are random. PyTorch computes in f64; jaxtrain in f64, to
1e-9, and in f32 with matrix products at highest precision, to 1e-5: of the largest logit, or, for gradients, of the
largest value in the leaf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.config import ModelConfig
from jaxtrain.models import registry
from jaxtrain.models.classifier import layer_name
from jaxtrain.models.layers import Context

torch = pytest.importorskip("torch", reason="PyTorch is the reference; install jaxtrain[parity]")
transformers = pytest.importorskip("transformers", reason="its ResNet and Swin are the reference; see jaxtrain[parity]")

CLASSES, BATCH = 10, 2


# ------------------------------------------------------------------------------------------ the references, in PyTorch


def torch_resnet50():
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=CLASSES))


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


def torch_vgg(depths, batch_norm):
    nn = torch.nn
    features, channels = [], 3
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            width = 64 * min(2**stage, 8)
            features += [nn.Conv2d(channels, width, 3, padding=1)]
            features += [nn.BatchNorm2d(width)] if batch_norm else []
            features += [nn.ReLU()]
            channels = width
        features += [nn.MaxPool2d(2)]
    hidden = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *hidden, nn.Linear(4096, CLASSES))


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


# --------------------------------------------------------- PyTorch's names and shapes -> ours; gradients go the same way


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
                self.put(self.stats, (*path, ours), self.left.pop(f"{name}.running_{ours}"))


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
    first = trees.left[f"{theirs}.weight"].reshape(4096, 512, 7, 7)
    trees.left[f"{theirs}.weight"] = first.transpose(0, 2, 3, 1).reshape(4096, -1)
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


def to_numpy(tensors):
    return {name: value.detach().numpy().copy() for name, value in tensors.items() if "num_batches" not in name}


def reference(model, convert, images, labels):
    """PyTorch's (params, stats, logits in evaluation, gradients, new stats), in f64 and in our names and shapes."""
    model = model.double()
    start = convert(to_numpy(model.state_dict()))
    assert not start.left, sorted(start.left)

    def logits():
        out = model(torch.from_numpy(images).double().permute(0, 3, 1, 2))
        return getattr(out, "logits", out)

    with torch.no_grad():
        evaluated = logits_of(model.eval(), logits)
    model.train()
    torch.nn.functional.cross_entropy(logits(), torch.from_numpy(labels)).backward()
    gradients = convert(to_numpy({name: value.grad for name, value in model.named_parameters()}))
    return start.params, start.stats, evaluated, gradients.params, convert(to_numpy(model.state_dict())).stats


def logits_of(_, function):
    return function().numpy()


def ours(config, image_size, dtype, trees, images, labels):
    model = registry.build(config, (image_size, image_size, 3), CLASSES, dtype, dtype)
    params, stats = jax.tree.map(lambda value: jnp.asarray(value, dtype), trees)
    example = jnp.arange(BATCH)
    shapes = jax.eval_shape(lambda key: model.init(key, images.shape, dtype), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, (params, stats))

    def loss(params, x):
        logits, new_stats = model.apply(params, stats, x, Context(example, train=True))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean(), new_stats

    @jax.jit
    def run(params, x):
        evaluated, _ = model.apply(params, stats, x, Context(example))
        gradients, new_stats = jax.grad(loss, has_aux=True)(params, x)
        return evaluated, gradients, new_stats

    with jax.default_matmul_precision("highest"):
        return jax.device_get(run(params, jnp.asarray(images, dtype)))


def test_dev():
    import time

    rng = np.random.default_rng(0)
    D = (2, 2, 6, 2)
    V = (2, 2, 4, 4, 4)
    cases = {
        "resnet50": (64, torch_resnet50, lambda t: resnet_import(t, (3, 4, 6, 3)), ModelConfig(name="resnet50")),
        "swin96": (
            96,
            lambda: torch_swin(96, 4, 3, D),
            lambda t: swin_import(t, D),
            ModelConfig(name="swin_tiny", window=3, drop_path=0),
        ),
        "swin32": (
            32,
            lambda: torch_swin(32, 2, 4, (2, 2, 2, 2)),
            lambda t: swin_import(t, (2, 2, 2, 2)),
            ModelConfig(name="swin_tiny", drop_path=0, depths=(2, 2, 2, 2)),
        ),
        "vgg19": (64, lambda: torch_vgg(V, False), lambda t: vgg_import(t, V, False), ModelConfig(name="vgg19", dropout=0)),
        "vgg19bn": (
            64,
            lambda: torch_vgg(V, True),
            lambda t: vgg_import(t, V, True),
            ModelConfig(name="vgg19_bn", dropout=0),
        ),
    }
    for name, (size, make, convert, config) in cases.items():
        t = time.time()
        m = make()
        randomize(m, rng)
        images = rng.standard_normal((BATCH, size, size, 3), np.float32)
        labels = np.array([1, 7])
        p, s, e, g, n = reference(m, convert, images, labels)
        del m
        print(name, "torch", time.time() - t, np.abs(e).max())
        for dt in (jnp.float64, jnp.float32):
            t = time.time()
            with jax.enable_x64(dt == jnp.float64):
                e2, g2, n2 = ours(config, size, dt, (p, s), images, labels)
            tt = time.time() - t
            rel = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()), g, g2)
            worst = sorted(((v, jax.tree_util.keystr(k), ) for k, v in jax.tree_util.tree_leaves_with_path(rel)))[-4:]
            gm = max(float(np.abs(a).max()) for a in jax.tree.leaves(g))
            relg = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max() / gm), g, g2)))
            rels = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), n, n2)
            print(dt.__name__, tt, "logits", np.abs(e - e2).max() / np.abs(e).max(), "grads", worst, relg, "stats", max([0,*jax.tree.leaves(rels)]))

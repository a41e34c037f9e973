"""The tables: under which names VGG, ResNet and Swin are stored by torchvision, timm and transformers.

Sources: `torchvision/models/{vgg,resnet,swin_transformer}.py` of pytorch/vision, `timm/models/{vgg,resnet,swin_transformer}.py`
of huggingface/pytorch-image-models, and what `save_pretrained` of transformers 5 writes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtrain.models.classifier import layer_name
from jaxtrain.weights.architecture import Architecture, window_of
from jaxtrain.weights.rows import (
    Row,
    Rows,
    Shape,
    flattened,
    heads_in,
    heads_out,
    joined,
    linear,
    pointwise,
    qkv_kernel,
    same,
)

Shapes = Mapping[str, Shape]

RECOMPUTED = (".num_batches_tracked", ".relative_position_index", ".attn_mask")
"""Ends of names that are no weights: counts that PyTorch keeps, and what follows from a model's shape."""


@dataclasses.dataclass(frozen=True)
class Naming:
    """One way to name the tensors of a family.

    family: of models. label: whose names these are. signature: names that such a file has. read: the architecture, from
    all names and shapes. rows: the table for an architecture.
    """

    family: str
    label: str
    signature: tuple[str, ...]
    read: Callable[[Shapes], Architecture]
    rows: Callable[[Architecture], list[Row]]


def _classes(shapes: Shapes, head: str) -> int:
    return shapes[f"{head}.weight"][0] if f"{head}.weight" in shapes else 0


def _count(shapes: Shapes, names: Iterator[str]) -> int:
    """How many of `names`, from the first on, are there."""
    return sum(1 for _ in itertools.takewhile(shapes.__contains__, names))


# ------------------------------------------------------------------------------------------------------------------ VGG


@dataclasses.dataclass(frozen=True)
class _VggNames:
    hidden: tuple[str, str]
    head: str
    convolutional: bool = False
    """Whether the hidden layers are convolutions of 7x7 and 1x1."""


def _vgg_rows(arch: Architecture, names: _VggNames) -> list[Row]:
    rows, theirs, layers = Rows(), 0, map(layer_name, itertools.count())
    for depth in arch.depths:
        for layer in itertools.islice(layers, depth):
            rows.convolution(f"{layer}/conv", f"features.{theirs}", bias=True)
            if arch.batch_norm:
                rows.norm(f"{layer}/bn", f"features.{theirs + 1}", statistics=True)
            theirs += 3 if arch.batch_norm else 2
        theirs += 1  # the pooling
    first = flattened(8 * arch.width, convolutional=names.convolutional)
    rows.linear(f"{next(layers)}/linear", names.hidden[0], first)
    rows.linear(f"{next(layers)}/linear", names.hidden[1], pointwise if names.convolutional else linear)
    rows.linear(f"{next(layers)}/linear", names.head)
    return rows.found


def _vgg_read(shapes: Shapes, names: _VggNames) -> Architecture:
    batch_norm = len(shapes.get("features.1.weight", ())) == 1
    depths, theirs = [0], 0
    while True:
        if len(shapes.get(f"features.{theirs}.weight", ())) == 4:
            depths[-1] += 1
            theirs += 3 if batch_norm else 2
        elif len(shapes.get(f"features.{theirs + 1}.weight", ())) == 4:
            depths.append(0)
            theirs += 1
        else:
            break
    width, channels = shapes["features.0.weight"][:2]
    first = shapes[f"{names.hidden[0]}.weight"]
    side = first[-1] if names.convolutional else math.isqrt(first[-1] // (8 * width))
    classes = _classes(shapes, names.head)
    return Architecture("vgg", tuple(depths), width, classes, batch_norm=batch_norm, stem=side, channels=channels)


# --------------------------------------------------------------------------------------------------------------- ResNet


@dataclasses.dataclass(frozen=True)
class _ResNetNames:
    """Names with {stage}, {block} and {number}, the place in a block."""

    stem: tuple[str, str]
    """Of convolution and BatchNorm, as are `layer` and `shortcut`."""
    layer: tuple[str, str]
    shortcut: tuple[str, str]
    head: str
    first: tuple[int, int]
    """From which stages, and the convolutions of a block, are counted."""


def _resnet_rows(arch: Architecture, names: _ResNetNames) -> list[Row]:
    rows, layers = Rows(), map(layer_name, itertools.count())

    def unit(layer: str, suffix: str, theirs: tuple[str, str], **where: int) -> None:
        convolution, norm = (name.format(**where) for name in theirs)
        rows.convolution(f"{layer}/{suffix.replace('*', 'conv')}", convolution)
        rows.norm(f"{layer}/{suffix.replace('*', 'bn')}", norm, statistics=True)

    unit(next(layers), "*", names.stem)
    first_stage, first = names.first
    for stage, depth in enumerate(arch.depths, start=first_stage):
        for block in range(depth):
            layer, where = next(layers), {"stage": stage, "block": block}
            for i in range(3 if arch.bottleneck else 2):
                unit(layer, f"*{i + 1}", names.layer, number=first + i, **where)
            if block == 0 and (stage > first_stage or arch.bottleneck):
                unit(layer, "shortcut_*", names.shortcut, **where)
    rows.linear(f"{next(layers)}/linear", names.head)
    return rows.found


def _resnet_read(shapes: Shapes, names: _ResNetNames) -> Architecture:
    first_stage, first = names.first
    convolution = f"{names.layer[0]}.weight"
    depths = tuple(
        _count(shapes, (convolution.format(stage=stage, block=b, number=first) for b in itertools.count()))
        for stage in range(first_stage, first_stage + 4)
    )
    third = convolution.format(stage=first_stage, block=0, number=first + 2)
    width, channels, side = shapes[f"{names.stem[0]}.weight"][:3]
    return Architecture(
        "resnet", depths, width, _classes(shapes, names.head), bottleneck=third in shapes, stem=side, channels=channels
    )


# ----------------------------------------------------------------------------------------------------------------- Swin


@dataclasses.dataclass(frozen=True)
class _SwinNames:
    """Names with {stage} and {block}; `table` and what follows it stand below a block's name."""

    patches: tuple[str, str]
    """Of convolution and norm."""
    block: str
    merging: str
    """Below it are norm and reduction."""
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    """One name, or those of queries, keys and values."""
    proj: str
    table: str
    mlp: tuple[str, str]
    norm: str
    head: str
    places: Callable[[int], dict[str, int]] = lambda stage: {"stage": stage}
    """The numbers of a stage in the names."""


def _torchvision_places(stage: int) -> dict[str, int]:
    """There patches, stages and mergings are counted together."""
    return {"stage": 2 * stage + 1, "after": 2 * stage + 2}


def _timm_places(stage: int) -> dict[str, int]:
    """A merging belongs to the stage after it in timm since 0.9, and to that before it in the original."""
    return {"stage": stage, "after": stage + 1}


def _swin_rows(arch: Architecture, names: _SwinNames) -> list[Row]:
    rows, layers = Rows(), map(layer_name, itertools.count())
    patches = next(layers)
    rows.convolution(f"{patches}/conv", names.patches[0], bias=True)
    rows.norm(f"{patches}/norm", names.patches[1])
    for stage, depth in enumerate(arch.depths):
        where = names.places(stage)
        for block in range(depth):
            layer, theirs = next(layers), names.block.format(block=block, **where)
            apart = len(names.qkv) > 1
            for leaf, name, form, stack in (
                ("kernel", "weight", heads_out if apart else qkv_kernel, 1),
                ("bias", "bias", joined, 0),
            ):
                parts = tuple(f"{theirs}.{part}.{name}" for part in names.qkv)
                rows.add(f"{layer}/attn/qkv/{leaf}", parts, form, **({"stack": stack} if apart else {}))
            rows.linear(f"{layer}/attn/proj", f"{theirs}.{names.proj}", heads_in)
            rows.add(f"{layer}/attn/bias_table", f"{theirs}.{names.table}", same, table=True)
            for ours, norm in zip(("norm1", "norm2"), names.norms, strict=True):
                rows.norm(f"{layer}/{ours}", f"{theirs}.{norm}")
            for ours, fc in zip(("fc1", "fc2"), names.mlp, strict=True):
                rows.linear(f"{layer}/{ours}", f"{theirs}.{fc}")
        if stage < len(arch.depths) - 1:
            layer, theirs = next(layers), names.merging.format(**where)
            rows.norm(f"{layer}/norm", f"{theirs}.norm")
            rows.linear(f"{layer}/linear", f"{theirs}.reduction", bias=False)
    head = next(layers)
    rows.norm(f"{head}/norm", names.norm)
    rows.linear(f"{head}/linear", names.head)
    return rows.found


def _swin_read(shapes: Shapes, names: _SwinNames) -> Architecture:
    counts = []
    for stage in range(4):
        where = names.places(stage)
        blocks = (f"{names.block.format(block=b, **where)}.{names.norms[0]}.weight" for b in itertools.count())
        counts.append(_count(shapes, blocks))
    width, channels, patch = shapes[f"{names.patches[0]}.weight"][:3]
    classes, window = _classes(shapes, names.head), window_of(shapes, f".{names.table}")
    return Architecture("swin", tuple(counts), width, classes, patch=patch, window=window, channels=channels)


# ----------------------------------------------------------------------------------------------------------- all namings

_TORCH_VGG = _VggNames(("classifier.0", "classifier.3"), "classifier.6")
_TIMM_VGG = _VggNames(("pre_logits.fc1", "pre_logits.fc2"), "head.fc", convolutional=True)

_TORCH_RESNET = _ResNetNames(
    stem=("conv1", "bn1"),
    layer=("layer{stage}.{block}.conv{number}", "layer{stage}.{block}.bn{number}"),
    shortcut=("layer{stage}.{block}.downsample.0", "layer{stage}.{block}.downsample.1"),
    head="fc",
    first=(1, 1),
)
_HF = "resnet.encoder.stages.{stage}.layers.{block}"
_HF_RESNET = _ResNetNames(
    stem=tuple(f"resnet.embedder.embedder.{part}" for part in ("convolution", "normalization")),  # type: ignore[arg-type]
    layer=tuple(_HF + f".layer.{{number}}.{part}" for part in ("convolution", "normalization")),  # type: ignore[arg-type]
    shortcut=tuple(f"{_HF}.shortcut.{part}" for part in ("convolution", "normalization")),  # type: ignore[arg-type]
    head="classifier.1",
    first=(0, 0),
)

_TORCH_SWIN = _SwinNames(
    patches=("features.0.0", "features.0.2"),
    block="features.{stage}.{block}",
    merging="features.{after}",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    proj="attn.proj",
    table="attn.relative_position_bias_table",
    mlp=("mlp.0", "mlp.3"),
    norm="norm",
    head="head",
    places=_torchvision_places,
)
_TIMM_SWIN = dataclasses.replace(
    _TORCH_SWIN,
    patches=("patch_embed.proj", "patch_embed.norm"),
    block="layers.{stage}.blocks.{block}",
    merging="layers.{after}.downsample",
    mlp=("mlp.fc1", "mlp.fc2"),
    head="head.fc",
    places=_timm_places,
)
_OLD_TIMM_SWIN = dataclasses.replace(_TIMM_SWIN, merging="layers.{stage}.downsample", head="head")
_HF_SWIN = _SwinNames(
    patches=("swin.embeddings.patch_embeddings.projection", "swin.embeddings.norm"),
    block="swin.encoder.layers.{stage}.blocks.{block}",
    merging="swin.encoder.layers.{stage}.downsample",
    norms=("layernorm_before", "layernorm_after"),
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    proj="attention.output.dense",
    table="attention.self.relative_position_bias_table",
    mlp=("intermediate.dense", "output.dense"),
    norm="swin.layernorm",
    head="classifier",
)

# As a state_dict of transformers 5 has them in memory; `save_pretrained` writes the older names.
_HF5_SWIN = dataclasses.replace(
    _HF_SWIN,
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    table="attention.relative_position_bias.relative_position_bias_table",
    mlp=("mlp.fc1", "mlp.fc2"),
)

_FAMILIES = {
    "vgg": (_vgg_read, _vgg_rows),
    "resnet": (_resnet_read, _resnet_rows),
    "swin": (_swin_read, _swin_rows),
}


def _naming(family: str, label: str, names: Any, *signature: str) -> Naming:
    read, rows = (functools.partial(function, names=names) for function in _FAMILIES[family])
    return Naming(family, label, signature, read, rows)


NAMINGS = (
    _naming("vgg", "torchvision", _TORCH_VGG, "features.0.weight", "classifier.0.weight"),
    _naming("vgg", "timm", _TIMM_VGG, "features.0.weight", "pre_logits.fc1.weight"),
    _naming("resnet", "torchvision", _TORCH_RESNET, "conv1.weight", "layer1.0.conv1.weight"),
    _naming("resnet", "timm", _TORCH_RESNET, "conv1.weight", "layer1.0.conv1.weight"),
    _naming("resnet", "transformers", _HF_RESNET, "resnet.embedder.embedder.convolution.weight"),
    _naming("swin", "torchvision", _TORCH_SWIN, "features.0.0.weight", "features.1.0.attn.qkv.weight"),
    _naming("swin", "timm", _TIMM_SWIN, "patch_embed.proj.weight", "layers.3.downsample.reduction.weight"),
    _naming(
        "swin", "timm before 0.9", _OLD_TIMM_SWIN, "patch_embed.proj.weight", "layers.0.downsample.reduction.weight"
    ),
    _naming("swin", "transformers 5", _HF5_SWIN, "swin.encoder.layers.0.blocks.0.attention.q_proj.weight"),
    _naming("swin", "transformers", _HF_SWIN, "swin.embeddings.patch_embeddings.projection.weight"),
)
"""All that is recognised. Of two whose names are the same, as those of ResNets are, the first stands for both."""

"""What model a file of weights holds, and what model a run has: in the same words, so that they can be compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from jaxtrain.models import resnet, swin, vgg
from jaxtrain.weights.rows import Shape

FAMILIES = ("vgg", "resnet", "swin")
_TITLES = {"vgg": "VGG", "resnet": "ResNet", "swin": "Swin"}
_SWINS = {"swin_tiny": "Swin-T", "swin_small": "Swin-S", "swin_base": "Swin-B"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model of one of the families. What a family has no use for has its default."""

    family: str
    depths: tuple[int, ...]
    """Blocks of each stage; for VGG convolutions."""
    width: int
    """Channels of the first stage."""
    classes: int = 0
    """Outputs; 0 without a head."""
    batch_norm: bool = False
    """Of a VGG."""
    bottleneck: bool = False
    """Of a ResNet: whether its blocks have three convolutions."""
    stem: int = 0
    """Of a ResNet: the side of its first kernel. Of a VGG: the side of the map that its classifier sees."""
    patch: int = 0
    """Of a Swin: the side of its patches, in pixels."""
    window: int = 0
    """Of a Swin: the side of its windows, in patches."""
    channels: int = 3
    """Of an image."""

    @property
    def name(self) -> str:
        """As `model.name` has it; "" for depths that have no name. Of two Swins of the same depths the one of this width."""
        names = [name for name, known in _named(self.family).items() if known == self._kind]
        return next((name for name in names if self.width == _width(name)), names[0] if names else "")

    @property
    def base(self) -> str:
        """The `model.name` with which, and its own depths and width, the config describes it."""
        if self.family == "vgg":
            return self.name or ("vgg16_bn" if self.batch_norm else "vgg16")
        if self.family == "resnet":
            return self.name or ("resnet50" if self.bottleneck else "resnet18")
        return self.name or "swin_tiny"

    @property
    def flags(self) -> list[str]:
        """Of the config, for its name, depths and width."""
        flags = [f"--config.model.name={self.base}"]
        flags += [] if self.name else [f"--config.model.depths='{self.depths}'"]
        return flags + ([f"--config.model.width={self.width}"] if self.width != _width(self.base) else [])

    @property
    def _kind(self) -> tuple:
        kinds = {"vgg": self.batch_norm, "resnet": self.bottleneck, "swin": 0}
        return kinds[self.family], self.depths

    @property
    def title(self) -> str:
        """For a sentence: "a ResNet-50", "a VGG-16 with BatchNorm of width 8", "a ResNet of depths (1, 1, 1, 1)"."""
        family, name = _TITLES[self.family], self.name
        if self.family == "swin":
            title = _SWINS[name] if name else f"Swin of depths {self.depths}"
        else:
            base = name.removesuffix("_bn")
            title = f"{family}-{base.removeprefix(self.family)}" if name else f"{family} of depths {self.depths}"
            if not name and self.family == "resnet":
                title += " of bottleneck blocks" if self.bottleneck else " of basic blocks"
            title += " with BatchNorm" if self.batch_norm else ""
        return f"a {title}" + (f" of width {self.width}" if self.width != _width(self.base) else "")


def _width(name: str) -> int:
    """Of the first stage of a model by its name."""
    return swin.VARIANTS[name][0] if name in swin.VARIANTS else 64


def _named(family: str) -> dict[str, tuple]:
    if family == "vgg":
        return {f"{name}{'_bn' * bn}": (bn, depths) for name, depths in vgg.DEPTHS.items() for bn in (False, True)}
    if family == "resnet":
        return dict(resnet.VARIANTS)
    return {name: (0, depths) for name, (_, depths, _) in swin.VARIANTS.items()}


def family_of(name: str) -> str:
    """The family of a model by its name in the config; "" for another model."""
    return next((family for family in FAMILIES if any(name == known for known in _named(family))), "")


def of_run(name: str, depths: tuple[int, ...], shapes: Mapping[str, Shape]) -> Architecture:
    """The architecture of a run's model.

    Args:
      name: `model.name`, of one of the families.
      depths: `model.depths`; () are the model's own.
      shapes: of its leaves, by their paths.
    """
    family = family_of(name)
    kind, own = _named(family)[name]
    depths = depths or own
    layers = sorted({path.split("/")[1] for path in shapes if path.startswith("params/")})
    stem = shapes[f"params/{layers[0]}/conv/kernel"]
    classes = shapes[f"params/{layers[-1]}/linear/kernel"][-1]
    common = {"family": family, "depths": depths, "width": stem[-1], "channels": stem[-2], "classes": classes}
    if family == "vgg":
        inputs = shapes[f"params/{layers[sum(depths)]}/linear/kernel"][0]
        side = math.isqrt(inputs // (stem[-1] * 8))
        return Architecture(**common, batch_norm=kind, stem=side)
    if family == "resnet":
        return Architecture(**common, bottleneck=kind, stem=stem[0])
    return Architecture(**common, patch=stem[0], window=window_of(shapes, "bias_table"))


def window_of(shapes: Mapping[str, Shape], suffix: str) -> int:
    """The side of a Swin's windows, from its tables: of several, as small maps have smaller windows, the largest."""
    return max((math.isqrt(shape[0]) + 1) // 2 for name, shape in shapes.items() if name.endswith(suffix))


def difference(theirs: Architecture, ours: Architecture) -> str:
    """What keeps weights of one model out of another, with the flags that help; "" where nothing does."""
    if theirs.family != ours.family or theirs._kind != ours._kind or theirs.width != ours.width:
        return f"{ours.title}; use {' '.join(theirs.flags)}"
    if theirs.stem != ours.stem and theirs.family == "resnet":
        stems = {7: "imagenet", 3: "cifar"}
        flag = f"; use --config.model.stem={stems[theirs.stem]}" if theirs.stem in stems else ""
        return (
            f"one whose first convolution is {ours.stem}x{ours.stem}, and here it is {theirs.stem}x{theirs.stem}{flag}"
        )
    if theirs.stem != ours.stem:
        flag = "; use --config.model.stem=imagenet" if theirs.stem == 7 else "; use --config.model.stem=cifar"
        return f"one whose classifier sees a map of {ours.stem}x{ours.stem}, and here it is {theirs.stem}x{theirs.stem}{flag}"
    if theirs.patch != ours.patch:
        flag = f"use --config.model.patch={theirs.patch}"
        return f"one with patches of {ours.patch} pixels, and here they have {theirs.patch}; {flag}"
    if theirs.channels != ours.channels:
        return f"for images of {ours.channels} channels, and here they have {theirs.channels}; choose other data or weights"
    return ""

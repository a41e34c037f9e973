"""The other side of `benchmarks.cpu.peers`: the models and the train step in PyTorch, for images of 32 x 32."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cpu.peers import BLOCKS, CLASSES, MODELS, OPTIMIZERS, SGD


class Block(nn.Module):
    """A residual block: convolutions of (size, channels, stride), each with BatchNorm."""

    def __init__(self, channels: int, plan: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        outputs, stride = plan[-1][1], max(s for _, _, s in plan)
        layers: list[nn.Module] = []
        inputs = channels
        for size, features, s in plan:
            layers += [*_conv_norm(inputs, features, size, s), nn.ReLU(inplace=True)]
            inputs = features
        self.branch = nn.Sequential(*layers[:-1])
        same = channels == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_norm(channels, outputs, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, outputs, H / stride, W / stride]"""
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


def _conv_norm(inputs: int, features: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, features, size, stride, size // 2, bias=False), nn.BatchNorm2d(features)]


def resnet(classes: int, depths: Sequence[int], *, bottleneck: bool, width: int = 64) -> nn.Module:
    """A ResNet with the stem for small images."""
    layers: list[nn.Module] = [*_conv_norm(3, width, 3, 1), nn.ReLU(inplace=True)]
    channels = width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            c, s = width * 2**stage, 2 if stage and not i else 1
            plan = ((1, c, 1), (3, c, s), (1, 4 * c, 1)) if bottleneck else ((3, c, s), (3, c, 1))
            layers.append(Block(channels, plan))
            channels = plan[-1][1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class SwinBlock(nn.Module):
    """Attention in windows of [B, H, W, C] with a bias by relative position, and a perceptron."""

    index: torch.Tensor
    mask: torch.Tensor | None

    def __init__(self, channels: int, side: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window = min(window, side)
        self.shift = self.window // 2 if shifted and side > self.window else 0
        self.heads = channels // 32
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.table = nn.Parameter(0.02 * torch.randn((2 * self.window - 1) ** 2, self.heads))
        at = torch.stack(torch.meshgrid(*[torch.arange(self.window)] * 2, indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None] + self.window - 1).permute(1, 2, 0)
        self.register_buffer("index", apart[..., 0] * (2 * self.window - 1) + apart[..., 1])
        mask = None
        if self.shift:
            line = torch.arange(side)
            part = (line >= side - self.window).int() + (line >= side - self.shift).int()
            regions = self._split((part[:, None] * 3 + part)[None, :, :, None])[..., 0]
            mask = torch.where(regions[:, :, None] != regions[:, None], -100.0, 0.0)[:, None]
        self.register_buffer("mask", mask)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.transpose(2, 3).reshape(-1, self.window**2, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> the same shape."""
        b, h, w, c = x.shape
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = self._split(y)
        q, k, v = self.qkv(y).view(*y.shape[:2], 3, self.heads, 32).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].permute(2, 0, 1)[None]
        if self.mask is not None:
            bias = (bias + self.mask).repeat(b, 1, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, bias)
        y = self.proj(y.transpose(1, 2).reshape(-1, self.window**2, c))
        y = (
            y.view(b, h // self.window, w // self.window, self.window, self.window, c)
            .transpose(2, 3)
            .reshape(b, h, w, c)
        )
        x = x + (y.roll((self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """[B, H, W, C] -> [B, H / 2, W / 2, 2 C]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.linear = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Joins each 2 x 2 square."""
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
        return self.linear(self.norm(x))


class Swin(nn.Module):
    """Swin-T with patches of 2 and windows of 4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 96, 2, 2)
        self.norm = nn.LayerNorm(96)
        layers: list[nn.Module] = []
        for stage, depth in enumerate((2, 2, 6, 2)):
            channels, side = 96 * 2**stage, 16 // 2**stage
            layers += [Merge(channels // 2)] if stage else []
            layers += [SwinBlock(channels, side, 4, shifted=i % 2 == 1) for i in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.last, self.head = nn.LayerNorm(768), nn.Linear(768, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 32, 32] -> logits"""
        x = self.layers(self.norm(self.patches(x).permute(0, 2, 3, 1)))
        return self.head(self.last(x).mean((1, 2)))


def mlp(classes: int) -> nn.Module:
    """Hidden layers of 512 and 256 units."""
    hidden = [nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, classes))


MODULES: dict[str, Callable[[int], nn.Module]] = {
    "mlp": mlp,
    "resnet18": lambda classes: resnet(classes, (2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda classes: resnet(classes, (3, 4, 6, 3), bottleneck=True),
    "swin_tiny": Swin,
}


def measure(name: str, *, compiled: bool) -> tuple[int, list[float]]:
    """The number of parameters, and the seconds a step of each block."""
    torch.manual_seed(0)
    model = MODULES[name](CLASSES).train()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    config = OPTIMIZERS.get(name, SGD)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, config.learning_rate, config.momentum, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.b1, config.b2), config.eps, fused=True)
    _, batch, steps = MODELS[name]
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (batch, 3, 32, 32), np.uint8)).to(memory_format=torch.channels_last)
    labels = torch.from_numpy(rng.integers(0, CLASSES, batch))

    def loss_of(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images = (pixels.float() / 255 - 0.5) / 0.25
        return torch.nn.functional.cross_entropy(model(images), labels)

    run = torch.compile(loss_of) if compiled else loss_of
    seconds = []
    for _ in range(BLOCKS + 1):
        began = time.perf_counter()
        for _ in range(steps):
            run(pixels, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append((time.perf_counter() - began) / steps)
    return sum(p.numel() for p in model.parameters()), seconds[1:]


if __name__ == "__main__":
    count, spread = measure(sys.argv[1], compiled=sys.argv[2] == "compiled")
    print(json.dumps({"parameters": count, "seconds": spread}))

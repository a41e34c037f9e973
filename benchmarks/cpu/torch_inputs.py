"""PyTorch's side of `benchmarks.cpu.inputs`: a process of its own, which reads batches when it is told to.

A line of JSON on stdin asks ({"work", "path", "how", "workers", "cores", "batch", "batches"}), a line on stdout answers: the
seconds of `batches` batches. The same question again goes on with the same loader, whose workers stay. "close" ends them.

The work is what a PyTorch user's loader does, and what jaxtrain's `resize_crop` does on the device: the shorter side to
256, a random crop of 224, a random flip, float32 in [0, 1], normalised. `how`: `pil` does it image by image with Pillow,
as torchvision's transforms do; `tensor` image by image on float tensors; `batch` on the whole batch at once, after
normalising and flipping while images are small: the least that can be done on the host.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.cpu.cores import pin

STORED, SIDE = 256, 224
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """As torchvision's ToTensor and Normalize: float32 [3, S, S]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div_(255).sub_(MEAN).div_(STD)


def _corner(width: int, height: int) -> tuple[int, int]:
    return random.randint(0, width - SIDE), random.randint(0, height - SIDE)


def _by_pillow(image: Image.Image) -> torch.Tensor:
    scale = STORED / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = _corner(*image.size)
    image = image.crop((left, top, left + SIDE, top + SIDE))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _to_tensor(image)


class Cifar(Dataset):
    """Images in memory, as torchvision's CIFAR10 holds them."""

    def __init__(self, path: Path, how: str):
        with np.load(path) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"].astype(np.int64)
        self.how = how

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if self.how == "batch":
            return self._batch(index)
        if self.how == "pil":
            return _by_pillow(Image.fromarray(self.images[index])), int(self.labels[index])
        pixels = torch.from_numpy(self.images[index]).permute(2, 0, 1).float().div_(255).sub_(MEAN).div_(STD)
        if random.random() < 0.5:
            pixels = pixels.flip(2)
        pixels = functional.interpolate(pixels[None], (STORED, STORED), mode="bilinear", align_corners=False)[0]
        left, top = _corner(STORED, STORED)
        return pixels[:, top : top + SIDE, left : left + SIDE], int(self.labels[index])

    def _batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)
        flipped = torch.rand(len(indices)) < 0.5
        pixels[flipped] = pixels[flipped].flip(3)
        large = functional.interpolate(pixels, (STORED, STORED), mode="bilinear", align_corners=False)
        cropped = torch.empty(len(indices), 3, SIDE, SIDE)
        for row, image in enumerate(large):
            left, top = _corner(STORED, STORED)
            cropped[row] = image[:, top : top + SIDE, left : left + SIDE]
        return cropped, torch.from_numpy(self.labels[indices])


class Folder(Dataset):
    """Image files, as torchvision's ImageFolder reads them."""

    def __init__(self, path: Path):
        self.files = sorted(path.glob("*/*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[index]) as image:
            return _by_pillow(image.convert("RGB")), 0


def _loader(work: str, path: str, how: str, workers: int, batch: int) -> DataLoader:
    dataset = Cifar(Path(path), how) if work == "cifar" else Folder(Path(path))
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**7)
    options: dict[str, Any] = {"batch_size": batch, "sampler": sampler}
    if how == "batch":
        options = {"batch_size": None, "sampler": BatchSampler(sampler, batch, drop_last=False)}
    return DataLoader(dataset, num_workers=workers, **options)


def main() -> None:
    """Answers until stdin ends."""
    open_loaders: dict[tuple[Any, ...], Iterator[Any]] = {}
    for line in sys.stdin:
        if line.strip() == "close":
            open_loaders.clear()
            print("closed", flush=True)
            continue
        asked = json.loads(line)
        pin(asked["cores"])
        torch.set_num_threads(asked["cores"] if not asked["workers"] else 1)
        key = tuple(asked[name] for name in ("work", "path", "how", "workers", "batch"))
        if key not in open_loaders:
            open_loaders[key] = iter(_loader(*key))
        batches = open_loaders[key]
        for _ in range(1 + 2 * asked["workers"]):  # what its workers read while others were measured
            next(batches)
        began = time.perf_counter()
        for _ in range(asked["batches"]):
            next(batches)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()

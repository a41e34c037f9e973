"""PyTorch's side of `benchmarks.cpu.predict`: a line of JSON asks ({"files", "workers"}), a line answers with the seconds."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.cpu.peers_torch import resnet

SIDE, BATCH = 64, 64
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Files(Dataset):
    """Images as torchvision's Resize, CenterCrop, ToTensor and Normalize give them."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(MEAN).div_(STD)


def main() -> None:
    """Answers until standard input ends."""
    model = resnet(10, (2, 2, 2, 2), bottleneck=False, width=16).eval()
    for line in sys.stdin:
        question = json.loads(line)
        began, found = time.perf_counter(), []
        with torch.inference_mode():
            for images in DataLoader(Files(question["files"]), BATCH, num_workers=question["workers"]):
                best = model(images).softmax(-1).topk(5)
                found += list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        assert len(found) == len(question["files"])
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()

"""The child that runs the peer: torchvision's or timm's model as a PyTorch user would train it, at its best.

channels-last, bf16 autocast, `torch.compile`, a fused optimizer, cudnn.benchmark, and CUDA graphs in two ways: those of
`torch.compile(mode="reduce-overhead")`, and one graph of the whole step. The step does what ours does, on the same kind of
uint8 batch that lies on the device: pad-crop, flip, normalise, forward, backward, loss and correct answers, optimizer. It
computes no norms of gradients, weights and updates, and checks nothing for being finite, which ours does.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import serve
from benchmarks.gpu.parts import CASES, EAGER, MEMORY_SHARE, OWN_GRAPH, PLAIN, Case, profile, read_trace

# As `Any`: PyTorch is no dependency of this project, and type checkers may not find it.
torch: Any = importlib.import_module("torch")
F: Any = importlib.import_module("torch.nn.functional")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARM_UP = 3


def model_of(case: Case) -> Any:
    """torchvision's ResNet (with a 3x3 stem and no pooling for small images) and VGG, timm's Swin; `_stand_in` for the
    self-check, which may have neither library."""
    if case.smoke:
        return _stand_in(case)
    if case.model.startswith("swin"):
        timm = importlib.import_module("timm")
        name, size = "swin_tiny_patch4_window7_224", {"img_size": case.image}
        return timm.create_model(name, pretrained=False, num_classes=case.classes, drop_path_rate=0.2, **size)
    model = getattr(importlib.import_module("torchvision.models"), case.model)(num_classes=case.classes)
    if case.image < 64:
        model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = torch.nn.Identity()
    return model


def _stand_in(case: Case) -> Any:
    nn = torch.nn
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, case.classes))


def optimizer_of(case: Case, model: Any, device: str, *, in_graph: bool) -> Any:
    """PyTorch's fused kernel of what ours uses."""
    fused = {"fused": True}
    if case.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, **fused)
    graph = {"capturable": True} if in_graph and device == "cuda" else {}
    return torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, **fused, **graph)


def augment(raw: Any, mean: Any, std: Any) -> Any:
    """uint8 [B, S, S, 3] -> bf16 [B, 3, S, S] in channels-last: flip, random crop of the padded image, normalise."""
    batch, side = raw.shape[0], raw.shape[1]
    width = max(1, round(side / 8))
    device = raw.device
    line = torch.arange(side, device=device)
    corner = torch.randint(0, 2 * width + 1, (2, batch, 1), device=device)
    flip = torch.rand((batch, 1), device=device) < 0.5
    rows, columns = line + corner[0], line + corner[1]
    # A row or column of the padded image, mirrored back where the image is flipped: one gather for all of it.
    inside = ((rows >= width) & (rows < side + width))[:, :, None] & ((columns >= width) & (columns < side + width))[
        :, None
    ]
    rows, columns = (rows - width).clamp(0, side - 1), (columns - width).clamp(0, side - 1)
    columns = torch.where(flip, side - 1 - columns, columns)
    example = torch.arange(batch, device=device)[:, None, None]
    pixels = torch.where(inside[..., None], raw[example, rows[:, :, None], columns[:, None, :]], 0)
    return ((pixels.float() / 255 - mean) / std).to(torch.bfloat16).permute(0, 3, 1, 2)


class Commands:
    """What the parent may ask."""

    def __init__(self) -> None:
        self.device = os.environ.get("GPU_SUITE_TORCH_DEVICE", "cuda")
        self._steps: dict[bool, Callable[[], Any]] = {}

    def info(self) -> dict[str, Any]:
        """The device and the versions."""
        names = ("torch", "torchvision", "timm", "triton")
        versions = {}
        for name in names:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = ""
        if self.device == "cuda":
            versions["cudnn"] = str(torch.backends.cudnn.version())
            return {"device": torch.cuda.get_device_name(0), "versions": versions}
        return {"device": "cpu", "versions": versions}

    def build(self, case: str, batch: int, smoke: bool, candidate: str, backend: str) -> dict[str, Any]:
        """Model, compiled step, first update. seconds: of all that, since the device was there."""
        shape = CASES[case].shrunk() if smoke else CASES[case]
        shape = dataclasses.replace(shape, batch=batch)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        if self.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE)
            torch.backends.cudnn.benchmark = True
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
        began = time.perf_counter()
        whole = candidate == OWN_GRAPH
        net = model_of(shape).to(self.device, memory_format=torch.channels_last).train()
        optimizer = optimizer_of(shape, net, self.device, in_graph=whole)

        draw = torch.Generator().manual_seed(0)
        size = (shape.batch, shape.image, shape.image, 3)
        raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw).to(self.device)
        labels = torch.randint(0, shape.classes, (shape.batch,), generator=draw).to(self.device)
        mean, std = (torch.tensor(values, device=self.device) for values in (MEAN, STD))

        def forward(images: Any) -> tuple[Any, Any]:
            with torch.autocast(self.device, dtype=torch.bfloat16):
                logits = net(images)
            return F.cross_entropy(logits.float(), labels), (logits.argmax(1) == labels).sum()

        compiled, augmented = forward, augment
        if candidate != EAGER:
            mode = {"mode": PLAIN if whole else candidate} if backend == "inductor" else {}
            compiled = torch.compile(forward, backend=backend, **mode)
            augmented = torch.compile(augment, backend=backend)
        prepared = augmented(raw, mean, std).clone()

        def step(bare: bool) -> tuple[Any, Any]:
            if candidate == "reduce-overhead" and self.device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            loss, correct = compiled(prepared if bare else augmented(raw, mean, std))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach(), correct

        self._steps = {bare: (lambda bare=bare: step(bare)) for bare in (False, True)}
        loss = float(self._steps[False]()[0])
        self._wait()
        first = time.perf_counter() - began
        if self.device == "cuda":  # what cuDNN and inductor took to choose their kernels is no part of a step
            torch.cuda.reset_peak_memory_stats()
        if whole and self.device == "cuda":
            self._steps = _graphs(step)
        for _ in range(WARM_UP):
            for each in self._steps.values():
                each()
        self._wait()
        return {
            "seconds": first,
            "with_warm_up_seconds": time.perf_counter() - began,
            "loss": loss,
            "parameters": sum(p.numel() for p in net.parameters()),
        }

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def block(self, steps: int, bare: bool) -> dict[str, Any]:
        """Seconds a step of `steps` updates, waited for at the end. bare: on a batch that is augmented already."""
        step = self._steps[bare]
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            result = step()
        self._wait()
        seconds = (time.perf_counter() - began) / steps
        return {"seconds": seconds, "loss": float(result[0])}

    def memory(self) -> dict[str, Any]:
        """Bytes of tensors at most, and what the allocator held for them."""
        if self.device != "cuda":
            return {"peak_bytes": None}
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}

    def profile(self, steps: int, step_seconds: float) -> dict[str, Any]:
        """See `parts.profile`."""
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CUDA if self.device == "cuda" else kinds.CPU]) as found:
            for _ in range(steps):
                self._steps[False]()
            self._wait()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            found.export_chrome_trace(str(path))
            return profile(read_trace(path), steps, step_seconds)


def _graphs(step: Callable[[bool], Any]) -> dict[bool, Callable[[], Any]]:
    """Each way of the step as one CUDA graph; both share their memory."""
    ways = (False, True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # both, before the first graph keeps a step's memory for itself
        for bare in ways:
            for _ in range(WARM_UP):
                step(bare)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    found: dict[bool, Callable[[], Any]] = {}
    pool = torch.cuda.graph_pool_handle()
    for bare in ways:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = step(bare)

        def replay(graph: Any = graph, result: Any = result) -> Any:
            graph.replay()
            return result

        found[bare] = replay
    return found


def main() -> None:
    """Answers the parent."""
    commands = Commands()
    names = ("info", "build", "block", "memory", "profile")
    serve({name: getattr(commands, name) for name in names})


if __name__ == "__main__":
    main()

"""Reads an optimized GPU program (XLA's HLO text): its kernels, the bytes that they move, its collectives, its donation.

A kernel is an instruction of the entry computation, or of a loop's body, that computes something: a fusion, a call of
cuDNN or cuBLAS, a copy, a sort. Its bytes are its operands and its results. So they are those that pass through the
GPU's memory, but for what the caches keep and for the libraries' workspaces.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

SMALL = 4_000_000
"""A kernel that moves fewer bytes takes longer to start than to run."""

_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}  # of others the name says it: f32, s8, f8e4m3fn
_SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_LAYER = re.compile(r"layers_\d+|\b(?:augmentation|update)\b")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_PRODUCTS = ("dot", "convolution")
_BODIES = {"while": r"body=%?([\w.\-]+)", "call": r"to_apply=%?([\w.\-]+)", "async-start": r"calls=%?([\w.\-]+)"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
      kind: `fusion: loop`, `fusion: reduction`, `cuDNN convolution`, `copy`, ...
      times: how often it runs in one call of the program.
      bytes: of its operands and results, in one run.
      layer: the model's layer that most of it comes from ("layers_03", "layers_03 backward"), "augmentation", "update", or "".
      operation: the last part of the JAX name that it comes from.
      products: the dtypes of the operands of the matrix products and convolutions in it.
    """

    kind: str
    times: int
    bytes: int
    layer: str
    operation: str
    products: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective.

    Attributes:
      kind: `all-reduce`, `all-gather`, ...
      axes: the mesh axes that it goes over.
      times: how often it runs in one call of the program.
      bytes: of its result, in one run.
      layer: as of a kernel.
      operation: as of a kernel.
      arrays: bytes of each array of the result; XLA joins collectives into one of several arrays.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: int
    layer: str
    operation: str
    arrays: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class GpuProgram:
    """What a compiled program does. donated: how many of its arguments its results take the place of."""

    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    donated: int
    host_callbacks: int

    @property
    def count(self) -> int:
        """Kernels that one call runs."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def small(self) -> int:
        """Of these, those that move less than `SMALL` bytes."""
        return sum(kernel.times for kernel in self.kernels if kernel.bytes < SMALL)

    @property
    def gigabytes(self) -> float:
        """What all kernels of one call move, in 1e9 bytes."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels) / 1e9

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """(kernels, gigabytes) of each kind, the largest first."""
        totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
        for kernel in self.kernels:
            totals[kernel.kind][0] += kernel.times
            totals[kernel.kind][1] += kernel.times * kernel.bytes / 1e9
        return {
            kind: (int(count), total) for kind, (count, total) in sorted(totals.items(), key=lambda item: -item[1][1])
        }


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str  # what follows the opening parenthesis

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", _until_closed(self.rest))

    @property
    def branches(self) -> list[str]:
        """The computations of a `conditional`, whether its condition is a number or a bool."""
        listed = self.attribute(r"branch_computations=\{([^}]*)\}") or ",".join(
            re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", self.rest)
        )
        return [name.strip().removeprefix("%") for name in listed.split(",") if name]

    def attribute(self, pattern: str) -> str:
        match = re.search(pattern, self.rest)
        return match[1] if match else ""


def read_program(hlo: str, mesh: Mesh) -> GpuProgram:
    """Reads the text of `Compiled.as_text()`.

    Args:
      hlo: the text.
      mesh: of the run; the program's partitions are its devices in their order.
    """
    computations, entry = _computations(hlo)
    kernels: list[Kernel] = []
    collectives: list[Collective] = []
    callbacks = 0
    for instruction, times, shapes in _executed(computations, entry, 1):
        kind = instruction.op.removesuffix("-start")
        layer, operation = _origin(instruction, computations)
        if kind in COLLECTIVES:
            arrays, axes = _result_arrays(instruction), _axes(instruction.rest, mesh)
            collectives.append(Collective(kind, axes, times, sum(arrays), layer, operation, arrays))
            continue
        target = instruction.attribute(r'custom_call_target="([^"]+)"')
        callbacks += "callback" in target
        moved = _bytes(instruction.shape) + sum(_read_bytes(instruction, shapes, computations))
        products = tuple(_product_dtypes(instruction, shapes, computations))
        kernels.append(Kernel(_kind(instruction, target), times, moved, layer, operation, products))
    header = hlo.partition("\n")[0]
    return GpuProgram(tuple(kernels), tuple(collectives), len(re.findall(r"(?:may|must)-alias", header)), callbacks)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an instruction of a program comes from: `kind`, `layer` and `operation` as those of a `Kernel`."""

    kind: str
    layer: str
    operation: str


def instruction_origins(hlo: str) -> dict[str, Origin]:
    """The origin of each instruction by its name, as profiles have it.

    XLA:CPU gives some convolutions no JAX name; they have that of what uses them.

    hlo: as `read_program` takes it.
    """
    computations, _ = _computations(hlo)
    origins = {}
    for instructions in computations.values():
        users: dict[str, tuple[str, str]] = {}
        for instruction in reversed(instructions):  # what uses a value comes after it
            target = instruction.attribute(r'custom_call_target="([^"]+)"')
            layer, operation = _origin(instruction, computations)
            if not operation:
                layer, operation = users.get(instruction.name, ("", ""))
            users |= dict.fromkeys(instruction.operands, (layer, operation)) if operation else {}
            origins[instruction.name] = Origin(_kind(instruction, target), layer, operation.rstrip(")"))
    return origins


def module_name(hlo: str) -> str:
    """The name of a program, as profiles have it: `jit_step`."""
    return hlo.partition("\n")[0].removeprefix("HloModule ").partition(",")[0].strip()


def permuted_bytes(hlo: str, counted: Callable[[int, int], bool] = lambda sender, receiver: True) -> dict[int, int]:
    """The bytes that each partition sends in the `collective-permute`s of one call, by its number.

    Args:
      hlo: the text of `Compiled.as_text()`, for GPUs or a CPU.
      counted: (sender, receiver) -> whether what goes between them counts.
    """
    sent: collections.Counter[int] = collections.Counter()
    for instruction, times, _ in _executed(*_computations(hlo), 1):
        if instruction.op.removesuffix("-start") == "collective-permute":
            for sender, receiver in _groups(instruction.rest, 0):
                sent[sender] += times * sum(_result_arrays(instruction)) * counted(sender, receiver)
    return dict(sent)


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, by its name; and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _executed(
    computations: Mapping[str, Sequence[_Instruction]], name: str, times: int
) -> Iterator[tuple[_Instruction, int, dict[str, str]]]:
    """The instructions that do something, how often each runs, and the shapes of its computation's values."""
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        if instruction.op == "conditional":  # of its branches, the one that does the most
            branches = [list(_executed(computations, name, times)) for name in instruction.branches]
            yield from max(branches, key=lambda found: sum(_bytes(each.shape) for each, _, _ in found), default=[])
        elif pattern := _BODIES.get(instruction.op):
            trips = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"') if instruction.op == "while" else "1"
            if (body := instruction.attribute(pattern)) in computations:
                yield from _executed(computations, body, times * int(trips or 1))
        elif instruction.op not in _FREE and not instruction.op.endswith("-done"):
            yield instruction, times, shapes


def _kind(instruction: _Instruction, target: str) -> str:
    if target:
        if "cudnn" in target:
            return "cuDNN convolution" if "conv" in target.lower() else f"cuDNN {target.rpartition('$')[2]}"
        return "cuBLAS product" if "cublas" in target else f"custom call {target}"
    if instruction.op != "fusion":
        return instruction.op
    inner = instruction.attribute(r'"kind":"(__[^"]+)"').strip("_")
    names = {"kLoop": "loop", "kInput": "reduction", "kOutput": "output"}
    outer = names.get(instruction.attribute(r"kind=(\w+)"), "custom")
    return f"fusion: {inner or outer}"


def _origin(instruction: _Instruction, computations: Mapping[str, Sequence[_Instruction]]) -> tuple[str, str]:
    """The layer (see `Kernel`), and the last part of the JAX name, that its product or most of an instruction comes from."""
    called = computations.get(instruction.attribute(r"calls=%?([\w.\-]+)"), ())
    if products := [each for each in called if each.op in _PRODUCTS]:
        instruction, *called = products
    names = [name for each in (instruction, *called) if (name := each.attribute(r'op_name="([^"]*)"'))]
    if not names:
        return "", ""
    found = [layer[0] + " backward" * ("transpose(" in name) for name in names if (layer := _LAYER.search(name))]
    layers, operations = collections.Counter(found), collections.Counter(name.rpartition("/")[2] for name in names)
    return (layers.most_common(1)[0][0] if layers else ""), operations.most_common(1)[0][0]


def _read_bytes(
    instruction: _Instruction, shapes: Mapping[str, str], computations: Mapping[str, Sequence[_Instruction]]
) -> Iterator[int]:
    """Bytes that are read of each operand: of one that a fusion only gathers or slices from, those that it takes."""
    called = computations.get(instruction.attribute(r"calls=%?([\w.\-]+)"), ())
    parameters = {each.rest.partition(")")[0]: each.name for each in called if each.op == "parameter"}
    for number, name in enumerate(instruction.operands):
        users = [each for each in called if parameters.get(str(number)) in each.operands]
        if users and all(each.op in ("gather", "dynamic-slice", "slice") for each in users):
            yield sum(_bytes(each.shape) for each in users)
        else:
            yield _bytes(shapes.get(name, ""))


def _product_dtypes(
    instruction: _Instruction, shapes: Mapping[str, str], computations: Mapping[str, Sequence[_Instruction]]
) -> Iterator[str]:
    """The dtypes of the operands of the matrix products and convolutions that a kernel computes."""
    target = instruction.attribute(r'custom_call_target="([^"]+)"')
    if "cudnn" in target or "cublas" in target:
        yield from (_dtype(shapes.get(name, "")) for name in instruction.operands[:2])
    for name in re.findall(r"calls=%?([\w.\-]+)", instruction.rest):
        inner = {each.name: each.shape for each in computations.get(name, ())}
        for each in computations.get(name, ()):
            if each.op in _PRODUCTS:
                yield from (_dtype(inner.get(operand, "")) for operand in each.operands[:2])


def _dtype(shape: str) -> str:
    match = _SHAPE.search(shape)
    return match[1] if match else ""


def _bytes(shape: str) -> int:
    return sum(_arrays(shape))


def _arrays(shape: str) -> tuple[int, ...]:
    """Bytes of each array of a shape, which may be a tuple."""
    return tuple(
        math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8 for dtype, dims in _SHAPE.findall(shape)
    )


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype) or int(digits[0] if digits else 8)


def _result_arrays(instruction: _Instruction) -> tuple[int, ...]:
    """Bytes of each array of a collective's result.

    What `all-gather-start` and `collective-permute-start` give is a pair: the operands, then the results. So it is of
    `all-to-all-start` and `reduce-scatter-start`, whose operands are a tuple also where there is one.
    """
    shape = instruction.shape
    paired = instruction.op in ("all-gather-start", "collective-permute-start") and shape.startswith("(")
    if paired or (instruction.op.endswith("-start") and shape.startswith("((")):
        parts = _split(shape[1:-1])
        shape = parts[1] if len(parts) > 1 else shape
    return _arrays(shape)


def _split(text: str) -> list[str]:
    """The parts of `text` between commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]]


def _until_closed(rest: str) -> str:
    """`rest` up to the parenthesis that closes the one before it."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:i]
    return rest


def _axes(rest: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a collective's groups differ."""
    groups = _groups(rest, mesh.size)
    coordinates = np.array(np.unravel_index(np.arange(mesh.size), mesh.devices.shape))
    varies = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        spread = coordinates[:, group]
        varies |= (spread != spread[:, :1]).any(1)
    return tuple(itertools.compress(mesh.axis_names, varies))


def _groups(rest: str, devices: int) -> list[list[int]]:
    """The groups of partitions of a collective, in any of the ways that HLO writes them."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest):
        return [
            [int(number) for number in group.split(",") if number] for group in re.findall(r"\{([\d,]*)\}", listed[1])
        ]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(*iota.groups())
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? \{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return _along(sizes, re.findall(r"'([^']+)'", named[3]))
    return [list(range(devices))]


def _iota(shape: str, dims: str, order: str | None) -> list[list[int]]:
    numbers: Any = np.arange(math.prod(map(int, dims.split(",")))).reshape([int(d) for d in dims.split(",")])
    if order:
        numbers = numbers.transpose([int(axis) for axis in order.split(",")])
    return numbers.reshape([int(d) for d in shape.split(",")]).tolist()


def _along(sizes: Mapping[str, int], axes: Sequence[str]) -> list[list[int]]:
    """The groups of devices that differ along `axes` alone, of a mesh of `sizes`."""
    numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    names = list(sizes)
    along = [names.index(axis) for axis in axes]
    others = [i for i in range(len(names)) if i not in along]
    return numbers.transpose(others + along).reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist()

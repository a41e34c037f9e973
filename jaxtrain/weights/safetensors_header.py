"""The header of a safetensors file, checked by its specification: 8 bytes of length, JSON, then the tensors' bytes.

The format is that of https://github.com/huggingface/safetensors. The header is checked here, before anything is allocated
for the tensors; `export` writes by the library.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxtrain.weights.tensors import MOST_TENSORS, Found, Tensor, checked_shape, refuse_overlaps, require, shown

_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
_SMALL_HEADER = (
    1 << 20
)  # bytes; a larger one must be a small part of the file, since parsed JSON takes several times its text
_MOST_BRACKETS = 8 * MOST_TENSORS


def read(file: BinaryIO, size: int) -> Found:
    """The table of a safetensors file of `size` bytes. Raises `ValueError` saying what is wrong with it."""
    file.seek(0)
    require(size >= 8, f"it has {size} bytes, and a header needs 8")
    length = int.from_bytes(file.read(8), "little")
    require(length <= size - 8, f"its header would have {length:,} bytes, and the file has {size:,}")
    require(length <= max(_SMALL_HEADER, size // 16), f"its header has {length:,} bytes, too many for {size:,} in all")
    text = file.read(length)
    require(len(text) == length, "it ends within its header")
    require(text[:1] == b"{", "its header does not begin with {")
    many = text.count(b'"data_offsets"') > MOST_TENSORS or text.count(b"{") + text.count(b"[") > _MOST_BRACKETS
    require(not many, f"its header names more than {MOST_TENSORS:,} tensors")
    values = _parsed(text)
    metadata = values.pop("__metadata__", {})
    words = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    require(words, "its __metadata__ is not made of strings")
    require(values, "it holds no tensor")
    tensors = {name: _tensor(name, entry, 8 + length, size) for name, entry in values.items()}
    refuse_overlaps(tensors)
    used = sum(tensor.end - tensor.offset for tensor in tensors.values())
    require(used == size - 8 - length, f"{size - 8 - length - used:,} bytes of the file belong to no tensor")
    return Found(tensors, metadata)


def _parsed(text: bytes) -> dict[str, Any]:
    """The header's JSON, in which no name stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"its header has {shown(twice)} twice")
        return found

    def no_constant(word: str) -> None:
        raise ValueError(f"its header holds {word}")

    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    try:
        values = json.loads(decoded, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON ({error})") from None
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    require(isinstance(values, dict), "its header is no JSON object")
    return values


def _tensor(name: str, entry: Any, begin: int, size: int) -> Tensor:
    """One entry of the header. begin: where the tensors' bytes begin. size: of the file."""
    fields = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    require(fields, f"{shown(name)} is not described by dtype, shape and data_offsets")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in _DTYPES
    require(known, f"{shown(name)} has the type {shown(dtype)}; {', '.join(_DTYPES)} are read")
    shape = checked_shape(name, entry["shape"])
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
    require(pair and 0 <= offsets[0] <= offsets[1] <= size - begin, f"{shown(name)} lies outside of the file")
    tensor = Tensor(_DTYPES[dtype], shape, begin + offsets[0])
    needed = tensor.end - tensor.offset
    has = offsets[1] - offsets[0]
    require(needed == has, f"{shown(name)} has {has:,} bytes and needs {needed:,} for {list(shape)} of {dtype}")
    return tensor

"""The table of an `.npz` file as `numpy.savez` writes it: a zip of arrays that are neither compressed nor pickled.

A compressed member could unpack to far more than the file, so there must be none. Then each array lies in the file as it
is, and is read like a tensor of a safetensors file.
"""

from __future__ import annotations

import re
import struct
import zipfile
from typing import BinaryIO

import numpy as np

from jaxtrain.weights.tensors import MOST_TENSORS, Found, Tensor, checked_shape, refuse_overlaps, require, shown

_END = struct.Struct("<4s4H2LH")  # the end of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # the header of a member
_MOST_HEADER = 10_000  # bytes of an array's header, as NumPy has it
_HEADER = re.compile(
    rb"\{'descr': '(?P<descr>[|<>=]?[A-Za-z0-9]{1,9})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:[0-9]{1,18}(?:, |,|))*)\), ?\}\s*"
)


class PickledError(Exception):
    """The zip is one that PyTorch writes: its data are a pickle."""


def read(file: BinaryIO, size: int) -> Found:
    """The table of an `.npz` of `size` bytes. Raises `ValueError` saying what is wrong, and `PickledError`."""
    require(size >= _END.size, f"it has {size} bytes, and a zip has at least {_END.size}")
    file.seek(size - _END.size)
    signature, _, _, _, count, _, _, comment = _END.unpack(file.read(_END.size))
    require(signature == b"PK\5\6" and not comment, "it is cut off, or does not end as numpy.savez ends it")
    require(count <= MOST_TENSORS, f"it has {count:,} members, more than {MOST_TENSORS:,}; save that as safetensors")
    file.seek(0)
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"its directory cannot be read ({error})") from None
    if any(member.filename.endswith("data.pkl") for member in members):
        raise PickledError
    tensors: dict[str, Tensor] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        require(name != member.filename, f"its member {shown(member.filename)} is no .npy")
        require(name not in tensors, f"it has {shown(name)} twice")
        tensors[name] = _tensor(file, size, member, name)
    require(tensors, "it holds no array")
    refuse_overlaps(tensors)
    return Found(tensors, {})


def _tensor(file: BinaryIO, size: int, member: zipfile.ZipInfo, name: str) -> Tensor:
    stored = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
    require(stored, f"{shown(name)} is compressed; write it by numpy.savez, not savez_compressed")
    require(not member.flag_bits & 1, f"{shown(name)} is encrypted")
    require(0 <= member.header_offset <= size - _LOCAL.size, f"{shown(name)} lies outside of the file")
    file.seek(member.header_offset)
    signature, *_, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
    require(signature == b"PK\3\4", f"{shown(name)} has no header")
    begin = member.header_offset + _LOCAL.size + name_length + extra_length
    end = begin + member.file_size
    require(end <= size, f"{shown(name)} lies outside of the file")
    file.seek(begin)
    head = file.read(min(member.file_size, _MOST_HEADER))
    length, descr, fortran, shape = _array_header(name, head)
    require(descr != "|O", f"{shown(name)} is pickled, which could run any code")
    plain = re.fullmatch("<[fiu][248]|[|][biu]1", descr)
    require(plain, f"{shown(name)} has the type {shown(descr)}; floats and integers, little-endian, are read")
    dtype = np.dtype(descr)
    require(not fortran, f"{shown(name)} is in Fortran order; save numpy.ascontiguousarray of it")
    tensor = Tensor(dtype, checked_shape(name, shape), begin + length)
    has = end - tensor.offset
    needed = tensor.end - tensor.offset
    require(needed == has, f"{shown(name)} has {has:,} bytes and needs {needed:,} for {list(tensor.shape)} of {dtype}")
    return tensor


def _array_header(name: str, head: bytes) -> tuple[int, str, bool, tuple[int, ...]]:
    """Length of an array's header, its type, whether it is in Fortran order, and its shape."""
    wide = head[6:7] in (b"\2", b"\3")  # versions whose length has four bytes
    begin = 12 if wide else 10
    length = begin + int.from_bytes(head[8:begin], "little")
    found = _HEADER.fullmatch(head[begin:length]) if head.startswith(b"\x93NUMPY") and length <= len(head) else None
    if found is None:
        raise ValueError(f"{shown(name)} has no header of an array of numbers")
    shape = tuple(int(n) for n in found["shape"].split(b",") if n.strip())
    return length, found["descr"].decode(), found["fortran"] == b"True", shape

"""Opens a file of weights: safetensors, or `.npz` without pickle. Nothing in it is run, and nothing is read unchecked.

Both formats are a table of tensors and their bytes. The table is checked against the file's size before anything is
allocated. The bytes are mapped into memory, so that a slice of a tensor costs no more than the slice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import mmap
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxtrain.errors import WeightsError
from jaxtrain.host.paths import require_local
from jaxtrain.weights import npz, safetensors_header
from jaxtrain.weights.tensors import Found, Tensor

_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
_OTHERS = {b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes it", b"\x93NUMPY": "a single array"}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """An open file of weights whose table has been checked. Close it by `open_weights`."""

    path: Path
    format: str
    """`safetensors` or `npz`."""
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    """What the file says of itself; empty in an `.npz`."""
    bytes: mmap.mmap

    def array(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file."""
        tensor = self.tensors[name]
        return np.frombuffer(self.bytes, tensor.dtype, tensor.size, tensor.offset).reshape(tensor.shape)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the whole file, as lower-case hex."""
        return hashlib.sha256(self.bytes).hexdigest()


@contextlib.contextmanager
def open_weights(path: str | Path) -> Iterator[WeightsFile]:
    """Opens a file of weights, and checks its table.

    Raises:
      WeightsError: there is no such file, it has another format, could run code, or is damaged.
    """
    require_local(path, f"The file of weights {path}", WeightsError)
    path = Path(path).expanduser().absolute()
    _refuse_pickle(path, by_name=True)
    try:
        # A FIFO would keep `open` waiting for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WeightsError(f"The file of weights {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise WeightsError(f"The file of weights {str(path)!r} cannot be read ({error}).") from error
    with open(_regular(path, descriptor), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(8)
        read, kind = (npz.read, "npz") if begin.startswith(b"PK") else (safetensors_header.read, "safetensors")
        if begin.startswith(b"\x80"):
            _refuse_pickle(path)
        for magic, what in _OTHERS.items():
            if begin.startswith(magic[:8]):
                raise WeightsError(f"{path} is {what}; save the weights as safetensors, or by numpy.savez as .npz.")
        try:
            found: Found = read(file, size)
        except npz.PickledError:
            _refuse_pickle(path)
        except ValueError as error:
            raise WeightsError(f"{path} is no {kind} file of weights, or is damaged: {error}.") from None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            yield WeightsFile(path, kind, found.tensors, found.metadata, mapped)
        finally:
            with contextlib.suppress(BufferError):  # a caller's view is still alive: the map closes with it
                mapped.close()


def _regular(path: Path, descriptor: int) -> int:
    """`descriptor`, which is that of a file with something in it; or it is closed, and a `WeightsError` says what is there."""
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size:
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(found.st_mode):
        raise WeightsError(f"{path} is empty.")
    if stat.S_ISDIR(found.st_mode):
        held = path / "model.safetensors"
        hint = f"; name the file, {held}" if held.is_file() else ""
        raise WeightsError(f"{path} is a directory, not a file of weights{hint}.")
    raise WeightsError(f"{path} is no regular file.")


def _refuse_pickle(path: Path, *, by_name: bool = False) -> None:
    """Raises `WeightsError` for a file that PyTorch would unpickle. by_name: only if its name says so."""
    if by_name and path.suffix.lower() not in _PICKLES:
        return
    out = path.with_suffix(".safetensors").name
    code = (
        "import torch, safetensors.torch as s; "
        f"s.save_file({{k: v.contiguous() for k, v in torch.load({path.name!r}, weights_only=True).items()}}, {out!r})"
    )
    raise WeightsError(
        f"{path} is a pickle, which can run any code, and is not read; where torch is installed, this makes "
        f"{out} of it: python -c {shlex.quote(code)}"
    )

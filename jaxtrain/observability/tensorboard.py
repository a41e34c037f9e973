"""TensorBoard event files without TensorFlow, protobuf or tensorboardX.

A run writes few scalars, and its config. A record is a length, a protocol buffer of at most four fields, and two checksums.
tensorboardX imports all of PyTorch where that is installed (half of a start's imports, measured). Its `SummaryWriter` starts
a thread for each directory, and names files by the second, so that a quick restart overwrites the file before.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.host.files import write_all, writing


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many numbers are in each of some bins of equal width."""

    least: float
    """The smallest number, where the first bin begins."""
    most: float
    """The largest number, where the last bin ends."""
    total: float
    """The sum of the numbers."""
    squares: float
    """The sum of their squares."""
    counts: Sequence[float]
    """Of each bin."""


class EventFile:
    """Appends records to a new event file in `directory`; TensorBoard shows all files of a directory as one run.

    The operating system gets each record at once, so a killed process loses none. After `flush` they survive a power cut.
    """

    def __init__(self, directory: Path, step: int, now: Callable[[], float] = time.time):
        """Opens a file.

        Its first record makes TensorBoard drop the later steps of earlier files.

        Args:
          directory: made if need be.
          step: where the run goes on from; 0 for a new run.
          now: the clock, in seconds since 1970.
        """
        self._directory = directory
        self._now = now
        # TensorBoard reads files in the order of their names: a new one must sort last, even if the clock was set back.
        taken = (path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*"))
        second = max([int(now()), *(int(t) + 1 for t in taken if re.fullmatch("[0-9]{10,12}", t))])
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"events.out.tfevents.{second:010d}.{socket.gethostname()}"
            self._file = path.open("xb", buffering=0)  # fails where a link has its name
        self._write(_bytes(3, b"brain.Event:2"))
        self.drop(step + 1 if step else 0)

    def drop(self, step: int) -> None:
        """Makes TensorBoard drop what this directory has of `step` and later ones (`SessionLog.START`)."""
        self._write(_integer(2, step) + _bytes(7, _integer(1, _SESSION_START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds `values` at `step`."""
        summaries = (_bytes(1, _bytes(1, tag.encode()) + _key(2, 5) + _float32(value)) for tag, value in values.items())
        self._write(_integer(2, step) + _bytes(5, b"".join(summaries)))

    def picture(self, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """Adds a picture at `step`. png: the file's content. size: width and height, in pixels."""
        width, height = size
        image = _integer(1, height) + _integer(2, width) + _integer(3, _RGB) + _bytes(4, png)
        self._write(_integer(2, step) + _bytes(5, _bytes(1, _bytes(1, tag.encode()) + _bytes(4, image))))

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Adds `values` at `step`, by tag."""
        summaries = (_bytes(1, _bytes(1, tag.encode()) + _bytes(5, _histogram(each))) for tag, each in values.items())
        self._write(_integer(2, step) + _bytes(5, b"".join(summaries)))

    def hparams(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a run's settings at `step`: a table under TEXT, and a row under HPARAMS. values: by dotted name."""
        lines = [f"| `{name}` | `{value!r}` |".replace("\n", " ") for name, value in values.items()]
        table = "\n".join(["| field | value |", "|--|--|", *lines]).encode()
        text = _value("config", "text", b"", _integer(1, _STRING) + _bytes(2, b"") + _bytes(8, table))
        pairs = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _bytes(2, _setting(value))) for name, value in values.items()
        )
        start = _bytes(3, pairs + _key(5, 1) + struct.pack("<d", self._now()))
        row = _value("_hparams_/session_start_info", "hparams", start, _integer(1, _FLOAT) + _bytes(2, b""))
        self._write(_integer(2, step) + _bytes(5, _bytes(1, text) + _bytes(1, row)))

    def flush(self) -> None:
        """Syncs to the disk."""
        with writing(self._directory):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes; may be called twice."""
        if not self._file.closed:
            with self._file:
                self.flush()

    def _write(self, fields: bytes) -> None:
        event = _key(1, 1) + struct.pack("<d", self._now()) + fields
        length = struct.pack("<Q", len(event))
        with writing(self._directory):
            write_all(self._file, length + _checksum(length) + event + _checksum(event))


# ----------------------------------------------------------------------------------------------------------- the format
# tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto; protobuf.dev/programming-guides/encoding.
# Event: wall_time 1, step 2, file_version 3, summary 5, session_log 7. SessionLog: status 1. Summary: value 1, of tag 1 and
# simple_value 2, image 4, histo 5, or tensor 8 and metadata 9. Image: height 1, width 2, colorspace 3, encoded_image_string 4.
# HistogramProto (tsl/protobuf/histogram.proto): min 1, max 2, num 3, sum 4, sum_squares 5, bucket_limit 6, bucket 7.
# SummaryMetadata: plugin_data 1, of plugin_name 1 and content 2. TensorProto: dtype 1, tensor_shape 2, string_val 8.
# tensorboard/plugins/hparams/plugin_data.proto: HParamsPluginData: session_start_info 3, of hparams 1 (a map of
# google.protobuf.Value: number 2, string 3, bool 4) and start_time_secs 5.

_SESSION_START = 1
_FLOAT, _STRING = 1, 7  # of TensorFlow's DataType
_RGB = 3


def _histogram(values: Histogram) -> bytes:
    """A `HistogramProto`."""
    bins = len(values.counts)
    ends = [values.least + (values.most - values.least) * (k + 1) / bins for k in range(bins)]
    numbers = values.least, values.most, sum(values.counts), values.total, values.squares
    fields = b"".join(_key(field, 1) + struct.pack("<d", number) for field, number in enumerate(numbers, 1))
    return fields + _bytes(6, struct.pack(f"<{bins}d", *ends)) + _bytes(7, struct.pack(f"<{bins}d", *values.counts))


def _value(tag: str, plugin: str, content: bytes, tensor: bytes) -> bytes:
    """A `Summary.Value` for one of TensorBoard's plugins."""
    metadata = _bytes(1, _bytes(1, plugin.encode()) + _bytes(2, content))
    return _bytes(1, tag.encode()) + _bytes(8, tensor) + _bytes(9, metadata)


def _setting(value: Any) -> bytes:
    """A `google.protobuf.Value`."""
    if isinstance(value, bool):
        return _integer(4, int(value))
    if isinstance(value, (int, float)):
        return _key(2, 1) + struct.pack("<d", value)
    return _bytes(3, str(value).encode())


def _key(field: int, kind: int) -> bytes:
    """A field's tag, which precedes its value. kind: 0 integer, 1 eight bytes, 2 length and bytes, 5 four bytes."""
    return bytes([field << 3 | kind])


def _integer(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first. The eighth bit is set if more bytes follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


def _crc_table() -> tuple[int, ...]:
    table = range(256)
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return tuple(table)


_CRC = _crc_table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C (RFC 3720, appendix B.4), rotated and shifted as TensorFlow's record files do."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

"""Image files: decoding with Pillow, and image folders."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from jaxtrain.config import did_you_mean
from jaxtrain.data import base
from jaxtrain.errors import ConfigError, DataError

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
# The other forty formats that Pillow tells by their content stay out: it hands some to other programs (EPS to Ghostscript).
_PLUGINS = (  # loading each has registered its extensions
    JpegImagePlugin,
    PngImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    WebPImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
)
_FORMATS = tuple(dict.fromkeys(Image.EXTENSION[extension] for extension in _EXTENSIONS))
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Above these an image is taken for a decompression bomb: 2**26 pixels are 200 MB of RGB, a file of a few kB can say so, and
# 2**26 rows of one pixel take a minute. What is decoded counts: of a JPEG that is read at an eighth, a 64th of its pixels.
_MAX_SIDE, _MAX_PIXELS = 1 << 16, 1 << 26
# A JPEG's own pixels, also those that are not decoded. A progressive one is kept whole, in up to 6 bytes a pixel.
_MAX_STORED, _MAX_PROGRESSIVE = 1 << 28, 1 << 27


def decode(data: bytes, where: str, *, channels: int, side: int = 0) -> np.ndarray:
    """uint8 [H, W, channels] of an encoded image.

    side: > 0 resizes the shorter side to it (bilinear, antialiased) and takes the centre square, so H = W = side. A
        JPEG of twice that side or more is decoded at a half, a quarter or an eighth of its size (never below `side`).
    where: names the file or record in the `DataError` that a truncated, garbage, empty or oversized image raises, and one of
        another format than those of `_EXTENSIONS`. The content says what format it is, and the first frame is read.
    """
    if not data:
        raise DataError(f"{where} is empty.")
    try:
        with _open(data) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255
                raise ValueError(f"its pixels are of mode {image.mode}, and 8-bit ones are read: convert it")
            # Only for JPEG, whose decoder leaves out the frequencies that the smaller image could not show.
            stored = image.size
            reduced = image.draft(None, (side, side)) if side else None
            _check_size(image, stored, may_be_reduced=side > 0 and reduced is None)
            size = reduced[1][2:] if reduced else image.size
            pixels = image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
            array = np.asarray(_centre_square(pixels, side, *size) if side else pixels)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise DataError(f"{where} is not a readable image ({error or type(error).__name__}).") from None
    return array[:, :, None] if array.ndim == 2 else array


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads the header only. Not `Image.open`: its own limit knows nothing of reduced decoding, warns, and holds for all of
    the process, and so would be lifted for all of it.
    """
    for name in _FORMATS:
        opens, accepts = Image.OPEN[name]
        if accepts is not None and (accepted := accepts(data[:16])):
            if isinstance(accepted, str):  # why this Pillow cannot read that format
                raise ValueError(accepted)
            try:
                image = opens(io.BytesIO(data), "")
            except Image.DecompressionBombError:  # some of Pillow's formats look for themselves
                raise ValueError(f"at most {_MAX_PIXELS:,} pixels are read: make it smaller") from None
            # Pillow reads those in Python, at a tenth of a megapixel a second, and cuts what is above 255.
            if isinstance(image, PpmImagePlugin.PpmImageFile) and any(tile[0] != "raw" for tile in image.tile):
                raise ValueError("its pixels are written as text, or not with 8 bits: convert it")
            return image
    raise ValueError(f"its content is none of {', '.join(_FORMATS)}")


def _check_size(image: ImageFile.ImageFile, stored: tuple[int, int], *, may_be_reduced: bool) -> None:
    """Raises `ValueError` for an image too large to be decoded, as `image` is about to be, or to be looked at (`stored`).

    may_be_reduced: whether it would be read at a reduced size if it were a JPEG.
    """
    most, kind = (_MAX_PROGRESSIVE, "progressive ") if image.info.get("progressive") else (_MAX_STORED, "")
    sizes = [image.size]
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whole tiles are decoded, even of a small image
        sizes.append((image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 1), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 1)))
    if max(stored) > _MAX_SIDE or any(width * height > _MAX_PIXELS for width, height in sizes):
        instead = ", or save it as a JPEG, which is read at a reduced size" if may_be_reduced else ""
        limit = f"at most {_MAX_PIXELS:,} are read, and at most {_MAX_SIDE:,} a side: make it smaller{instead}"
    elif stored[0] * stored[1] > most:
        limit = f"at most {most:,} of a {kind}JPEG are read: make it smaller"
    else:
        return
    raise ValueError(f"{stored[0]} x {stored[1]} pixels; {limit}")


def _centre_square(image: Image.Image, side: int, width: float, height: float) -> Image.Image:
    """width, height: of what the image shows; a JPEG reduced to 12.5 pixels has 13, and the last shows half of one."""
    if image.size == (side, side):
        return image
    square = min(width, height)  # only the square is computed: all of a 1 x 100,000 image at side 256 is 20 GB
    left, top = (width - square) / 2, (height - square) / 2
    if square == side:  # whole pixels: a shift by half of one would blur
        return image.crop((int(left), int(top), int(left) + side, int(top) + side))
    box = (left, top, left + square, top + square)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(base.DecodedSource):
    """Images in files, decoded when read.

    files: paths below `root`. labels: int32 [n]. side: of the square that every image is resized and cropped to.
    """

    root: Path
    files: tuple[str, ...]
    labels: np.ndarray
    side: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, 3

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in enumerate(indices):
            path = self.root / self.files[index]
            images[row] = decode(_read_bytes(path), f"{path} (class {path.parent.name!r})", channels=3, side=self.side)
        return images, self.labels[indices]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} (class {path.parent.name!r}) cannot be read ({error.strerror}).") from None


def folder(path: Path, side: int, chosen: Mapping[str, str], needed: str = "") -> base.RawSplits:
    """Finds the images of PATH/{train,val|valid|validation,test}/CLASS/*, or of PATH/CLASS/* where there are no splits.

    Classes are the folders' names, sorted; other files than images are left alone. A split whose images lie in no folders of
    classes counts as absent.

    Args:
      path: the folder.
      side: of the square that every image is resized and cropped to.
      chosen: as `DataConfig.chosen_splits`: folders that are splits whatever they are called; others may lie beside them.
      needed: the one split whose folder must be there, "" for all.

    Raises:
      DataError: for a class or a split without images, a class that training lacks, folders beside the splits, a name that
        is no UTF-8, and a link that leaves `path` (it could name any file). ConfigError: a chosen split is not there.
    """
    root = path.resolve()
    splits = _splits(root, chosen) or {"train": "."}
    required = needed if needed in splits else "train"
    if required not in splits:
        raise DataError(f"{root}: has {', '.join(sorted(splits.values()))} but no train.")
    unlabelled = [
        split for split, name in splits.items()
        if split != "train" and split not in chosen and _has_no_classes(root / name, root)
    ]  # fmt: skip
    splits = {split: name for split, name in splits.items() if split not in unlabelled}
    required = required if required in splits else "train"
    of_classes = {required, *({"train"} & splits.keys())}
    names = {e.name for split in of_classes for e in _listing(root / splits[split], root) if e.is_dir()}
    if len(names) < 2 and not needed:
        raise DataError(f"{root / splits['train']}: needs a folder of images for each of at least 2 classes.")
    classes = tuple(sorted(names))
    digest = hashlib.sha256(f"{side} {classes}".encode())
    sources: dict[str, FolderSource] = {}
    sizes: dict[str, list[int]] = {}
    identities: dict[str, str] = {}
    for split, name in splits.items():
        try:
            sources[split], sizes[split] = _split_source(root, name, classes, side)
        except DataError:
            if needed and split != required:
                continue  # as if it were not there
            raise
        identities[split] = "".join(
            f"{file} {size}\n" for file, size in zip(sources[split].files, sizes[split], strict=True)
        )
        digest.update(identities[split].encode())
    absent = base.Outline(0, (side, side, 3))
    found = (
        {split: absent for split, name in chosen.items() if name == "none"} | dict.fromkeys(splits, absent) | sources
    )
    mean, std = base.channel_statistics(3)
    train = sources.get("train")
    below = len(splits.get("train", "")) + 1
    return base.RawSplits(
        train=found.get("train", absent),
        validation=found.get("validation"),
        test=found.get("test"),
        class_names=classes,
        mean=mean,
        std=std,
        identity=digest.hexdigest(),
        identities=identities,
        labels=train.labels if train else None,
        notes=tuple(f"the split {split!r} has images without classes, and is left out" for split in unlabelled),
        files=tuple((file[below:], size) for file, size in zip(train.files, sizes["train"], strict=True))
        if train
        else (),
    )


_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def _splits(root: Path, chosen: Mapping[str, str]) -> dict[str, str]:
    """The folder of each split, {} where there are none. Raises `DataError` where images would be left out unnoticed."""
    names = [entry.name for entry in _listing(root, root) if entry.is_dir()]
    found: dict[str, str] = {split: name for split, name in chosen.items() if name != "none"}
    for split, name in found.items():
        if name not in names:
            there = f"it has {', '.join(names[:8])}{', ...' * (len(names) > 8)}" if names else "it has none"
            raise ConfigError(f"config.data.splits: {root} has no folder {name!r} for {split}; {there}.")
    twice = [split for split, name in found.items() if split != "train" and name == found.get("train")]
    if twice:
        raise ConfigError(
            f"config.data.splits: {found['train']!r} is for {twice[0]} and for train, which would be tested on."
        )
    for name in names:
        if name in chosen.values() or _SPLITS.get(name) in chosen:
            continue
        if (split := _SPLITS.get(name)) in found:
            raise DataError(f"{root}: {found[split]} and {name} are both for {split}; keep one of them.")
        if split:
            found[split] = name
    others = [name for name in names if name not in _SPLITS and name not in found.values()]
    if found and others and not chosen:
        raise DataError(
            f"{root}: has the split{'s' * (len(found) > 1)} {', '.join(found.values())} and beside them {', '.join(others[:3])}"
            f"{', ...' * (len(others) > 3)}; splits are called {', '.join(_SPLITS)}, and a class must not be called like one. "
            "config.data.splits names others."
        )
    return found


def _has_no_classes(split: Path, root: Path) -> bool:
    """Whether a split's folder has images, as the test of a competition, and no folders of classes."""
    entries = _listing(split, root)
    return not any(e.is_dir() for e in entries) and any(e.name.lower().endswith(_EXTENSIONS) for e in entries)


def _split_source(root: Path, split: str, classes: tuple[str, ...], side: int) -> tuple[FolderSource, list[int]]:
    """The images of a split's folder, and the bytes of each of their files."""
    files: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for folder_entry in _listing(root / split, root):
        name = folder_entry.name
        if not folder_entry.is_dir():
            continue
        if name not in classes:
            raise DataError(f"{root / split / name}: training has no class {name!r}.{did_you_mean(name, classes)}")
        listing = _listing(root / split / name, root)
        images = [e for e in listing if e.name.lower().endswith(_EXTENSIONS) and not e.is_dir()]
        if not images:
            raise DataError(f"{root / split / name}: the class has no images ({', '.join(_EXTENSIONS)}).")
        sizes += [_size(entry) for entry in images]
        files += [os.path.join(split, name, entry.name) for entry in images]
        labels += [classes.index(name)] * len(images)
    if not files:
        raise DataError(f"{root / split}: the split has no images.")
    return FolderSource(root, tuple(files), np.array(labels, np.int32), side), sizes


def _size(entry: os.DirEntry[str]) -> int:
    try:
        found = entry.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{entry.path} is no file with an image, but a device, a pipe or a socket.")
        return found.st_size
    except OSError as error:  # a dangling link
        raise DataError(f"{entry.path} cannot be read ({error.strerror}).") from None


def _listing(folder_path: Path, root: Path) -> list[os.DirEntry[str]]:
    """Entries sorted by name, without hidden ones.

    Raises `DataError` for a link that leads out of `root`, and for a name that is no UTF-8.
    """
    try:
        with os.scandir(folder_path) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder_path} cannot be read ({error.strerror}).") from None
    for entry in visible:
        if not _is_utf8(entry.name):
            raise DataError(f"{folder_path}: the name {entry.name!r} is not UTF-8; give it another one.")
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
            raise DataError(f"{entry.path}: the link leads out of {root}; copy what it points to, or mount it there.")
    return visible


def _is_utf8(name: str) -> bool:
    """Whether a name of the file system is text: Python keeps other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Decoding image files with Pillow."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from jaxtrain.errors import DataError

# Pillow would recognize thirty other formats. They are left out: it gives some to other programs (EPS to Ghostscript).
_PLUGINS = (  # importing these has registered their extensions
    JpegImagePlugin,
    PngImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    WebPImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    AvifImagePlugin,
    Jpeg2KImagePlugin,
)
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF", "AVIF", "JPEG2000")
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".gif", ".webp", ".avif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
)  # fmt: skip
"""What a name of a file of these formats ends with, in lower case."""
# Its warnings are about metadata, or about pixels that a run does not use; an image that cannot be read is an error here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# A larger image is treated as a decompression bomb: 2**26 pixels are 200 MB of RGB, a file of a few kB can claim as many, and
# 2**26 rows of one pixel take a minute. Decoded pixels count: of a JPEG that is read at an eighth, a 64th of its pixels.
_MAX_SIDE, _MAX_PIXELS = 1 << 16, 1 << 26
# All pixels of a JPEG, also those that are not decoded. A progressive one is kept in memory, in up to 6 bytes a pixel.
_MAX_STORED, _MAX_PROGRESSIVE = 1 << 28, 1 << 27


def read_file(path: Path, class_name: str, side: int, *, channels: int = 3) -> np.ndarray:
    """The colours of an image file, cut to a square.

    Args:
      path: the file.
      class_name: its class, for errors; "" where nobody knows it.
      side: in pixels, of the square.
      channels: 1, 3 or 4.

    Returns:
      uint8 [side, side, channels].

    Raises:
      DataError: the file cannot be read, or `decode` cannot decode it.
    """
    where = f"{path} (class {class_name!r})" if class_name else str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror}).") from None
    return decode(data, where, channels=channels, side=side)


def decode(data: bytes, where: str, *, channels: int, side: int = 0) -> np.ndarray:
    """Decodes an image. Its content decides the format, not its name; of several frames the first is read.

    Args:
      data: the encoded image.
      where: names the file or record in errors.
      channels: 1, 3 or 4.
      side: in pixels; above 0 the shorter side is resized to it (bilinear, antialiased), and the centre square is taken. A
        JPEG of twice that side or more is decoded at a half, a quarter or an eighth of its size (never below `side`).

    Returns:
      uint8 [H, W, channels]; H = W = side if that is above 0.

    Raises:
      DataError: the image is empty, truncated, damaged, too large, or of another format than those of `EXTENSIONS`.
    """
    if not data:
        raise DataError(f"{where} is empty.")
    try:
        with _open(data) as image:
            # JPEG only: its decoder can leave out the frequencies that the smaller image could not show.
            stored = image.size
            reduced = image.draft(None, (side, side)) if side else None
            _check_size(image, stored, may_be_reduced=side > 0 and reduced is None)
            return _pixels(image, channels, side, reduced[1][2:] if reduced else image.size)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise DataError(f"{where} is not a readable image ({error or type(error).__name__}).") from None


def from_memory(image: Image.Image | np.ndarray, where: str, *, channels: int, side: int) -> np.ndarray:
    """An image that is decoded already, as `decode` gives one: its colours, cut to a square.

    Args:
      image: Pillow's, or uint8 [H, W] or [H, W, 1, 3 or 4].
      where: names it in errors.
      channels: 1, 3 or 4.
      side: in pixels, of the square.

    Returns:
      uint8 [side, side, channels].

    Raises:
      DataError: its pixels are not of 8 bits, or it has another shape.
    """
    try:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                raise ValueError(f"it has numbers of type {image.dtype}, and uint8 is read: convert it")
            if image.ndim not in (2, 3):
                raise ValueError(f"it has shape {image.shape}, and [H, W] or [H, W, channels] is read")
            image = Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)
        return _pixels(image, channels, side, image.size)
    except Exception as error:  # as in `decode`: Pillow's images may be files that are read now
        raise DataError(f"{where} is not a readable image ({error or type(error).__name__}).") from None


def _pixels(image: Image.Image, channels: int, side: int, size: tuple[float, float]) -> np.ndarray:
    """The colours, uint8 [H, W, channels]; the centre square where `side` is above 0. size: as of `_centre_square`."""
    if image.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255
        raise ValueError(f"its pixels are of mode {image.mode}, and 8-bit ones are read: convert it")
    pixels = image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
    array = np.asarray(_centre_square(pixels, side, *size) if side else pixels)
    return array[:, :, None] if array.ndim == 2 else array


def as_png(pixels: np.ndarray, most: int) -> bytes:
    """uint8 [H, W, C] as a PNG of at most so many pixels a side; of other than 1, 3 or 4 channels the first alone."""
    mode = pixels.shape[2] in _MODES and pixels.shape[2] > 1
    image, file = Image.fromarray(pixels if mode else pixels[:, :, 0]), io.BytesIO()
    image.thumbnail((most, most))
    image.save(file, "PNG")
    return file.getvalue()


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads the header only.

    `Image.open` does not fit: its size limit ignores reduced decoding, only warns, and is one setting for the whole process.
    """
    for name in _FORMATS:
        opens, accepts = Image.OPEN[name]
        if accepts is not None and (accepted := accepts(data[:16])):
            if isinstance(accepted, str):  # why this Pillow cannot read that format
                raise ValueError(accepted)
            try:
                image = opens(io.BytesIO(data), "")
            except Image.DecompressionBombError:  # some of Pillow's formats check the size themselves
                raise ValueError(f"at most {_MAX_PIXELS:,} pixels are read: make it smaller") from None
            # Pillow reads these in Python, at a tenth of a megapixel a second, and cuts values above 255.
            if isinstance(image, PpmImagePlugin.PpmImageFile) and any(tile[0] != "raw" for tile in image.tile):
                raise ValueError("its pixels are written as text, or not with 8 bits: convert it")
            return image
    raise ValueError(f"its content is none of {', '.join(_FORMATS)}")


def _check_size(image: ImageFile.ImageFile, stored: tuple[int, int], *, may_be_reduced: bool) -> None:
    """Raises `ValueError` for an image that is too large.

    image: at the size at which it will be decoded. stored: (width, height) in the file. may_be_reduced: whether it would be
    read at a reduced size if it were a JPEG.
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
    """The centre square, resized to [side, side].

    width, height: of the picture, in pixels. A JPEG that is reduced to 12.5 pixels has 13; the last one shows half a pixel.
    """
    if image.size == (side, side):
        return image
    square = min(width, height)  # only the square is computed: all of a 1 x 100,000 image at side 256 is 20 GB
    left, top = (width - square) / 2, (height - square) / 2
    if square == side:  # whole pixels: a shift by half of one would blur
        return image.crop((int(left), int(top), int(left) + side, int(top) + side))
    box = (left, top, left + square, top + square)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)

"""Decoding image files with Pillow."""

from __future__ import annotations

import io

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

from jaxtrain.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
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
_FORMATS = tuple(dict.fromkeys(Image.EXTENSION[extension] for extension in EXTENSIONS))
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
        another format than those of `EXTENSIONS`. The content says what format it is, and the first frame is read.
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

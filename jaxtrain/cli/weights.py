"""Say what a file of weights holds and what it maps to (inspect), or download one whose SHA-256 is known (fetch)."""

import argparse
import re
import urllib.parse
from pathlib import Path

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """inspect FILE|fetch URL, --json, --sha256, --out, --max-bytes."""
    parser.add_argument("action", choices=("inspect", "fetch"))
    parser.add_argument("what", metavar="FILE|URL", help="a file of weights; for fetch, where to download one by https")
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor")
    parser.add_argument("--sha256", default="", metavar="HEX", help="for fetch: the SHA-256 that the file must have")
    parser.add_argument(
        "--out", default="", metavar="FILE", help="for fetch: where to put it (default: the URL's last part, here)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=8 << 30, metavar="N", help="for fetch: more are refused (default: 8 GiB)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints what there is, or where the file is."""
    if arguments.action == "fetch":
        _fetch(arguments)
    else:
        _inspect(arguments)


def _fetch(arguments: argparse.Namespace) -> None:
    from jaxtrain.weights.fetching import fetch  # noqa: PLC0415

    if not re.fullmatch("[0-9a-fA-F]{64}", arguments.sha256):
        raise ConfigError(
            f"--sha256 {arguments.sha256!r}: fetch needs the file's SHA-256, 64 hexadecimal digits, from whoever publishes it."
        )
    name = arguments.out or Path(urllib.parse.urlsplit(arguments.what).path).name
    if not name:
        raise ConfigError(f"{arguments.what!r} names no file; choose its name with --out.")
    require_local(name, f"--out {name}", ConfigError)
    out = Path(name).expanduser().absolute()
    print(printable(fetch(arguments.what, arguments.sha256, out, most_bytes=arguments.max_bytes)))


def _inspect(arguments: argparse.Namespace) -> None:
    start.without_devices()
    from jaxtrain.weights.file import open_weights  # noqa: PLC0415
    from jaxtrain.weights.inspection import inspect  # noqa: PLC0415

    with open_weights(arguments.what) as file:
        found = inspect(file)
    if arguments.json:
        print(found.to_json())
        return
    known = found.config
    classes = f", {found.classes} classes" if found.classes else ""
    types = ", ".join(f"{count} of {dtype}" for dtype, count in found.dtypes.items())
    model = f"{found.model or 'no model that is known'}{classes}"
    lines = [
        f"{found.path}: {found.format}, {found.bytes:,} bytes",
        f"SHA-256    {found.sha256}",
        f"holds      {model}, {found.parameters:,} values in {found.tensors} tensors ({types})",
    ]
    if found.names:
        lines.append(f"names      of {found.names}; {len(found.leaves)} tensors map to leaves of jaxtrain")
    if found.left:
        lines.append(
            f"left over  {', '.join(found.left[:3])}{f' and {len(found.left) - 3} more' * (len(found.left) > 3)}"
        )
    images = [f"{name} {value}" for name, value in vars(known).items() if value and name != "class_names"]
    images += [f"{len(known.class_names)} class names"] if known.class_names else []
    lines.append(f"images     {', '.join(images) or 'nothing is said of them'}")
    flags = " ".join([f"--config.model.init_from={arguments.what}", *found.flags])
    lines.append(f"use        {flags}")
    for line in lines:
        print(printable(line))

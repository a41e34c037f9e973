"""Predict the classes of images with a trained model: a table, CSV or JSON, and the embedding of each image."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.host.files import atomic_write, writing
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import note, printable, spreadsheet_cell

if TYPE_CHECKING:
    from jaxtrain.training.prediction import Prediction
    from jaxtrain.training.trained import Trained

_UNREADABLE = DataError.exit_code  # what is left has its predictions, and the command this exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, images, --top, --csv, --json, --features, --strict, --checkpoint, --ema, --trust, devices."""
    start.add_model_argument(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, or folders with all images below them; - reads paths, one a line",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes for each image (default: 5)")
    parser.add_argument(
        "--csv", default="", metavar="FILE", help="write CSV in place of the table; - is standard output"
    )
    parser.add_argument(
        "--json", default="", metavar="FILE", help="write JSON in place of the table; - is standard output"
    )
    parser.add_argument(
        "--features",
        default="",
        metavar="NPZ",
        help="also write the input of the head's last linear map, for each image",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    start.add_weights_arguments(parser)
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Writes a row for each image. Returns 65 where images could not be read, which are named on standard error."""
    _check(arguments)
    words = [path for word in arguments.images for path in (_listed() if word == "-" else [word])]
    start.start_devices(arguments)
    from jaxtrain.training.inference import load_trained  # noqa: PLC0415
    from jaxtrain.training.jax_settings import compile_cache_note  # noqa: PLC0415
    from jaxtrain.training.prediction import image_files, predict  # noqa: PLC0415
    from jaxtrain.training.setup import select_devices  # noqa: PLC0415

    files, others = image_files(words)
    if not files:
        raise DataError(f"There is no image in {', '.join(words) or 'the list'} ({others:,} other files).")
    if others:
        note(f"{others:,} files that are no images by their extension are left out")
    found: list[Prediction] = []
    showing = start.progress().activity("reading the checkpoint")
    with start.warnings_shown(), contextlib.ExitStack() as process, showing as activity:
        which = {"checkpoint": arguments.checkpoint, "ema": arguments.ema, "trust": arguments.trust}
        devices = select_devices(arguments.devices)
        model = load_trained(arguments.run, devices=devices, process=process, **which)
        activity.what, activity.note = "compiling", compile_cache_note()
        options = {"top": arguments.top, "features": bool(arguments.features), "strict": arguments.strict}
        for prediction in predict(model, files, **options):
            activity.what, activity.note, activity.total = "predicting", "", len(files)
            activity.done += 1
            found.append(prediction)
            if prediction.error:
                note(prediction.error)
    _write(arguments, model, found)
    failed = sum(bool(each.error) for each in found)
    if failed:
        note(f"{failed:,} of {len(files):,} images could not be read, and have no prediction")
    return _UNREADABLE if failed else 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for what cannot work, before any device is started."""
    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top}: must be at least 1.")
    if arguments.csv == arguments.json == "-":
        raise ConfigError("--csv - and --json -: both would go to standard output; name a file for one of them.")
    for option in ("csv", "json", "features"):
        value = getattr(arguments, option)
        require_local(value, f"--{option} {value}", ConfigError)
        if value not in ("", "-") and not Path(value).absolute().parent.is_dir():
            raise ConfigError(f"--{option} {value}: there is no such directory.")
    if arguments.features == "-" or Path(arguments.features).suffix not in ("", ".npz"):
        raise ConfigError(f"--features {arguments.features}: must be a file that ends with .npz.")


def _listed() -> list[str]:
    return [line for line in sys.stdin.read().splitlines() if line]


def _write(arguments: argparse.Namespace, model: Trained, found: Sequence[Prediction]) -> None:
    made = [each for each in found if not each.error]
    if arguments.features:
        _write_features(Path(arguments.features), made)
    texts = {
        arguments.csv: _csv(model.class_names, made, min(arguments.top, len(model.class_names))),
        arguments.json: _json(model, found),
    }
    for name, text in texts.items():
        if name == "-":
            sys.stdout.write(text)
        elif name:
            atomic_write(Path(name), text)
    if not arguments.csv and not arguments.json:
        _print_table(model.class_names, made)


def _print_table(names: Sequence[str], found: Sequence[Prediction]) -> None:
    console = start.console()
    width = max((len(printable(each.file)) for each in found), default=0)
    for each in found:
        best = zip(each.classes, each.probabilities, strict=True)
        answers = "  ".join(f"{printable(names[i])} {probability:.4f}" for i, probability in best)
        console.print(f"{printable(each.file):{width}}  {answers}", soft_wrap=True)


def _csv(names: Sequence[str], found: Sequence[Prediction], top: int) -> str:
    """A row for each image: its file, then class and probability of the best, of the second, ..."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["file", *(f"{what}_{k}" for k in range(1, top + 1) for what in ("class", "probability"))])
    for each in found:
        best = zip(each.classes, each.probabilities, strict=True)
        cells = (cell for i, p in best for cell in (spreadsheet_cell(names[i]), f"{p:.6g}"))
        writer.writerow([spreadsheet_cell(each.file), *cells])
    return file.getvalue()


def _json(model: Trained, found: Sequence[Prediction]) -> str:
    images: list[dict[str, Any]] = []
    for each in found:
        if each.error:
            images.append({"file": each.file, "error": each.error})
            continue
        best = zip(each.classes, each.probabilities, strict=True)
        answers = [
            {"class": model.class_names[i], "index": i, "probability": None if math.isnan(p) else p} for i, p in best
        ]
        images.append({"file": each.file, "classes": answers})
    text = json.dumps({"step": model.step, "weights": model.weights, "images": images}, indent=1)
    # The same text to a parser; in a page, no mark-up.
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text + "\n"


def _write_features(path: Path, found: Sequence[Prediction]) -> None:
    """An npz of `files`, text [N], and `features`, float32 [N, D]; it can be read without pickle."""
    import numpy as np  # noqa: PLC0415

    vectors = [each.features for each in found if each.features is not None]
    features = np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        with open(part, "wb") as file:
            np.savez(file, files=np.array([printable(each.file) for each in found], np.str_), features=features)
        part.replace(path)

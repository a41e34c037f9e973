"""Write a trained model for other programs: one StableHLO program with its weights inside."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local

if TYPE_CHECKING:
    from jaxtrain.training.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --format, --out, --force, --checkpoint, --ema, --trust, devices."""
    start.add_model_argument(parser)
    parser.add_argument("--format", choices=tuple(_FORMATS), required=True, help="what to write")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace FILE where it is there")
    start.add_weights_arguments(parser)
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, and says what is in it."""
    out = _checked(arguments.out, force=arguments.force)
    start.start_devices(arguments)
    import jax  # noqa: PLC0415

    from jaxtrain.training.inference import load_trained  # noqa: PLC0415

    which = {"checkpoint": arguments.checkpoint, "ema": arguments.ema, "trust": arguments.trust}
    with start.warnings_shown(), start.progress().activity("exporting"):
        model = load_trained(arguments.run, devices=jax.local_devices()[:1], **which)
        what = _FORMATS[arguments.format](model, out)
    weights = {"ema": "the average of the weights (EMA)", "raw": "raw weights", "file": "weights of a file"}
    start.console().print(f"{out}: step {model.step}, {weights[model.weights]}, {what}")


def _checked(out: str, *, force: bool) -> Path:
    """The path of a file that may be written. Raises `ConfigError` where it is there and `force` is not set."""
    require_local(out, f"--out {out}", ConfigError)
    path = Path(out)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: {'is a directory' if path.is_dir() else 'its directory is not there'}.")
    if path.exists() and not force:
        raise ConfigError(f"--out {out}: is there already; --force replaces it.")
    return path


def _stablehlo(model: Trained, out: Path) -> str:
    from jaxtrain.training.stablehlo import write_stablehlo  # noqa: PLC0415

    return write_stablehlo(model, out)


_FORMATS = {"stablehlo": _stablehlo}
"""By `--format`: writes a model to a file, and says in words what it has written."""

"""Write a trained model for other programs: safetensors with the names of others, or one StableHLO program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError

if TYPE_CHECKING:
    from jaxtrain.training.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --format, --naming, --out, --force, --checkpoint, --ema, --trust, devices."""
    start.add_model_argument(parser)
    parser.add_argument("--format", choices=tuple(_FORMATS), default="safetensors", help="(default: safetensors)")
    parser.add_argument(
        "--naming",
        choices=("torchvision", "timm", "transformers", "jaxtrain"),
        default="",
        help="of the tensors, for safetensors: VGG as torchvision or timm, ResNet and Swin as transformers too, and every "
        "model as jaxtrain (default: torchvision, where the model has its names)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace FILE where it is there")
    start.add_weights_arguments(parser)
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, and says what is in it."""
    if arguments.naming and arguments.format != "safetensors":
        raise ConfigError(
            f"--naming {arguments.naming}: {arguments.format} has no names; it is for --format safetensors."
        )
    start.start_devices(arguments)
    import jax  # noqa: PLC0415

    from jaxtrain.training.export import check_out  # noqa: PLC0415
    from jaxtrain.training.inference import load_trained  # noqa: PLC0415

    out = check_out(arguments.out, force=arguments.force)
    which = {"checkpoint": arguments.checkpoint, "ema": arguments.ema, "trust": arguments.trust}
    with start.warnings_shown(), start.progress().activity("exporting"):
        model = load_trained(arguments.run, devices=jax.local_devices()[:1], **which)
        what = _FORMATS[arguments.format](model, arguments, out)
    weights = {"ema": "the average of the weights (EMA)", "raw": "raw weights", "file": "weights of a file"}
    start.console().print(f"{out}: step {model.step}, {weights[model.weights]}, {what}")


def _safetensors(model: Trained, arguments: argparse.Namespace, out: Path) -> str:
    from jaxtrain.training.export import export_safetensors  # noqa: PLC0415
    from jaxtrain.weights.architecture import family_of  # noqa: PLC0415

    naming = arguments.naming or ("torchvision" if family_of(model.config.model.name) else "jaxtrain")
    count = export_safetensors(model, naming, out)
    return f"{count} tensors with {naming}'s names"


def _stablehlo(model: Trained, arguments: argparse.Namespace, out: Path) -> str:
    del arguments
    from jaxtrain.training.stablehlo import write_stablehlo  # noqa: PLC0415

    return write_stablehlo(model, out)


_FORMATS = {"safetensors": _safetensors, "stablehlo": _stablehlo}
"""By `--format`: writes a model to the file, and says in words what it has written."""

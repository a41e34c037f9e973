"""Write a run's weights for other programs, as safetensors with the names of torchvision, timm or transformers."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrain.cli import start

if TYPE_CHECKING:
    from jaxtrain.training.stored_model import StoredModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --format, --naming, --out, --checkpoint, --ema, --force, --trust, devices."""
    parser.add_argument("workdir", metavar="RUN", help="the work directory of a run")
    parser.add_argument("--format", choices=tuple(_FORMATS), default="safetensors", help="(default: safetensors)")
    parser.add_argument(
        "--naming",
        choices=("torchvision", "timm", "transformers", "jaxtrain"),
        default="",
        help="of the tensors, for safetensors: VGG as torchvision or timm, ResNet and Swin as transformers too, and every "
        "model as jaxtrain (default: torchvision, where the model has its names)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--checkpoint", default="best", help="best, latest, a step, or epoch:N (default: best)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="export the moving average of the weights, or the weights; default: the average if the run keeps one",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE where it is there")
    parser.add_argument(
        "--trust", action="store_true", help="run the code that the run's config names, as package.module:attribute"
    )
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, and says what is in it."""
    start.start_devices(arguments)
    from jaxtrain.training.export import check_out  # noqa: PLC0415
    from jaxtrain.training.stored_model import read_model  # noqa: PLC0415

    out = check_out(arguments.out, force=arguments.force)
    with start.warnings_shown():
        stored = read_model(
            arguments.workdir, checkpoint=arguments.checkpoint, ema=arguments.ema, trust=arguments.trust
        )
    what = _FORMATS[arguments.format](stored, arguments, out)
    weights = "the average of the weights (EMA)" if stored.weights == "ema" else "raw weights"
    start.console().print(f"{out}: step {stored.step}, {weights}, {what}")


def _safetensors(stored: "StoredModel", arguments: argparse.Namespace, out: Path) -> str:
    from jaxtrain.training.export import export_safetensors  # noqa: PLC0415
    from jaxtrain.weights.architecture import family_of  # noqa: PLC0415

    naming = arguments.naming or ("torchvision" if family_of(stored.config.model.name) else "jaxtrain")
    count = export_safetensors(stored, naming, out)
    return f"{count} tensors with {naming}'s names"


_FORMATS = {"safetensors": _safetensors}
"""By `--format`: writes a stored model to the file, and says in words what it has written."""

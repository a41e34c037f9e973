"""What weights say of the images that they were trained on: the config that timm and transformers store with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.errors import WeightsError
from jaxtrain.host.files import parse_json
from jaxtrain.weights.file import WeightsFile

METADATA_KEY = "pretrained_cfg"
"""The key of a safetensors file's metadata that holds timm's config as JSON."""
_MOST_BYTES = 8 << 20
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL.Image.Resampling


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """How images become the input of pretrained weights. What is not known has its default."""

    architecture: str = ""
    """As the program that wrote the weights names it."""
    image_size: int = 0
    """Side in pixels."""
    mean: tuple[float, ...] = ()
    """One number a channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = ()
    interpolation: str = ""
    """How images were resized: `bilinear`, `bicubic`, ..."""
    crop_pct: float = 0.0
    """The side of the centre crop, as a share of the resized image's."""
    class_names: tuple[str, ...] = ()

    def to_timm(self, channels: int, classes: int) -> dict[str, Any]:
        """As timm's `pretrained_cfg`, without what is not known.

        Args:
          channels: of an image.
          classes: outputs of the head.
        """
        size = [channels, self.image_size, self.image_size] if self.image_size else None
        fields = {
            "architecture": self.architecture, "input_size": size, "mean": list(self.mean), "std": list(self.std),
            "interpolation": self.interpolation, "crop_pct": self.crop_pct, "num_classes": classes,
            "label_names": list(self.class_names),
        }  # fmt: skip
        return {name: value for name, value in fields.items() if value}


def pretrained_config(file: WeightsFile) -> PretrainedConfig:
    """What is known of a file's images: from its own metadata, or else from the `config.json` beside it.

    Raises:
      WeightsError: what is there is not as timm or transformers write it.
    """
    if METADATA_KEY in file.metadata:
        source = f"{METADATA_KEY} in the metadata of {file.path}"
        return _checked(source, lambda: _of_timm(_object(parse_json(file.metadata[METADATA_KEY]))))
    found = PretrainedConfig()
    for path, read in ((file.path.with_name("config.json"), _of_config), (_preprocessor(file.path), _of_preprocessor)):
        values = _read(path) if path.is_file() else None
        if values is not None:
            more = _checked(str(path), lambda read=read, values=values: read(values))
            known = {f.name: v for f in dataclasses.fields(more) if (v := getattr(more, f.name))}
            found = dataclasses.replace(found, **known)
    return found


def _preprocessor(path: Path) -> Path:
    return path.with_name("preprocessor_config.json")


def _read(path: Path) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
        return _object(parse_json(text))

    return _checked(str(path), read)


def _checked(source: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise WeightsError(
            f"{source} is not as timm or transformers write it ({error}); correct it, or move it away."
        ) from None


def _object(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values


def _of_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """Of a `config.json`: timm's has the config as a member, transformers' is flat."""
    if METADATA_KEY in values:
        inner = {"architecture": values.get("architecture", ""), "label_names": values.get("label_names") or []}
        return _of_timm(inner | _object(values[METADATA_KEY]))
    names = _object(values.get("id2label") or {})
    size = values.get("image_size") or 0
    return PretrainedConfig(
        architecture=_text("architectures", (values.get("architectures") or [""])[0]),
        image_size=_side("image_size", size if isinstance(size, list) else [size, size]),
        class_names=_names(names[str(i)] for i in range(len(names))),
    )


def _of_preprocessor(values: Mapping[str, Any]) -> PretrainedConfig:
    """Of transformers' `preprocessor_config.json`."""
    size = values.get("size") or {}
    size = size if isinstance(size, dict) else {"height": size, "width": size}
    side = size.get("shortest_edge") or size.get("height") or 0
    return PretrainedConfig(
        image_size=_side("size", [side, size.get("width") or side]),
        mean=_channels("image_mean", values.get("image_mean")),
        std=_channels("image_std", values.get("image_std")),
        interpolation=_PIL_FILTERS[values["resample"]] if "resample" in values else "",
        crop_pct=_share("crop_pct", values.get("crop_pct")),
    )


def _of_timm(values: Mapping[str, Any]) -> PretrainedConfig:
    size = values.get("input_size") or [0, 0, 0]
    return PretrainedConfig(
        architecture=_text("architecture", values.get("architecture", "")),
        image_size=_side("input_size", list(size)[1:]),
        mean=_channels("mean", values.get("mean")),
        std=_channels("std", values.get("std")),
        interpolation=_text("interpolation", values.get("interpolation", "")),
        crop_pct=_share("crop_pct", values.get("crop_pct")),
        class_names=_names(values.get("label_names") or []),
    )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise ValueError(f"its {name} is no short text")
    return value


def _names(values: Iterator[Any] | list[Any]) -> tuple[str, ...]:
    return tuple(_text("class name", value) for value in values)


def _side(name: str, sides: list[Any]) -> int:
    """The side of a square image. Raises `ValueError` for another one."""
    if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int or not 0 <= sides[0] <= 1 << 16:
        raise ValueError(f"its {name} is {sides!r}, and images are square here")
    return sides[0]


def _channels(name: str, values: Any) -> tuple[float, ...]:
    numbers = values or []
    good = isinstance(numbers, list) and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    if not good or (name.endswith("std") and not all(n > 0 for n in numbers)):
        raise ValueError(f"its {name} is {values!r}")
    return tuple(float(n) for n in numbers)


def _share(name: str, value: Any) -> float:
    share = value or 0.0
    if type(share) not in (int, float) or not 0 <= share <= 2:
        raise ValueError(f"its {name} is {value!r}")
    return float(share)

"""CIFAR builders that need no TensorFlow, and data sets that TFDS has prepared. This is the one module that knows TFDS.

TFDS's CIFAR builders import TensorFlow to read the archive and to encode the images. Here a builder gives `Image` an
encoded PNG as a file object, which TFDS stores as it is. TFDS does the download, the checksum, versions and record files.
The decoded images are stored beside the records as `.npy` files, which training maps into memory. Decoding 60,000 PNGs
would take 6.5 s at every start (9,000 a second, measured). Mapping and hashing the arrays takes 0.1 s.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import constants, utils
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.proto import tf_example_pb2

from jaxtrain.data import base, cifar, images
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.host.files import create, no_link
from jaxtrain.host.text import did_you_mean, printable

_MANIFEST = "jaxtrain.json"
_PROTOS: Any = tf_example_pb2  # its classes are made when it is loaded


# ------------------------------------------------------------------------------------------------------ CIFAR builders


class _Cifar(tfds.core.GeneratorBasedBuilder):
    """Writes the official files as PNG records, in the official order, so that record i is official example i."""

    VERSION = tfds.core.Version("1.0.0")
    official_name: str

    @property
    def official(self) -> cifar.CifarSpec:
        return cifar.CIFAR[self.official_name]

    @property
    def url_infos(self) -> Any:
        """Size and checksum of the archive; by its file name, TFDS also finds it in the manual directory."""
        size = utils.Size(self.official.archive_bytes)
        known = checksums.UrlInfo(size, self.official.archive_sha256, self.official.archive)
        return {self.official.url: known}

    def _info(self) -> Any:
        labels = {feature: tfds.features.ClassLabel() for feature in self.official.labels}
        image = tfds.features.Image(shape=self.official.shape, encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.",
            features=tfds.features.FeaturesDict({"image": image, **labels}),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> Any:
        files = _official_files(self.name, self.official, dl_manager)
        for feature, names in cifar.class_names(self.official, files).items():
            self.info.features[feature].names = names  # type: ignore[index]
        return {split: self._generate_examples(files, split) for split in self.official.splits}

    def _generate_examples(self, files: dict[str, bytes], split: str) -> Any:
        for number, (image, labels) in enumerate(cifar.examples(self.official, files, split)):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="PNG")
            encoded.seek(0)
            yield number, {"image": encoded, **labels}


class JaxtrainCifar10(_Cifar):
    """CIFAR-10: 60,000 colour images of 32 x 32 pixels in 10 classes. Its TFDS name is `jaxtrain_cifar10`."""

    official_name = "cifar10"


class JaxtrainCifar100(_Cifar):
    """CIFAR-100: 60,000 colour images of 32 x 32 pixels in 100 classes. Its TFDS name is `jaxtrain_cifar100`."""

    official_name = "cifar100"


_BUILDERS: dict[str, type[_Cifar]] = {builder.official_name: builder for builder in (JaxtrainCifar10, JaxtrainCifar100)}


def _official_files(builder_name: str, official: cifar.CifarSpec, dl_manager: Any) -> dict[str, bytes]:
    """The official files from the manual directory, or from the archive that TFDS has or fetches."""
    downloads = Path(dl_manager.download_dir)
    manual = downloads / "manual"
    if (manual / official.folder).exists():
        return cifar.read_folder(official, manual / official.folder)
    archive = manual / official.archive
    if archive.exists() and archive.stat().st_size != official.archive_bytes:
        size = archive.stat().st_size
        raise DataError(
            f"{archive} has {size:,} bytes, the official archive {official.archive_bytes:,}: copy it again."
        )
    try:
        if not archive.exists() and not any((downloads / builder_name).rglob("*.tar.gz")):
            # TFDS would try for 200 s and then wait without limit. This request fails at once without a network.
            urllib.request.urlopen(urllib.request.Request(official.url, method="HEAD"), timeout=20).close()
        path = Path(dl_manager.download(official.url))
    except Exception as error:  # errors of urllib, requests and TFDS, among them a checksum that differs
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise DataError(
            f"{official.url} could not be fetched ({reason}): put {official.archive} "
            f"({official.archive_bytes:,} bytes), or the folder {official.folder} that it extracts to, into {manual}/ "
            "and run again."
        ) from None
    return cifar.read_archive(official, path)


# ------------------------------------------------------------------------------------ CIFAR: preparing, loading, checks


def cifar_directory(name: str, root: Path) -> Path:
    """Where TFDS keeps the prepared records of `name` ("cifar10" or "cifar100")."""
    builder = _BUILDERS[name]
    return root / builder.name / str(builder.VERSION)


def prepare_cifar(name: str, root: Path, timeout: float) -> Path:
    """Downloads and prepares CIFAR unless that is done.

    One process of this host works while the others wait. An interrupted preparation leaves nothing that counts as prepared,
    and the next call prepares again.

    Args:
      name: "cifar10" or "cifar100".
      root: the data directory.
      timeout: how many minutes to wait for another process.

    Returns:
      The directory of the prepared files.

    Raises:
      DataError: there is no network and no official file (the error says which file to put where), a file differs from the
        official one, a preparation is damaged, or the disk is full.
    """
    directory = cifar_directory(name, root)
    if (directory / _MANIFEST).exists():
        _manifest(directory)
        return directory
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{directory.parent.name}.lock", timeout):
            if not (directory / _MANIFEST).exists():
                print(f"Preparing {name} in {printable(directory)} (once, about 20 s) ...", file=sys.stderr, flush=True)
                _generate(name, root)
                _write_arrays(name, directory)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{error.filename or root} cannot be written while preparing {name} ({reason}).") from None
    return directory


def _generate(name: str, root: Path) -> None:
    """Lets TFDS write the records. It builds them in a temporary directory, which it renames at the end."""
    directory = cifar_directory(name, root)
    for leftover in [
        *directory.parent.glob(f"{constants.INCOMPLETE_PREFIX}*"),
        *(root / "downloads" / directory.parent.name).glob("**/*.tmp.*"),
    ]:
        shutil.rmtree(leftover, ignore_errors=True)  # a killed process left it: this one holds the lock
    _check_classes(directory)
    try:
        builder = _BUILDERS[name](data_dir=root)
    except Exception as error:  # TFDS's parsers read what an earlier preparation left
        raise DataError(f"{directory} is damaged ({error}); {_again(directory)}") from None
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.display_progress_bar(sys.stderr.isatty())  # a log file would get a line a second
    with contextlib.redirect_stdout(sys.stderr):  # TFDS's progress goes there; stdout is for results
        builder.download_and_prepare(
            file_format="array_record", download_dir=root / "downloads", download_config=config
        )


def _write_arrays(name: str, directory: Path) -> None:
    """Decodes all records into `.npy` files. Then writes the manifest, which marks the directory as prepared."""
    for split, count in cifar.CIFAR[name].examples.items():
        source = TfdsSource(directory, split)
        if len(source) != count:
            raise DataError(f"{directory}: {split} has {len(source):,} records and must have {count:,}; delete it.")
        for path, array in zip(_array_paths(directory, split), base.materialize(source), strict=True):
            with open(f"{path}.tmp", "wb", opener=no_link) as file:
                np.save(file, array, allow_pickle=False)
            os.replace(f"{path}.tmp", path)
    complete = [path for path in sorted(directory.iterdir()) if path.suffix != ".tmp"]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in complete}
    temporary = directory / f"{_MANIFEST}.tmp"
    text = json.dumps({"class_names": TfdsSource(directory, "train").class_names, "files": files}, indent=1)
    with create(temporary) as file:
        file.write(text)
    os.replace(temporary, directory / _MANIFEST)


def _array_paths(directory: Path, split: str) -> tuple[Path, Path]:
    return directory / f"images-{split}.npy", directory / f"labels-{split}.npy"


def _manifest(directory: Path) -> dict[str, Any]:
    """The manifest. Raises `DataError` where it is damaged, or a file does not have the size that it says."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        wanted = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{directory / _MANIFEST} is damaged ({error}); {_again(directory)}") from None
    for name, size in wanted.items():
        path = directory / name
        actual = path.stat().st_size if path.exists() else None
        if actual != size:
            problem = "is missing" if actual is None else f"has {actual:,} bytes and must have {size:,}"
            raise DataError(f"{path} {problem}; {_again(directory)}")
    return manifest


def _again(directory: Path) -> str:
    return (
        f"delete {directory} and run {_prepare(directory.parent.name.removeprefix('jaxtrain_'), directory.parents[1])}."
    )


def _prepare(name: str, root: Path) -> str:
    """The command that prepares the data set."""
    return f"`jaxtrain data prepare {name} --dir {shlex.quote(str(root))}`"


def _check_hash(directory: Path, manifest: dict[str, Any], name: str) -> None:
    if _sha256(directory / name) != manifest["files"][name]["sha256"]:
        raise DataError(f"{directory / name} has changed since it was prepared (SHA-256 differs); {_again(directory)}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(path: Path, timeout: float) -> Iterator[None]:
    """Holds an exclusive lock, which the operating system frees when the process dies; waits up to `timeout` minutes."""
    deadline = time.monotonic() + 60 * timeout
    with open(path, "w", opener=no_link) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{path}: another process still prepares the data after {timeout:g} minutes "
                        "(config.data.prepare_timeout)."
                    ) from None
                time.sleep(0.2)
            else:
                break
        yield


def load_cifar(name: str, root: Path) -> base.RawSplits:
    """The prepared CIFAR `name` in `root`; `DataError` if it is not prepared, is incomplete, or its arrays have changed."""
    directory = cifar_directory(name, root)
    if not (directory / _MANIFEST).exists():
        raise DataError(f"{name} is not prepared in {root} (no {directory}): run {_prepare(name, root)}.")
    manifest = _manifest(directory)
    sources: dict[str, base.Source] = {}
    for split in cifar.CIFAR[name].splits:
        paths = _array_paths(directory, split)
        for path in paths:
            _check_hash(directory, manifest, path.name)
        sources[split] = base.MappedSource(*paths)
    official = cifar.CIFAR[name]
    return base.RawSplits(
        train=sources["train"],
        validation=None,
        test=sources["test"],
        class_names=tuple(manifest["class_names"]),
        mean=official.mean,
        std=official.std,
        identity=json.dumps([name, *official.files.values()]),
        identities={
            split: json.dumps([name, *(official.files[file] for file in files)])
            for split, files in official.splits.items()
        },
    )


def verify_cifar(name: str, root: Path) -> dict[str, int]:
    """Reads every record again and compares it with the arrays, then all hashes; returns split -> number of records.

    Raises `DataError` naming the file, and the record where one is damaged.
    """
    parts = load_cifar(name, root)
    directory = cifar_directory(name, root)
    counts: dict[str, int] = {}
    for split, arrays in (("train", parts.train), ("test", parts.test)):
        assert arrays is not None
        records = TfdsSource(directory, split)
        pairs = zip(base.chunks(records), base.chunks(arrays), strict=True)
        for (start, decoded, labels), (_, mapped, mapped_labels) in pairs:
            same = (decoded == mapped).all(axis=(1, 2, 3)) & (labels == mapped_labels)
            if not same.all():
                record = records.where(start + int(np.argmin(same)))
                raise DataError(f"{record} differs from {_array_paths(directory, split)[0].name}; {_again(directory)}")
        counts[split] = len(records)
    manifest = _manifest(directory)
    for file in manifest["files"]:
        _check_hash(directory, manifest, file)
    return counts


# ----------------------------------------------------------------------------------------------------- prepared by TFDS


def _check_classes(directory: Path) -> None:
    """Raises `DataError` where a prepared data set names classes that are not TFDS's.

    TFDS imports the modules of all classes that `features.json` and `dataset_info.json` name. Foreign ones could run code.
    """
    for name in ("features.json", "dataset_info.json"):
        try:
            values = json.loads((directory / name).read_text(encoding="utf-8"))
            classes = _feature_classes(values if name == "features.json" else values.get("features"))
        except (OSError, ValueError, AttributeError):
            continue  # missing or malformed: TFDS reports it
        except RecursionError:
            raise DataError(f"{directory / name} is nested too deep; prepare the data set again.") from None
        for cls in classes:
            if not re.fullmatch(r"tensorflow_datasets(\.\w+)+", cls):
                raise DataError(
                    f"{directory / name} names the class {cls!r}, which would be imported, and must name classes of "
                    "tensorflow_datasets only: prepare the data set again with TFDS's own features."
                )


def _feature_classes(values: Any) -> list[str]:
    """The names of Python classes anywhere in parsed JSON, also in JSON that is a string inside it."""
    if isinstance(values, str) and values.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return _feature_classes(json.loads(values))
    if isinstance(values, list):
        return [name for value in values for name in _feature_classes(value)]
    if not isinstance(values, dict):
        return []
    keys = ("type", "pythonClassName", "python_class_name")
    here = [value for key, value in values.items() if key in keys and isinstance(value, str)]
    return here + [name for value in values.values() for name in _feature_classes(value)]


class TfdsSource(base.DecodedSource):
    """One split of a data set that TFDS has prepared as array_record; images are decoded when read."""

    def __init__(self, directory: Path, split: str, side: int = 0):
        """Opens a split.

        Args:
          directory: of the prepared data set.
          split: TFDS's name of it, such as "train" or "train[:90%]".
          side: in pixels, of the square that images are resized and cropped to; 0 if all have one size.

        Raises:
          DataError: the files are missing or damaged, have no random access, or hold no labelled images.
        """
        self._arguments = (directory, split, side)
        self._side = side
        builder, formats = _builder(directory)
        info = builder.info
        if "array_record" not in formats:
            raise DataError(
                f"{directory} is stored as {' and '.join(sorted(formats))}, which has no random access: run `tfds "
                f"convert_format --dataset_version_dir={directory} --out_file_format=array_record`."
            )
        self._image, self._label = _keys(directory, info)
        image, label = info.features[self._image], info.features[self._label]
        height, width, self._channels = image.shape
        if image.np_dtype != np.uint8 or self._channels not in (1, 3, 4):
            raise DataError(f"{directory}: images are {image.np_dtype} x {self._channels}; only 8-bit images are read.")
        self.shape = (side, side, self._channels) if side else (height, width, self._channels)
        self.class_names: tuple[str, ...] = tuple(label.names)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            self._records = builder.as_data_source(split, deserialize_method=raw, file_format="array_record")
            self._files = [(Path(f.filename), f.skip, f.take) for f in info.splits[split].file_instructions]
        except Exception as error:
            raise DataError(f"{directory}: the split {split!r} cannot be opened ({error}).") from None
        for path, _, _ in self._files:
            if not path.exists():
                raise DataError(f"{path} is missing; prepare the data set again.")

    def __reduce__(self):
        return TfdsSource, self._arguments

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """'FILE: record N' of example `index`."""
        for path, skip, count in self._files:
            if index < count:
                return f"{path}: record {index + skip}"
            index -= count
        raise IndexError(index)

    @property
    def identity(self) -> str:
        """Text that identifies the content: the files' names and sizes, and which of their records belong to the split."""
        files = [(path.name, path.stat().st_size, skip, count) for path, skip, count in self._files]
        return json.dumps([self._arguments[0].name, self._side, files])

    def shared_with(self, other: TfdsSource) -> int:
        """How many examples both splits have."""
        return sum(
            max(0, min(skip + count, first + more) - max(skip, first))
            for path, skip, count in self._files
            for same, first, more in other._files
            if path == same
        )

    def label(self, index: int) -> int:
        """The label of example `index` as it is stored: -1 where it has none."""
        return self._parse(self._fetch_one(index), self.where(index))[1]

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.empty((len(indices), *self.shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for row, (index, record) in enumerate(zip(indices, self._fetch(indices), strict=True)):
            where = self.where(int(index))
            encoded, label = self._parse(record, where)
            image = images.decode(encoded, where, channels=self._channels, side=self._side)
            if image.shape != self.shape:
                raise DataError(f"{where} is an image of shape {image.shape}; the data set's is {self.shape}.")
            if not 0 <= label < len(self.class_names):
                raise DataError(f"{where} has label {label}; the data set has {len(self.class_names)} classes.")
            pixels[row], labels[row] = image, label
        return pixels, labels

    def _parse(self, record: bytes, where: str) -> tuple[bytes, int]:
        """The encoded image and the label. TFDS's own parser walks all features of every record: 8 times as long."""
        try:
            features = _PROTOS.Example.FromString(record).features.feature
            return features[self._image].bytes_list.value[0], features[self._label].int64_list.value[0]
        except Exception as error:  # the parser's errors share no class
            raise DataError(f"{where} is damaged ({error}).") from None

    def _fetch(self, indices: np.ndarray) -> list[bytes]:
        try:
            return list(self._records.__getitems__([int(i) for i in indices]))
        except Exception:  # one record of many is damaged: reading them one by one tells which
            return [self._fetch_one(int(i)) for i in indices]

    def _fetch_one(self, index: int) -> bytes:
        try:
            return self._records[index]
        except Exception as error:  # array_record passes on the errors of its C++ library
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where(index)} is damaged ({reason}).") from None


def _builder(directory: Path) -> tuple[Any, set[str]]:
    """TFDS's builder of a prepared data set, and the formats of its files.

    Raises `DataError` where the directory is no such data set, or names classes that are not TFDS's.
    """
    _check_classes(directory)
    try:
        builder: Any = tfds.builder_from_directory(directory)
        return builder, {str(getattr(f, "value", f)) for f in builder.info.available_file_formats()}
    except Exception as error:  # TFDS raises what its parsers raise
        raise DataError(
            f"{directory} is not a complete TFDS data set ({error}); delete it and prepare it again."
        ) from None


def _keys(directory: Path, info: Any) -> tuple[str, str]:
    """The names of the image feature and of the label feature: the supervised keys if there are any, else the first."""
    names = [n for n in info.supervised_keys or info.features if isinstance(n, str) and n in info.features]
    image = [n for n in names if isinstance(info.features[n], tfds.features.Image)]
    label = [n for n in names if isinstance(info.features[n], tfds.features.ClassLabel)]
    if not image or not label:
        raise DataError(f"{directory}: has features {', '.join(info.features)}, but an image with a class is needed.")
    return image[0], label[0]


_NAME = re.compile(r"(?P<name>[a-zA-Z]\w*)(?:/(?P<config>\w[\w.-]*))?(?::(?P<version>[\d*]+\.[\d*]+\.[\d*]+))?")


def known_names(root: Path) -> list[str]:
    """Names of data sets that are prepared in `root` or that TFDS could prepare."""
    prepared = [path for levels in ("*/*", "*/*/*") for path in root.glob(f"{levels}/features.json")]
    names = [path.relative_to(root).parts[0] for path in prepared]
    return sorted({*names, *tfds.list_builders(with_community_datasets=False)})


def find(name: str, root: Path) -> Path:
    """The directory of the prepared data set `name`, `name/config` or `name:1.0.0`: the newest version that matches.

    Raises `DataError` if it is not prepared in `root`; the error says what to run.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"config.data.name={name!r}: a TFDS data set is written name, name/config or name:1.0.0.")
    top = root / match["name"] / (match["config"] or "")
    pattern = re.compile((match["version"] or "*.*.*").replace(".", r"\.").replace("*", r"\d+"))
    versions = [p.parent for p in top.glob("*/features.json") if pattern.fullmatch(p.parent.name)]
    if versions:
        return max(versions, key=lambda path: tuple(int(part) for part in path.name.split(".")))
    configs = sorted({str(p.parents[1].relative_to(root)) for p in top.glob("*/*/features.json")})
    if configs and match["config"] is None:
        raise DataError(f"config.data.name={name!r}: choose one of its configs: {', '.join(configs)}.")
    configs = _configs(match["name"])
    if configs and match["config"] not in configs:
        chosen = f"has no config {match['config']!r}" if match["config"] else "has configs"
        raise ConfigError(
            f"config.data.name={name!r}: {match['name']} {chosen}; choose one, as {match['name']}/{configs[0]}, of "
            f"{', '.join(configs[:12])}{', ...' * (len(configs) > 12)}.{did_you_mean(match['config'] or '', configs)}"
        )
    built = "/".join(filter(None, (match["name"], match["config"])))
    raise DataError(
        f"{name} is not prepared in {root} (no {top}/{match['version'] or '*.*.*'}): run `tfds build {built} "
        f"--data_dir={root} --file_format=array_record`, where TensorFlow is installed."
    )


def _configs(name: str) -> list[str]:
    """The configs of TFDS's data set `name`, [] where it has none or TFDS does not know it."""
    try:
        return list(tfds.builder_cls(name).builder_configs)
    except Exception:  # an unknown name, or a module that imports what is not installed
        return []


def load_prepared(directory: Path, root: Path, side: int, chosen: Mapping[str, str], needed: str) -> base.RawSplits:
    """A data set that TFDS has prepared. A split without labels, as the test of a competition, counts as absent.

    Args:
      directory: of the prepared data set.
      root: the data directory, above it.
      side: in pixels, of the square that images are resized and cropped to if they differ in size.
      chosen: as `DataConfig.chosen_splits`; splits that it does not name have their usual names.
      needed: the one split whose files must exist, "" for all.

    Raises:
      DataError: the data set is damaged.
      ConfigError: images differ in size and `side` is 0, or a chosen split does not exist.
    """
    names = _split_names(directory, chosen)
    required = needed if needed in names else "train"
    first = TfdsSource(directory, names[required])
    if None in first.shape and not side:
        raise ConfigError(
            f"config.data.image_size=0: the images in {directory} differ in size; set the side they are cut to."
        )
    side = side if None in first.shape else 0
    sources: dict[str, TfdsSource] = {}
    for split, name in names.items():
        try:
            sources[split] = TfdsSource(directory, name, side)
        except DataError:
            if not needed or split == required:
                raise
    unlabelled = [split for split, source in sources.items() if _is_unlabelled(source)]
    for split in unlabelled:
        if split == "train" or split in chosen:
            raise DataError(
                f"{directory}: the split {names[split]!r} has no labels (-1); choose another with config.data.splits."
            )
        del sources[split]
    _refuse_overlap(sources, names)
    shape = (side, side, first.shape[2]) if side else first.shape
    not_read = [split for split in names if split not in unlabelled]
    not_wanted = [split for split, name in chosen.items() if name == "none"]
    by_split: dict[str, base.Source] = {**dict.fromkeys([*not_read, *not_wanted], base.Outline(0, shape)), **sources}
    mean, std = base.channel_statistics(first.shape[2])
    files = [(p.name, p.stat().st_size) for p in sorted(directory.iterdir()) if not p.name.startswith(".")]
    identity = [str(directory.relative_to(root)), side, files]
    # What is drawn from training depends on which splits were left out. A data set without such splits keeps its identity.
    drawn_anew = unlabelled if "validation" not in by_split else []
    return base.RawSplits(
        train=by_split["train"],
        validation=by_split.get("validation"),
        test=by_split.get("test"),
        class_names=first.class_names,
        mean=mean,
        std=std,
        identity=json.dumps([*identity, *([names] if chosen else []), *([drawn_anew] if drawn_anew else [])]),
        identities={split: source.identity for split, source in sources.items()},
        notes=tuple(f"the split {names[split]!r} has no labels and is left out" for split in unlabelled),
    )


def _refuse_overlap(sources: Mapping[str, TfdsSource], names: Mapping[str, str]) -> None:
    """Raises `ConfigError` where another split has examples of train. names: split -> TFDS's name of it."""
    for split in sources.keys() - {"train"} if "train" in sources else ():
        if shared := sources["train"].shared_with(sources[split]):
            raise ConfigError(
                f"config.data.splits: {shared:,} examples are in train={names['train']} and in {split}={names[split]}, so that "
                f"{split} would judge by what was trained on."
            )


def _split_names(directory: Path, chosen: Mapping[str, str]) -> dict[str, str]:
    """Split that exists or is chosen -> TFDS's name of it (`train`, or `train[:90%]`)."""
    info = _builder(directory)[0].info
    names = {split: chosen.get(split, split) for split in base.SPLITS}
    for name in chosen.values():
        if name != "none" and not _examples(info, name):
            there = ", ".join(sorted(key for key in info.splits if info.splits[key].num_examples))
            raise ConfigError(f"config.data.splits: {directory} has no split {name!r}; it has {there}.")
    present = {split: name for split, name in names.items() if name != "none" and _examples(info, name)}
    return {"train": names["train"], **present}


def _examples(info: Any, split: str) -> int:
    try:
        return info.splits[split].num_examples
    except Exception:  # TFDS raises what its parsers raise
        return 0


_SAMPLED_LABELS = 16  # read to tell whether a split has labels; reading one also reads its image


def _is_unlabelled(source: TfdsSource) -> bool:
    """Whether `source` has no labels (-1), judged by a sample of them. Raises `DataError` where only some are missing."""
    sample = np.unique(np.linspace(0, len(source) - 1, _SAMPLED_LABELS).astype(int)).tolist() if len(source) else []
    labels: dict[int, int] = {}
    for index in sample:
        with contextlib.suppress(DataError):  # a damaged record is reported when it is read
            labels[index] = source.label(index)
    missing = [index for index, label in labels.items() if label < 0]
    if missing and len(missing) < len(labels):
        raise DataError(f"{source.where(missing[0])} has no label (-1), and others of its split have one.")
    return bool(missing)

"""Preparing, verifying and reading with TFDS: `jaxtrain/data/{cifar,tfds_sets}.py`, on tiny official-looking files."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  compiled
from PIL import Image
from tensorflow_datasets.core import registered

from jaxtrain.config import DataConfig
from jaxtrain.data import base, cifar, registry, tfds_sets
from jaxtrain.errors import ConfigError, DataError

TRAIN, TEST = 24, 8


def python2_pickle(content: dict) -> bytes:
    """NumPy's modules have other names than they had when the official files were written."""
    data = pickle.dumps(content, protocol=3)
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def tiny_files(name: str) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """Files of the official names and layout, of few images; and those images [N, 32, 32, 3] and labels [N]."""
    official, random = cifar.CIFAR[name], np.random.default_rng(0)
    keys = {feature: key for feature, (_, key) in official.labels.items()}
    classes = {"label": int(name.removeprefix("cifar")), "coarse_label": 20}
    meta = {key: [f"{f}{k}".encode() for k in range(classes[f])] for f, (key, _) in official.labels.items()}
    files, truth = {official.meta: python2_pickle(meta)}, {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        pixels = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = {feature: random.integers(0, classes[feature], count) for feature in keys}
        parts = official.splits[split]
        for part, rows in zip(parts, np.array_split(np.arange(count), len(parts)), strict=True):
            planes = np.ascontiguousarray(pixels[rows].transpose(0, 3, 1, 2)).reshape(len(rows), -1)
            content = {b"data": planes, **{keys[f]: column[rows].tolist() for f, column in labels.items()}}
            files[part] = python2_pickle(content)
        truth |= {f"{split} images": pixels, f"{split} labels": labels["label"]}
    return files, truth


def tiny_official(name: str, files: dict[str, bytes], **changes) -> cifar.CifarSpec:
    table = {file: (len(data), hashlib.md5(data).hexdigest()) for file, data in files.items()}
    unreachable = f"http://127.0.0.1:9/{cifar.CIFAR[name].archive}"
    counts = {"train": TRAIN, "test": TEST}
    changes = {"files": table, "examples": counts, "url": unreachable, **changes}
    return dataclasses.replace(cifar.CIFAR[name], **changes)


def put_folder(root: Path, name: str, files: dict[str, bytes]) -> Path:
    folder = root / "downloads/manual" / cifar.CIFAR[name].folder
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


def put_archive(path: Path, name: str, files: dict[str, bytes]) -> dict[str, object]:
    """Writes the archive; returns the fields of `CifarSpec` that describe it."""
    folder = put_folder(path.parent / "unpacked", name, files)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return {"archive_bytes": path.stat().st_size, "archive_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    """CIFAR-10 with 24 + 8 images, its official files in the manual directory of `tmp_path`; the images and labels."""
    files, truth = tiny_files("cifar10")
    monkeypatch.setitem(cifar.CIFAR, "cifar10", tiny_official("cifar10", files))
    put_folder(tmp_path, "cifar10", files)
    return truth


def config(root: Path, name: str = "cifar10", **changes) -> DataConfig:
    return DataConfig(name=name, dir=str(root), **changes)


def prepared(root: Path, name: str = "cifar10") -> Path:
    directory = registry.prepare(config(root, name))
    assert directory is not None
    return directory


def whole(source: base.Source) -> tuple[np.ndarray, np.ndarray]:
    """A source as arrays, in its own order where it is a subset."""
    return base.materialize(source.base if isinstance(source, base.Subset) else source)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_prepare_from_the_official_folder(tmp_path, monkeypatch, name):
    files, truth = tiny_files(name)
    monkeypatch.setitem(cifar.CIFAR, name, tiny_official(name, files))
    put_folder(tmp_path, name, files)
    with pytest.raises(
        DataError, match=f"{name} is not prepared in .*: run `jaxtrain data prepare {name} --dir {tmp_path}`"
    ):
        registry.load(config(tmp_path, name))
    directory = prepared(tmp_path, name)
    assert directory == tmp_path / f"jaxtrain_{name}/1.0.0"  # TFDS's own layout
    assert len(list(directory.glob("*.array_record-*"))) == 2
    dataset = registry.load(config(tmp_path, name))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (22, 2, 8)
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        pixels, labels = whole(source)
        np.testing.assert_array_equal(pixels, truth[f"{split} images"])
        np.testing.assert_array_equal(labels, truth[f"{split} labels"])
        assert (pixels.dtype, labels.dtype) == (np.uint8, np.int32)
    assert dataset.num_classes == len(dataset.class_names) == int(name.removeprefix("cifar"))
    assert dataset.class_names[1] == "label1"
    assert registry.verify(config(tmp_path, name)) == {"train": TRAIN, "test": TEST}
    fingerprint = dataset.fingerprint
    stamps = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert registry.prepare(config(tmp_path, name)) == directory
    assert stamps == {path: path.stat().st_mtime_ns for path in directory.iterdir()}  # it did nothing
    assert registry.load(config(tmp_path, name)).fingerprint == fingerprint


def test_records_are_ordinary_tfds_records(tmp_path, tiny):
    directory = prepared(tmp_path)
    builder: Any = tfds.builder_from_directory(directory)
    records = builder.as_data_source("train")
    assert len(records) == TRAIN
    np.testing.assert_array_equal(records[5]["image"], tiny["train images"][5])
    assert records[5]["label"] == tiny["train labels"][5]


def test_the_archive_may_be_put_there_instead(tmp_path, monkeypatch, tiny):
    files, _ = tiny_files("cifar10")
    root = tmp_path / "other"
    archive = root / "downloads/manual" / cifar.CIFAR["cifar10"].archive
    monkeypatch.setitem(
        cifar.CIFAR, "cifar10", tiny_official("cifar10", files, **put_archive(archive, "cifar10", files))
    )
    good = archive.read_bytes()
    archive.write_bytes(good[:-100])
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz has [\d,]+ bytes, the official archive [\d,]+"):
        registry.prepare(config(root))
    archive.write_bytes(good[:-100] + bytes(100))
    with pytest.raises(DataError, match=r"could not be fetched \(.*cifar-10-python.tar.gz, has wrong checksum"):
        registry.prepare(config(root))
    archive.write_bytes(good)
    registry.prepare(config(root))
    np.testing.assert_array_equal(whole(registry.load(config(root)).train)[0], tiny["train images"])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a web server on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()


def test_download_is_checked_against_the_published_checksum(tmp_path, monkeypatch, server):
    address, served = server
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files, truth = tiny_files("cifar10")
    known = put_archive(served / "cifar-10-python.tar.gz", "cifar10", files)
    url = f"{address}/cifar-10-python.tar.gz"
    wrong = tiny_official("cifar10", files, url=url, **{**known, "archive_sha256": "0" * 64})
    monkeypatch.setitem(cifar.CIFAR, "cifar10", wrong)
    root = tmp_path / "data"
    with pytest.raises(DataError, match=r"could not be fetched \(.*wrong checksum.*downloads/manual"):
        registry.prepare(config(root))
    assert not (root / "jaxtrain_cifar10/1.0.0").exists()
    monkeypatch.setitem(cifar.CIFAR, "cifar10", tiny_official("cifar10", files, url=url, **known))
    registry.prepare(config(root))
    np.testing.assert_array_equal(whole(registry.load(config(root)).train)[0], truth["train images"])


def test_without_network_one_sentence_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(cifar.CIFAR, "cifar100", tiny_official("cifar100", tiny_files("cifar100")[0]))
    with pytest.raises(DataError) as caught:
        registry.prepare(config(tmp_path, "cifar100"))
    text = str(caught.value)
    assert "put cifar-100-python.tar.gz (169,001,437 bytes), or the folder cifar-100-python" in text
    assert f"into {tmp_path}/downloads/manual/" in text
    assert "\n" not in text
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"data_batch_3 has [\d,]+ bytes, the official file"),
        (
            lambda path: path.write_bytes(b"\x00" + path.read_bytes()[1:]),
            "data_batch_3 is not the official file: its MD5",
        ),
        (lambda path: path.unlink(), "data_batch_3 cannot be read .*copy all of cifar-10-batches-py"),
    ],
    ids=["half-copied", "changed", "missing"],
)
def test_official_files_that_are_wrong_are_named(tmp_path, tiny, damage, words):
    damage(tmp_path / "downloads/manual/cifar-10-batches-py/data_batch_3")
    with pytest.raises(DataError, match=words):
        registry.prepare(config(tmp_path))
    assert not (tmp_path / "jaxtrain_cifar10/1.0.0").exists()


class _Exploit:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("checksum", ["wrong", "right"])
def test_no_pickle_runs_code(tmp_path, monkeypatch, tiny, checksum):
    """Unknown bytes are not unpickled at all; and were they known, a pickle of arrays is all that is understood."""
    files, _ = tiny_files("cifar10")
    canary = tmp_path / "canary"
    files["test_batch"] = pickle.dumps({b"data": _Exploit(canary)}, protocol=2)
    (tmp_path / "downloads/manual/cifar-10-batches-py/test_batch").write_bytes(files["test_batch"])
    if checksum == "right":
        monkeypatch.setitem(cifar.CIFAR, "cifar10", tiny_official("cifar10", files))
    with pytest.raises(DataError, match="test_batch" if checksum == "wrong" else "NumPy arrays only"):
        registry.prepare(config(tmp_path))
    assert not canary.exists()


def test_an_interrupted_preparation_is_done_again(tmp_path, tiny, capsys):
    """Killed while TFDS writes: only its temporary directory exists. Killed after: the records lack the manifest."""
    leftover = tmp_path / "jaxtrain_cifar10/incomplete.ABC123_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "part").write_text("half a record")
    directory = prepared(tmp_path)
    assert not leftover.exists()
    (directory / "jaxtrain.json").unlink()
    (directory / "images-train.npy").write_bytes(b"half")
    (directory / "jaxtrain.json.tmp").write_text("half")
    with pytest.raises(DataError, match="not prepared"):
        registry.load(config(tmp_path))
    registry.prepare(config(tmp_path))
    np.testing.assert_array_equal(whole(registry.load(config(tmp_path)).train)[0], tiny["train images"])


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["images-train.npy", "jaxtrain_cifar10-train.array_record-00000-of-00001"])
def test_a_prepared_file_that_was_cut_is_found_at_start(tmp_path, tiny, file):
    path = prepared(tmp_path) / file
    damage_truncate(path)
    for start in (registry.load, registry.prepare, registry.verify):
        with pytest.raises(
            DataError, match=rf"{file} has [\d,]+ bytes and must have [\d,]+; delete .*jaxtrain data prepare"
        ):
            start(config(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match=f"{file} is missing"):
        registry.load(config(tmp_path))


def test_a_flipped_bit_is_found(tmp_path, tiny):
    """In what training reads: at start. In the records: by `verify`, which names the record."""
    directory = prepared(tmp_path)
    damage_flip(directory / "images-train.npy")
    with pytest.raises(DataError, match=r"images-train.npy has changed since it was prepared"):
        registry.load(config(tmp_path))
    damage_flip(directory / "images-train.npy")
    damage_flip(directory / "jaxtrain_cifar10-test.array_record-00000-of-00001")
    registry.load(config(tmp_path))
    with pytest.raises(DataError, match=r"jaxtrain_cifar10-test.array_record-00000-of-00001: record \d+ is damaged"):
        registry.verify(config(tmp_path))


def test_verify_compares_records_with_the_arrays(tmp_path, tiny):
    """Arrays and manifest that agree with each other but not with the records."""
    directory = prepared(tmp_path)
    labels = np.load(directory / "labels-test.npy")
    labels[3] += 1
    np.save(directory / "labels-test.npy", labels)
    manifest = json.loads((directory / "jaxtrain.json").read_text())
    manifest["files"]["labels-test.npy"]["sha256"] = hashlib.sha256(
        (directory / "labels-test.npy").read_bytes()
    ).hexdigest()
    (directory / "jaxtrain.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"test.array_record.*: record 3 differs"):
        registry.verify(config(tmp_path))


PREPARE = """
    import sys
    import numpy as np
    sys.path.insert(0, {tests!r})
    import test_data_prepare as tests
    from jaxtrain.data import cifar, registry, stream
    files, truth = tests.tiny_files("cifar10")
    cifar.CIFAR["cifar10"] = tests.tiny_official("cifar10", files)
    config = tests.config({root!r})
    registry.prepare(config)
    dataset = registry.load(config)
    assert (tests.whole(dataset.train)[0] == truth["train images"]).all()
    registry.verify(config)
    assert "tensorflow" not in sys.modules, "TensorFlow was imported"
    print("prepared" if {root!r} else "")
"""


def test_two_processes_prepare_once_and_without_tensorflow(tmp_path, tiny):
    path = os.pathsep.join([str(Path(base.__file__).parents[2]), *sys.path])
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(PREPARE.format(tests=str(Path(__file__).parents[1]), root=str(tmp_path))),
    ]
    runs = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        for _ in range(2)
    ]
    results = [run.communicate(timeout=300) for run in runs]
    assert [out.strip() for out, _ in results] == ["prepared"] * 2, results
    assert sum(err.count("Preparing cifar10") for _, err in results) == 1


def test_waiting_for_the_other_process_has_an_end(tmp_path, tiny):
    with (
        tfds_sets._lock(tmp_path / "jaxtrain_cifar10.lock", timeout=1.0),
        pytest.raises(DataError, match=r"still prepares the data after 0.002 minutes \(config.data.prepare_timeout\)"),
    ):
        registry.prepare(config(tmp_path, prepare_timeout=0.002))


def test_a_full_disk_is_told_and_leaves_nothing_that_counts(tmp_path, monkeypatch, tiny):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(DataError, match=r"cannot be written while preparing cifar10 \(No space left on device\)"):
            registry.prepare(config(tmp_path))
    with pytest.raises(DataError, match="not prepared"):
        registry.load(config(tmp_path))
    prepared(tmp_path)
    np.testing.assert_array_equal(whole(registry.load(config(tmp_path)).train)[0], tiny["train images"])


def test_a_damaged_preparation_without_manifest(tmp_path, tiny):
    directory = prepared(tmp_path)
    (directory / "jaxtrain.json").unlink()
    (directory / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=rf"{directory} is damaged .*delete .*jaxtrain data prepare cifar10"):
        registry.prepare(config(tmp_path))


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        registry.prepare(config(tmp_path / "file"))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_data(name):
    """The real files, where the official ones are: the published mean and deviation, balanced classes."""
    root = Path(os.environ.get("JAXTRAIN_DATA_DIR", "/nowhere"))
    if not (root / "downloads" / "manual").is_dir() and not tfds_sets.cifar_directory(name, root).is_dir():
        pytest.skip(f"{name} is not in $JAXTRAIN_DATA_DIR={root}")
    registry.prepare(DataConfig(name=name))
    assert sum(registry.verify(DataConfig(name=name)).values()) == 60_000
    dataset = registry.load(DataConfig(name=name))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (45_000, 5_000, 10_000)
    pixels, labels = whole(dataset.train)
    values = np.arange(256) / 255
    for channel in range(3):
        share = np.bincount(pixels[..., channel].ravel(), minlength=256) / pixels[..., channel].size
        mean = share @ values
        assert mean == pytest.approx(dataset.mean[channel], abs=3e-4)
        assert (share @ (values - mean) ** 2) ** 0.5 == pytest.approx(dataset.std[channel], abs=3e-4)
    assert set(np.bincount(labels)) == {50_000 // dataset.num_classes}


# ------------------------------------------------------------------------------------------------- prepared by TFDS


def make_builder(
    name: str, shape: tuple, splits: dict[str, int], *, labels: bool = True, unlabelled: tuple[str, ...] = ()
) -> type:
    """A TFDS builder class as a user would write it; image k of a split is filled with k, its label is k modulo 3.

    unlabelled: splits whose labels are -1, as TFDS has those of a test that is not published.
    """

    def info(self):
        features: dict[str, object] = {"picture": tfds.features.Image(shape=shape, encoding_format="png")}
        if labels:
            features["kind"] = tfds.features.ClassLabel(names=["x", "y", "z"])
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def generate(self, count, labelled):
        for k in range(count):
            height = 12 if shape[0] else 12 + k
            image = Image.new("L" if shape[2] == 1 else "RGB", (10, height), k if shape[2] == 1 else (k, k, k))
            yield k, {"picture": image, **({"kind": k % 3 if labelled else -1} if labels else {})}

    with registered.skip_registration():
        return type(
            name,
            (tfds.core.GeneratorBasedBuilder,),
            {
                "VERSION": tfds.core.Version("1.0.0"),
                "_info": info,
                "_split_generators": lambda self, _: {
                    s: self._generate_examples(n, s not in unlabelled) for s, n in splits.items()
                },
                "_generate_examples": generate,
                "__module__": __name__,
            },
        )


def build(root: Path, name: str, shape: tuple, splits: dict[str, int], **options) -> Path:
    builder = make_builder(name, shape, splits, **options)(data_dir=root)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


def test_prepared_set_by_name(tmp_path):
    build(tmp_path, "MySet", (12, 10, 1), {"train": 9, "validation": 4, "test": 5})
    for name in ("my_set", "my_set:1.0.0", "my_set:1.*.*"):
        dataset = registry.load(config(tmp_path, name))
        assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (9, 4, 5)
    pixels, labels = whole(dataset.train)
    assert pixels.shape == (9, 12, 10, 1)
    np.testing.assert_array_equal(pixels[:, 0, 0, 0], np.arange(9))
    np.testing.assert_array_equal(labels, np.arange(9) % 3)
    assert dataset.class_names == ("x", "y", "z")
    assert len(dataset.mean) == len(dataset.std) == 1
    again = pickle.loads(pickle.dumps(dataset.test))  # as a reading worker gets it
    np.testing.assert_array_equal(again.read(np.array([4, 1]))[0][:, 0, 0, 0], [4, 1])
    assert registry.prepare(config(tmp_path, "my_set")) == tmp_path / "my_set/1.0.0"
    assert registry.verify(config(tmp_path, "my_set")) == {"train": 9, "validation": 4, "test": 5}


@pytest.mark.parametrize(
    ("splits", "unlabelled", "sizes", "noted"),
    [
        ({"train": 20, "validation": 4, "test": 5}, "test", (20, 4, 0), ("no labels and is left out", "no test split")),
        ({"train": 20, "test": 5}, "test", (14, 2, 4), ("no labels and is left out",)),
        ({"train": 20, "validation": 4, "test": 5}, "validation", (18, 2, 5), ("no labels and is left out",)),
        ({"train": 20, "validation": 4}, "", (20, 4, 0), ("no test split",)),
        ({"train": 20, "test": 5}, "", (18, 2, 5), ()),
        ({"train": 20}, "", (14, 2, 4), ()),
    ],
)
def test_a_split_without_labels_is_absent(tmp_path, splits, unlabelled, sizes, noted):
    build(tmp_path, "MySet", (12, 10, 1), splits, unlabelled=(unlabelled,))
    dataset = registry.load(config(tmp_path, "my_set"))
    assert tuple(len(getattr(dataset, split)) for split in base.SPLITS) == sizes
    assert [words for words in noted if any(words in note for note in dataset.notes)] == list(noted)
    assert len(dataset.notes) == len(noted)
    for split in base.SPLITS:
        one = registry.load(config(tmp_path, "my_set"), needed=split)
        assert len(getattr(one, split)) == len(getattr(dataset, split))
        if len(getattr(one, split)):
            assert one.split_fingerprints[split] == dataset.split_fingerprints[split]


def test_a_split_left_out_changes_the_identity_where_another_is_drawn_for_it(tmp_path):
    """What training holds then is not what it held with the unlabelled test: no run goes on on it unnoticed."""
    splits = {"train": 20, "validation": 4, "test": 5}
    prints = []
    for number, (left, unlabelled) in enumerate(
        [(splits, ()), (splits, ("test",)), ({"train": 20, "test": 5}, ("test",))]
    ):
        build(tmp_path / str(number), "MySet", (12, 10, 1), left, unlabelled=unlabelled)
        prints.append(registry.load(config(tmp_path / str(number), "my_set")))
    directory = tfds_sets.find("my_set", tmp_path / "2")
    files = [(p.name, p.stat().st_size) for p in sorted(directory.iterdir()) if not p.name.startswith(".")]
    as_before = json.dumps([json.dumps(["my_set/1.0.0", 0, files]), 0, 0.1, 0])
    assert prints[2].fingerprint != hashlib.sha256(as_before.encode()).hexdigest()
    directory = tfds_sets.find("my_set", tmp_path / "1")  # its training is what it always was
    files = [(p.name, p.stat().st_size) for p in sorted(directory.iterdir()) if not p.name.startswith(".")]
    as_before = json.dumps([json.dumps(["my_set/1.0.0", 0, files]), 0, 0.1, 0])
    assert prints[1].fingerprint == hashlib.sha256(as_before.encode()).hexdigest()


def test_a_split_with_some_labels_or_no_training_labels_is_refused(tmp_path):
    build(tmp_path, "MySet", (12, 10, 1), {"train": 20}, unlabelled=("train",))
    with pytest.raises(
        DataError, match=r"the split 'train' has no labels \(-1\); choose another with config.data.splits"
    ):
        registry.load(config(tmp_path, "my_set"))
    build(tmp_path / "some", "MySet", (12, 10, 1), {"train": 20, "test": 9}, unlabelled=("test",))
    with pytest.raises(DataError, match=r"record 0 has no label \(-1\), and others of its split have one"):
        registry.load(config(tmp_path / "some", "my_set", splits="train=train+test[:3],test=none"))


def test_chosen_splits_of_a_prepared_set(tmp_path):
    build(tmp_path, "MySet", (12, 10, 1), {"train": 20, "extra": 7, "test": 5}, unlabelled=("test",))
    dataset = registry.load(config(tmp_path, "my_set", splits="train=train[:16],validation=train[16:],test=extra"))
    assert [len(getattr(dataset, split)) for split in base.SPLITS] == [16, 4, 7]
    assert dataset.validation.read(np.arange(4))[0][:, 0, 0, 0].tolist() == [16, 17, 18, 19]
    assert dataset.validation.where(1).endswith("record 17")
    assert dataset.notes == ()
    assert dataset.fingerprint != registry.load(config(tmp_path, "my_set")).fingerprint
    assert len(registry.load(config(tmp_path, "my_set", splits="test=none")).test) == 0
    for chosen, error, words in (
        ("test=tset", ConfigError, "has no split 'tset'; it has extra, test, train"),
        ("test=test", DataError, "the split 'test' has no labels"),
        (
            "validation=train[12:],test=none",
            ConfigError,
            r"8 examples are in train=train and in validation=train\[12:\]",
        ),
    ):
        with pytest.raises(error, match=words):
            registry.load(config(tmp_path, "my_set", splits=chosen))


def test_prepared_set_of_many_sizes_is_cut_to_squares(tmp_path):
    build(tmp_path, "Sizes", (None, None, 3), {"train": 20})
    with pytest.raises(ConfigError, match=r"config.data.image_size=0: .*differ in size"):
        registry.load(config(tmp_path, "sizes"))
    dataset = registry.load(config(tmp_path, "sizes"), image_size=8)
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [14, 2, 4]
    pixels, _ = whole(dataset.train)
    assert pixels.shape == (20, 8, 8, 3)
    assert (pixels == np.arange(20)[:, None, None, None]).all()


@pytest.mark.parametrize("damage", ["flip", "garbage"])
def test_damaged_record_is_named(tmp_path, damage):
    directory = build(tmp_path, "MySet", (12, 10, 1), {"train": 9})
    (file,) = directory.glob("*train.array_record*")
    data = bytearray(file.read_bytes())
    begin = [k for k in range(len(data)) if data[k : k + 4] == b"\x89PNG"]
    assert len(begin) == 9
    if damage == "flip":
        data[begin[6] + 40] ^= 4
    else:
        data[begin[6] : begin[6] + 40] = os.urandom(40)
    file.write_bytes(data)
    dataset = registry.load(config(tmp_path, "my_set"))
    assert isinstance(dataset.train, base.Subset)
    records = dataset.train.base
    assert records.read(np.arange(6))[1].tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(DataError, match=rf"{file.name}: record 6 is damaged"):
        records.read(np.arange(9))
    with pytest.raises(DataError, match=rf"{file.name}: record 6 is damaged"):
        registry.verify(config(tmp_path, "my_set"))


@pytest.mark.parametrize("record", [b"no protocol buffer", b""], ids=["garbage", "no features"])
def test_a_whole_record_that_is_no_example_is_named(tmp_path, record):
    directory = build(tmp_path, "MySet", (12, 10, 1), {"train": 9})
    (file,) = directory.glob("*train.array_record*")
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for _ in range(9):
        writer.write(record)
    writer.close()
    with pytest.raises(DataError, match=rf"{file.name}: record \d is damaged"):
        registry.verify(config(tmp_path, "my_set"))


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_record_file_is_named(tmp_path, size):
    directory = build(tmp_path, "MySet", (12, 10, 1), {"train": 9})
    (file,) = directory.glob("*train.array_record*")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=file.name):
        registry.verify(config(tmp_path, "my_set"))
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name} is missing"):
        registry.load(config(tmp_path, "my_set"))


def test_garbage_description_is_named(tmp_path):
    directory = build(tmp_path, "MySet", (12, 10, 1), {"train": 9})
    (directory / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=f"{directory} is not a complete TFDS data set"):
        registry.load(config(tmp_path, "my_set"))


CLASS = "stranger_features.Feature"


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("features.json", {"pythonClassName": CLASS}),
        ("features.json", {"python_class_name": CLASS}),
        ("features.json", {"type": CLASS, "content": {}}),
        ("features.json", {"pythonClassName": "os.system"}),
        (
            "features.json",
            {
                "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                "featuresDict": {"features": {"image": {"pythonClassName": CLASS}}},
            },
        ),
        (
            "features.json",
            {
                "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                "jsonFeature": {"json": json.dumps({"image": {"type": CLASS, "content": {}}})},
            },
        ),
        ("dataset_info.json", {"features": {"pythonClassName": CLASS}}),
    ],
    ids=["proto", "proto-field-name", "legacy", "standard-library", "nested", "json-in-json", "info"],
)
def test_a_class_that_a_data_set_names_is_not_imported(tmp_path, monkeypatch, file, values):
    directory = build(tmp_path / "data", "made_by_a_stranger", (8, 8, 1), {"train": 4})
    (tmp_path / "stranger_features.py").write_text("raise RuntimeError('the code was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = json.loads((directory / file).read_text()) if file == "dataset_info.json" else {}
    (directory / file).write_text(json.dumps(before | values))
    with pytest.raises(DataError, match=rf"{file} names the class '.*', which would be imported"):
        registry.load(config(tmp_path / "data", "made_by_a_stranger"))


def test_tfrecord_names_the_command_that_converts(tmp_path):
    directory = build(tmp_path, "MySet", (12, 10, 1), {"train": 9})
    info = json.loads((directory / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (directory / "dataset_info.json").write_text(json.dumps(info))
    command = f"tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record"
    with pytest.raises(DataError, match=f"stored as tfrecord, which has no random access: run `{command}`"):
        registry.load(config(tmp_path, "my_set"))


def test_what_is_not_prepared_or_not_usable(tmp_path):
    with pytest.raises(
        DataError, match=r"mnist is not prepared in .*: run `tfds build mnist --data_dir=.*array_record`"
    ):
        registry.load(config(tmp_path, "mnist"))
    with pytest.raises(ConfigError, match=r"imagenet_resized has configs; choose one, .* of 8x8, 16x16, 32x32, 64x64"):
        registry.load(config(tmp_path, "imagenet_resized"))
    with pytest.raises(ConfigError, match=r"imagenet_resized has no config '32'; choose one, .* of 8x8, 16x16"):
        registry.load(config(tmp_path, "imagenet_resized/32"))
    with pytest.raises(DataError, match=r"run `tfds build imagenet_resized/32x32 --data_dir="):
        registry.load(config(tmp_path, "imagenet_resized/32x32"))
    with pytest.raises(DataError, match=r"my_set:2.0.0 is not prepared"):
        registry.prepare(config(tmp_path, "my_set:2.0.0"))
    with pytest.raises(ConfigError, match=r"digits, synthetic, cifar10, cifar100, folder:PATH.* Did you mean 'mnist'"):
        registry.load(config(tmp_path, "minst"))
    build(tmp_path, "NoLabels", (12, 10, 1), {"train": 3}, labels=False)
    with pytest.raises(DataError, match="has features picture, but an image with a class is needed"):
        registry.load(config(tmp_path, "no_labels"))
    build(tmp_path, "NoTrain", (12, 10, 1), {"test": 3})
    with pytest.raises(DataError, match="the split 'train' cannot be opened"):
        registry.load(config(tmp_path, "no_train"))

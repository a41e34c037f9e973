"""Order, splits, sources and streams: `jaxtrain/data/{order,sources,images,stream}.py`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxtrain import cli
from jaxtrain.config import DataConfig, LayoutConfig
from jaxtrain.data import base, folder_scan, images, order, registry, stream
from jaxtrain.data.folder import FolderSource
from jaxtrain.distributed import coordination
from jaxtrain.errors import ConfigError, DataError, JaxtrainError
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.training.input_pipeline import make_input_pipeline


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------- order


def test_order_is_fixed_forever():
    """A change here reorders every run that resumes: these hashes hold across NumPy versions and platforms."""
    assert order.permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert sha(order.permutation(50_000, 7, 3)) == "80293edbb020ef86"
    assert sha(order.split_permutation(50_000, 0)) == "d0e7728c8f8bde6b"
    assert order.permutation(50_000, 7, 3).dtype == np.int64


def test_each_epoch_is_another_permutation():
    epochs = [order.permutation(1000, 5, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1000))
    assert (
        len({sha(epoch) for epoch in [*epochs, order.permutation(1000, 6, 0), order.split_permutation(1000, 5)]}) == 5
    )


def test_remainder_is_carried_into_the_next_epoch():
    batches = [order.batch_indices(10, 1, 4 * step, 4) for step in range(5)]
    stream_ = np.concatenate(batches)
    np.testing.assert_array_equal(stream_, np.concatenate([order.permutation(10, 1, 0), order.permutation(10, 1, 1)]))


def test_a_batch_may_span_many_epochs():
    np.testing.assert_array_equal(
        order.batch_indices(3, 2, 7, 8), np.concatenate([order.permutation(3, 2, e) for e in range(5)])[7:15]
    )


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_each_batch_without_loss_or_repeat(processes):
    """Places are dealt out within each of two microbatches; put together they are the batch of one process."""
    places = np.arange(16).reshape(2, processes, -1).swapaxes(0, 1).reshape(processes, -1)
    streams = [order.index_stream(50, seed=3, global_batch=16, positions=p, first_example=0, steps=25) for p in places]
    seen = []
    for step, parts in enumerate(zip(*streams, strict=True)):
        batch = np.empty(16, np.int32)
        batch[np.concatenate(places)] = np.concatenate(parts)
        np.testing.assert_array_equal(batch, order.batch_indices(50, 3, 16 * step, 16))
        seen.append(batch)
    np.testing.assert_array_equal(np.bincount(np.concatenate(seen)), np.full(50, 8))  # 400 examples: 8 epochs of 50


def test_resume_needs_only_the_count_of_examples():
    whole = np.concatenate([order.batch_indices(97, 0, 8 * step, 8) for step in range(30)])
    resumed = order.index_stream(97, seed=0, global_batch=12, positions=np.arange(12), first_example=120, steps=10)
    np.testing.assert_array_equal(np.concatenate(list(resumed)), whole[120:])


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (8, 4), (3, 8), (0, 4)])
def test_evaluation_counts_each_example_once(n, batch):
    counted = np.zeros(n, int)
    for indices, mask in order.eval_batches(n, batch):
        assert indices.shape == mask.shape == (batch,)
        assert indices.max() < n
        np.add.at(counted, indices[mask], 1)
    assert (counted == 1).all()


def test_a_part_of_an_evaluation_is_of_every_class_and_always_the_same():
    labels = np.repeat(np.arange(10), 100)  # sorted by class, as the files of a folder are
    part = order.eval_subset(1000, 200)
    assert (np.diff(part) > 0).all()
    assert np.bincount(labels[part]).min() >= 10
    assert set(order.eval_subset(1000, 50)) < set(part)
    np.testing.assert_array_equal(order.eval_subset(1000, 5), [403, 606, 656, 811, 931])
    for count in (0, 1000, 2000):
        np.testing.assert_array_equal(order.eval_subset(1000, count), np.arange(1000))


# -------------------------------------------------------------------------------------------------------------- splits


def indices_of(source: base.Source) -> np.ndarray:
    assert isinstance(source, base.Subset)
    return source.indices


def test_digits_splits():
    dataset = registry.load(DataConfig(name="digits"))
    parts = [indices_of(s) for s in (dataset.train, dataset.validation, dataset.test)]
    assert [len(p) for p in parts] == [1294, 144, 359]
    assert sorted(np.concatenate(parts)) == list(range(1797))  # disjoint, and nothing is lost
    assert [sha(p) for p in parts] == ["b5f3da00619392bd", "a2221cde7b578242", "3258f4e6e1a3f760"]
    labels = dataset.test.read(np.arange(359))[1]
    assert np.bincount(labels).min() >= 34  # stratified: a fifth of each class


def test_splits_follow_split_seed_alone():
    load = lambda **changes: indices_of(registry.load(DataConfig(name="digits", **changes)).train).tolist()  # noqa: E731
    assert load() == load(global_batch=7)
    assert load() != load(split_seed=1)
    assert load(examples=100) == load()[:100]
    assert len(load(validation=0.0)) == 1797 - 359


def test_digits_are_the_scanned_images():
    dataset = registry.load(DataConfig(name="digits"))
    assert isinstance(dataset.train, base.Subset)
    pixels, labels = base.materialize(dataset.train.base)
    assert pixels.shape == (1797, 8, 8, 1)
    assert pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert labels[:10].tolist() == list(range(10))  # scikit-learn's file begins so
    assert (pixels.mean() / 255, pixels.std() / 255) == pytest.approx((dataset.mean[0], dataset.std[0]), abs=1e-3)
    assert base.nbytes(dataset.train.base) == pixels.nbytes + labels.nbytes


def test_fingerprint_names_content_and_splits():
    base_config = DataConfig(name="synthetic")
    prints = {
        registry.load(dataclasses.replace(base_config, **changes)).fingerprint
        for changes in ({}, {"split_seed": 1}, {"validation": 0.2}, {"examples": 50}, {"name": "digits"})
    }
    assert len(prints) == 5
    assert registry.load(base_config).fingerprint in prints


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DataConfig(name="digts"), "Did you mean 'digits'"),
        (DataConfig(name="digits", examples=1500), "1,294 training examples"),
        (DataConfig(name="digits", mean=(0.5,) * 3, std=(0.5,) * 3), "config.data.mean"),
        (DataConfig(name="os.path:joint"), "Did you mean 'join'"),
        (DataConfig(name="folder:anywhere"), "config.data.image_size=0"),
    ],
)
def test_settings_that_do_not_fit(config, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        registry.load(dataclasses.replace(config, dir=str(tmp_path)))


# ----------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_bytes_depend_on_the_seed_alone():
    dataset = registry.load(DataConfig(name="synthetic"))
    pixels, labels = dataset.train.read(np.array([5, 2, 5]))
    assert dataset.train.shape == (28, 28, 1)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (10_000, 1000, 2000)
    assert (sha(pixels), labels.tolist()) == ("75511cf98267b2f4", [0, 5, 0])
    np.testing.assert_array_equal(pixels[0], pixels[2])
    assert sha(registry.load(DataConfig(name="synthetic", split_seed=1)).train.read(np.array([5, 2, 5]))[0]) != sha(
        pixels
    )


def test_synthetic_is_learnable_lazy_and_takes_a_size():
    huge = registry.load(DataConfig(name="synthetic", examples=10**6), image_size=32)
    assert huge.train.shape == (32, 32, 3)
    pixels, labels = huge.train.read(np.arange(500))
    means = np.stack([pixels[labels == label].mean(0) for label in range(10)])
    unseen, wanted = huge.test.read(np.arange(200))
    nearest = ((unseen[:, None].astype(float) - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == wanted).mean() > 0.95
    assert pixels.mean() / 255 == pytest.approx(huge.mean[0], abs=0.02)
    assert pixels.std() / 255 == pytest.approx(huge.std[0], abs=0.02)


# -------------------------------------------------------------------------------------------------------------- folder


def write_image(path: Path, size: tuple[int, int] = (20, 12), value: int = 0, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes of eight images of several sizes, modes and formats, beside files that are none."""
    for label, name in enumerate(("ant", "bee", "cat", "dog")):
        for k in range(8):
            write_image(tmp_path / "set" / name / f"{k}.{'png' if k % 2 else 'jpg'}", (20 + k, 12 + label), 60 * label)
    Image.new("L", (9, 30), 200).save(tmp_path / "set/ant/grey.png")
    (tmp_path / "set/ant/notes.txt").write_text("not an image")
    (tmp_path / "set/.hidden").mkdir()
    return tmp_path / "set"


def load_folder(path: Path, **changes) -> base.Dataset:
    return registry.load(DataConfig(name=f"folder:{path}", **changes), image_size=14)


def test_folder_without_splits_is_cut(folder):
    dataset = load_folder(folder)
    assert dataset.class_names == ("ant", "bee", "cat", "dog")
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [21, 2, 10]
    pixels, labels = base.materialize(dataset.train)
    assert pixels.shape == (21, 14, 14, 3)
    coloured = np.ptp(pixels.astype(int), axis=-1).reshape(21, -1).max(1) > 0
    np.testing.assert_allclose(pixels[coloured].mean((1, 2))[:, 0], 60 * labels[coloured], atol=3)
    grey = ~coloured
    assert (pixels[grey] == 200).all()  # converted to RGB


def empty_files(top: Path, classes: str, first: int, last: int) -> Path:
    """PATH/CLASS/*.png of no bytes: finding and splitting them reads none."""
    for name in classes:
        (top / name).mkdir(parents=True, exist_ok=True)
        for k in range(first, last):
            (top / name / f"{(k * 7919) % 100_000:05d}.png").touch()
    return top


def split_files(dataset: base.Dataset) -> dict[str, set[str]]:
    """The files of each split."""
    found: dict[str, set[str]] = {}
    for split in base.SPLITS:
        source = getattr(dataset, split)
        whole = source.base if isinstance(source, base.Subset) else source
        assert isinstance(whole, FolderSource)
        found[split] = {os.path.normpath(whole.files[i]) for i in indices_of(source)}
    return found


def test_no_added_file_moves_another_to_another_split(tmp_path):
    before = load_folder(empty_files(tmp_path, "ace", 0, 400))
    files = split_files(before)
    after = split_files(load_folder(empty_files(tmp_path, "abcde", 0, 500)))
    assert all(files[split] <= after[split] for split in files)
    assert sum(map(len, after.values())) == 2500
    for split, share in (("test", 0.2), ("validation", 0.8 * 0.1)):  # within four deviations
        expected = 1200 * share
        assert abs(len(files[split]) - expected) < 4 * (expected * (1 - share)) ** 0.5
    wider = split_files(load_folder(tmp_path, validation=0.3))
    assert after["validation"] < wider["validation"]
    assert after["test"] == wider["test"]
    assert split_files(load_folder(tmp_path, split_seed=1)) != after
    assert split_files(load_folder(tmp_path, examples=100))["train"] < after["train"]


def test_a_split_is_known_again_by_its_own_files(tmp_path):
    before = load_folder(empty_files(tmp_path, "ab", 0, 60))
    test, other = (next(iter(split_files(before)[split])) for split in ("test", "train"))
    (tmp_path / other).write_bytes(b"longer")
    after = load_folder(tmp_path)
    changed = {split for split in base.SPLITS if after.split_fingerprints[split] != before.split_fingerprints[split]}
    assert changed == {"train"}
    assert after.fingerprint != before.fingerprint
    (tmp_path / test).unlink()
    assert load_folder(tmp_path).split_fingerprints["test"] != before.split_fingerprints["test"]


def test_fingerprints_of_positions_are_those_of_every_version():
    """A run that was started before goes on: these are of the first version."""
    prints = [registry.load(DataConfig(name=name)).fingerprint[:12] for name in ("digits", "synthetic")]
    assert prints == ["95c7481f8691", "6a89c4e5e0f1"]


def test_classes_without_an_example_are_named(tmp_path):
    empty_files(tmp_path, "ab", 0, 60)
    empty_files(tmp_path, "c", 0, 1)
    dataset = load_folder(tmp_path)
    (where,) = [split for split, files in split_files(dataset).items() if any(file.startswith("c") for file in files)]
    missing = {note.split()[0] for note in dataset.notes if note.endswith("has no example of the class 'c'")}
    assert missing == set(base.SPLITS) - {where}


def test_too_few_images_are_not_blamed_on_the_validation(tmp_path):
    empty_files(tmp_path, "ab", 0, 1)
    refused = []
    for seed in range(60):
        try:
            load_folder(tmp_path, split_seed=seed)
        except ConfigError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 30  # both images are held out, with a probability of (0.2 + 0.8 * 0.1) ** 2
    assert all("of 2 training examples none is left (" in text and "data.validation" not in text for text in refused)


def test_folder_stores_room_for_the_crop(folder):
    config = DataConfig(name=f"folder:{folder}", augmentation="resize_crop")
    assert registry.load(config, image_size=224).train.shape == (256, 256, 3)


@pytest.mark.parametrize(
    ("size", "side"),
    [((30, 10), 10), ((31, 10), 10), ((30, 10), 5), ((10, 30), 16), ((20, 12), 6), ((20, 12), 18), ((9, 9), 4)],
)
def test_folder_image_is_the_centre_of_the_resized_image(tmp_path, size, side):
    """Against Pillow's resize of the whole image, then a crop."""
    image = Image.effect_noise(size, 90).convert("RGB")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(2):
            image.save(tmp_path / name / f"{k}.png")
    found = registry.load(DataConfig(name=f"folder:{tmp_path}", validation=0.0), image_size=side).train.read(
        np.array([0])
    )
    scale = side / min(size)
    whole = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    wanted = np.asarray(whole)[top : top + side, left : left + side].astype(int)
    assert np.abs(found[0][0] - wanted).max() <= 1  # rounding of Pillow's fixed-point weights


def photo(width: int, height: int) -> Image.Image:
    """Shapes, a gradient and some noise: smooth as a photograph is, with edges."""
    y, x = np.mgrid[:height, :width] / height
    waves = np.stack([np.sin(7 * x + k) * np.cos(5 * y * y + k) for k in range(3)], -1)
    disc = (np.hypot(x - 0.6, y - 0.4) < 0.3)[..., None] * np.array([70, -50, 30])
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(128 + 60 * waves + disc + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "reduction", "most", "mean"),
    [((60, 47), 1, 0, 0.0), ((100, 52), 2, 12, 1.2), ((109, 101), 4, 10, 1.0), ((405, 310), 8, 8, 0.8)],
)
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(size, reduction, most, mean):
    """At side 24, against decoding the whole image first."""
    buffer = io.BytesIO()
    photo(*size).save(buffer, format="JPEG", quality=95)
    decoded = []

    def spy(image, *arguments):
        decoded.append(image.size)
        return resize(image, *arguments)

    resize = images._centre_square
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_centre_square", spy)
        found = images.decode(buffer.getvalue(), "it", channels=3, side=24).astype(int)
    assert decoded == [tuple(-(-length // reduction) for length in size)]
    wanted = np.asarray(resize(Image.open(buffer), 24, *size)).astype(int)
    assert found.shape == (24, 24, 3)
    assert np.abs(found - wanted).max() <= most
    assert np.abs(found - wanted).mean() <= mean


def test_chosen_splits_of_a_folder(folder, tmp_path):
    top = tmp_path / "split"
    top.mkdir()
    os.rename(folder, top / "training")
    for name in ("held", "other"):
        write_image(top / name / "ant/0.png")
    dataset = load_folder(top, splits="train=training,val=held,test=none")
    assert [len(getattr(dataset, split)) for split in base.SPLITS] == [33, 1, 0]
    assert not any("has no test split" in note for note in dataset.notes)  # it was not wanted
    drawn = load_folder(top, splits="train=training,test=other")
    assert [len(getattr(drawn, split)) > 0 for split in base.SPLITS] == [True, True, True]
    assert len(drawn.train) + len(drawn.validation) == 33
    assert [len(getattr(load_folder(top, splits="train=training,validation=none"), s)) > 0 for s in base.SPLITS] == [
        True, False, True,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"has no folder 'test' for test; it has held, other, training"):
        load_folder(top, splits="train=training,test=test")
    with pytest.raises(DataError, match="has held but no train"):
        load_folder(top, splits="val=held")
    with pytest.raises(ConfigError, match="'training' is for validation and for train, which would be tested on"):
        load_folder(top, splits="train=training,validation=training")
    whole = DataConfig(name=f"folder:{top}", dir=str(tmp_path / "dir"), splits="train=training,val=held,test=other")
    assert sum(registry.verify(whole).values()) == 35
    part = dataclasses.replace(whole, splits="train=training,val=held,test=none")
    assert sum(registry.verify(part).values()) == 34  # and what it leaves out is not gone
    with pytest.raises(ConfigError, match="digits has its own splits"):
        registry.load(DataConfig(name="digits", splits="test=none"))


def test_a_test_without_classes_is_absent(folder, tmp_path):
    top = tmp_path / "split"
    top.mkdir()
    os.rename(folder, top / "train")
    write_image(top / "test/0.png")
    dataset = load_folder(top)
    assert [len(getattr(dataset, split)) > 0 for split in base.SPLITS] == [True, True, True]  # drawn from training
    assert any("the split 'test' has images without classes, and is left out" in note for note in dataset.notes)
    assert len(registry.load(DataConfig(name=f"folder:{top}"), image_size=14, needed="test").test) == len(dataset.test)
    write_image(top / "val/ant/0.png")
    assert len(load_folder(top).test) == 0


def test_one_split_needs_no_other(folder, tmp_path):
    top = tmp_path / "split"
    top.mkdir()
    os.rename(folder, top / "train")
    for name in ("ant", "dog"):
        write_image(top / "test" / name / "0.png")
    config = DataConfig(name=f"folder:{top}", validation=0.0)
    whole = registry.load(config, image_size=14)
    for path in (top / "train").glob("*/*"):
        path.unlink()
    alone = registry.load(config, image_size=14, needed="test")
    assert alone.split_fingerprints["test"] == whole.split_fingerprints["test"]
    assert (len(alone.train), len(alone.test)) == (0, 2)
    with pytest.raises(DataError, match="the class has no images"):
        registry.load(config, image_size=14)
    with pytest.raises(DataError, match="the class has no images"):
        registry.load(config, image_size=14, needed="train")
    os.rename(top / "train", tmp_path / "gone")
    assert registry.load(config, image_size=14, needed="test").class_names == ("ant", "dog")


def test_classes_are_followed_by_name():
    source = base.ArraySource(np.zeros((6, 2, 2, 1), np.uint8), np.array([0, 0, 1, 1, 2, 2], np.int32))
    dataset = base.Dataset("mine", source, source, source, 3, ("a", "c", "zb"), (0.5,), (0.5,), "1")
    assert base.follow_classes(dataset, ("a", "c", "zb"), extend=False) is dataset

    renamed = base.follow_classes(dataset, ("a", "b", "c"), extend=True)
    assert renamed.class_names == ("a", "zb", "c")
    assert renamed.train.read(np.arange(6))[1].tolist() == [0, 0, 2, 2, 1, 1]
    assert renamed.notes == ("the class 'b' is gone", "the class 'zb' is new and has output 1")
    longer = base.follow_classes(dataset, ("zb", "q", "r", "a", "x"), extend=True)
    assert (longer.class_names, longer.num_classes) == (("zb", "c", "r", "a", "x"), 5)

    known = base.follow_classes(dataset, ("a", "b", "c"), extend=False)
    assert (known.class_names, known.num_classes, len(known.test)) == (("a", "b", "c"), 3, 4)
    assert known.test.read(np.arange(4))[1].tolist() == [0, 0, 2, 2]
    assert base.labels_of(known.test).tolist() == [0, 0, 2, 2]
    with pytest.raises(DataError, match="not unique"):
        base.follow_classes(dataset, ("a", "a"), extend=False)


def test_an_image_that_was_edited_at_the_same_size_is_found(folder, tmp_path):
    config = DataConfig(name=f"folder:{folder}", dir=str(tmp_path / "data"))
    assert registry.recorded_on(config) == ""
    registry.verify(config)
    assert registry.recorded_on(config)
    victim = folder / "bee/1.png"
    before = load_folder(folder).fingerprint
    content = victim.read_bytes()
    victim.write_bytes(edited(content))
    assert load_folder(folder).fingerprint == before  # names and sizes
    registry.record_contents(config, load_folder(folder))  # as a start of a run does: it takes nothing for sound
    with pytest.raises(DataError, match=r"1 of 33 files of .* are not as they were on .* \(bee/1.png has changed\)"):
        registry.verify(config)
    victim.write_bytes(content)
    write_image(folder / "bee/new.png")
    assert sum(registry.verify(config).values()) == 34  # what was added is recorded too
    (folder / "bee/new.png").unlink()
    with pytest.raises(DataError, match=r"bee/new.png is gone"):
        registry.verify(config)
    registry.record_contents(config, load_folder(folder), afresh=True)
    assert sum(registry.verify(config).values()) == 33


def edited(png: bytes) -> bytes:
    """A PNG of the same size in bytes and pixels, which shows another image."""
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image).copy()
    for value in range(256):
        pixels[...] = value
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        if len(buffer.getvalue()) <= len(png):
            data = buffer.getvalue()
            return data + b"\0" * (len(png) - len(data))  # behind the end of the image
    raise AssertionError


def test_folder_with_its_own_splits(folder, tmp_path):
    top = tmp_path / "split"
    top.mkdir()
    os.rename(folder, top / "train")
    for name in ("ant", "dog"):
        write_image(top / "val" / name / "0.png")
    dataset = load_folder(top)
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [33, 2, 0]
    assert any(
        "has no test split" in note for note in dataset.notes
    )  # as ImageNet: validation chooses the best weights
    assert dataset.validation.read(np.arange(2))[1].tolist() == [0, 3]
    write_image(top / "test/bee/0.png")
    assert len(load_folder(top).test) == 1
    assert load_folder(top).fingerprint != dataset.fingerprint
    write_image(top / "val/dogs/0.png")
    with pytest.raises(DataError, match=r"val/dogs: training has no class 'dogs'. Did you mean 'dog'"):
        load_folder(top)


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes that declares so many pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, format="PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def tiled_tiff() -> bytes:
    """A TIFF of 4 x 4 pixels in one tile of 60,000 x 60,000."""
    words = {256: 4, 257: 4, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 200, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in words.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(words)) + entries + bytes(4 + 100)


def jpeg(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x00garbage" * 50, "is not a readable image"),
        (jpeg()[:-200], "is not a readable image .*truncated"),
        (bomb(), "is not a readable image .*60000 x 60000 pixels; at most 67,108,864 are read.*make it smaller"),
        (bomb(1, 1 << 26), "is not a readable image .*1 x 67108864 pixels; .* at most 65,536 a side: make it smaller"),
        (tiled_tiff(), "is not a readable image .*4 x 4 pixels; at most 67,108,864 are read"),
    ],
    ids=["zero-length", "garbage", "truncated", "bomb", "column", "tile"],
)
@pytest.mark.filterwarnings("error")
def test_bad_image_file_is_named(folder, content, words):
    (folder / "bee" / "0.jpg").write_bytes(content)
    dataset = load_folder(folder)  # finding the files reads none of them
    assert isinstance(dataset.train, base.Subset)
    with pytest.raises(DataError, match=rf"bee/0.jpg \(class 'bee'\) {words}"):
        base.materialize(dataset.train.base)
    with pytest.raises(DataError, match=r"bee/0.jpg"):
        registry.verify(DataConfig(name=f"folder:{folder}"))


def test_what_is_no_file_is_not_waited_for(folder):
    os.mkfifo(folder / "bee" / "pipe.png")
    with pytest.raises(DataError, match=r"bee/pipe.png is no file with an image"):
        load_folder(folder)


@pytest.mark.parametrize("header", [b"P6\n4 4\n65535\n", b"P3\n4 4\n255\n", b"P1\n4 4\n"])
def test_a_pixmap_that_pillow_reads_in_python_is_refused(header):
    with pytest.raises(DataError, match="its pixels are written as text, or not with 8 bits: convert it"):
        images.decode(header + b"0 " * 96, "x.ppm", channels=3, side=4)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_eight_bits_are_refused(folder, mode):
    Image.fromarray(np.full((20, 20), 1000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(
        folder / "bee" / "0.tif"
    )
    with pytest.raises(DataError, match=rf"bee/0.tif .*pixels are of mode {mode}, and 8-bit ones are read"):
        registry.verify(DataConfig(name=f"folder:{folder}"))


def test_no_folder_of_images_is_left_out_unnoticed(folder, tmp_path):
    top = tmp_path / "split"
    top.mkdir()
    os.rename(folder, top / "train")
    write_image(top / "valid/ant/0.png")
    assert len(load_folder(top).validation) == 1
    write_image(top / "Test/ant/0.png")
    with pytest.raises(
        DataError, match=r"has the splits train, valid and beside them Test; splits are called train, val"
    ):
        load_folder(top)
    os.rename(top / "Test", top / "val")
    with pytest.raises(DataError, match=r"val and valid are both for validation; keep one"):
        load_folder(top)


def test_a_name_that_is_no_text_is_refused(folder):
    os.mkdir(os.fsencode(folder) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"the name 'caf\\udce9' is not UTF-8"):
        load_folder(folder)


def test_a_large_image_below_the_bomb_limit_is_refused_too(monkeypatch, folder):
    monkeypatch.setattr("jaxtrain.data.images._MAX_PIXELS", 300)
    with pytest.raises(DataError, match="at most 300 are read"):
        registry.verify(DataConfig(name=f"folder:{folder}"))


@pytest.mark.filterwarnings("error")  # Pillow warns above 89 megapixels, whatever is decoded of them
def test_of_a_jpeg_the_pixels_count_that_are_decoded():
    """108 megapixels, as a phone takes them; grey, so that the test is quick."""
    buffer = io.BytesIO()
    Image.new("L", (12_000, 9_000), 77).save(buffer, format="JPEG")
    assert (images.decode(buffer.getvalue(), "it", channels=3, side=224) == 77).all()
    with pytest.raises(DataError, match=r"12000 x 9000 pixels; at most 67,108,864 are read.*: make it smaller"):
        images.decode(buffer.getvalue(), "it", channels=3)
    with pytest.raises(DataError, match=r"make it smaller, or save it as a JPEG, which is read at a reduced size"):
        images.decode(bomb(12_000, 9_000), "it", channels=3, side=224)


@pytest.mark.parametrize(
    ("progressive", "said"), [(False, "200,000 of a JPEG"), (True, "100,000 of a progressive JPEG")]
)
def test_a_jpeg_has_a_limit_before_it_is_reduced_too(monkeypatch, progressive, said):
    monkeypatch.setattr(images, "_MAX_STORED", 200_000)
    monkeypatch.setattr(images, "_MAX_PROGRESSIVE", 100_000)
    sizes = [(310, 310), (320, 320)] if progressive else [(440, 440), (450, 450)]
    small, large = io.BytesIO(), io.BytesIO()
    for size, buffer in zip(sizes, (small, large), strict=True):
        photo(*size).save(buffer, format="JPEG", progressive=progressive)
    assert images.decode(small.getvalue(), "it", channels=3, side=24).shape == (24, 24, 3)
    with pytest.raises(DataError, match=f"at most {said} are read: make it smaller"):
        images.decode(large.getvalue(), "it", channels=3, side=24)


def encoded(name: str, **options) -> bytes:
    """A red image; with `save_all`, and a black one behind it."""
    if options.get("save_all"):
        options["append_images"] = [Image.new("RGB", (20, 20))]
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 0, 0)).save(buffer, format=name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["EPS", "PDF", "TGA", "ICO", "PCX", "SGI", "DIB"])
def test_an_image_of_a_format_that_is_not_promised_is_not_opened(monkeypatch, name):
    """By its content, whatever its name: Pillow hands an EPS file to Ghostscript."""

    def other_program(*arguments, **options):
        raise AssertionError(f"another program was started: {arguments}")

    monkeypatch.setattr("subprocess.Popen", other_program)
    monkeypatch.setattr("shutil.which", lambda program: program)
    with pytest.raises(
        DataError,
        match=r"x\.png is not a readable image .*none of JPEG, PNG, BMP, GIF, WEBP, PPM, TIFF, AVIF, JPEG2000",
    ):
        images.decode(encoded(name), "x.png", channels=3, side=8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("JPEG", "PNG", "BMP", "PPM", "AVIF", "JPEG2000")),
        *(("TIFF", {"compression": each}) for each in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        *((name, {"save_all": True}) for name in ("GIF", "WEBP", "TIFF", "MPO", "PNG")),
    ],
    ids=str,
)
def test_the_first_frame_of_each_promised_format_is_read(name, options):
    found = images.decode(encoded(name, **options), "it", channels=3, side=8)
    assert np.abs(found.astype(int) - [200, 0, 0]).max() <= 3


FORMATS = {".avif": "AVIF", ".jfif": "JPEG", ".jpe": "JPEG", ".JP2": "JPEG2000", ".webp": "WEBP", ".apng": "PNG"}


def test_files_by_other_names_and_in_sub_folders_are_read_and_others_counted(tmp_path):
    for k, (extension, name) in enumerate(FORMATS.items()):
        (tmp_path / "ant/deep/er").mkdir(parents=True, exist_ok=True)
        (tmp_path / ("ant", "ant/deep", "ant/deep/er")[k % 3] / f"{k}{extension}").write_bytes(encoded(name))
    write_image(tmp_path / "bee/0.png", value=50)
    for name in ("ant/a.heic", "ant/deep/b.HEIC", "bee/label", "bee/Thumbs.db", "README.md", "loose.png"):
        (tmp_path / name).touch()
    for name in ("__MACOSX/ant", "lost+found", "bee/@eaDir"):
        (tmp_path / name).mkdir(parents=True)
    dataset = load_folder(tmp_path, validation=0.0)
    source = base.underlying(dataset.train)
    assert isinstance(source, FolderSource)
    assert dataset.class_names == ("ant", "bee")
    assert sorted(Path(file).suffix for file in source.files) == sorted([*FORMATS, ".png"])
    pixels, labels = base.materialize(source)
    assert labels.tolist() == [0] * 6 + [1]
    assert np.abs(pixels[labels == 0].astype(int) - [200, 0, 0]).max() <= 3
    (left_out,) = [note for note in dataset.notes if note.startswith("left out")]
    for part in ("2 .heic", "1 without an extension", f"1 beside the folders of classes in {tmp_path}", "__MACOSX"):
        assert part in left_out
    assert "README" not in left_out
    assert "the images of sub-folders belong to their class: ant/deep and 1 more" in dataset.notes
    (tmp_path / "ant/deep/loop").symlink_to(tmp_path / "ant")
    with pytest.raises(DataError, match=r"deep/loop: the link leads to a folder above it"):
        load_folder(tmp_path)


def test_a_fingerprint_of_a_folder_is_that_of_every_version(tmp_path):
    """A run that was started before goes on: these are of the version that read no sub-folders."""
    for top in ("flat", "split/train", "split/val"):
        for name in "ab":
            (tmp_path / top / name).mkdir(parents=True)
            for k in range(20):
                (tmp_path / top / name / f"{k:02d}.{'png' if k % 2 else 'JPG'}").write_bytes(b"x" * (k + ord(name)))
            (tmp_path / top / name / "notes.txt").touch()
    found = [registry.load(DataConfig(name=f"folder:{tmp_path / top}"), image_size=16) for top in ("flat", "split")]
    assert [dataset.fingerprint[:12] for dataset in found] == ["0c8cf9f694bf", "bd95cdc6e96a"]
    assert [print_[:10] for print_ in found[0].split_fingerprints.values()] == [
        "543038b823",
        "4f53cda18c",
        "64e19c11fc",
    ]


@pytest.fixture
def spoilt(folder) -> dict[str, str]:
    """Files of `folder` that cannot be read -> why."""
    (folder / "bee/0.jpg").write_bytes(b"")
    (folder / "cat/1.png").write_bytes((folder / "cat/1.png").read_bytes()[:60])
    (folder / "cat/2.jpg").write_text("<html>404</html>")
    (folder / "dog/3.png").write_bytes(bomb())
    (folder / "dog/gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "dog/pipe.png")
    why = ("is empty", "truncated|broken", "its content is none of", "pixels; at most", "No such file", "a pipe")
    return dict(
        zip(("bee/0.jpg", "cat/1.png", "cat/2.jpg", "dog/3.png", "dog/gone.png", "dog/pipe.png"), why, strict=True)
    )


def test_every_image_that_cannot_be_read_is_listed(folder, spoilt, tmp_path, capsys):
    assert cli.main(["data", "verify", f"folder:{folder}", "--dir", str(tmp_path / "data")]) == 65
    said = capsys.readouterr()
    for line, (name, why) in zip(said.out.splitlines(), spoilt.items(), strict=True):
        assert re.search(rf"{name}.* .*({why})", line)
    assert "6 of 35 images of" in said.err
    assert "skip_bad=true" in said.err


def test_bad_images_are_left_out_by_name(folder, spoilt, tmp_path, monkeypatch):
    """As if they were not there, at every start the same, and found by reading every image once."""
    config = DataConfig(name=f"folder:{folder}", dir=str(tmp_path / "data"), skip_bad=True, image_size=14)
    with pytest.raises(DataError, match=r"dog/gone.png cannot be read .*skip_bad=true leaves them out"):
        registry.load(dataclasses.replace(config, skip_bad=False), image_size=14)
    registry.prepare(config)
    read: list[Path] = []
    monkeypatch.setattr(
        images, "read_file", lambda path, *rest, before=images.read_file: read.append(path) or before(path, *rest)
    )
    dataset = registry.load(config, image_size=14)
    assert read == []  # what process 0 has found holds for all, whatever another could read
    registry.prepare(config)
    assert {str(path.relative_to(folder)) for path in read} == set(spoilt) - {"dog/gone.png", "dog/pipe.png"}
    assert [sentence.split()[0] for sentence in dataset.skipped] == [str(folder / name) for name in spoilt]
    assert any("6 of 35 images cannot be read and are left out" in note for note in dataset.notes)
    (folder / "cat/new.png").write_bytes(encoded("PNG"))  # anything that changed is read
    assert len(registry.load(config, image_size=14).skipped) == 6
    (folder / "cat/new.png").unlink()
    spoilt_later = folder / "ant/1.png"
    content = spoilt_later.read_bytes()
    spoilt_later.write_bytes(bytes(len(content)))
    assert len(registry.load(config, image_size=14).skipped) == 7
    spoilt_later.write_bytes(content)
    mended = (folder / "cat/2.jpg").stat()
    (folder / "cat/2.jpg").write_bytes(encoded("JPEG"))
    os.utime(folder / "cat/2.jpg", ns=(mended.st_atime_ns, mended.st_mtime_ns))
    assert len(registry.load(config, image_size=14).skipped) == 5
    for name in spoilt.keys() - {"cat/2.jpg"}:
        (folder / name).unlink()
    without = load_folder(folder)
    assert registry.load(config, image_size=14).fingerprint == without.fingerprint
    assert without.fingerprint != dataset.fingerprint
    assert any("skip_bad=True has no effect" in note for note in registry.load(DataConfig(skip_bad=True)).notes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Train", "Test"), r"splits=test=Test,train=Train"),
        (("TRAIN", "VAL"), r"splits=train=TRAIN,validation=VAL"),
        (("Training", "other"), r"splits=train=Training"),
        (("train", "Test"), r"splits=train=train,test=Test"),
    ],
)
def test_folders_named_almost_as_splits_are_not_taken_for_classes(folder, tmp_path, names, said):
    for name in names:
        shutil.copytree(folder, tmp_path / "top" / name)
    with pytest.raises(DataError, match=f"Rename the folders, or name the splits: --config.data.{said}"):
        load_folder(tmp_path / "top")


def test_classes_may_be_named_almost_as_splits(tmp_path):
    for name in ("Train", "Tram"):
        write_image(tmp_path / name / "0.png")
    assert load_folder(tmp_path, validation=0.0).class_names == ("Train", "Tram")


def test_what_is_no_data_set_gets_told_what_to_do(folder, tmp_path):
    write_image(tmp_path / "loose/0.png")
    (tmp_path / "file.zip").touch()
    (tmp_path / "wrapped").mkdir()
    shutil.copytree(folder, tmp_path / "wrapped/inner")
    shutil.copytree(folder, tmp_path / "unlabelled/train")
    write_image(tmp_path / "unlabelled/test/all/0.png")
    (folder / "bee/x.heic").touch()
    for path in (folder / "bee").glob("*.[pj]*"):
        path.unlink()
    for where, said in {
        tmp_path / "loose": r"has images without folders \(1\); move those of each class",
        tmp_path / "file.zip": "is a file; unpack it",
        tmp_path / "wrapped": r"has one, 'inner'; was folder:.*wrapped/inner meant, which has ant, bee, cat, ...",
        tmp_path / "unlabelled": r"no class 'all'.* is left out with --config.data.splits=test=none",
        folder: r"bee: the class has no images, but 1 .heic; remove the folder",
    }.items():
        with pytest.raises(DataError, match=said):
            load_folder(where)


def test_a_name_that_the_locale_cannot_read_is_blamed_on_the_locale(monkeypatch):
    """As `LC_ALL=C` with `PYTHONUTF8=0` gives the bytes of 'kätzchen'."""
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    with pytest.raises(DataError, match=r"the name 'kätzchen' is UTF-8, .* as ascii, by its locale; .*PYTHONUTF8=1"):
        folder_scan.check_name("k\udcc3\udca4tzchen", Path("/data"))


def test_warnings_of_the_decoder_are_not_shown():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = encoded("JPEG", exif=exif)
    tag = b"\x01\x0e\x00\x02\x00\x00\x00"  # text of so many bytes, and now of more than there are
    assert tag in data
    data = data.replace(tag, tag[:-2] + b"\x0f\x00")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        images.decode(data, "it", channels=3, side=8)
        assert shown
        shown.clear()
        importlib.reload(images)
        images.decode(data, "it", channels=3, side=8)
    assert not shown


def test_links_that_leave_the_folder_are_refused(folder, tmp_path):
    write_image(tmp_path / "elsewhere.png")
    (folder / "bee/inside.png").symlink_to(folder / "bee/1.png")
    linked = load_folder(folder, validation=0.0)
    assert len(linked.train) + len(linked.test) == 34
    (folder / "bee/outside.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match=r"bee/outside.png: the link leads out of"):
        load_folder(folder)


def test_broken_folders(folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty: the class has no images"):
        load_folder(folder)
    with pytest.raises(DataError, match="there is no such folder"):
        load_folder(tmp_path / "nowhere")
    write_image(tmp_path / "only/val/a/0.png")
    with pytest.raises(DataError, match="has val but no train"):
        load_folder(tmp_path / "only")
    write_image(tmp_path / "one/a/0.png")
    with pytest.raises(DataError, match="at least 2 classes"):
        load_folder(tmp_path / "one")


# --------------------------------------------------------------------------------------------------------- user's own


def my_source(config: DataConfig, *, image_size: int) -> base.Dataset:
    source = base.ArraySource(
        np.full((6, image_size, image_size, 1), config.split_seed, np.uint8), np.zeros(6, np.int32)
    )
    return base.Dataset("mine", source, source, source, 2, ("a", "b"), (0.5,), (0.5,), "mine-1")


def test_source_by_dotted_name(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    config = DataConfig(name="test_data:my_source", split_seed=9)
    dataset = registry.load(config, image_size=5)
    assert dataset.train.read(np.arange(2))[0].tolist() == np.full((2, 5, 5, 1), 9).tolist()
    assert registry.prepare(config) is None
    with pytest.raises(ConfigError, match="returned int, not a Dataset"):
        registry.load(DataConfig(name="test_data:not_a_source"))


def test_the_configs_normalization_replaces_that_of_any_data_set(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = DataConfig(name="test_data:my_source", mean=(0.25,), std=(1,))
    dataset = registry.load(config, image_size=5)
    assert (dataset.mean, dataset.std) == ((0.25,), (1.0,))
    dataset = registry.outline(DataConfig(name="cifar10", mean=(0.5,) * 3, std=(0.25,) * 3))
    assert (dataset.mean, dataset.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(ConfigError, match="must have 1 numbers, one for each channel"):
        registry.load(dataclasses.replace(config, mean=(0.5,) * 3, std=(1.0,) * 3), image_size=5)


def test_settings_that_a_users_data_set_does_not_read_are_said(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    config = DataConfig(name="test_data:my_source", split_seed=9, examples=3, validation=0.5)
    assert registry.load(config, image_size=5).notes == (
        "config.data.examples=3 has no effect: test_data:my_source does not read it",
        "config.data.validation=0.5 has no effect: test_data:my_source does not read it",
    )
    config = DataConfig(name="test_data:watched_source", examples=3)
    assert pickle.loads(pickle.dumps(registry.load(config, image_size=5).train)).config == config


@dataclasses.dataclass(frozen=True, eq=False)
class WithConfig(base.ArraySource):
    config: DataConfig


def watched_source(config: DataConfig, *, image_size: int) -> base.Dataset:
    """Its source holds the config, and goes to reading workers with it."""
    found = my_source(dataclasses.replace(config, split_seed=1), image_size=image_size)
    assert config.examples == 3
    return dataclasses.replace(found, train=WithConfig(found.train.images, found.train.labels, config))


def unlabelled_source(config: DataConfig, *, image_size: int) -> base.Dataset:
    found = my_source(config, image_size=image_size)
    return dataclasses.replace(found, test=base.ArraySource(found.test.images, np.full(6, -1, np.int32)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": ("a", "b", "c")}, "class_names has 3 names for 2 classes"),
        ({"num_classes": 2.0}, "num_classes is 2.0, and must be a whole number"),
        ({"validation": None}, "validation is no source"),
        ({"fingerprint": ""}, "fingerprint is ''"),
        ({"std": (0.0,)}, "std is"),
        ({"mean": (0.5, 0.5)}, "mean is"),
        ({"train": base.Outline(0, (5, 5, 1))}, "train is empty"),
    ],
)
def test_what_a_users_data_set_lacks_is_named(monkeypatch, changes, words):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    import test_data  # noqa: PLC0415

    monkeypatch.setattr(
        test_data, "changed", lambda *a, **k: dataclasses.replace(my_source(*a, **k), **changes), raising=False
    )
    with pytest.raises(DataError, match=words):
        registry.load(DataConfig(name="test_data:changed"), image_size=5)


def test_labels_of_a_users_data_set_are_classes(monkeypatch):
    """A label of -1 would count as a wrong answer."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    with pytest.raises(DataError, match="example 0 of test has label -1, and there are 2 classes"):
        registry.load(DataConfig(name="test_data:unlabelled_source"), image_size=5)


def odd_source(config: DataConfig, *, image_size: int) -> base.Dataset:
    found = my_source(config, image_size=image_size)
    return dataclasses.replace(found, test=base.ArraySource(found.test.images[:, 1:], found.test.labels))


def test_a_split_of_a_users_data_set_is_like_its_training(monkeypatch):
    """Or the run would end in an error when it comes to its test."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    with pytest.raises(DataError, match=r"test has images of \[4, 5, 1\], and training of \[5, 5, 1\]"):
        registry.load(DataConfig(name="test_data:odd_source"), image_size=5)


def not_a_source(config: DataConfig, *, image_size: int) -> int:
    return image_size


# -------------------------------------------------------------------------------------------------------------- stream


@dataclasses.dataclass(frozen=True)
class Failing:
    """Reads zeros; example 7 fails in the way that `how` says."""

    how: str
    shape = (2, 2, 1)

    def __len__(self) -> int:
        return 64

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if 7 in indices:
            if self.how == "damaged":
                raise DataError("shard-3: record 7 is damaged.")
            if self.how == "bug":
                raise type("Odd", (Exception,), {})("does not pickle")
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((len(indices), 2, 2, 1), np.uint8), indices.astype(np.int32)


def children() -> list:
    return multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_gives_the_bytes_of_direct_reads(workers):
    source = registry.load(DataConfig(name="digits")).train
    positions = np.array([0, 1, 8, 9])
    with stream.train_stream(
        source, seed=3, global_batch=16, positions=positions, first_example=1280, workers=workers, steps=9
    ) as batches:
        got = list(batches)
    assert len(got) == 9
    for step, (pixels, labels) in enumerate(got):
        wanted = source.read(order.batch_indices(len(source), 3, 1280 + 16 * step, 16)[positions])
        np.testing.assert_array_equal(pixels, wanted[0])
        np.testing.assert_array_equal(labels, wanted[1])
        assert (pixels.dtype, labels.dtype, type(pixels)) == (np.uint8, np.int32, np.ndarray)
    assert not children()
    shared = [array.base.shm.name for pair in got for array in pair if hasattr(array.base, "shm")]
    assert len(shared) == (2 * 9 if workers else 0)
    assert not any(Path("/dev/shm", name).exists() for name in shared)  # nothing is left if the program ends here


@pytest.mark.parametrize("read", ["train", "eval"])
def test_threads_change_no_batch(folder, read):
    """And they do read at once: the first batch is slow, and those behind it are begun meanwhile."""
    source = Slow(load_folder(folder).train)
    order_: dict = {"global_batch": 4, "positions": np.arange(4), "workers": 0, "threads": 3}
    make = stream.eval_stream
    if read == "train":
        make = functools.partial(stream.train_stream, seed=0, first_example=0, steps=5)
    with make(source, **order_) as batches:
        got = list(batches)
    alone = registry.load(DataConfig(name=f"folder:{folder}"), image_size=14).train
    for step, (pixels, labels) in enumerate(got):
        rows = order.batch_indices(21, 0, 4 * step, 4) if read == "train" else order.eval_batch(21, 4, step)[0]
        wanted = alone.read(rows)
        np.testing.assert_array_equal(pixels, wanted[0])
        np.testing.assert_array_equal(labels, wanted[1])
    assert source.most > 1


class Slow:
    """Another source, whose first reading waits for a second to begin (10 s at most). most: readings at once."""

    def __init__(self, whole: base.Source):
        self.whole, self.shape = whole, whole.shape
        self.most = self.now = 0
        self.changed = threading.Condition()

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self.changed:
            self.now += 1
            self.most = max(self.most, self.now)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most > 1, 10)
        result = self.whole.read(indices)
        with self.changed:
            self.now -= 1
        return result


def test_threads_read_a_whole_source_in_its_order(monkeypatch, folder):
    monkeypatch.setattr(base, "_CHUNK", 3)
    source = Slow(load_folder(folder).train)
    pixels, labels = base.materialize(source, threads=3)
    wanted = source.whole.read(np.arange(21))
    np.testing.assert_array_equal(pixels, wanted[0])
    np.testing.assert_array_equal(labels, wanted[1])
    assert source.most > 1


def test_evaluation_stream_follows_its_masks():
    source = registry.load(DataConfig(name="digits")).test
    with stream.eval_stream(source, global_batch=100, positions=np.arange(50, 100), workers=0) as batches:
        labels = [labels for _, labels in batches]
    masks = [mask[50:] for _, mask in order.eval_batches(len(source), 100)]
    wanted = source.read(np.concatenate([np.arange(50, 100) + 100 * k for k in range(3)] + [np.arange(350, 359)]))[1]
    np.testing.assert_array_equal(np.concatenate(labels)[np.concatenate(masks)], wanted)


@pytest.mark.parametrize(
    ("how", "workers", "words"),
    [
        ("damaged", 0, "shard-3: record 7 is damaged."),
        pytest.param("damaged", 2, "shard-3: record 7 is damaged.", marks=pytest.mark.faults),
        ("bug", 2, r"Failing failed to read examples .* \(Odd: does not pickle, at .*test_data\.py:\d+\)"),
        ("killed", 1, r"config.data.workers=1 failed .*exit code -9"),
    ],
)
def test_a_failing_read_ends_the_stream_with_its_reason(how, workers, words):
    begin = time.monotonic()
    batches = stream.train_stream(
        Failing(how), seed=0, global_batch=4, positions=np.arange(4), first_example=0, workers=workers, steps=1000
    )
    with pytest.raises(JaxtrainError, match=words) as caught:
        for _ in batches:
            pass
    assert isinstance(caught.value, DataError) == (how != "killed")
    assert time.monotonic() - begin < 60  # it raises; it does not hang
    assert not children()


def test_closing_early_leaves_no_worker():
    source = Failing("damaged")
    batches = stream.train_stream(
        source, seed=1, global_batch=2, positions=np.arange(2), first_example=0, workers=1, steps=10**6
    )
    next(batches)
    assert children()
    batches.close()
    batches.close()
    assert not children()


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for a parent to collect its exit code does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc").exists()


def test_workers_end_when_the_program_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, os, time
        import numpy as np
        from jaxtrain.data import base, stream
        if __name__ == "__main__":
            source = base.ArraySource(np.zeros((64, 2, 2, 1), np.uint8), np.zeros(64, np.int32))
            batches = stream.train_stream(source, seed=0, global_batch=4, positions=np.arange(4), first_example=0,
                                          workers=1, steps=10**9)
            next(batches)
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            time.sleep(600)
        """)
    )
    command, path = [sys.executable, str(script)], os.pathsep.join([str(Path(base.__file__).parents[2]), *sys.path])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as run:
        assert run.stdout is not None
        workers = [int(pid) for pid in run.stdout.readline().split()]
        run.kill()
    assert workers
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    survivors = [pid for pid in workers if alive(pid)]
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert not survivors, "the worker outlived its parent"


def test_a_worker_takes_no_module_from_the_current_directory(tmp_path):
    """It is a Python started with -c, which looks there first for what it needs to come up."""
    (tmp_path / "here").mkdir()
    for name in ("pickle", "socket", "multiprocessing"):
        (tmp_path / "here" / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os
        import numpy as np
        from jaxtrain.data import base, stream
        if __name__ == "__main__":
            source = base.ArraySource(np.zeros((64, 2, 2, 1), np.uint8), np.zeros(64, np.int32))
            with stream.train_stream(source, seed=0, global_batch=4, positions=np.arange(4), first_example=0,
                                     workers=1, steps=2) as batches:
                print(len(list(batches)), os.environ.get("PYTHONSAFEPATH"))
        """)
    )
    path = os.pathsep.join([str(Path(base.__file__).parents[2]), *filter(None, sys.path)])
    found = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path / "here", capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path}, timeout=120,
    )  # fmt: skip
    assert found.stdout == "2 None\n", found.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("cpus", "cheap", "local", "workers"),
    [(1, False, 1, 0), (2, False, 1, 0), (6, False, 1, 4), (64, False, 1, 16), (64, True, 1, 0), (16, False, 4, 2)],
)
def test_default_workers_follow_the_cpus(monkeypatch, cpus, cheap, local, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    assert stream.default_workers(cheap=cheap, local_processes=local) == workers
    assert 1 <= stream.default_threads(local_processes=local) <= max(1, cpus // local)


@pytest.mark.parametrize(
    ("name", "side", "sharing", "reading"),
    [
        ("folder", 128, 1, (6, 4)),
        ("folder", 128, 4, (0, 2)),
        ("folder", 32, 1, (6, 1)),  # small images: Python's lock, not the decoder, is what threads would wait for
        ("digits", 0, 1, (0, 1)),
    ],
)
def test_a_feed_shares_the_cpus_with_the_processes_of_its_host(monkeypatch, folder, name, side, sharing, reading):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("jaxtrain.training.input_pipeline.on_this_host", lambda: sharing)
    config = DataConfig(name=f"folder:{folder}" if name == "folder" else name)
    layout = Layout(make_mesh(LayoutConfig(), jax.devices()[:1]), LayoutConfig())
    feed = make_input_pipeline(registry.load(config, image_size=side), layout, "stream", -1)
    assert (feed.workers, feed.threads) == reading
    assert feed.where.startswith(
        "streamed, read by " + ("6 worker processes" if reading[0] else f"{reading[1]} thread")
    )


def test_processes_of_this_host_are_counted(monkeypatch):
    assert coordination.on_this_host() == 1
    monkeypatch.setattr(coordination, "allgather_str", lambda word, mine, timeout: [mine, f"not-{mine}", mine])
    assert coordination.on_this_host() == 2


def test_cheap_sources_are_those_in_memory(folder):
    assert base.is_cheap(registry.load(DataConfig(name="digits")).train)
    assert base.is_cheap(registry.load(DataConfig(name="synthetic")).train)
    assert not base.is_cheap(load_folder(folder).train)

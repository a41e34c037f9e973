"""On-device augmentation against Pillow and NumPy, and its independence of how a batch is divided."""

import itertools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from jaxtrain.config import DataConfig
from jaxtrain.data import augment, base, randaugment, random_bits, registry, resized_crop
from jaxtrain.errors import ConfigError

OPS = randaugment.OPERATIONS
ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
train_inputs = jax.jit(augment.train_inputs, static_argnums=0)
eval_inputs = jax.jit(augment.eval_inputs, static_argnums=0)


def preprocess(size: int, augmentation: str, channels: int = 3, **kwargs: Any) -> augment.Preprocess:
    # With this mean and deviation, and black and white pixels, x is exactly -1 and 1.
    own = augment.own_augmentation(augmentation)
    return augment.Preprocess(size, augmentation, (0.5,) * channels, (0.5,) * channels, 10, own=own, **kwargs)


def noise(batch: int, size: int, channels: int = 3, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, channels), dtype=np.uint8)


def batch_of(images: Any, seed: int = 1) -> Any:
    labels = np.random.default_rng(seed).integers(0, 10, len(images), dtype=np.int32)
    return images, labels, np.arange(len(images), dtype=np.int32)


def words_of(count: int, number: int) -> Any:
    return np.random.default_rng(0).integers(0, 2**32, (count, number), dtype=np.uint32)


def to_pixels(x: Any) -> np.ndarray:
    return np.rint((np.asarray(x, np.float64) * 0.5 + 0.5) * 255).astype(np.uint8)


def to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pillow(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


# ------------------------------------------------------------------------------------------- one operation at a time


def varied_images(size: int, channels: int) -> Any:
    """Noise, a smooth picture, few levels, a narrow range, one level, and mostly one level."""
    rng = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size] / size
    smooth = np.stack([120 + 100 * np.sin(5 * x + 3 * y + c) for c in range(channels)], -1)
    few = rng.choice([0, 90, 255], (size, size, channels))
    narrow = rng.integers(100, 130, (size, size, channels))
    flat = np.full((size, size, channels), 77)
    mostly = np.where(rng.random((size, size, 1)) < 0.97, 200, rng.integers(0, 256, (size, size, channels)))
    return np.stack([noise(1, size, channels)[0], smooth, few, narrow, flat, mostly]).astype(np.uint8)


def pillow_operation(image: np.ndarray, name: str, negative: bool) -> np.ndarray:
    """torchvision's RandAugment at magnitude 9 of 30, spelled out with Pillow."""
    sign = -1 if negative else 1
    pil, size = to_pillow(image), image.shape[0]

    def affine(*matrix: float) -> Image.Image:
        return pil.transform(pil.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    shift = -sign * int(150 / 331 * size * 9 / 30)
    match name:
        case "shear_x":
            pil = affine(1, sign * 0.09, 0, 0, 1, 0)
        case "shear_y":
            pil = affine(1, 0, 0, sign * 0.09, 1, 0)
        case "translate_x":
            pil = affine(1, 0, shift, 0, 1, 0)
        case "translate_y":
            pil = affine(1, 0, 0, 0, 1, shift)
        case "rotate":
            pil = pil.rotate(sign * 9, Image.Resampling.NEAREST)
        case "posterize":
            pil = ImageOps.posterize(pil, 7)
        case "solarize":
            pil = ImageOps.solarize(pil, 179)  # whole levels from 178.5 on
        case "autocontrast":
            pil = ImageOps.autocontrast(pil)
        case "equalize":
            pil = ImageOps.equalize(pil)
        case "brightness" | "color" | "contrast" | "sharpness":
            pil = ENHANCE[name](pil).enhance(1 + sign * 0.27)
    return from_pillow(pil)


def exactly_whole(image: np.ndarray, name: str) -> np.ndarray:
    """Where the exact result is a whole number, so that float rounding and a cut may land one below it."""
    if name in ENHANCE:
        degenerate = from_pillow(ENHANCE[name](to_pillow(image)).degenerate).astype(int)
        return 27 * (image.astype(int) - degenerate) % 100 == 0
    low, high = image.min((0, 1)).astype(int), image.max((0, 1)).astype(int)
    return 255 * (image - low) % np.maximum(high - low, 1) == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [9, 32, 70])
def test_operations_equal_pillow(size, channels):
    images = varied_images(size, channels)
    stack = np.repeat(images, 28, 0)
    operation, negative = np.tile(np.arange(28, dtype=np.int32) // 2, 6), np.tile(np.arange(28) % 2 == 1, 6)
    ours = np.asarray(jax.jit(randaugment.apply_operation)(stack, operation, negative))
    assert ours.dtype == np.uint8
    for result, image, number, sign in zip(ours, stack, operation, negative, strict=True):
        reference = pillow_operation(image, OPS[number], sign)
        difference = result.astype(int) - reference
        if OPS[number] in (*ENHANCE, "autocontrast"):  # whose rounding ends below the exact result
            assert set(np.unique(difference)) <= ({-1, 0} if OPS[number] in ENHANCE else {0, 1}), OPS[number]
            difference = difference[~exactly_whole(image, OPS[number])]
        assert not difference.any(), (OPS[number], sign)


@pytest.mark.parametrize(
    ("source", "size"), [(32, 256), (32, 37), (8, 32), (50, 24), (96, 32), (40, 5), (2, 5), (1, 4)]
)
def test_resize_equals_pillow(source, size):
    images = np.concatenate([noise(2, source), np.where(noise(2, source) > 127, 255, 0).astype(np.uint8)])
    reference = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    np.testing.assert_array_equal(jax.jit(augment.resize, static_argnums=1)(images, size), reference)


def test_resize_of_an_oblong_image_equals_pillow():
    images: Any = np.random.default_rng(0).integers(0, 256, (2, 20, 33, 1), dtype=np.uint8)
    reference = [from_pillow(to_pillow(image).resize((24, 24), Image.Resampling.BILINEAR)) for image in images]
    np.testing.assert_array_equal(augment.resize(images, 24), reference)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_equals_pillow(channels):
    count = 200
    images = np.repeat(varied_images(8, channels), -(-count // 6), 0)[:count]
    words = words_of(count, 4)
    results = np.asarray(jax.jit(randaugment.color_jitter)(images, words)).astype(int)
    orders = list(itertools.permutations(("brightness", "contrast", "color")))
    for image, result, shares in zip(images, results, words / 2**32, strict=True):
        factors = dict(zip(orders[0], 0.6 + 0.8 * shares[:3], strict=True))
        pil = to_pillow(image)
        for name in orders[int(6 * shares[3])]:
            pil = ENHANCE[name](pil).enhance(factors[name])
        # In each of the three, rounding can move a pixel by a level; and by another where the mean level moves.
        assert np.abs(result - from_pillow(pil)).max() <= 4
        assert np.abs(result - from_pillow(pil)).mean() < 0.5


def test_rand_augment_applies_one_operation_after_the_other():
    count = 300
    images, words = np.repeat(varied_images(16, 3)[1:2], count, 0), words_of(count, 2)
    expected: Any = images
    apply = jax.jit(randaugment.apply_operation)
    for variant in (28 * (words / 2**32)).astype(np.int32).T:  # 14 operations with two signs
        expected = apply(expected, variant // 2, variant % 2 == 1)
    np.testing.assert_array_equal(jax.jit(randaugment.rand_augment)(images, words), expected)


def test_random_erase():
    count, side = 4000, 32
    erased = (
        np.asarray(jax.jit(augment.random_erase)(np.ones((count, side, side, 1), np.float32), words_of(count, 23)))[
            ..., 0
        ]
        == 0
    )
    rows, columns = erased.any(2), erased.any(1)
    np.testing.assert_array_equal(erased, rows[:, :, None] & columns[:, None, :])  # a product of rows and columns
    for line in (rows, columns):  # without gaps
        assert (np.abs(np.diff(line.astype(int), axis=1, prepend=0, append=0)).sum(1) <= 2).all()
    hit = erased.any((1, 2))
    assert abs(hit.mean() - 0.25) < 0.03
    height, width = rows[hit].sum(1), columns[hit].sum(1)
    assert height.max() < side
    assert width.max() < side
    area, aspect = height * width / side**2, height / width
    assert 0.015 < area.min() < 0.05
    assert 0.28 < area.max() < 0.35
    assert abs(area.mean() - 0.17) < 0.01  # uniform in 0.02 ... 0.33, but the widest do not fit
    assert abs(np.log(aspect).mean()) < 0.1  # as often upright as lying
    assert 0.25 < aspect.min() < 0.4
    assert 2.5 < aspect.max() < 4
    assert rows[hit].mean(0).min() > 0.05  # anywhere


# --------------------------------------------------------------------------------------------------------- the chains


@pytest.mark.parametrize("channels", [1, 3])
def test_none_is_normalisation_only(channels):
    mean, std = (0.4914, 0.4822, 0.4465)[:channels], (0.2470, 0.2435, 0.2616)[:channels]
    pre = augment.Preprocess(8, "none", mean, std, 10)
    images, labels, example = batch_of(noise(4, 8, channels))
    x, targets = train_inputs(pre, images, labels, example, jax.random.key(0))
    reference = (images / np.float32(255) - np.array(mean, np.float32)) / np.array(std, np.float32)
    np.testing.assert_allclose(x, reference, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(x, eval_inputs(pre, images))
    np.testing.assert_array_equal(targets, np.eye(10)[labels])
    assert x.dtype == targets.dtype == jnp.float32


@pytest.mark.parametrize(
    ("size", "channels", "padding", "border"), [(32, 3, 0, 4), (8, 1, 0, 1), (6, 3, 0, 1), (8, 3, 2, 2)]
)
def test_light_is_a_padded_crop_and_a_flip(size, channels, padding, border):
    count = 600
    images, labels, example = batch_of(np.repeat(noise(1, size, channels), count, 0))
    pre = preprocess(size, "light", channels, padding=padding)
    x, targets = train_inputs(pre, images, labels, example, jax.random.key(0))
    assert x.shape == images.shape
    np.testing.assert_array_equal(np.argmax(targets, 1), labels)

    padded = np.pad(images[0], ((border, border), (border, border), (0, 0)))
    windows = {}
    for y, x0, flip in itertools.product(range(2 * border + 1), range(2 * border + 1), (False, True)):
        window = padded[y : y + size, x0 : x0 + size]
        # A flip before or after the crop gives the same set of pictures, as the borders are equally wide.
        windows[(window[:, ::-1] if flip else window).tobytes()] = (y, x0, flip)
    chosen = np.array([windows[image.tobytes()] for image in to_pixels(x)])
    assert abs(chosen[:, 2].mean() - 0.5) < 0.08
    for offsets in chosen[:, 0], chosen[:, 1]:
        shares = np.bincount(offsets, minlength=2 * border + 1) / count
        assert np.abs(shares - 1 / (2 * border + 1)).max() < 0.08
    assert abs(np.corrcoef(chosen.T)[np.triu_indices(3, 1)]).max() < 0.15  # drawn independently


def test_flip_and_crop_can_be_left_out():
    images, labels, example = batch_of(np.repeat(noise(1, 8), 64, 0))
    original, mirrored = images[0], images[0][:, ::-1]

    def seen(augmentation="light", **fields):
        x, _ = train_inputs(preprocess(8, augmentation, **fields), images, labels, example, jax.random.key(0))
        return {image.tobytes() for image in to_pixels(x)}

    assert seen(padding=-1) == {original.tobytes(), mirrored.tobytes()}
    assert seen(padding=-1, flip=False) == {original.tobytes()}
    windows = {np.pad(original, ((1, 1), (1, 1), (0, 0)))[y : y + 8, x : x + 8].tobytes() for y, x in np.ndindex(3, 3)}
    assert seen(flip=False) == windows
    assert seen() - windows  # mirrored ones too
    for augmentation in ("heavy", "resize_crop", "random_resized_crop"):
        assert seen(augmentation, flip=False) != seen(augmentation)


def test_resize_crop_is_a_window_of_the_enlarged_image():
    count, size, enlarged = 300, 21, 24
    images, labels, example = batch_of(np.repeat(noise(1, 12), count, 0))
    x, _ = train_inputs(preprocess(size, "resize_crop"), images, labels, example, jax.random.key(0))
    windows = {}
    for flip in (False, True):
        source = images[0][:, ::-1] if flip else images[0]
        large = np.asarray(Image.fromarray(source).resize((enlarged, enlarged), Image.Resampling.BILINEAR))
        for y, x0 in itertools.product(range(4), range(4)):
            windows[large[y : y + size, x0 : x0 + size].tobytes()] = (y, x0, flip)
    chosen = {windows[image.tobytes()] for image in to_pixels(x)}
    assert len(chosen) == 32  # every window, mirrored and not


@pytest.mark.parametrize(("source", "size"), [(32, 224), (256, 224), (30, 28)])
def test_evaluation_takes_the_centre(source, size):
    images = noise(2, source)
    enlarged = round(size * 8 / 7)
    start = round((enlarged - size) / 2)
    reference = np.stack(
        [np.asarray(Image.fromarray(image).resize((enlarged, enlarged), Image.Resampling.BILINEAR)) for image in images]
    )[:, start : start + size, start : start + size]
    x = eval_inputs(preprocess(size, "resize_crop"), images)
    np.testing.assert_array_equal(to_pixels(x), reference)
    np.testing.assert_allclose(x, reference / 127.5 - 1, atol=1e-6)


RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def torchvision_box(height: int, width: int, scale, ratio, tries, place):
    """`RandomResizedCrop.get_params` of torchvision 0.25; tries: pairs of numbers in [0, 1). place: one number each way."""
    for area, aspect in tries:
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        shape = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * aspect)
        w, h = np.sqrt(target * shape), np.sqrt(target / shape)
        near_half = min(abs(side % 1 - 0.5) for side in (w, h)) < 0.01  # where fixed-point numbers may round otherwise
        w, h = round(w), round(h)
        if 0 < w <= width and 0 < h <= height:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w, near_half
    w = min(width, round(height * ratio[1])) if width / height > ratio[1] else width
    h = min(height, round(width / ratio[0])) if width / height < ratio[0] else height
    return (height - h) // 2, (width - w) // 2, h, w, False


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [
        ((32, 32), (0.08, 1.0), (3 / 4, 4 / 3)), ((256, 256), (0.3, 0.5), (1.0, 1.0)), ((40, 64), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((64, 20), (0.9, 1.0), (1.0, 2.0)), ((20, 64), (0.9, 1.0), (0.5, 1.0)),
    ],
)  # fmt: skip
def test_boxes_are_those_of_torchvision(shape, scale, ratio):
    words: Any = words_of(2000, resized_crop.WORDS)
    boxes = jax.jit(resized_crop.random_boxes, static_argnums=(0, 1, 2))(shape, scale, ratio, words)
    unclear = 0
    for word, box in zip(words, np.concatenate(boxes, axis=1), strict=True):
        tries = zip(((word >> 20) + 0.5) / 4096, ((word >> 8) % 4096 + 0.5) / 4096, strict=True)
        *wanted, near_half = torchvision_box(*shape, scale, ratio, list(tries)[:10], (word[10:] >> 16) / 2**16)
        if near_half:
            unclear += 1
            continue
        np.testing.assert_array_equal(box, wanted)
    assert unclear < 200
    inside = (boxes[0] + boxes[2] <= shape[0]) & (boxes[1] + boxes[3] <= shape[1]) & (boxes[0] >= 0) & (boxes[1] >= 0)
    assert inside.all()


def assert_near_pillow(images: Any, boxes: Any, size: int, interpolation: str, levels: int = 1) -> None:
    found = jax.jit(resized_crop.resize_boxes, static_argnums=(2, 3))(images, boxes, size, interpolation)
    for image, result, (top, left, h, w) in zip(images, found, np.concatenate(boxes, axis=1).tolist(), strict=True):
        box = to_pillow(image).crop((left, top, left + w, top + h))  # as torchvision: nothing beyond the box is read
        # First along the width, always: Pillow 13 takes the height first for some tall boxes, and cuts off other overshoots.
        wide = box.resize((size, h), RESAMPLING[interpolation])
        wanted = from_pillow(wide.resize((size, size), RESAMPLING[interpolation])).astype(int)
        difference = np.abs(np.asarray(result) - wanted)
        assert difference.max() <= levels
        assert (difference > 0).mean() < 0.06


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (32, 32, 96), (120, 120, 50), (40, 64, 24), (96, 96, 7)]
)
def test_a_resized_box_is_pillows(height, width, size, interpolation):
    images: Any = np.random.default_rng(1).integers(0, 256, (12, height, width, 3), dtype=np.uint8)
    images[6:] = np.where(images[6:] > 127, 255, 0)
    boxes = resized_crop.random_boxes((height, width), (0.08, 1.0), (3 / 4, 4 / 3), words_of(12, resized_crop.WORDS))
    # In noise, two roundings of bicubic values may add up; in photographs (below) they do not.
    assert_near_pillow(images, boxes, size, interpolation, levels=2 if interpolation == "bicubic" else 1)


def test_a_box_off_by_one_shows():
    images = noise(4, 32)
    top, *rest = resized_crop.random_boxes((32, 32), (0.3, 0.6), (1.0, 1.0), words_of(4, resized_crop.WORDS))
    shifted = jax.jit(resized_crop.resize_boxes, static_argnums=(2, 3))(images, (top ^ 1, *rest), 32, "bilinear")
    exact = jax.jit(resized_crop.resize_boxes, static_argnums=(2, 3))(images, (top, *rest), 32, "bilinear")
    assert np.abs(np.asarray(shifted, int) - exact).max() > 50


def test_boxes_of_real_photographs(tmp_path):
    """CIFAR-10's own images, and JPEGs of several sizes in a folder, from the form in which they are stored."""
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(60, 40), (40, 90), (300, 200), (64, 64)]):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
        (tmp_path / f"class{number % 2}").mkdir(exist_ok=True)
        smooth.save(tmp_path / f"class{number % 2}" / f"{number}.jpg", quality=95)
    config = DataConfig(
        name=f"folder:{tmp_path}", augmentation="random_resized_crop", image_size=28, validation=0.0, splits="test=none"
    )
    folder, _ = base.materialize(registry.load(config, image_size=28).train)
    assert folder.shape == (4, 32, 32, 3)  # 28 / 0.875
    sets = [folder]
    if (Path(os.environ.get("JAXTRAIN_DATA_DIR", "/nowhere")) / "cifar10").is_dir():
        sets.append(registry.load(DataConfig(name="cifar10"), image_size=0).train.read(np.arange(40))[0])
    for images in sets:
        words = words_of(len(images), resized_crop.WORDS)
        boxes = resized_crop.random_boxes((32, 32), (0.08, 1.0), (3 / 4, 4 / 3), words)
        for interpolation in RESAMPLING:
            assert_near_pillow(images, boxes, 28, interpolation)


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_evaluation_crops_the_centre_of_the_resized_image(crop_pct):
    images, side = noise(2, 40), round(28 / crop_pct)
    start = round((side - 28) / 2)
    wanted = [np.asarray(Image.fromarray(image).resize((side, side), RESAMPLING["bicubic"])) for image in images]
    pre = preprocess(28, "random_resized_crop", crop_pct=crop_pct, interpolation="bicubic")
    stop = start + 28
    np.testing.assert_array_equal(to_pixels(eval_inputs(pre, images)), np.stack(wanted)[:, start:stop, start:stop])


def test_random_resized_crop_in_the_step():
    """The box of each example's own words, then the flip."""
    images, labels, example = batch_of(noise(64, 16))
    pre, key = preprocess(16, "random_resized_crop", crop_scale=(0.2, 0.6)), jax.random.key(4)
    found = to_pixels(train_inputs(pre, images, labels, example, key)[0])
    words = augment._words(pre, augment._example_keys(key, example))
    boxes = resized_crop.random_boxes((16, 16), (0.2, 0.6), pre.crop_ratio, words["resized_crop"])
    straight = np.asarray(resized_crop.resize_boxes(images, boxes, 16, "bilinear"))
    kept, mirrored = ((found == each).all((1, 2, 3)) for each in (straight, straight[:, :, ::-1]))
    assert (kept | mirrored).all()
    assert 16 < kept.sum() < 48


@pytest.mark.parametrize("augmentation", ["none", "light", "heavy"])
def test_evaluation_of_the_others_is_a_plain_resize(augmentation):
    images = noise(2, 12)
    reference = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)) for image in images]
    np.testing.assert_array_equal(to_pixels(eval_inputs(preprocess(16, augmentation), images)), reference)


def test_heavy_changes_most_images_and_stays_in_range():
    for size, channels in ((16, 3), (8, 1)):
        images, labels, example = batch_of(np.repeat(varied_images(size, channels)[1:2], 64, 0))
        x, targets = train_inputs(preprocess(size, "heavy", channels), images, labels, example, jax.random.key(0))
        assert x.shape == images.shape
        assert np.abs(x).max() <= 1 + 1e-6
        assert len({image.tobytes() for image in np.asarray(x)}) > 60
        np.testing.assert_array_equal(np.argmax(targets, 1), labels)


# ------------------------------------------------------------------------------------------------------ mixup, cutmix


@pytest.mark.parametrize("batch", [8, 7])
def test_mixup_mixes_neighbours(batch):
    images, _, example = batch_of(noise(batch, 8))
    labels = np.arange(batch, dtype=np.int32)
    plain, one_hot = train_inputs(preprocess(8, "none"), images, labels, example, jax.random.key(0))
    partner = np.array([min(i ^ 1, batch - 1) if i ^ 1 < batch else i for i in range(batch)])
    shares = []
    for seed in range(10):
        x, targets = train_inputs(preprocess(8, "none", mixup=0.4), images, labels, example, jax.random.key(seed))
        lam = float(targets[0, 0])
        shares.append(lam)
        np.testing.assert_allclose(x, lam * plain + (1 - lam) * plain[partner], atol=1e-6)
        np.testing.assert_allclose(targets, lam * one_hot + (1 - lam) * one_hot[partner], atol=1e-6)
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    assert np.std(shares) > 0.1


def black_and_white() -> Any:
    images = np.stack([np.zeros((16, 16, 1), np.uint8), np.full((16, 16, 1), 255, np.uint8)])
    return images, np.array([0, 1], np.int32), np.arange(2, dtype=np.int32)


def test_cutmix_share_is_the_share_of_pixels():
    """Of a black and a white neighbour: the label's share must be the share of pixels that kept their colour."""
    images, labels, example = black_and_white()
    shares, cut_off = [], 0
    for seed in range(40):
        x, targets = train_inputs(preprocess(16, "none", 1, cutmix=1.0), images, labels, example, jax.random.key(seed))
        foreign = np.greater(x[0, ..., 0], 0)
        np.testing.assert_allclose(x[0], -x[1], atol=1e-6)
        np.testing.assert_allclose(np.abs(x), 1, atol=1e-6)
        rows, columns = foreign.any(1), foreign.any(0)
        np.testing.assert_array_equal(foreign, np.outer(rows, columns))
        share = 1 - foreign.mean()
        shares.append(share)
        cut_off += rows.sum() != columns.sum()
        np.testing.assert_allclose(targets[:, :2], [[share, 1 - share], [1 - share, share]], atol=1e-6)
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    assert np.std(shares) > 0.1
    assert cut_off > 5  # boxes over the edge are cut, and the share follows


def test_both_take_turns():
    images, labels, example = black_and_white()
    pre = preprocess(16, "none", 1, mixup=1.0, cutmix=1.0)
    run = jax.jit(jax.vmap(lambda key: augment.train_inputs(pre, images, labels, example, key)))
    x, _ = run(jax.random.split(jax.random.key(0), 400))
    mixed = np.any(np.abs(np.asarray(x)) < 0.999, axis=(1, 2, 3, 4))
    assert abs(mixed.mean() - 0.5) < 0.1


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 4.0])
def test_beta_quantile(alpha):
    share = np.concatenate([np.linspace(0, 1, 1001), [1e-5, 1e-3, 1 - 1e-5]]).astype(np.float32)
    ours = np.asarray(random_bits.beta_quantile(alpha, jnp.asarray(share)))
    np.testing.assert_allclose(ours, stats.beta.ppf(share.astype(float), alpha, alpha), atol=1e-3)
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_label_smoothing():
    images, labels, example = batch_of(noise(4, 8))
    _, targets = train_inputs(preprocess(8, "none", label_smoothing=0.1), images, labels, example, jax.random.key(0))
    np.testing.assert_allclose(targets, 0.9 * np.eye(10)[labels] + 0.01, atol=1e-7)


# --------------------------------------------------------------------------------------------- the same on any layout


@pytest.mark.parametrize(
    ("augmentation", "channels"),
    [("light", 3), ("heavy", 3), ("heavy", 1), ("resize_crop", 3), ("random_resized_crop", 3), ("tiny:speckle", 3)],
)
def test_an_example_is_augmented_alike_in_any_batch(augmentation, channels):
    pre = preprocess(8, augmentation, channels)
    images, labels, example = batch_of(noise(16, 8, channels))
    key = jax.random.key(5)
    x, targets = train_inputs(pre, images, labels, example, key)
    order = np.random.default_rng(0).permutation(16)
    permuted = train_inputs(pre, images[order], labels[order], example[order], key)
    np.testing.assert_array_equal(permuted[0], x[order])
    np.testing.assert_array_equal(permuted[1], targets[order])
    np.testing.assert_array_equal(train_inputs(pre, images[3:8], labels[3:8], example[3:8], key)[0], x[3:8])

    again = train_inputs(pre, images, labels, example, key)[0]
    np.testing.assert_array_equal(again, x)
    for other in (
        train_inputs(pre, images, labels, example, jax.random.fold_in(key, 1))[0],
        train_inputs(pre, images, labels, example + 16, key)[0],
    ):
        assert (np.asarray(other) != np.asarray(x)).any((1, 2, 3)).mean() > 0.7


def test_microbatches_add_up_to_the_batch():
    pre = preprocess(8, "light", mixup=0.5, cutmix=1.0, label_smoothing=0.1)
    images, labels, example = batch_of(noise(8, 8))
    for seed in range(4):
        key = jax.random.key(seed)
        whole = train_inputs(pre, images, labels, example, key)
        parts = [train_inputs(pre, images[i : i + 4], labels[i : i + 4], example[i : i + 4], key) for i in (0, 4)]
        for a, b in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_allclose(a, np.concatenate(b), atol=1e-6)


def test_precisions_agree():
    images, labels, example = batch_of(noise(16, 8))

    def run(augmentation: str, dtype: Any) -> tuple[jax.Array, jax.Array]:
        pre = preprocess(8, augmentation, mixup=0.5, cutmix=1.0, dtype=dtype)
        return train_inputs(pre, images, labels, example, jax.random.key(2))

    single, half, heavy = run("light", jnp.float32), run("light", jnp.bfloat16), run("heavy", jnp.float32)
    with jax.enable_x64(True):
        single_in_x64, double = run("light", jnp.float32), run("heavy", jnp.float64)
    assert [x.dtype for x in half] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_array_equal(half[0], single[0].astype(jnp.bfloat16))  # computed in float32, rounded once
    np.testing.assert_array_equal(half[1], single[1])
    assert [x.dtype for x in single_in_x64] == [jnp.float32, jnp.float32]
    for a, b in zip(single_in_x64, single, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [x.dtype for x in double] == [jnp.float64, jnp.float64]
    for a, b in zip(double, heavy, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("mean", [(0.4914, 0.4822, 0.4465), (0.5, 0.5, 0.5), (0.0, 0.9, 0.1)])
def test_sums_of_a_patch_are_the_same_in_any_order_in_f64(mean):
    """So that no layout rounds them otherwise; and what that moves is far less than f32 resolves."""
    std, draws = (0.2470, 0.2435, 0.2616), np.random.default_rng(0)
    images, _, example = batch_of(noise(8, 8))
    with jax.enable_x64(True):
        plain, mixed = (
            augment.Preprocess(8, "none", mean, std, 10, mixup=alpha, dtype=jnp.float64) for alpha in (0.0, 0.4)
        )
        np.testing.assert_allclose(eval_inputs(plain, images), (images / 255 - mean) / std, rtol=0, atol=2e-8)
        for seed in range(3):
            x = jax.jit(augment.train_images, static_argnums=0)(mixed, images, example, jax.random.key(seed))
            patches = np.asarray(x).reshape(-1, 12) * np.tile([1, -2, 1], 4)
            for _ in range(5):
                order = draws.permutation(12)
                np.testing.assert_array_equal(np.cumsum(patches[:, order], 1)[:, -1], np.cumsum(patches, 1)[:, -1])


def test_a_sharded_batch_stays_on_its_devices():
    """Eight devices, two examples each: the compiled program has no collective, and the numbers are those of one."""
    program = """
        import re, jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jaxtrain.data import augment

        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
        labels, example = rng.integers(0, 10, 16, dtype=np.int32), np.arange(16, dtype=np.int32)
        pre = augment.Preprocess(8, "heavy", (0.5,) * 3, (0.5,) * 3, 10, mixup=0.5, cutmix=1.0)
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        args = (images, labels, example, jax.random.key(3))
        run = lambda *args: augment.train_inputs(pre, *args)
        compiled = jax.jit(run, in_shardings=(split, split, split, whole), out_shardings=split).lower(*args).compile()
        arrays = jax.device_put(args, (split, split, split, whole))
        for ours, reference in zip(compiled(*arrays), jax.jit(run)(*args)):
            np.testing.assert_allclose(ours, reference, atol=1e-6)
            assert len(ours.sharding.device_set) == 8
        print("collectives", re.findall(r"(all-[a-z]+|collective-[a-z]+|reduce-scatter)[-a-z]*\\(", compiled.as_text()))
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "collectives []" in run.stdout


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("augmentation", "image_channels", "mean_channels", "message"),
    [("none", 1, 3, "config.data.mean"), ("heavy", 4, 4, "1 or 3 channels (grey or RGB), not 4")],
)
def test_wrong_channels_are_refused(augmentation, image_channels, mean_channels, message):
    images, labels, example = batch_of(noise(2, 8, image_channels))
    pre = preprocess(8, augmentation, mean_channels)
    with pytest.raises(ConfigError, match=re.escape(message)):
        augment.train_inputs(pre, images, labels, example, jax.random.key(0))
    with pytest.raises(ConfigError, match=re.escape(message)):
        augment.eval_inputs(pre, images)

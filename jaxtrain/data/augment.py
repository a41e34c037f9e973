"""From stored uint8 images to the model's inputs, inside the jitted step: `train_inputs` and `eval_inputs`.

Until it is normalised, an image has whole numbers 0 ... 255. Every operation on it is integer arithmetic that agrees with
Pillow's. So images are the same for every compute dtype and every layout. Random numbers for one example depend on the
key and on the example's index in the global batch. Those for the whole batch (mixup, cutmix) depend on the key alone. So
it makes no difference how a batch is divided into microbatches or over devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxtrain.data import random_bits
from jaxtrain.data.base import CROPPED, resized_side
from jaxtrain.data.filters import FILTERS
from jaxtrain.data.randaugment import color_jitter, rand_augment
from jaxtrain.data.resized_crop import WORDS, random_boxes, resize_boxes
from jaxtrain.errors import ConfigError
from jaxtrain.plugins import load_callable

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]

_EXAMPLE, _BATCH = range(2)  # root keys: for one example, and for the whole batch

_SHARE_BITS = 12  # mixup's shares are multiples of 2**-12
_SUM_BITS = 4  # for whole weights whose sizes add up to 16, the largest sum of `convnet.Stem`

_ERASE_PROBABILITY = 0.25
_ERASE_AREA = (0.02, 0.33)  # share of the image
_ERASE_LOG_ASPECT = (math.log(0.3), math.log(3.3))  # height / width
_ERASE_TRIES = 10

# Random words an example, by purpose. All are drawn in one call: every call adds 0.2 s to the compilation on a CPU.
_WORDS = {"flip": 1, "crop": 2, "rand_augment": 2, "color_jitter": 4, "random_erase": 3 + 2 * _ERASE_TRIES}
_BOX_WORDS = {"flip": 1, "resized_crop": WORDS}  # of `random_resized_crop`, which needs no others


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How stored images become inputs. It is static and hashable, so that a jitted step can close over it."""

    image_size: int
    """Side S in pixels of the images that the model sees."""
    augmentation: str
    """One of `jaxtrain.config.AUGMENTATIONS`, or the name of `own`."""
    mean: tuple[float, ...]
    """One number a channel, for pixels in [0, 1]; so is `std`."""
    std: tuple[float, ...]
    num_classes: int
    """K."""
    mixup: float = 0.0
    """Alpha of Beta(alpha, alpha); 0 is off. With `cutmix` on too, one of them is taken a batch, with equal probability."""
    cutmix: float = 0.0
    """As `mixup`."""
    label_smoothing: float = 0.0
    """The share of a target that is spread over all classes."""
    own: Augmentation | None = None
    """The user's augmentation (`own_augmentation`)."""
    flip: bool = True
    """Whether jaxtrain's augmentations mirror images."""
    padding: int = 0
    """Pixels around an image before `light` and `heavy` crop it; 0 is an eighth of its side, -1 does not crop."""
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    """The smallest and the largest share of the area that `random_resized_crop` takes."""
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """The smallest and the largest width over height of what it takes."""
    crop_pct: float = 0.875
    """The share of `resized` that `image_size` is."""
    interpolation: str = "bilinear"
    """A name of `FILTERS`."""
    dtype: DTypeLike = jnp.float32
    """Of the returned images."""

    @property
    def float_dtype(self) -> jnp.dtype:
        """The compute dtype, but at least float32: for normalisation, mixing and targets."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def mixes(self) -> bool:
        """Whether examples are mixed with their neighbours."""
        return bool(self.mixup or self.cutmix)

    @property
    def pads(self) -> bool:
        """Whether images are padded, and cropped to their size again."""
        return self.augmentation in ("light", "heavy") and self.padding >= 0

    @property
    def resized(self) -> int:
        """The side to which an image is resized before it is cropped (256 for 224)."""
        return resized_side(self.image_size, self.crop_pct)

    @property
    def evaluated_side(self) -> int:
        """The side of the square that an image is resized to before the evaluation takes the whole of it, or its centre."""
        return self.resized if self.augmentation in CROPPED else self.image_size


def train_inputs(
    pre: Preprocess, images: jax.Array, labels: jax.Array, example: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augmented inputs and soft targets of a microbatch: `train_images` and `train_targets`.

    Args:
        pre: what to do.
        images: uint8 [B, H, W, C].
        labels: int32 [B].
        example: int32 [B], each example's index in the global batch.
        key: one PRNG key for (seed, role, step).

    Returns:
        Images, `pre.dtype` [B, S, S, C], and targets, `pre.float_dtype` [B, K].

    Raises:
        ConfigError: the images' channels do not fit `pre.mean`, or the augmentation.
    """
    return train_images(pre, images, example, key), train_targets(pre, labels, key)


def train_images(pre: Preprocess, images: jax.Array, example: jax.Array, key: jax.Array) -> jax.Array:
    """Augmented inputs of a microbatch.

    Args:
        pre: what to do.
        images: uint8 [B, H, W, C].
        example: int32 [B], each example's index in the global batch.
        key: one PRNG key for (seed, role, step).

    Returns:
        `pre.dtype` [B, S, S, C].

    Raises:
        ConfigError: the images' channels do not fit `pre.mean`, or the augmentation.
    """
    _check_channels(pre, images)
    keys = _example_keys(key, example)
    x = (
        _augment(pre, images, _words(pre, keys))
        if pre.own is None
        else normalize(pre, _augment_by_own(pre, images, keys))
    )
    if pre.mixes:
        pixels, _ = mix_shares(pre, key)
        x = pixels * x + (1 - pixels) * _partners(x)
    return x.astype(pre.dtype)


def _augment(pre: Preprocess, images: jax.Array, words: dict[str, jax.Array]) -> jax.Array:
    """jaxtrain's own augmentations of uint8 [B, H, W, C], by the words of `_words`: `pre.float_dtype` [B, S, S, C]."""
    if pre.augmentation == "random_resized_crop":
        boxes = random_boxes((images.shape[1], images.shape[2]), pre.crop_scale, pre.crop_ratio, words["resized_crop"])
        images = resize_boxes(images, boxes, pre.image_size, pre.interpolation)
    if pre.augmentation != "none" and pre.flip:
        images = random_flip(images, words["flip"])  # before they are enlarged
    side = pre.resized if pre.augmentation == "resize_crop" else pre.image_size
    images = resize(images, side, pre.interpolation)
    if pre.pads:
        images = pad(images, pre.padding)
    if pre.pads or pre.augmentation == "resize_crop":
        images = random_crop(images, pre.image_size, words["crop"])
    if pre.augmentation == "heavy":
        images = color_jitter(rand_augment(images, words["rand_augment"]), words["color_jitter"])
    x = normalize(pre, images)
    return random_erase(x, words["random_erase"]) if pre.augmentation == "heavy" else x


def train_targets(pre: Preprocess, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Soft targets of a microbatch.

    Args:
        pre: what to do.
        labels: int32 [B].
        key: the one of `train_images`.

    Returns:
        `pre.float_dtype` [B, K]; the sum of each row is 1.
    """
    targets = smooth_one_hot(pre, labels)
    if pre.mixes:
        _, label = mix_shares(pre, key)
        targets = label * targets + (1 - label) * _partners(targets)
    return targets


def eval_inputs(pre: Preprocess, images: jax.Array) -> jax.Array:
    """Inputs for evaluation: uint8 [B, H, W, C] resized (and centre-cropped, where training crops) and normalised.

    Returns `pre.dtype` [B, S, S, C]. Raises `ConfigError` as `train_inputs` does.
    """
    _check_channels(pre, images)
    if pre.augmentation in CROPPED:
        start = round((pre.resized - pre.image_size) / 2)  # half to even, as torchvision's CenterCrop
        stop = start + pre.image_size
        images = resize(images, pre.resized, pre.interpolation)[:, start:stop, start:stop]
    else:
        images = resize(images, pre.image_size, pre.interpolation)
    return normalize(pre, images).astype(pre.dtype)


def _check_channels(pre: Preprocess, images: jax.Array) -> None:
    channels = images.shape[-1]
    if channels != len(pre.mean):
        raise ConfigError(f"config.data.mean={pre.mean!r}: must have one value a channel; the images have {channels}.")
    if pre.augmentation == "heavy" and channels not in (1, 3):
        raise ConfigError(
            f"config.data.augmentation='heavy': the images must have 1 or 3 channels (grey or RGB), not {channels}."
        )


def _example_keys(key: jax.Array, example: jax.Array) -> jax.Array:
    """A PRNG key for each example, [B]: a function of the key and of the example's index, int32 [B]."""
    root = jax.random.fold_in(key, _EXAMPLE)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(example)


def _words(pre: Preprocess, keys: jax.Array) -> dict[str, jax.Array]:
    """Purpose -> uint32 [B, words as in `_WORDS` or `_BOX_WORDS`], for PRNG keys [B]."""
    counts = _BOX_WORDS if pre.augmentation == "random_resized_crop" else _WORDS
    ends = list(itertools.accumulate(counts.values()))
    return dict(zip(counts, jnp.split(random_bits.words(keys, ends[-1]), ends[:-1], axis=1), strict=True))


# --------------------------------------------------------------------------------------------------- the user's own


def own_augmentation(name: str) -> Augmentation | None:
    """The user's function that `data.augmentation=name` means; None for jaxtrain's own.

    It is called as `function(images, keys)` inside the jitted step. `images` are uint8 [B, S, S, C], at the side S that the
    model sees; it returns uint8 [B, S, S, C], which is normalised afterwards. `keys` are typed PRNG keys [B], one an example:
    functions of the seed, the step and the example's index in the global batch. An example's result may depend on its own
    image and key alone, since a microbatch, and what a device has of it, are other examples under each layout: use
    `jax.vmap`, or sums within an image. Evaluation does not call it.

    Raises:
      ConfigError: the name cannot be loaded, or is no function.
    """
    return load_callable(name, "data.augmentation") if ":" in name else None


def check_own_augmentation(pre: Preprocess, images: jax.ShapeDtypeStruct) -> None:
    """Calls the user's augmentation with shapes alone, so that a run with a bad one ends before it compiles.

    images: uint8 [B, H, W, C], as they are stored. Raises `ConfigError` where the result has another shape or type.
    """
    if pre.own is not None:
        example = jax.ShapeDtypeStruct(images.shape[:1], np.int32)
        jax.eval_shape(lambda images, example: train_images(pre, images, example, jax.random.key(0)), images, example)


def _augment_by_own(pre: Preprocess, images: jax.Array, keys: jax.Array) -> jax.Array:
    """`pre.own` of uint8 [B, H, W, C] at the model's size: uint8 [B, S, S, C]. keys: [B]."""
    assert pre.own is not None
    before = resize(images, pre.image_size, pre.interpolation)
    after = pre.own(before, keys)
    returned = f"{after.dtype} {list(after.shape)}" if hasattr(after, "dtype") else f"a {type(after).__name__}"
    wanted = f"{before.dtype} {list(before.shape)}"
    if returned != wanted:
        raise ConfigError(
            f"config.data.augmentation={pre.augmentation!r}: returned {returned}; it must return {wanted}, the shape and type "
            "of the images that it is given."
        )
    return after


# -------------------------------------------------------------------------------------------- crops and flips, in uint8


def resize(images: jax.Array, size: int, interpolation: str = "bilinear") -> jax.Array:
    """Resize of uint8 [B, H, W, C] to uint8 [B, size, size, C], with antialiasing when it gets smaller.

    Equal to Pillow's `Image.resize(..., BILINEAR)` or `BICUBIC`, pixel for pixel: the same 22-bit weights, first along the
    width, then along the height. It is a sum over the few taps: products with the nearly empty weight matrices took 3 to 10
    times as long on a CPU (32 to 256 pixels, 256 to 224, 400 to 224).
    """
    return _resize_axis(_resize_axis(images, 2, size, interpolation), 1, size, interpolation)


def _resize_axis(images: jax.Array, axis: int, size: int, interpolation: str) -> jax.Array:
    if images.shape[axis] == size:
        return images
    first, weights = _resize_weights(images.shape[axis], size, interpolation)
    column = [-1 if i == axis else 1 for i in range(images.ndim)]
    total = jnp.int32(1 << 21)
    for tap in range(weights.shape[1]):
        pixels = jnp.take(images, first + tap, axis=axis, mode="clip").astype(jnp.int32)
        total += weights[:, tap].reshape(column) * pixels
    return jnp.clip(total >> 22, 0, 255).astype(jnp.uint8)


def _resize_weights(source: int, size: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """Output pixel i is the sum over t of weights[i, t] / 2**22 * input[first[i] + t].

    Returns int32 first [size] and int32 weights [size, taps]: the filter around the output pixel's centre, in units of input
    pixels, or of output pixels where those are larger.
    """
    scale = source / size
    center = (np.arange(size)[:, None] + 0.5) * scale
    function, _ = FILTERS[interpolation]
    values = function(np.abs(np.arange(source) + 0.5 - center) / max(scale, 1.0))
    weights = values / values.sum(1, keepdims=True) * 2**22
    weights = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)
    used = weights != 0
    begin, end = used.argmax(1), source - used[:, ::-1].argmax(1)
    taps = (end - begin).max()
    first = np.minimum(begin, source - taps)
    return first.astype(np.int32), np.take_along_axis(weights, first[:, None] + np.arange(taps), axis=1)


def pad(images: jax.Array, width: int = 0) -> jax.Array:
    """Adds black pixels around uint8 [B, S, S, C]: `width` a side; for 0 S/8, rounded, at least one (4 for CIFAR)."""
    width = width or max(1, round(images.shape[1] / 8))
    return jnp.pad(images, ((0, 0), (width, width), (width, width), (0, 0)))


def random_crop(images: jax.Array, size: int, words: jax.Array) -> jax.Array:
    """A random square of each image.

    Args:
        images: uint8 [B, S, S, C].
        size: side of the squares, in pixels.
        words: random, uint32 [B, 2].

    Returns:
        uint8 [B, size, size, C].
    """
    batch, side, _, channels = images.shape
    corners = random_bits.below(side - size + 1, words)
    # Whole rows as the last dim: on a CPU 3 to 6 times as fast as slices that keep the few channels apart.
    rows = images.reshape(batch, side, side * channels)
    crop = jax.vmap(lambda row, y, x: lax.dynamic_slice(row, (y, x * channels), (size, size * channels)))
    return crop(rows, corners[:, 0], corners[:, 1]).reshape(batch, size, size, channels)


def random_flip(images: jax.Array, words: jax.Array) -> jax.Array:
    """Mirrors each image of uint8 [B, S, S, C] left to right with probability 1/2, by its random word, uint32 [B, 1]."""
    flip = random_bits.below(2, words) == 1
    return jnp.where(flip[:, :, None, None], images[:, :, ::-1], images)


# -------------------------------------------------------------------------------------- normalisation, erasing, targets


def normalize(pre: Preprocess, images: jax.Array) -> jax.Array:
    """(pixels / 255 - mean) / std of uint8 [B, S, S, C], in `pre.float_dtype`.

    In f64, in which layouts are compared, sums of the results are exact.
    """
    pixels = images.astype(pre.float_dtype)
    if pre.float_dtype == jnp.float64:
        scale, shift = _exact_affine(pre.mean, pre.std)
        return pixels * scale + shift
    mean, std = (jnp.asarray(values, pre.float_dtype) for values in (pre.mean, pre.std))
    return (pixels / 255 - mean) / std


def _exact_affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """float64 (scale [C], shift [C]), rounded to multiples of 2**-k, so that x = pixels * scale + shift is a multiple too.

    k leaves room in f64's 53 bits for a share (`_SHARE_BITS`) and a sum (`_SUM_BITS`). So products of x with shares, and
    sums of x, are exact: they are the same in any order. For the usual means and deviations k is 35, which moves x by 4e-9
    at most. If one channel has a much smaller scale than another, its scale keeps f32's 24 bits, and sums are rounded.
    """
    shift, scale = -np.asarray(mean) / std, 1 / (255 * np.asarray(std))
    largest = np.max(np.maximum(np.abs(shift), np.abs(255 * scale + shift)))
    grid = 2.0 ** max(53 - _SHARE_BITS - _SUM_BITS - math.frexp(largest)[1], 25 - math.frexp(scale.min())[1])
    return np.rint(scale * grid) / grid, np.rint(shift * grid) / grid


def random_erase(x: jax.Array, words: jax.Array) -> jax.Array:
    """Random Erasing (Zhong 2020, arXiv:1708.04896): with probability 1/4 a rectangle of each image becomes 0.

    As in torchvision: 2 to 33 % of the area, aspect 0.3 to 3.3, and ten tries to find one smaller than the image. x is
    normalised, float [B, S, S, C], so 0 is the mean colour. words: random, uint32 [B, 23].
    """
    side, tries = x.shape[1], _ERASE_TRIES
    erase = random_bits.uniform(words[:, :1], x.dtype) < _ERASE_PROBABILITY
    area = side**2 * _between(*_ERASE_AREA, random_bits.uniform(words[:, 1 : 1 + tries], x.dtype))
    log_aspect = _between(*_ERASE_LOG_ASPECT, random_bits.uniform(words[:, 1 + tries : 1 + 2 * tries], x.dtype))
    height = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)  # [B, tries]
    width = jnp.round(jnp.sqrt(area * jnp.exp(-log_aspect))).astype(jnp.int32)
    fits = (height < side) & (width < side)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    extent = jnp.concatenate([jnp.take_along_axis(tried, first, axis=1) for tried in (height, width)], axis=1)
    start = random_bits.below(side - extent + 1, words[:, -2:])
    line = jnp.arange(side, dtype=jnp.int32)
    inside = (line >= start[..., None]) & (line < (start + extent)[..., None])  # [B, 2, S]: rows, columns
    box = inside[:, 0, :, None] & inside[:, 1, None, :] & (erase & fits.any(1, keepdims=True))[..., None]
    return jnp.where(box[..., None], 0, x)


def _between(low: float, high: float, share: jax.Array) -> jax.Array:
    return low + (high - low) * share


def smooth_one_hot(pre: Preprocess, labels: jax.Array) -> jax.Array:
    """`pre.float_dtype` [B, K] of labels int32 [B]: 1 - label_smoothing for the label, plus label_smoothing / K for all."""
    one_hot = jax.nn.one_hot(labels, pre.num_classes, dtype=pre.float_dtype)
    return one_hot * (1 - pre.label_smoothing) + pre.label_smoothing / pre.num_classes


# ------------------------------------------------------------------------------------------------------ mixup, cutmix


def mix_shares(pre: Preprocess, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How much an example keeps of itself when it is mixed with its partner: `pre.float_dtype` [S, S, 1] and [].

    The first result is the share of each pixel, the second that of the label. key: the one of `train_images`.

    Mixup (Zhang 2018) or cutmix (Yun 2019), one of them for the whole batch. The partner of the example at j is at j XOR 1.
    They are neighbours: in one microbatch, in one BatchNorm group, and on one device if that has an even number of
    examples. A last example without a partner stays as it is.
    """
    word = random_bits.words(jax.random.fold_in(key, _BATCH)[None], 4)[0]
    side, share = pre.image_size, random_bits.uniform(word[0], pre.float_dtype)
    ways: list[tuple[jax.Array, jax.Array]] = []
    if pre.mixup:
        ways.append(_mixup_shares(random_bits.beta_quantile(pre.mixup, share), side))
    if pre.cutmix:
        ways.append(_cutmix_shares(random_bits.beta_quantile(pre.cutmix, share), side, word[1:3]))
    first = random_bits.below(len(ways), word[3]) == 0
    pixels, label = (jnp.where(first, a, b) for a, b in zip(ways[0], ways[-1], strict=True))
    return pixels, label


def _mixup_shares(lam: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """`mix_shares` of mixup: the same share `lam` for all pixels [S, S, 1] and for the label.

    It is rounded to `_SHARE_BITS`, so that mixed values are exact in f64 too. That is within a quarter of the error of
    `beta_quantile`.
    """
    lam = jnp.round(lam * 2**_SHARE_BITS) / 2**_SHARE_BITS
    return jnp.broadcast_to(lam, (side, side, 1)), lam


def _cutmix_shares(lam: jax.Array, side: int, word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`mix_shares` of cutmix: 0 inside one random box, 1 outside. The label's share is the area outside.

    The box has 1 - lam of the area. Its centre is anywhere in the image, so the edges may cut it off.
    """
    half = (side * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    center = random_bits.below(side, word)[:, None]
    line = jnp.arange(side, dtype=jnp.int32)
    rows, columns = (line >= center - half) & (line < center + half)
    outside = (~(rows[:, None] & columns)).astype(lam.dtype)
    return outside[..., None], outside.mean()


def _partners(x: jax.Array) -> jax.Array:
    """x [B, ...] with its neighbours 2i and 2i + 1 swapped. If B is odd, the last one stays."""
    if x.shape[0] % 2:
        return jnp.concatenate([_partners(x[:-1]), x[-1:]])
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)

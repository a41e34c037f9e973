"""Models of a few layers and a handful of digits, named in configs as `tiny:resnet`, `tiny:digits`: compiled in a moment."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxtrain.data import registry
from jaxtrain.data.base import Subset
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import Dropout, Layer, at_least_f32
from jaxtrain.models.registry import build
from jaxtrain.models.resnet import Block, Head, Stem


def resnet(config, *, image_shape, num_classes, dtype, param_dtype):
    """Stem, a block that halves the image, head; with BatchNorm, drop-path and dropout."""
    del image_shape
    types, width = (dtype, param_dtype), config.width
    block = Block(*types, 2 * width, 2, False, config.drop_path)
    return Classifier((Stem(*types, width, True), block, Head(*types, num_classes, config.dropout)))


def resnet18(config, **kinds):
    """The real one's stem, first two blocks (the second halves the map) and head, with both drop-path rates above 0."""
    whole = build(dataclasses.replace(config, name="resnet18", depths=(1, 1, 1, 1)), **kinds)
    stem, first, second, *_, head = whole.layers
    first, second = (dataclasses.replace(block, drop_path=config.drop_path) for block in (first, second))
    return dataclasses.replace(whole, layers=(stem, first, second, head))


def swin(config, **kinds):
    """The real one's patches, a block, a shifted block, the merging of patches, a block of more heads, and head."""
    whole = build(dataclasses.replace(config, name="swin_tiny", depths=(2, 1, 1, 1)), **kinds)
    patches, first, shifted, merging, last, *_, head = whole.layers
    blocks = (dataclasses.replace(block, drop_path=config.drop_path) for block in (first, shifted, last))
    first, shifted, last = blocks
    return dataclasses.replace(whole, layers=(patches, first, shifted, merging, last, head))


def digits(config, *, image_size):
    """The handwritten digits, with 40 for validation and 40 for the test: evaluations are not what is tested."""
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    first = np.arange(40)
    return dataclasses.replace(found, validation=Subset(found.validation, first), test=Subset(found.test, first))


@dataclasses.dataclass(frozen=True)
class SlowOnProcess1(Subset):
    """Takes 150 ms for what it reads, on process 1 alone."""

    def read(self, indices):
        time.sleep(0.15 * (jax.process_index() == 1))
        return super().read(indices)


def slow_digits(config, *, image_size):
    """`digits` whose training examples come slowly to process 1."""
    found = digits(config, image_size=image_size)
    return dataclasses.replace(found, train=SlowOnProcess1(found.train, np.arange(len(found.train))))


def speckle(images, keys):
    """A user's augmentation: noise on each image, from its own key."""
    noise = jax.vmap(lambda key: jax.random.randint(key, images.shape[1:], -40, 41, jnp.int32))(keys)
    return jnp.clip(images + noise, 0, 255).astype(jnp.uint8)


def bad_at_first(logits, targets):
    """A user's loss that is not a number for the first example that it is given."""
    losses = -jnp.sum(targets * jax.nn.log_softmax(logits), -1)
    return losses.at[0].multiply(jnp.nan)


class Pool(Layer):
    """[B, H, W, C] -> [B, H / 2 * W / 2 * C]; no parameters."""

    @nn.compact
    def __call__(self, x, context):
        return nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)


class Dense(Layer):
    """[B, D] -> [B, width]; without a bias, which `Centre` would leave without a gradient."""

    width: int

    @nn.compact
    def __call__(self, x, context):
        return nn.Dense(self.width, use_bias=False, name="linear", **self.types)(x)


class Centre(Layer):
    """[B, D], less the mean of its BatchNorm group: statistics without parameters."""

    @nn.compact
    def __call__(self, x, context):
        running = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], self.param_dtype)
        if not context.train:
            return x - running.value.astype(x.dtype)
        groups = x.reshape(context.bn_groups, -1, x.shape[-1])
        mean = groups.mean(1, keepdims=True)
        if not self.is_initializing():
            new = jax.lax.stop_gradient(mean.mean((0, 1)).astype(self.param_dtype))
            running.value = 0.9 * running.value + 0.1 * new
        return (groups - mean).reshape(x.shape)


class Dropped(Layer):
    """Dropout alone."""

    rate: float

    @nn.compact
    def __call__(self, x, context):
        return Dropout(self.rate)(x, context)


class Logits(Layer):
    """The values as logits: at least f32, and no parameters."""

    @nn.compact
    def __call__(self, x, context):
        return jax.nn.log_softmax(x.astype(at_least_f32(x.dtype)))


def sparse(config, *, image_shape, num_classes, dtype, param_dtype):
    """Six layers, of which two have parameters: a pool, a product, centring, dropout, a product, a softmax."""
    del image_shape
    types = (dtype, param_dtype)
    wide, last = Dense(*types, config.width), Dense(*types, num_classes)
    return Classifier((Pool(*types), wide, Centre(*types), Dropped(*types, config.dropout), last, Logits(*types)))

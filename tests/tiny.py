"""A ResNet of one block and a handful of digits, named in configs as `tiny:resnet` and `tiny:digits`: compiled in a moment."""

import dataclasses
import time

import jax
import numpy as np

from jaxtrain.data import sources
from jaxtrain.data.base import Subset
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.resnet import Block, Head, Stem


def resnet(config, *, image_shape, num_classes, dtype, param_dtype):
    """Stem, a block that halves the image, head; with BatchNorm, drop-path and dropout."""
    del image_shape
    types, width = (dtype, param_dtype), config.width
    block = Block(*types, 2 * width, 2, False, config.drop_path)
    return Classifier((Stem(*types, width, True), block, Head(*types, num_classes, config.dropout)))


def digits(config, *, image_size):
    """The handwritten digits, with 40 for validation and 40 for the test: evaluations are not what is tested."""
    found = sources.load(dataclasses.replace(config, name="digits"), image_size=image_size)
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

"""Fine-tuning: which parameters are trained, and at what multiple of the learning rate.

A tree of the trained leaves has `optax.MaskedNode()`, which JAX counts as no leaf, in place of each frozen one. So it
has the layers of the whole tree as keys, and gradients, momenta and norms of it have nothing of a frozen leaf.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import optax

from jaxtrain.config import OptimConfig, without_effect
from jaxtrain.errors import ConfigError
from jaxtrain.host.text import did_you_mean
from jaxtrain.trees import PyTree, path_of


@dataclasses.dataclass(frozen=True)
class ParamGroups:
    """What `optim.freeze`, `freeze_layers`, `layer_decay` and `head_rate` say of each leaf, by its path.

    Attributes:
      config: the section `optim`.
      layers: the names of the model's layers, in order; the last is the head.
    """

    config: OptimConfig
    layers: tuple[str, ...]

    def is_trained(self, path: str) -> bool:
        """Whether the leaf at `path`, such as 'layers_03/conv1/kernel', is updated."""
        of_layers = _layer(path) in self.layers[: self.config.freeze_layers]
        return not of_layers and not any(re.search(regex, path) for regex in self.config.freeze)

    def trained(self, params: PyTree) -> PyTree:
        """The trained leaves of `params`, or of any tree with its paths."""
        return select(params, self.is_trained)

    def rate(self, path: str) -> float:
        """What the learning rate is multiplied by for the leaf at `path`: layer_decay^(layers above it), and the head's own.

        BEiT's layer-wise decay (Bao 2022, appendix H): the head has 1, the layer below it `layer_decay`, and so on.
        """
        above = len(self.layers) - 1 - self.layers.index(_layer(path))
        return self.config.layer_decay**above * (self.config.head_rate if above == 0 else 1.0)

    def with_rates(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """`optimizer`, whose update of each leaf is multiplied by `rate` of its path. Its state is not another.

        This is a learning rate of its own for each leaf, as param groups in PyTorch have it: all updates are in proportion
        to the rate, with the decoupled weight decay in them, and one leaf's factor never changes. So where a momentum adds
        up updates that are multiplied by the rate (LARS), the factor may come before or after it.
        """
        if self.config.layer_decay == self.config.head_rate == 1.0:
            return optimizer

        def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
            updates, state = optimizer.update(updates, state, params)
            scaled = jax.tree_util.tree_map_with_path(lambda path, u: u * self.rate(path_of(path)), updates)
            return scaled, state

        return optax.GradientTransformation(optimizer.init, update)

    def check(self, params: PyTree) -> None:
        """Raises `ConfigError` where a pattern matches no leaf of `params`, or none is left to train."""
        paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for regex in self.config.freeze:
            if not any(re.search(regex, path) for path in paths):
                near = did_you_mean(regex, [*paths, *self.layers])
                raise ConfigError(
                    f"config.optim.freeze: {regex!r} matches no parameter.{near} `jaxtrain layout --leaves` lists their paths."
                )
        count, most = self.config.freeze_layers, len(self.layers) - 1
        if abs(count) > most:
            raise ConfigError(
                f"config.optim.freeze_layers={count}: must be between -{most} and {most}, as the model has {most + 1} layers."
            )
        if not any(map(self.is_trained, paths)):
            raise ConfigError(
                f"config.optim.freeze={self.config.freeze!r}, config.optim.freeze_layers={count}: freeze all parameters, and "
                "there is nothing to train; leave some out, such as the head's."
            )


def frozen_statistics(groups: ParamGroups, params: PyTree, batch_stats: PyTree, *, every: bool) -> frozenset[str]:
    """The paths of the BatchNorms ('layers_03/bn1') that run as in evaluation, and whose running statistics stay.

    Args:
      groups: says which leaves are frozen.
      params: shapes, keyed by layer.
      batch_stats: shapes, keyed by layer.
      every: all of them (`model.freeze_bn`), and not those alone whose parameters are all frozen.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    norms = {_owner(path_of(path)) for path, _ in jax.tree_util.tree_leaves_with_path(batch_stats)}

    def is_frozen(norm: str) -> bool:
        own = [path for path in paths if _owner(path) == norm]
        return bool(own) and not any(map(groups.is_trained, own))

    return frozenset(norm for norm in norms if every or is_frozen(norm))


def moving_statistics(batch_stats: PyTree, frozen: frozenset[str]) -> PyTree:
    """The running statistics that training changes. frozen: of `frozen_statistics`."""
    return select(batch_stats, lambda path: _owner(path) not in frozen)


def _layer(path: str) -> str:
    """The layer that has the leaf at `path`."""
    return path.partition("/")[0]


def _owner(path: str) -> str:
    """The path of the module that has the leaf at `path`."""
    return path.rpartition("/")[0]


def select(tree: PyTree, wanted: Callable[[str], bool]) -> PyTree:
    """`tree` with `optax.MaskedNode()` in place of each leaf whose path is not `wanted`."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x if wanted(path_of(path)) else optax.MaskedNode(), tree)


def merge(tree: PyTree, part: PyTree) -> PyTree:
    """`tree` with the leaves of `part` in their places. part: of `select`."""
    return jax.tree.map(lambda new, old: old if _is_masked(new) else new, part, tree, is_leaf=_is_masked)


def _is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def unused_rates(groups: ParamGroups, params: PyTree) -> list[str]:
    """A sentence for each rate that differs from 1 and concerns no trained leaf of `params`."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(groups.trained(params))]
    trained, head = {_layer(path) for path in paths}, groups.layers[-1]
    found: list[str] = []
    if head not in trained:
        found += without_effect("optim", groups.config, ["head_rate"], f"the head, {head}, is frozen")
    if trained == {head}:
        found += without_effect("optim", groups.config, ["layer_decay"], "only the head is trained")
    return found

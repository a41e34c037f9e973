"""Trees of arrays, as JAX knows them: nested dicts, tuples and dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any


def path_of(path: tuple[Any, ...]) -> str:
    """'layers_03/attn/qkv/kernel', from the keys that `jax.tree_util` gives for a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dicts whose leaves have these paths; see `path_of`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by their paths."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def shapes_of(tree: PyTree, shardings: PyTree = None) -> PyTree:
    """`tree` without its values: a `jax.ShapeDtypeStruct` with shape, dtype and sharding at each leaf.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      shardings: the sharding of every leaf: one for all of them, or a tree of them with the structure of `tree`.
        `None`: each leaf keeps its own.
    """
    if shardings is None:
        return jax.tree.map(lambda leaf: _shape_of(leaf, leaf.sharding), tree)
    return jax.tree.map(
        lambda sharding, subtree: jax.tree.map(lambda leaf: _shape_of(leaf, sharding), subtree), shardings, tree
    )


def _shape_of(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

"""Trees of arrays, as JAX knows them: nested dicts, tuples and dataclasses."""

from __future__ import annotations

from typing import Any

import jax

PyTree = Any


def path_of(path: tuple[Any, ...]) -> str:
    """'layers_03/attn/qkv/kernel', from the keys that `jax.tree_util` gives for a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")

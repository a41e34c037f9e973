"""A wrapper around each layer's function: gathers its parameters under ZeRO-3, and rematerializes activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.parallel.layout import Layout
from jaxtrain.trees import PyTree, path_of


def layer_wrapper(
    layout: Layout, params: PyTree, remat: str, *, gathered: bool = False
) -> Callable[[Callable[..., Any], str], Callable[..., Any]] | None:
    """The wrapper for `Classifier.apply`, or `None` if there is nothing to do.

    Under ZeRO-3 a layer's gathered parameters are never stored for the backward pass, which gathers them again
    (Rajbhandari 2020, section 5.3; XLA:CPU merges the two gathers).

    Args:
      layout: of the parameters.
      params: arrays or shapes, keyed by layer.
      remat: `train.remat`: what the forward pass stores for the backward pass. `none`: everything; `dots`: the results
        of matrix products and convolutions; `full`: nothing but the layer's input.
      gathered: whether the parameters are gathered already.

    Returns:
      wrap(function, name of the layer): the layer's function `(params, *args)` with this around it.
    """
    gather = layout.gathers_params and not gathered and not layout.by_device
    if not gather and remat == "none":
        return None

    def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(params.get(name, {}))
        placements = [
            layout.place("params", f"{name}/{path_of(path)}", leaf.shape, leaf.dtype) for path, leaf in leaves
        ]
        shardings = structure.unflatten([layout.sharding(placement.compute_spec) for placement in placements])

        def call(layer_params: PyTree, *args: Any) -> Any:
            if gather:
                layer_params = jax.lax.with_sharding_constraint(layer_params, shardings)
            return function(layer_params, *args)

        return rematerialized(call, remat)

    return wrap


def rematerialized(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`function`, whose forward pass stores what `train.remat` says."""
    return jax.checkpoint(function, policy=_REMAT_POLICIES[remat])


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name != "sharding_constraint"


def _products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("dot_general", "conv_general_dilated")


_REMAT_POLICIES = {"none": _all_but_gathered, "dots": _products, "full": jax.checkpoint_policies.nothing_saveable}

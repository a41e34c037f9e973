"""What the layout puts around each layer: gathering its parameters under ZeRO-3, and rematerialization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.parallel.layout import Layout
from jaxtrain.trees import PyTree, path_of


def layer_wrapper(
    layout: Layout, params: PyTree, remat: str, *, gathered: bool = False
) -> Callable[[Callable[..., Any], str], Callable[..., Any]] | None:
    """What the layout and `remat` put around each layer's function: gather its parameters, and what not to store.

    Under ZeRO-3 a layer's gathered parameters are never stored for the backward pass, which gathers them again
    (Rajbhandari 2020, section 5.3; XLA:CPU merges the two gathers). gathered: the parameters are whole already.
    """
    gather = layout.config.zero == 3 and not gathered
    if not gather and remat == "none":
        return None

    def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(params.get(name, {}))
        places = [layout.place("params", f"{name}/{path_of(path)}", leaf.shape, leaf.dtype) for path, leaf in leaves]
        shardings = structure.unflatten([layout.sharding(place.compute_spec) for place in places])

        def call(layer_params: PyTree, *args: Any) -> Any:
            if gather:
                layer_params = jax.lax.with_sharding_constraint(layer_params, shardings)
            return function(layer_params, *args)

        return jax.checkpoint(call, policy=_REMAT_POLICIES[remat])

    return wrap


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name != "sharding_constraint"


def _products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("dot_general", "conv_general_dilated")


_REMAT_POLICIES = {"none": _all_but_gathered, "dots": _products, "full": jax.checkpoint_policies.nothing_saveable}

"""What a layer costs, from its jaxpr: bytes that it stores, holds and moves, kernels, floating point operations.

Nothing is compiled. The model of XLA's fusion is simple: what a matrix product, a convolution, a pooling or a sort reads and
writes is an array in memory, and so is what a reduction writes. Everything else is fused into what uses it, and computed
again where two use it. So an array lives from where it is made until its last use, through all that is fused between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

_PRODUCTS = ("dot_general", "conv_general_dilated")
_WHOLE = (
    *_PRODUCTS, "reduce_window", "reduce_window_max", "reduce_window_sum", "select_and_scatter_add", "select_and_scatter",
    "select_and_gather_add", "sort", "top_k", "scatter", "scatter-add", "scatter_add", "cumsum", "while", "scan",
    "pallas_call", "fft",
)  # fmt: skip
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin")
_VIEWS = ("reshape", "squeeze", "expand_dims", "copy", "optimization_barrier", "sharding_constraint", "stop_gradient")
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Pass:
    """A layer's forward or backward pass of one microbatch on one device.

    Attributes:
      peak: bytes that it holds at most, but for parameters and for what is stored of other layers.
      moved: bytes that its kernels read and write.
      product_bytes: of these, those of matrix products and convolutions.
      kernels: how many arrays it writes.
      flops: of matrix products and convolutions.
    """

    peak: int = 0
    moved: int = 0
    product_bytes: int = 0
    kernels: int = 0
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a layer costs.

    Attributes:
      forward: its forward pass.
      backward: its backward pass, with what it computes again.
      stored: bytes that wait for the backward pass, without the layer's input and output.
      output: bytes of its output.
      keeps_input: whether the input waits for the backward pass.
      keeps_output: whether the output does.
      late: bytes that only the products for the weights' gradients read, which may run after the whole backward pass.
    """

    forward: Pass
    backward: Pass
    stored: int
    output: int
    keeps_input: bool
    keeps_output: bool
    late: int = 0


def layer_footprint(function: Callable[..., Any], params: Any, x: Any, *, first: bool, platform: str) -> Footprint:
    """The footprint of a layer.

    Args:
      function: (params, x) -> y, differentiable; under `jax.checkpoint` where the run rematerializes.
      params: shapes.
      x: shape of the input, [b, ...], of one device and microbatch.
      first: whether x are the images, which need no gradient.
      platform: "cuda" or "cpu", where the run would be: which branch of `jax.lax.platform_dependent` counts.
    """
    y = jax.eval_shape(function, params, x)

    def both(params: Any, x: Any, cotangent: Any) -> Any:
        if first:
            y, vjp = jax.vjp(lambda params: function(params, x), params)
        else:
            y, vjp = jax.vjp(function, params, x)
        return y, vjp(cotangent)

    closed = jax.make_jaxpr(both)(params, x, y)
    graph = _Graph(closed.jaxpr, platform)
    weights = closed.jaxpr.invars[: len(jax.tree.leaves(params))]
    images, cotangents = closed.jaxpr.invars[len(weights)], closed.jaxpr.invars[len(weights) + 1 :]
    return graph.footprint(weights, images, cotangents)


def product_operations(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating point operations of the matrix products and convolutions of a function. arguments: shapes."""
    closed = jax.make_jaxpr(function)(*arguments)
    return sum(each.flops for each in _Graph(closed.jaxpr, "cpu").operations)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A primitive of the jaxpr without the jaxprs in it. Values are numbers."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    flops: float


class _Graph:
    """A jaxpr as a list of operations, in order, without those that nothing needs."""

    def __init__(self, jaxpr: Any, platform: str):
        self._platform = platform
        self._bytes: list[int] = []
        self._alias: dict[Any, int] = {}
        operations: list[_Operation] = []
        self._values = {var: self._new(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
        self._walk(jaxpr, self._values, operations)
        self.outputs = [self._values[v] for v in jaxpr.outvars if not isinstance(v, Literal)]
        self.operations = list(_needed(operations, self.outputs))

    def _new(self, var: Any) -> int:
        aval = var.aval
        itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
        self._bytes.append(math.prod(getattr(aval, "shape", ())) * itemsize)
        return len(self._bytes) - 1

    def _walk(self, jaxpr: Any, values: dict[Any, int], found: list[_Operation]) -> None:
        for equation in jaxpr.eqns:
            reads = [values[v] for v in equation.invars if not isinstance(v, Literal)]
            if inner := self._inner(equation):
                operands = equation.invars[1:] if equation.primitive.name == "cond" else equation.invars
                scope = {
                    var: values[operand] if not isinstance(operand, Literal) else self._new(var)
                    for var, operand in zip(inner.invars, operands, strict=True)
                }
                scope |= {var: self._new(var) for var in inner.constvars}
                self._walk(inner, scope, found)
                values |= {
                    out: self._new(out) if isinstance(result, Literal) else scope[result]
                    for out, result in zip(equation.outvars, inner.outvars, strict=True)
                }
                continue
            writes = tuple(self._new(var) for var in equation.outvars)
            values |= dict(zip(equation.outvars, writes, strict=True))
            found.append(_Operation(equation.primitive.name, tuple(reads), writes, _flops(equation)))

    def _inner(self, equation: Any) -> Any:
        """The jaxpr that the equation calls once, or None."""
        if equation.primitive.name in ("while", "scan", "pallas_call", *_REDUCTIONS):
            return None
        if equation.primitive.name == "cond":
            platforms = equation.params.get("branches_platforms")
            branches = equation.params["branches"]
            chosen = next((i for i, p in enumerate(platforms or ()) if p is None or self._platform in p), -1)
            return branches[chosen].jaxpr
        for name in _INNER:
            if name in equation.params:
                inner = equation.params[name]
                return getattr(inner, "jaxpr", inner)
        return None

    # ------------------------------------------------------------------------------------------------------- costs

    def footprint(self, weights: Sequence[Any], images: Any, cotangents: Sequence[Any]) -> Footprint:
        """What `layer_footprint` returns; the arguments are variables of the jaxpr."""
        parameters = {self._values[var] for var in weights}
        x, (y, *_) = self._values[images], self.outputs
        made_by = {value: i for i, each in enumerate(self.operations) for value in each.writes}
        constants = {v for each in self.operations for v in each.reads if v not in made_by}
        arguments = parameters | {x} | {self._values[var] for var in cotangents} | constants
        roots = self._roots(arguments, frozenset())
        border = max((made_by[value] for value in roots.get(y, ()) if value in made_by), default=-1)
        roots = self._roots(arguments, self._kept(roots, border))
        self._fuse_epilogues(roots)
        in_memory = {value for value, found in roots.items() if found == frozenset((value,))}
        made = {value: i for i, each in enumerate(self.operations) for value in each.writes if value in in_memory}
        y_roots = roots.get(y, frozenset())
        last = dict.fromkeys(made, -1) | dict.fromkeys(arguments, -1)
        for i, each in enumerate(self.operations):
            if any(value in in_memory for value in each.writes):
                for value in each.reads:
                    last |= dict.fromkeys(roots[value], i)
        for output in self.outputs[1:]:
            last |= dict.fromkeys(roots.get(output, ()), len(self.operations))
        waiting = {v for v, i in made.items() if i <= border < last[v]}
        return Footprint(
            forward=self._pass(roots, made, last, parameters, range(border + 1), waiting),
            backward=self._pass(roots, made, last, parameters, range(border + 1, len(self.operations)), waiting),
            stored=sum(self._bytes[v] for v in waiting - y_roots),
            output=self._bytes[y],
            keeps_input=last[x] > border,
            keeps_output=bool(y_roots & waiting),
            late=self._late(roots, self.outputs[1 : 1 + len(weights)], {v for v, i in made.items() if i > border}),
        )

    def _late(self, roots: Mapping[int, frozenset[int]], gradients: Sequence[int], backward: set[int]) -> int:
        """Bytes of the backward pass that the products for `gradients` read."""
        behind = set(gradients)
        read: set[int] = set()
        for each in reversed(self.operations):
            if not behind.intersection(each.writes):
                continue
            if each.name in _PRODUCTS:
                read |= frozenset().union(*(roots[v] for v in each.reads)) & backward
            else:
                behind.update(each.reads)
        return sum(self._bytes[v] for v in read)

    def _roots(self, arguments: Iterable[int], kept: frozenset[int]) -> dict[int, frozenset[int]]:
        """For each value the arrays in memory that it is computed from; an array in memory has itself alone.

        arguments: what is in memory before. kept: what is written although it could be fused.
        """
        read_whole = {v for each in self.operations if each.name in _WHOLE for v in each.reads}
        read_whole |= {*self.outputs, *kept}
        roots = {value: frozenset((value,)) for value in arguments}
        exact = set(roots)  # what is in memory as it is, or as a view
        for each in self.operations:
            before = frozenset().union(*(roots.get(v, frozenset()) for v in each.reads))
            size = sum(self._bytes[v] for v in before)
            for value in each.writes:
                view = each.name in _VIEWS and exact.issuperset(each.reads) and self._bytes[value] == size
                written = each.name in (*_WHOLE, *_REDUCTIONS) or value in read_whole
                new = written and not view and self._bytes[value] > 0
                roots[value] = frozenset((value,)) if new else before
                if new or view:
                    exact.add(value)
        return roots

    def _kept(self, roots: Mapping[int, frozenset[int]], border: int) -> frozenset[int]:
        """Of the fused values that the backward pass reads, those that are much smaller than what they are computed from.

        So max-pooling keeps the number of the largest value, a byte, and not the four values that it is computed from.
        """
        forward = {v for each in self.operations[: border + 1] for v in each.writes}
        read = {v for each in self.operations[border + 1 :] for v in each.reads} & forward
        size = {v: sum(self._bytes[root] for root in roots[v]) for v in read}
        return frozenset(v for v in read if roots[v] != frozenset((v,)) and 0 < 2 * self._bytes[v] < size[v])

    def _fuse_epilogues(self, roots: Mapping[int, frozenset[int]]) -> None:
        """Gives no bytes to a product's result that only bias and activation behind it read: one kernel computes both."""
        readers: dict[int, list[_Operation]] = {}
        for each in self.operations:
            if any(roots[v] == frozenset((v,)) for v in each.writes):
                for value in frozenset().union(*(roots[v] for v in each.reads)):
                    readers.setdefault(value, []).append(each)
        for each in self.operations:
            if each.name in _PRODUCTS and len(found := readers.get(each.writes[0], [])) == 1:
                (reader,) = found
                if reader.name not in (*_WHOLE, *_REDUCTIONS) and each.writes[0] not in self.outputs:
                    self._bytes[each.writes[0]] = 0

    def _pass(
        self,
        roots: Mapping[int, frozenset[int]],
        made: Mapping[int, int],
        last: Mapping[int, int],
        parameters: set[int],
        span: range,
        waiting: set[int],
    ) -> Pass:
        """The cost of the operations in `span`."""
        live = {v for v in waiting if made[v] < span.start}
        held, peak, moved, products, kernels, flops = sum(self._bytes[v] for v in live), 0, 0, 0, 0, 0.0
        peak = held
        for i in span:
            each = self.operations[i]
            written = [v for v in each.writes if made.get(v) == i]
            flops += each.flops
            if not written:
                continue
            read = frozenset().union(*(roots[v] for v in each.reads)) if each.reads else frozenset()
            size = sum(self._bytes[v] for v in (*read, *written))
            moved, kernels = moved + size, kernels + 1
            products += size * (each.name in _PRODUCTS)
            held += sum(self._bytes[v] for v in written)
            live |= set(written)
            peak = max(peak, held)
            gone = {v for v in live if last[v] <= i}
            held -= sum(self._bytes[v] for v in gone)
            live -= gone
        return Pass(peak, moved, products, kernels, flops)


def _needed(operations: Sequence[_Operation], outputs: Sequence[int]) -> Iterator[_Operation]:
    """The operations whose results are needed, in order."""
    needed, kept = set(outputs), []
    for each in reversed(operations):
        if needed.intersection(each.writes):
            needed.update(each.reads)
            kept.append(each)
    return reversed(kept)


def _flops(equation: Any) -> float:
    """Floating point operations of a matrix product or convolution, two for each product and sum."""
    name, params = equation.primitive.name, equation.params
    if name not in _PRODUCTS:
        return 0.0
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = math.prod(equation.outvars[0].aval.shape)
    if name == "dot_general":
        return 2.0 * out * math.prod(left[axis] for axis in params["dimension_numbers"][0][0])
    numbers = params["dimension_numbers"]
    kernel = math.prod(right) / right[numbers.rhs_spec[0]]
    return 2.0 * out * kernel / math.prod(params["lhs_dilation"])

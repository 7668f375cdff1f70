"""Counting multiply-adds on the jaxpr of a forward pass, and telling whose weights they are made with."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
from flax import nnx
from jax.extend import core as jex_core

from unified_approx.assemble import modules
from unified_approx.calling import Call, forward
from unified_approx.layers import Factored
from unified_approx.sites import Path


@dataclass(frozen=True)
class LayerCall:
    """One product, convolution or filter of data with a module's weights, as one forward pass runs it.

    Attributes:
        path: the module; () when both operands are data.
        macs: multiply-adds for the whole batch.
        input_shape: of the data operand.
        input_dtype: likewise.
        output_shape: of what comes out of it.
    """

    path: Path
    macs: int
    input_shape: tuple[int, ...]
    input_dtype: str
    output_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Source:
    """Where a value of the jaxpr comes from: the data, or only these Variables; `layer` if it is an affine output."""

    data: bool = False
    paths: frozenset[Path] = frozenset()
    layer: Path | None = None


_AFFINE = ("add", "sub", "mul", "div", "neg", "convert_element_type", "reshape")


class Walk:
    """Follows the data through a jaxpr and all that it calls.

    Attributes:
        owner: the module that a Variable's path belongs to.
        filters: modules whose elementwise products with data count too: depthwise filters.
        calls: products of data with weights, in order.
        follows: for each module whose weights meet data elementwise, the layer whose output that is, if there is one
            and only affine operations lie between.
    """

    def __init__(self, owner: Callable[[Path], Path], filters: Collection[Path] = ()):
        self.owner = owner
        self.filters = filters
        self.calls: list[LayerCall] = []
        self.follows: dict[Path, Path | None] = {}

    def run(self, jaxpr: Any, args: Sequence[_Source], times: int = 1) -> list[_Source]:
        """Follow arguments from these sources; each call counts `times` times."""
        inner = jaxpr.jaxpr if isinstance(jaxpr, jex_core.ClosedJaxpr) else jaxpr
        env: dict[Any, _Source] = dict(zip(inner.invars, args, strict=True))
        atoms = [a for eqn in inner.eqns for a in eqn.invars] + list(inner.outvars)
        uses = Counter(a for a in atoms if not isinstance(a, jex_core.Literal))

        def read(atom: Any) -> _Source:
            if isinstance(atom, jex_core.Literal):
                return _Source()
            source = env.get(atom, _Source())
            return source if uses[atom] == 1 else replace(source, layer=None)

        for eqn in inner.eqns:
            env.update(zip(eqn.outvars, self._apply(eqn, [read(a) for a in eqn.invars], times), strict=True))
        return [read(a) for a in inner.outvars]

    def _apply(self, eqn: Any, ins: list[_Source], times: int) -> list[_Source]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            fed, first, some = list(ins), params["num_consts"], any(s.data for s in ins)
            for i in range(first, first + params["num_carry"]):  # what starts as a constant may carry data later
                fed[i] = replace(fed[i], data=fed[i].data or some)
            return self.run(params["jaxpr"], fed, times * params["length"])
        if name == "while":  # the number of rounds is unknown: count one
            return self.run(params["body_jaxpr"], ins[params["cond_nconsts"] :], times)
        if name == "cond":
            return self._dearest([partial(self.run, b, ins[1:], times) for b in params["branches"]])
        for value in params.values():
            if isinstance(value, jex_core.ClosedJaxpr | jex_core.Jaxpr):
                inner = value.jaxpr if isinstance(value, jex_core.ClosedJaxpr) else value
                if len(inner.invars) == len(ins):
                    return self.run(value, ins, times)
        return [self._combine(eqn, ins, times)] * len(eqn.outvars)

    def _dearest(self, branches: Sequence[Callable[[], list[_Source]]]) -> list[_Source]:
        """Run all branches, keep the calls of the one with the most multiply-adds."""
        before, found = self.calls, []
        for branch in branches:
            self.calls = []
            outs = branch()
            found.append((sum(c.macs for c in self.calls), self.calls, outs))
        _, calls, outs = max(found, key=lambda f: f[0])
        self.calls = before + calls
        return outs

    def _combine(self, eqn: Any, ins: list[_Source], times: int) -> _Source:
        if not any(s.data for s in ins):
            return _Source(paths=frozenset().union(*(s.paths for s in ins)))
        weights = frozenset().union(*(s.paths for s in ins if not s.data))
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            data = eqn.invars[0 if ins[0].data else 1].aval
            owners = {self.owner(path) for path in weights}
            path = min(owners, key=str) if owners else ()
            out = eqn.outvars[0].aval.shape
            self.calls.append(LayerCall(path, times * _macs(eqn), data.shape, data.dtype.name, out))
            return _Source(data=True, layer=path or None)
        before = [s.layer for s in ins if s.data]
        layer = before[0] if len(before) == 1 and eqn.primitive.name in _AFFINE else None
        for path in weights:
            self.follows.setdefault(self.owner(path), layer)
        if eqn.primitive.name == "mul" and (found := {self.owner(path) for path in weights}.intersection(self.filters)):
            out = eqn.outvars[0].aval
            self.calls.append(
                LayerCall(min(found, key=str), times * prod(out.shape), out.shape, out.dtype.name, out.shape)
            )
        return _Source(data=True, layer=layer)


def _macs(eqn: Any) -> int:
    left, right = (a.aval.shape for a in eqn.invars[:2])
    out = prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * prod(left[i] for i in contracted)
    return out * prod(right) // max(1, right[eqn.params["dimension_numbers"].rhs_spec[0]])


def factored_layers(model: nnx.Module) -> dict[Path, Factored]:
    """The factored layers of a network by their (first) path."""
    return {path: module for path, module in modules(model).items() if isinstance(module, Factored)}


def walk(model: nnx.Module, example: tuple[Any, ...], call: Call | None) -> Walk:
    """Trace `call(model, *example)` and follow the data through it; nothing is run."""
    layers = factored_layers(model)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    paths = [tuple(k.key for k in keys if isinstance(k, jax.tree_util.DictKey)) for keys, _ in leaves]

    def owner(path: Path) -> Path:
        return next((path[:i] for i in range(len(path)) if path[:i] in layers), path[:-1])

    def traced(values: list[Any], *args: Any) -> Any:
        return (call or forward)(nnx.merge(graphdef, jax.tree.unflatten(tree, values)), *args)

    closed = jax.make_jaxpr(traced)([value for _, value in leaves], *example)
    walked = Walk(owner, layers)
    weights = [_Source(paths=frozenset([path])) for path in paths]
    walked.run(closed, weights + [_Source(data=True)] * (len(closed.jaxpr.invars) - len(weights)))
    return walked

"""Operations of a function exchanged, in its traced program, for faster ones of the same value."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
from jax.extend import core as jex_core
from jaxtyping import Array

Exchange = Callable[[Any], Callable[..., Array] | None]
"""Of an operation of a jaxpr what takes its place, a function of its operands; None to leave it."""

_CALLS = ("jit", "pjit")


def exchanging(function: Callable[..., Any], *exchanges: Exchange) -> Callable[..., Any]:
    """The same function of (nested) arrays, its operations exchanged; for each the first exchange that applies.

    Operations inside loops, branches and functions with derivatives of their own stay as they are. What is put in place
    must have one result.
    """

    def replacement(eqn: Any) -> Callable[..., Array] | None:
        return next((new for exchange in exchanges if (new := exchange(eqn)) is not None), None)

    @wraps(function)
    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        if _applies(closed.jaxpr, replacement):
            outputs = _evaluate(closed.jaxpr, closed.consts, leaves, replacement)
        else:
            outputs = jex_core.jaxpr_as_fun(closed)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


def _applies(jaxpr: Any, replacement: Exchange) -> bool:
    inner = (eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name in _CALLS)
    return any(replacement(eqn) is not None for eqn in jaxpr.eqns) or any(_applies(part, replacement) for part in inner)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], replacement: Exchange) -> list[Any]:
    """As `jax.extend.core.jaxpr_as_fun`, but for what is replaced."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if (new := replacement(eqn)) is not None:
            outputs = [new(*inputs).astype(eqn.outvars[0].aval.dtype)]
        elif eqn.primitive.name in _CALLS:
            inner = eqn.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, replacement)
        else:
            found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

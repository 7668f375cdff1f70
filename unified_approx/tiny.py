"""Convolutions to very small images, run as patches times matrix: XLA's are tens of times slower on CPU."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from math import prod
from typing import Any

import jax
from jax.extend import core as jex_core
from jaxtyping import Array, Float

from unified_approx.im2col import Geometry, is_channels_last, patches

TINY = 8  # output positions; at 2x2 the convolution runs at 2 GFLOP/s, patches times matrix at 145
_CALLS = ("jit", "pjit")


def tiny_convolution(eqn: Any) -> Geometry | None:
    """The geometry of a plain convolution to so small an image; None of any other operation of a jaxpr."""
    if eqn.primitive.name != "conv_general_dilated":
        return None
    params, (x, kernel) = eqn.params, (v.aval for v in eqn.invars)
    axes = x.ndim - 2
    plain = (
        is_channels_last(params["dimension_numbers"], axes)
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and all(pad >= 0 for pair in params["padding"] for pad in pair)
    )
    if not plain or prod(eqn.outvars[0].aval.shape[1:-1]) > TINY:
        return None
    *window, c_in, c_out = kernel.shape
    return Geometry(
        tuple(window), c_in, c_out, params["window_strides"], tuple(params["padding"]), params["rhs_dilation"]
    )


@partial(jax.jit, static_argnums=2)
def by_patches(
    x: Float[Array, "batch *spatial c_in"], kernel: Float[Array, "*window c_in c_out"], geometry: Geometry
) -> Float[Array, "batch *out c_out"]:
    """The convolution as a matrix product."""
    return patches(x, geometry) @ kernel.reshape(-1, geometry.c_out)


def as_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of (nested) arrays with its tiny convolutions as matrix products; differentiable as before.

    Convolutions inside loops, branches and functions with derivatives of their own stay as they are.
    """

    @wraps(function)
    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        evaluate = _products_as_fun if _has_tiny(closed.jaxpr) else jex_core.jaxpr_as_fun
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(closed)(*jax.tree.leaves(args)))

    return run


def _has_tiny(jaxpr: Any) -> bool:
    inner = (eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name in _CALLS)
    return any(map(tiny_convolution, jaxpr.eqns)) or any(map(_has_tiny, inner))


def _products_as_fun(closed: Any) -> Callable[..., list[Any]]:
    """As `jax.extend.core.jaxpr_as_fun`, but for the tiny convolutions."""
    return lambda *args: _evaluate(closed.jaxpr, closed.consts, args)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if (geometry := tiny_convolution(eqn)) is not None:
            outputs = [by_patches(*inputs, geometry).astype(eqn.outvars[0].aval.dtype)]
        elif eqn.primitive.name in _CALLS:
            outputs = _products_as_fun(eqn.params["jaxpr"])(*inputs)
        else:
            found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

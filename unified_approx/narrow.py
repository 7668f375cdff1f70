"""Layers and batch normalisations with fewer channels, and layers as dense ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from solvers.extract import with_gauge
from solvers.terms import Dense, LowRank, MatrixShape, Term
from unified_approx.assemble import homes, put
from unified_approx.im2col import kernel_to_matrix
from unified_approx.layers import Factored, factored_class, geometry_of
from unified_approx.layers.factored import AUTO
from unified_approx.macs import factored_layers

_REMOVED = "removed"  # an attribute of the batch norms made here, which Flax does not know

Layer = nnx.Conv | nnx.Linear | Factored


def terms_of(layer: Layer) -> tuple[Term, ...]:
    """What a layer's matrix is the sum of, in float32; for a dense layer one term."""
    if isinstance(layer, Factored):
        return tuple(term.term() for term in layer.terms)
    return (Dense(np.asarray(kernel_to_matrix(layer.kernel[...]), np.float32)),)


def shape_of(layer: Layer) -> MatrixShape:
    """The layer as a matrix."""
    if isinstance(layer, Factored):
        return layer.geometry.matrix_shape
    *window, c_in, c_out = layer.kernel.shape
    return MatrixShape(tuple(window), c_in, c_out)


def dense_layer(layer: Factored) -> nnx.Conv | nnx.Linear:
    """A Flax layer that computes the same."""
    g = layer.geometry
    options = {"use_bias": layer.bias is not None, "dtype": layer.dtype}

    def make() -> nnx.Conv | nnx.Linear:
        if not g.window:
            return nnx.Linear(g.c_in, g.c_out, **options, rngs=nnx.Rngs(0))
        more = {"strides": g.strides, "padding": g.padding, "kernel_dilation": g.dilation}
        return nnx.Conv(g.c_in, g.c_out, g.window, **more, **options, rngs=nnx.Rngs(0))

    new = nnx.eval_shape(make)  # an initialiser would be compiled for every shape
    new.kernel = nnx.Param(layer.kernel())
    if layer.bias is not None:
        new.bias = nnx.Param(layer.bias[...])
    return new


def as_dense(model: nnx.Module) -> nnx.Module:
    """The network with a Flax layer that computes the same in place of every factored one; the others are shared."""
    new = nnx.clone(model)
    for path, layer in factored_layers(model).items():
        dense = dense_layer(layer)
        for home in homes(model, path):
            new = put(new, home, dense)
    return new


def narrow_layer(layer: Layer, rows: Int[np.ndarray, " n"], channels: Int[np.ndarray, " c_in"]) -> Factored:
    """The layer with these output channels only, on these input channels only.

    Args:
        layer: one that `geometry_of` accepts, or a factored one.
        rows: the output channels that stay, increasing.
        channels: the input channels that stay, increasing; the terms must read no others.

    Returns:
        A factored layer; a dense one keeps its values, as one term.
    """
    factored = isinstance(layer, Factored)
    geometry = layer.geometry if factored else geometry_of(layer)
    param_dtype = layer.spec()["param_dtype"] if factored else layer.param_dtype
    terms = []
    for term in terms_of(layer):
        cut = term.with_rows(rows)
        lost_gauge = isinstance(cut, LowRank) and isinstance(term, LowRank) and len(term.pivots) > len(cut.pivots)
        if isinstance(cut, LowRank) and lost_gauge and jnp.dtype(param_dtype) == jnp.float32:
            cut = with_gauge(cut)  # rounded anew, which smaller dtypes would show
        terms.append(cut.with_channels(channels, geometry.matrix_shape))
    removed = (geometry.c_in - len(channels), geometry.c_out - len(rows))
    before = layer.removed if factored else (0, 0)
    new = factored_class(geometry).from_terms(
        terms,
        None if layer.bias is None else layer.bias[...][rows],
        replace(geometry, c_in=len(channels), c_out=len(rows)),
        dtype=layer.dtype,
        param_dtype=param_dtype,
        removed=(before[0] + removed[0], before[1] + removed[1]),
    )
    return run_as(new, layer) if factored else new


def run_as(new: Factored, old: Factored) -> Factored:
    """In the old layer's form, if that was not the automatic choice and there still is such a form."""
    chosen = old.with_execution(AUTO).execution != old.execution and old.execution in new.executions()
    return new.with_execution(old.execution) if chosen else new


def narrow_norm(norm: nnx.BatchNorm, kept: Int[np.ndarray, " features"]) -> nnx.BatchNorm:
    """A copy with these features only; it may have shapes in place of arrays."""
    new = nnx.clone(norm)
    for name in ("scale", "bias", "mean", "var"):
        variable = getattr(norm, name)
        if variable is not None:
            setattr(new, name, variable.replace(_take(variable.get_value(), kept)))
    new.num_features = len(kept)
    setattr(new, _REMOVED, removed_features(norm) + norm.num_features - len(kept))
    return new


def _take(value: jax.Array | jax.ShapeDtypeStruct, kept: np.ndarray) -> jax.Array | jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(kept.shape, value.dtype) if isinstance(value, jax.ShapeDtypeStruct) else value[kept]


def removed_features(norm: nnx.BatchNorm) -> int:
    """How many features `narrow_norm` took from a batch norm."""
    return getattr(norm, _REMOVED, 0)

"""Tucker-2 and CP as forms of a layer: features chosen on the Gram matrix; refit and refinement are shared by all."""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from solvers.candidates import Candidate, Context
from solvers.factor_sizes import Ranks, check_ranks, full_ranks, largest_ranks, mode_tails, refusal
from solvers.structure import Structure, feature_structure
from solvers.tensor import QUICK, padded, products
from solvers.tensor_extract import extract_cp, extract_tucker2
from solvers.tensor_features import FeatureOptions, cp_features, tucker2_inputs, whitened_tensor


@partial(jax.jit, static_argnames="places", compiler_options=QUICK)
def _tucker2_structure(gram: Array, first: Array, ranks: Array, places: int) -> Structure:
    features = jnp.kron(jnp.eye(places, dtype=gram.dtype), first)
    used = jnp.tile(jnp.arange(first.shape[0], dtype=jnp.int32) < ranks[1], places)
    found = feature_structure(gram, features, used)
    return replace(found, free=jnp.zeros_like(found.free), rank=ranks[0])


@partial(jax.jit, compiler_options=QUICK)
def _cp_structure(gram: Array, factors: tuple[Array, ...], rank: Array) -> Structure:
    used = jnp.arange(factors[0].shape[0], dtype=jnp.int32) < rank
    return feature_structure(gram, products(factors), used)


whitened = jax.jit(whitened_tensor, static_argnums=2, compiler_options=QUICK)


def wanted_ranks(context: Context, form: str) -> Ranks | None:
    """The context's ranks, or the largest that its budget pays for; None if the form does not fit the layer at all."""
    shape = context.shape
    if context.ranks is not None:
        check_ranks(form, shape, context.ranks)
        return context.ranks
    if refusal(form, shape) or context.group == "channel":  # they read every channel
        return None
    tails: Any = (np.zeros(0), np.zeros(0))
    if form == "tucker2":
        tails = mode_tails(np.asarray(whitened(context.stats.gram, context.w, shape.c_in)))
    found = largest_ranks(form, shape, context.budget, tails)
    most = full_ranks(form, shape)
    return found and tuple(context.rounded(r, m) for r, m in zip(found, most, strict=True))


def tucker2_form(context: Context) -> Candidate | None:
    """Tucker-2: fewer channels, the window on these, all outputs."""
    ranks, shape = wanted_ranks(context, "tucker2"), context.shape
    if ranks is None:
        return None
    places = prod(shape.window)
    size = (padded(ranks[0], shape.n), padded(ranks[1], shape.c_in))
    chosen, options = jnp.asarray(ranks, jnp.int32), FeatureOptions.for_size(shape.p)
    first = tucker2_inputs(context.stats, context.w, chosen, places=places, size=size, options=options)
    structure = _tucker2_structure(context.stats.gram, first, chosen, places)
    kept = np.asarray(first)[: ranks[1]]
    return Candidate(structure, lambda m: extract_tucker2(m, kept, ranks[0], shape))


def _cp_form(context: Context, form: str, filters: tuple[int, ...]) -> Candidate | None:
    ranks, shape = wanted_ranks(context, form), context.shape
    if ranks is None:
        return None
    (rank,), modes = ranks, (*filters, shape.c_in)
    size, options = padded(rank, max(rank, full_ranks(form, shape)[0])), FeatureOptions.for_size(shape.p)
    factors = cp_features(context.stats, context.w, rank, modes=modes, size=min(size, shape.p), options=options)
    structure = _cp_structure(context.stats.gram, factors, jnp.asarray(rank, jnp.int32))
    kept = tuple(np.asarray(f)[:rank] for f in factors)
    return Candidate(structure, lambda m: extract_cp(m, kept, shape))


def cp3_form(context: Context) -> Candidate | None:
    """CP of outputs, places and inputs: one filter of the window per component."""
    return _cp_form(context, "cp3", (prod(context.shape.window),))


def cp4_form(context: Context) -> Candidate | None:
    """CP of outputs, height, width and inputs: separable filters."""
    return _cp_form(context, "cp4", context.shape.window)

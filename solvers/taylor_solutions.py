"""Compression under a diagonal quadratic model, solved at once: weighted C steps, without an alternation.

With a diagonal the model is, but for a constant, 1/2 sum_i h_i (w_i - m_i)^2 with m its minimum: the problem of a C
step in which each weight has its own importance. Pruning, codebooks and signs have exact solutions; sums of these are
solved by turns.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    Codebook,
    Compression,
    FixedCodebook,
    OneOf,
    OptimalCodebook,
    PenaltyL0,
    PruneGroups,
    PruneL0,
    PruneNofM,
    ScaledBinary,
    ScaledTernary,
)
from solvers.compressions.base import FLOAT_BITS, Theta
from solvers.compressions.checks import count_of
from solvers.compressions.one_of import Choice
from solvers.compressions.optimal_codebook import optimal_centers
from solvers.compressions.quantization import Scaled, nearest
from solvers.selection import largest
from solvers.taylor import Taylor

Values = Float[Array, "..."]

_minimum, _saliency = jax.jit(Taylor.minimum), jax.jit(Taylor.saliency)


@jax.jit
def _kept(model: Taylor, mask: Bool[np.ndarray | Array, "..."]) -> Values:
    """The chosen weights at the minimum, the others 0; none for which 0 is as good."""
    return jnp.where(mask & (_saliency(model) > 0), _minimum(model), 0)


def prune(form: PruneL0, model: Taylor) -> Values:
    """The `kappa` weights of largest saliency, at the model's minimum: exact, as the sum of saliencies is what is lost.

    Raises:
        ValueError: kappa above the number of weights.
    """
    kappa = count_of("kappa", form.kappa, model.w.size, "weights")
    saliency = np.asarray(_saliency(model))
    return _kept(model, largest(saliency.reshape(-1), kappa).reshape(saliency.shape))


def prune_penalty(form: PenaltyL0, model: Taylor) -> Values:
    """The weights whose saliency is above alpha."""
    return _kept(model, np.asarray(_saliency(model) > form.alpha))


def prune_groups(form: PruneGroups, model: Taylor) -> Float[Array, "n p"]:
    """The groups of largest total saliency.

    Raises:
        ValueError: kappa above the number of groups.
    """
    shape = model.w.shape
    kappa = count_of("kappa", form.kappa, form.grouping.count(shape), form.grouping.name)
    gains = jnp.sqrt(jnp.maximum(_saliency(model), 0))
    mask = largest(np.asarray(form.grouping.norms(gains)), kappa)
    return _kept(model, np.asarray(form.grouping.expand(jnp.asarray(mask), shape)))


def prune_n_of_m(form: PruneNofM, model: Taylor) -> Values:
    """In every block the n weights of largest saliency."""
    blocks = np.asarray(_saliency(model)).reshape(-1, form.m)
    order = np.argsort(-blocks, axis=1, kind="stable")[:, : form.n]
    mask = np.zeros(blocks.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return _kept(model, mask.reshape(model.w.shape))


def importance(model: Taylor) -> Values:
    """The curvatures, or ones if all of the model is flat: then every weight counts alike."""
    curvature = model.curvature()
    return jnp.where(jnp.any(curvature > 0), curvature, jnp.ones_like(curvature))


def quantize(form: AdaptiveCodebook | OptimalCodebook, model: Taylor) -> Codebook:
    """The best codebook there is: weighted k-means on the line of the minima, solved exactly.

    Raises:
        ValueError: k above the number of weights.
    """
    if form.k > model.w.size:
        raise ValueError(f"k: {form.k} values for {model.w.size} weights; give at most that many")
    points, weights = (np.asarray(a).reshape(-1) for a in (_minimum(model), importance(model)))
    centers = jnp.asarray(optimal_centers(points, form.k, weights), model.w.dtype)
    return Codebook(centers, nearest(_minimum(model), centers))


def quantize_fixed(form: FixedCodebook, model: Taylor) -> Theta:
    """The value nearest to the minimum, whatever its weight; for {-1, 1} its sign."""
    return form.compress(_minimum(model), 0.0)


def binarize(form: ScaledBinary, model: Taylor) -> Scaled:
    """Signs of the minima; the scale is the weighted mean of their sizes. No other signs can be better at any scale."""
    points, weights = _minimum(model), importance(model)
    scale = jnp.sum(weights * jnp.abs(points)) / jnp.sum(weights)
    return Scaled(scale, jnp.where(points < 0, -1, 1).astype(jnp.int8))


def ternarize(form: ScaledTernary, model: Taylor) -> Scaled:
    """{-c, 0, c}, by enumeration of the breakpoints: at a scale c the weights with |m| > c/2 are not zero.

    So only the j largest |m| have to be tried, j = 1 ... d; with their weights h the best c is sum h|m| / sum h, and
    the model falls by (sum h|m|)^2 / (2 sum h).
    """
    points, weights = (np.asarray(a, np.float64).reshape(-1) for a in (_minimum(model), importance(model)))
    size = np.abs(points)
    order = np.argsort(-size, kind="stable")
    mass, pull = np.cumsum(weights[order]), np.cumsum((weights * size)[order])
    gain = np.where(mass > 0, pull**2 / np.where(mass > 0, mass, 1), 0)
    j = int(np.argmax(gain))
    signs = np.zeros(size.shape, np.int8)
    signs[order[: j + 1]] = np.sign(points[order[: j + 1]])
    scale = pull[j] / mass[j] if mass[j] > 0 else 0.0
    return Scaled(jnp.asarray(scale, model.w.dtype), jnp.asarray(signs.reshape(model.w.shape)))


def add(form: Additive, model: Taylor) -> tuple[Theta, ...]:
    """By turns: each part solved exactly with the others fixed, so that the loss never rises."""
    thetas: list[Theta] = [None] * len(form.parts)
    values = [jnp.zeros_like(model.w) for _ in form.parts]
    for _ in range(form.rounds):
        for i, part in enumerate(form.parts):
            others = sum((v for j, v in enumerate(values) if j != i), start=jnp.zeros_like(model.w))
            thetas[i] = solve(part, Taylor(model.w - others, model.g, model.h))
            values[i] = part.decompress(thetas[i]).astype(model.w.dtype)
    return tuple(thetas)


def choose(form: OneOf, model: Taylor) -> Choice:
    """The form of lowest loss, of equals the first."""
    thetas = tuple(solve(part, model) for part in form.parts)
    losses = jnp.stack([_loss(part, theta, model) for part, theta in zip(form.parts, thetas, strict=True)])
    return Choice(jnp.argmin(losses).astype(jnp.int32), thetas)


def _loss(form: Compression, theta: Theta, model: Taylor) -> Float[Array, ""]:
    values = form.decompress(theta).astype(model.w.dtype)
    return model.value(values) + form.penalty(theta).astype(model.w.dtype)


SOLUTIONS: Mapping[type, Callable[[Any, Taylor], Theta]] = {
    AdaptiveCodebook: quantize,
    Additive: add,
    FixedCodebook: quantize_fixed,
    OneOf: choose,
    OptimalCodebook: quantize,
    PenaltyL0: prune_penalty,
    PruneGroups: prune_groups,
    PruneL0: prune,
    PruneNofM: prune_n_of_m,
    ScaledBinary: binarize,
    ScaledTernary: ternarize,
}
"""A new one is a function above and a line here."""


def is_solvable(form: Compression) -> bool:
    """Whether `solve` takes the form."""
    if isinstance(form, Additive | OneOf):
        return all(is_solvable(part) for part in form.parts)
    if isinstance(form, PruneL0):
        return form.precision == FLOAT_BITS
    return type(form) in SOLUTIONS


def solve(form: Compression, model: Taylor) -> Theta:
    """argmin over theta of model.value(Delta(theta)) + penalty(theta): global, but for sums, which are solved by turns.

    Raises:
        ValueError: a form without a solution of this kind, or a size that is out of range.
    """
    if not is_solvable(form):
        raise ValueError(f"form: {form} has no solution in closed form; use `solvers.taylor.alternate`")
    return SOLUTIONS[type(form)](form, model)

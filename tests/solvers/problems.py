"""Small layer problems that several tests share."""

import jax.numpy as jnp
import numpy as np

from solvers.reconstruction import LayerProblem
from solvers.terms import MatrixShape

N, P = 5, 7


def make_problem(d: int, *, offset: bool = False, weights: bool = False, seed: int = 0) -> LayerProblem:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, P)) @ rng.normal(size=(P, P)) + rng.normal(size=P)
    w = rng.normal(size=(N, P))
    s = rng.normal(size=(d, N)) if offset else None
    h = x @ w.T + 0.5 + (0 if s is None else s)
    return LayerProblem(
        x=jnp.asarray(x),
        y=jnp.maximum(jnp.asarray(h), 0),
        response=jnp.asarray(h),
        bias=jnp.zeros(N),
        offset=None if s is None else jnp.asarray(s),
        weights=jnp.arange(1.0, N + 1) if weights else None,
    )


def near_low_rank(shape: MatrixShape, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(Rows of correlated non-negative features, the same matrix for every seed: near low rank)."""
    world, rng = np.random.default_rng(7), np.random.default_rng(seed)
    n, p = shape.n, shape.p
    mix = world.normal(size=(p, p)) * np.geomspace(1, 0.05, p)
    w = world.normal(size=(n, 5)) @ world.normal(size=(5, p)) / np.sqrt(p) + 0.1 * world.normal(size=(n, p))
    return np.maximum(rng.normal(size=(d, p)) @ mix.T, 0).astype(np.float32), w.astype(np.float32)

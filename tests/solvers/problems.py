"""Small layer problems that several tests share."""

import jax.numpy as jnp
import numpy as np

from solvers.reconstruction import LayerProblem

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

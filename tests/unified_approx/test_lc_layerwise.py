"""One layer by LC against the ADMM core: the same problem, the same optimum."""

import jax.numpy as jnp
import numpy as np
import pytest

from solvers.activation import IDENTITY, RELU
from solvers.admm import solve
from solvers.admm_state import AdmmOptions
from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    LowRank,
    PenaltyGroups,
    PenaltyNuclear,
    PruneGroups,
    PruneL0,
)
from solvers.m_step import ExactLinear
from solvers.penalties import penalized_fractions
from solvers.penalty_parameter import mean_curvature
from solvers.prox import CHANNELS
from solvers.reconstruction import LayerProblem, loss
from solvers.terms import MatrixShape
from unified_approx.learning_compression import LayerLStep, compress_layer, exponential


def problem(activation=IDENTITY, d=400, n=6, p=18, seed=0):
    """A layer whose matrix is column-sparse plus low-rank plus noise, on correlated features."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, 2)) @ rng.normal(size=(2, p)) * 0.4 + 0.05 * rng.normal(size=(n, p))
    w[:, :4] += rng.normal(size=(n, 4))
    x = rng.normal(size=(d, p)) @ (np.eye(p) + 0.2 * rng.normal(size=(p, p)))
    bias = 0.1 * rng.normal(size=n)
    response = x @ w.T + bias
    y = np.maximum(response, 0) if activation == RELU else response
    arrays = {"x": x, "y": y, "bias": bias, "response": response}
    own = LayerProblem(**{k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}, activation=activation)
    return own, jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.05, 0.12)])
def test_the_papers_split_by_both_engines(fractions):
    """min L(a + b) + lambda1 sum ||a_g|| + lambda2 ||b||_*, convex: objectives agree to 1e-3."""
    own, w = problem()
    penalty = penalized_fractions(own, *fractions)
    core = solve(own, penalty, options=AdmmOptions(splitting="two_block", max_steps=2000, rtol=1e-5))
    parts = (PenaltyGroups(float(penalty.lambda_sparse)), PenaltyNuclear(float(penalty.lambda_rank)))
    form = Additive(parts, rounds=30)
    mus = exponential(float(mean_curvature(own)), 1.0, 100)
    found = compress_layer(own, w, form, mus, m_step=ExactLinear(), iterations=1)
    theta = found.thetas[0]
    objective = float(loss(own, form.decompress(theta)) + form.penalty(theta))
    assert objective == pytest.approx(float(core.objective), rel=1e-3)
    assert objective == pytest.approx(found.history[found.best].loss + found.history[found.best].penalty, rel=1e-5)
    assert objective < 0.9 * float(loss(own, jnp.zeros_like(w)))


@pytest.mark.parametrize(
    "form",
    [
        PruneL0(30),
        AdaptiveCodebook(4),
        LowRank(2, "spatial"),
        PruneGroups(2, CHANNELS),
        Additive((PruneGroups(4), LowRank(1))),
    ],
)
def test_every_compression_is_a_layerwise_one(form):
    """After a ReLU: better than direct compression in the same units, and as sparse, quantized or flat as asked."""
    own, w = problem(RELU)
    mus = exponential(0.1 * float(mean_curvature(own)), 1.25, 20)
    shape = MatrixShape((2, 3), 3, 6)
    found = compress_layer(own, w, form, mus, shape=shape)
    first, best = found.history[0].loss, found.history[found.best].loss
    assert best < 0.7 * first
    m = found.pieces[0].compression.decompress(found.thetas[0])
    assert best == pytest.approx(float(loss(own, m)), rel=1e-4)
    np.testing.assert_allclose(found.model.kernel[...].reshape(18, 6).T, m, atol=1e-6)


def test_bad_layers():
    own, w = problem(RELU)
    with pytest.raises(ValueError, match="ExactLinear is for layers without one"):
        compress_layer(own, w, PruneL0(3), [1.0], m_step=ExactLinear())
    with pytest.raises(ValueError, match="iterations: 0"):
        LayerLStep(own, iterations=0)

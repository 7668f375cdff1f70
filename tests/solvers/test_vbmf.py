"""Analytic solutions against the free energy itself, minimised by brute force; ranks that are known by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from solvers.vbmf import evbmf, vbmf

L, M, H = 3, 5, 2
NOISE = 0.3


def signal(rows, columns, rank, noise, seed=0):
    """Entries of unit variance, of that rank, in noise of that standard deviation."""
    rng = np.random.default_rng(seed)
    product = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns)) / np.sqrt(max(rank, 1))
    return product + noise * rng.normal(size=(rows, columns))


def unpack(flat):
    """Means, Cholesky factors of the covariances, and the logarithms of the priors' variances and of the noise."""
    sizes = {"a": (M, H), "b": (L, H), "ca": (H, H), "cb": (H, H), "pa": (H,), "pb": (H,), "noise": ()}
    parts, start = {}, 0
    for name, shape in sizes.items():
        count = int(np.prod(shape))
        parts[name] = flat[start : start + count].reshape(shape)
        start += count
    return parts, start


def free_energy(flat, y, prior, noise):
    """Eq. 8 of the paper for q(a) q(b) with full covariances over the components. None: a variable of its own."""
    p = unpack(flat)[0]
    s2 = jnp.exp(p["noise"]) if noise is None else noise
    pa, pb = (jnp.exp(p["pa"]), jnp.exp(p["pb"])) if prior is None else (prior * jnp.ones(H), prior * jnp.ones(H))
    lower = [jnp.tril(p[k], -1) + jnp.diag(jnp.exp(jnp.diagonal(p[k]))) for k in ("ca", "cb")]
    cov_a, cov_b = (c @ c.T for c in lower)
    logdet_a, logdet_b = (2 * jnp.sum(jnp.diagonal(p[k])) for k in ("ca", "cb"))
    second_a, second_b = p["a"].T @ p["a"] + M * cov_a, p["b"].T @ p["b"] + L * cov_b
    gap = jnp.sum((y - p["b"] @ p["a"].T) ** 2) - jnp.sum((p["a"].T @ p["a"]) * (p["b"].T @ p["b"]))
    twice = L * M * jnp.log(2 * jnp.pi * s2) + (gap + jnp.sum(second_a * second_b)) / s2
    twice += M * (jnp.sum(jnp.log(pa)) - logdet_a) + L * (jnp.sum(jnp.log(pb)) - logdet_b) - (L + M) * H
    return (twice + jnp.sum(jnp.diagonal(second_a) / pa) + jnp.sum(jnp.diagonal(second_b) / pb)) / 2


@pytest.fixture(scope="module")
def brute_force():
    """(free energy, mean, noise) of the best of several local minima."""
    with jax.numpy_rank_promotion("allow"):
        both = {
            known: jax.jit(
                jax.value_and_grad(
                    lambda f, y, prior, noise, k=known: free_energy(
                        f, y, prior if k[0] else None, noise if k[1] else None
                    )
                )
            )
            for known in [(True, True), (True, False), (False, True), (False, False)]
        }

    def solve(y, prior, noise, starts=20):
        rng, count, best = np.random.default_rng(1), unpack(np.zeros(999))[1], None
        run = both[prior is not None, noise is not None]
        for level in np.linspace(-6, 1, starts):
            start = rng.normal(size=count)
            start[-1] = level
            found = minimize(
                lambda f: tuple(np.asarray(v) for v in run(f, y, prior or 1.0, noise or 1.0)),
                start,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": 400, "ftol": 1e-13, "gtol": 1e-7},
            )
            best = found if best is None or found.fun < best.fun else best
        p = unpack(best.x)[0]
        return best.fun, p["b"] @ p["a"].T, float(np.exp(p["noise"]))

    return solve


@pytest.mark.parametrize("noise", [NOISE, None])
@pytest.mark.parametrize("prior", [0.4, 3.0, None])
def test_the_free_energy_has_its_least_value_there(brute_force, prior, noise):
    y = 2 * signal(L, M, 1, 0.25, seed=5)
    found = evbmf(y, noise, max_rank=H) if prior is None else vbmf(y, prior, noise, max_rank=H)
    energy, mean, estimated = brute_force(y, prior, noise)
    assert found.free_energy == pytest.approx(energy, abs=2e-4)
    np.testing.assert_allclose(found.mean(), mean, atol=5e-3)
    assert found.rank > 0
    if noise is None:
        assert found.noise == pytest.approx(estimated, rel=5e-3)


@pytest.mark.parametrize("prior", [0.5, None])
def test_the_posterior_is_stationary(prior):
    """Each factor's mean and variance are those that the other one implies, and so are the estimated priors."""
    y = signal(12, 20, 3, 0.3)
    found = evbmf(y) if prior is None else vbmf(y, prior)
    singular = np.linalg.svd(y, compute_uv=False)[: found.rank]
    rows, columns = y.shape
    row, column, noise = found.row_variances, found.column_variances, found.noise
    length = np.sqrt(column / row)  # |a| / |b|
    a2, b2 = found.values * length, found.values / length
    np.testing.assert_allclose(column, noise / (b2 + rows * row + noise / found.priors))
    np.testing.assert_allclose(row, noise / (a2 + columns * column + noise / found.priors))
    np.testing.assert_allclose(np.sqrt(a2), column * singular * np.sqrt(b2) / noise)
    if prior is None:
        np.testing.assert_allclose(found.priors, np.sqrt((a2 / columns + column) * (b2 / rows + row)))


@pytest.mark.parametrize("shape", [(30, 120), (120, 30), (60, 60)])
@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_known_ranks_are_found_exactly(shape, rank):
    for seed in range(3):
        y = signal(*shape, rank, 0.3, seed)
        found = evbmf(y)
        assert found.rank == rank
        assert found.noise == pytest.approx(0.09, rel=0.2)
        assert evbmf(y, 0.09).rank == rank


def test_orientation_does_not_matter_and_factors_are_singular_vectors():
    y = signal(10, 24, 3, 0.2)
    one, other = evbmf(y), evbmf(y.T)
    np.testing.assert_allclose(one.mean(), other.mean().T, atol=1e-9)
    np.testing.assert_allclose(one.row_variances, other.column_variances)
    assert one.free_energy == pytest.approx(other.free_energy)
    u, s, v = np.linalg.svd(y, full_matrices=False)
    for got, want in ((one.u, u[:, :3]), (one.v.T, v[:3].T)):
        np.testing.assert_allclose(np.abs(np.sum(got * want, axis=0)), 1, atol=1e-9)
    assert (one.values < s[:3]).all()


def test_memory_is_that_of_the_smaller_side():
    """A square matrix of the larger side would be 80 GB."""
    assert evbmf(signal(4, 100_000, 1, 0.5)).rank == 1
    assert evbmf(signal(100_000, 4, 1, 0.5)).v.shape == (1, 4)


def test_more_noise_keeps_less_and_a_larger_prior_more():
    y = signal(20, 60, 8, 0.5)
    ranks = [evbmf(y, noise).rank for noise in (0.1, 0.25, 2.0, 50.0)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 0
    ranks = [vbmf(y, prior, 0.25).rank for prior in (1e-3, 0.05, 1.0)]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    assert evbmf(y, max_rank=3).rank == 3


def test_no_noise_and_nothing_at_all():
    assert evbmf(signal(20, 50, 6, 0.0)).rank == 6
    nothing = evbmf(np.zeros((3, 4)))
    assert (nothing.rank, nothing.noise) == (0, 0.0)
    assert not nothing.mean().any()
    assert evbmf(np.zeros((3, 4)), 1.0).rank == 0
    assert evbmf(np.full((1, 1), 2.0)).rank in (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: evbmf(np.full((2, 2), np.nan)), "y:"),
        (lambda y: evbmf(np.zeros((0, 3))), "y:"),
        (lambda y: evbmf(y, 0.0), "noise: 0.0"),
        (lambda y: evbmf(y, float("nan")), "noise"),
        (lambda y: evbmf(y, max_rank=4), "give 1 to 3"),
        (lambda y: vbmf(y, 0.0), "prior: 0.0"),
        (lambda y: vbmf(y, float("inf")), "prior"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((3, 5)))


@pytest.mark.parametrize("prior", [1e-3, 1e-5, 1e-8])
def test_a_narrow_prior_leaves_the_energy_of_noise_alone(prior):
    y, noise = np.random.default_rng(0).normal(size=(12, 20)), 0.25
    alone = 0.5 * (y.size * np.log(2 * np.pi * noise) + np.sum(y**2) / noise)
    found = vbmf(y, prior, noise)
    assert found.rank == 0
    np.testing.assert_allclose(found.free_energy, alone, rtol=1e4 * prior**2 + 1e-13)

"""Decompositions against planted ones, NumPy and brute force; the data-aware ones against the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from solvers import tensor as decompositions
from solvers.gram import GramStatistics, least_squares, weight_statistics
from solvers.spatial_factor import Moments
from solvers.tensor import QUICK, CpOptions, padded, products
from solvers.tensor_extract import extract_cp, extract_tucker2
from solvers.tensor_features import FeatureOptions, cp_features, last_factor, tucker2_inputs
from solvers.terms import MatrixShape

SHAPE = MatrixShape((3, 3), 5, 8)
N, S, C = 8, 9, 5
RNG = np.random.default_rng(0)
MORE = FeatureOptions(cp=CpOptions(sweeps=100, restarts=3), steps=200, rtol=1e-8)
cp = jax.jit(decompositions.cp, static_argnames=("size", "options"), compiler_options=QUICK)
tucker2 = jax.jit(decompositions.tucker2, static_argnames=("size", "sweeps"), compiler_options=QUICK)


def normal(*shape):
    return RNG.normal(size=shape)


def composed(*factors):
    """Sum of outer products, one row per component."""
    letters = "abcd"[: len(factors)]
    return np.einsum(",".join(f"r{x}" for x in letters) + f"->{letters}", *factors)


def moments_of(w, seed=1):
    """Moments of correlated inputs of unequal sizes, and the response of w."""
    p = w.shape[1]
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20 * p, p)) @ (rng.normal(size=(p, p)) * np.geomspace(1, 0.05, p)[:, None])
    gram = x.T @ x / len(x)
    arrays = {"gram": gram, "cross": w @ gram, "x_mean": np.zeros(p), "target_mean": np.zeros(len(w))}
    energy = jnp.asarray(np.sum((w @ gram) * w))
    return GramStatistics(**{k: jnp.asarray(v) for k, v in arrays.items()}, target_energy=energy)


def error_of(stats, features, rank=None):
    """Relative error of the best matrix on these features (of that rank), by NumPy."""
    gram, cross = np.asarray(stats.gram), np.asarray(stats.cross)
    chol = np.linalg.cholesky(features @ gram @ features.T)
    s = np.linalg.svd(np.linalg.solve(chol, features @ cross.T), compute_uv=False)
    return 1 - np.sum(s[:rank] ** 2) / float(stats.target_energy)


def places_of(first):
    return np.kron(np.eye(S), np.asarray(first))


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (8, 2), (2, 5)])
def test_tucker2_finds_what_was_planted(ranks):
    core = normal(ranks[0], S, ranks[1])
    tensor = jnp.asarray(np.einsum("asb,oa,cb->osc", core, normal(N, ranks[0]), normal(C, ranks[1])))
    found = tucker2(tensor, jnp.asarray(ranks), size=(N, C))
    np.testing.assert_allclose(found.energy, jnp.sum(tensor**2), rtol=1e-10)
    outer, inner = np.asarray(found.outer), np.asarray(found.inner)
    np.testing.assert_allclose(outer.T @ outer, np.diag(np.arange(N) < ranks[0]), atol=1e-9)
    projected = np.einsum("osc,oa,pa,cb,db->psd", tensor, outer, outer, inner, inner)
    np.testing.assert_allclose(projected, tensor, atol=1e-8)


def test_tucker2_is_not_worse_than_hosvd_nor_than_random_bases_improved_by_brute_force():
    tensor, ranks = normal(N, S, C), (3, 2)
    found = float(tucker2(jnp.asarray(tensor), jnp.asarray(ranks), size=(4, 4), sweeps=30).energy)
    sizes = (N * ranks[0], C * ranks[1])

    def lost(flat):
        outer, inner = (np.linalg.qr(a)[0] for a in (flat[: sizes[0]].reshape(N, -1), flat[sizes[0] :].reshape(C, -1)))
        return -np.sum(np.einsum("osc,oa,cb->asb", tensor, outer, inner) ** 2)

    best = min(minimize(lost, normal(sum(sizes)), method="BFGS").fun for _ in range(4))
    assert found >= -best * (1 - 1e-5)
    one = float(tucker2(jnp.asarray(tensor), jnp.asarray(ranks), size=(4, 4), sweeps=1).energy)
    assert one <= found * (1 + 1e-12)


@pytest.mark.parametrize("modes", [(N, S, C), (N, 3, 3, C)])
@pytest.mark.parametrize("rank", [1, 3])
def test_cp_finds_what_was_planted(modes, rank):
    planted = composed(*(normal(rank, m) for m in modes))
    factors, error = cp(jnp.asarray(planted), rank, size=4, options=CpOptions(restarts=6, sweeps=800, rtol=1e-9))
    assert error < 1e-6
    np.testing.assert_allclose(composed(*map(np.asarray, factors)), planted, atol=1e-2 * np.abs(planted).max())
    assert not any(np.asarray(f)[rank:].any() for f in factors)
    norms = np.stack([np.linalg.norm(f, axis=1) for f in factors])
    np.testing.assert_allclose(norms, np.broadcast_to(norms[:1], norms.shape), rtol=1e-6)


def test_cp_does_not_rise_and_a_start_is_gone_on_from():
    tensor = jnp.asarray(normal(N, S, C))
    errors, start = [], None
    for _ in range(6):
        start, error = cp(tensor, 4, size=4, options=CpOptions(sweeps=3, restarts=1), start=start)
        errors.append(float(error))
    assert all(b <= a * (1 + 1e-9) for a, b in zip(errors, errors[1:], strict=False))
    assert start is not None
    gap = tensor - composed(*map(np.asarray, start))
    np.testing.assert_allclose(errors[-1], jnp.sum(gap**2) / jnp.sum(tensor**2), rtol=1e-6)


def test_damping_keeps_components_from_growing_against_each_other():
    """The best rank-2 approximation of this tensor does not exist: components diverge in opposite directions."""
    a, b = np.eye(3)[0], np.eye(3)[1]
    outer = lambda x, y, z: np.einsum("i,j,k->ijk", x, y, z)  # noqa: E731
    tensor = jnp.asarray(outer(a, a, b) + outer(a, b, a) + outer(b, a, a))
    sizes = {}
    for damping in (0.0, 30.0):
        options = CpOptions(damping=damping, decay=0.97, sweeps=60, restarts=3, rtol=0.0)
        factors, error = cp(tensor, 2, size=2, options=options)
        assert error < 0.2
        sizes[damping] = float(np.prod([np.linalg.norm(f, axis=1) for f in factors], axis=0).max())
    assert np.isfinite(list(sizes.values())).all()
    assert sizes[30.0] < sizes[0.0]


def test_seeds_repeat_and_float32_works():
    tensor = jnp.asarray(normal(N, S, C))
    one, other = (cp(tensor, 3, size=4)[0] for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    single = cp(tensor.astype(jnp.float32), 3, size=4)
    assert single[0][0].dtype == jnp.float32
    np.testing.assert_allclose(single[1], cp(tensor, 3, size=4)[1], rtol=0.05)


def test_other_ranks_compile_nothing():
    tensor = jnp.asarray(normal(N, S, C))
    cp(tensor, 2, size=4)
    count = cp._cache_size()
    for rank in (1, 3, 4):
        cp(tensor, rank, size=4)
    assert cp._cache_size() == count  # pyright: ignore[reportFunctionMemberAccess]
    assert [padded(r, 64) for r in (1, 16, 17, 64)] == [16, 16, 32, 64]
    assert all(r <= padded(r, m) <= m for m in (1, 3, 17, 100) for r in range(1, m + 1))


def test_tucker2_on_the_output_is_better_there_and_the_same_without_data():
    w = normal(N, S * C)
    stats, ranks = moments_of(w), jnp.asarray((4, 2))
    size = (N, C)
    found = tucker2_inputs(stats, least_squares(stats), ranks, places=S, size=size, options=MORE)
    plain = tucker2(jnp.asarray(w.reshape(N, S, C)), ranks, size=size).inner.T
    assert not found[2:].any()
    errors = [error_of(stats, places_of(f[:2]), 4) for f in (found, plain)]
    assert errors[0] < 0.98 * errors[1]
    free = weight_statistics(jnp.asarray(w), jnp.zeros(N))
    again = tucker2_inputs(free, jnp.asarray(w), ranks, places=S, size=size, options=MORE)
    kept = [error_of(free, places_of(f[:2]), 4) for f in (again, plain)]
    np.testing.assert_allclose(kept[0], kept[1], rtol=1e-3)


@pytest.mark.parametrize("modes", [(S, C), (3, 3, C)])
def test_cp_on_the_output_is_better_there(modes):
    w = normal(N, S * C)
    stats = moments_of(w)
    found = cp_features(stats, least_squares(stats), 6, modes=modes, size=8, options=MORE)
    plain = cp(jnp.asarray(w.reshape(N, *modes)), 6, size=8, options=MORE.cp)[0][1:]
    errors = [error_of(stats, np.asarray(products(f))[:6]) for f in (found, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_features_of_the_least_error_are_stationary():
    """No small change of the features lowers the error that the best last factor leaves."""
    stats = moments_of(normal(N, S * C))
    w, ranks = least_squares(stats), jnp.asarray((4, 2))
    first = np.asarray(tucker2_inputs(stats, w, ranks, places=S, size=(N, C), options=MORE))[:2]
    factors = cp_features(stats, w, 6, modes=(S, C), size=8, options=MORE)
    best = error_of(stats, places_of(first), 4), error_of(stats, np.asarray(products(factors))[:6])
    for _ in range(20):
        moved = first + 1e-2 * np.linalg.norm(first) * normal(*first.shape)
        assert error_of(stats, places_of(moved), 4) > best[0] - 1e-6
        shaken = tuple(f + 1e-2 * jnp.linalg.norm(f) * normal(*f.shape) for f in factors)
        assert error_of(stats, np.asarray(products(shaken))[:6]) > best[1] - 1e-6


def test_last_factor_is_least_squares_and_takes_dependent_features():
    stats = moments_of(normal(N, S * C))
    rows = jnp.asarray(normal(3, S * C))
    rows = jnp.concatenate([rows, rows[:1], jnp.zeros((1, S * C))])
    used = jnp.asarray([True, True, True, True, False])
    last, _, aim = last_factor(rows, Moments(stats.gram, stats.cross), used)
    assert np.isfinite(last).all()
    explained = 1 - jnp.sum(last * aim) / stats.target_energy
    np.testing.assert_allclose(explained, error_of(stats, np.asarray(rows[:3])), rtol=1e-4)


def test_terms_come_back_out_of_their_matrix():
    first, core, last = normal(2, C), normal(3, S, 2), normal(N, 3)
    matrix = np.einsum("oa,asb,bc->osc", last, core, first).reshape(N, -1)
    (tucker,) = extract_tucker2(matrix, normal(2, 2) @ first, 3, SHAPE)
    np.testing.assert_allclose(tucker.matrix(SHAPE), matrix, atol=1e-4)
    assert (tucker.first.shape, tucker.core.shape) == ((2, C), (3, S, 2))
    np.testing.assert_allclose(
        np.linalg.norm(tucker.core, axis=(0, 1)), np.linalg.norm(tucker.first, axis=1), rtol=1e-3
    )
    for sizes, kind in (((9,), "Cp3"), ((3, 3), "Cp4")):
        factors = (*(normal(4, m) for m in sizes), normal(4, C))
        matrix = normal(N, 4) @ np.asarray(products(tuple(map(jnp.asarray, factors))))
        (term,) = extract_cp(matrix, factors, SHAPE)
        assert type(term).__name__ == kind
        np.testing.assert_allclose(term.matrix(SHAPE), matrix, atol=1e-4)
    assert extract_tucker2(0 * matrix, first, 3, SHAPE) == extract_cp(0 * matrix, factors, SHAPE) == ()
    with pytest.raises(ValueError, match="away from what is kept"):
        extract_tucker2(normal(N, S * C), first, 3, SHAPE)
    with pytest.raises(ValueError, match="NaN or Inf"):
        extract_cp(np.full((N, S * C), np.nan), factors, SHAPE)


@pytest.mark.parametrize(
    "options", [{"sweeps": 0}, {"restarts": 0}, {"damping": -1.0}, {"damping": float("nan")}, {"decay": 1.0}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CpOptions(**options)


def test_a_tensor_of_zeros():
    factors, error = cp(jnp.zeros((2, 3, 4)), 2, size=2)
    assert error == 0
    assert all(np.isfinite(f).all() for f in factors)
    assert jax.tree.all(
        jax.tree.map(
            lambda b: bool(np.isfinite(b).all()), tucker2(jnp.zeros((2, 3, 4)), jnp.asarray((1, 1)), size=(1, 1))
        )
    )

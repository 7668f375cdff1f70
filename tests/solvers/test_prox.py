import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers.prox import (
    COLUMNS,
    ENTRIES,
    ROWS,
    Grouping,
    channels,
    group_soft_threshold,
    project_groups,
    project_rank,
    singular_value_threshold,
    soft_threshold,
)

SHAPE = (6, 8)
GROUPINGS = [COLUMNS, ROWS, ENTRIES, channels(4)]


def random_matrix(seed: int, shape: tuple[int, int] = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def counted(function):
    """The function jitted, and a list that grows with every compilation."""
    traces = []

    def body(*args):
        traces.append(args)
        return function(*args)

    return jax.jit(body), traces


def nuclear_norm(v):
    return jnp.sum(jnp.linalg.svd(v, compute_uv=False))


def svt(v, tau):
    return singular_value_threshold(v, tau)[0]


# (prox, its penalty): a new prox joins the list and gets every test below.
PROXES = [
    pytest.param(soft_threshold, lambda a: jnp.sum(jnp.abs(a)), id="l1"),
    pytest.param(svt, nuclear_norm, id="nuclear"),
    *(
        pytest.param(lambda v, tau, g=g: group_soft_threshold(v, tau, g), lambda a, g=g: jnp.sum(g.norms(a)), id=g.name)
        for g in GROUPINGS
    ),
]


@pytest.mark.parametrize("shape", [(6, 8), (12, 4)])
@pytest.mark.parametrize(("prox", "penalty"), PROXES)
def test_prox_minimises_its_documented_objective(prox, penalty, shape):
    v, tau = random_matrix(0, shape), 0.7
    point = prox(v, tau)

    def objective(a):
        return tau * penalty(a) + 0.5 * jnp.sum((a - v) ** 2)

    directions = jnp.asarray(np.random.default_rng(1).normal(size=(100, *shape)))
    for size in (1e-3, 1e-1):
        assert objective(point) < jax.vmap(objective)(point[None] + size * directions).min()
    assert objective(point) < min(objective(v), objective(jnp.zeros_like(v)))


@pytest.mark.parametrize(("prox", "penalty"), PROXES)
def test_gradient_of_the_moreau_envelope_is_the_scaled_step(prox, penalty):
    v, tau, eps = random_matrix(2), 0.6, 1e-5
    direction = random_matrix(3)

    def envelope(u):
        a = prox(u, tau)
        return penalty(a) + jnp.sum((a - u) ** 2) / (2 * tau)

    slope = (envelope(v + eps * direction) - envelope(v - eps * direction)) / (2 * eps)
    np.testing.assert_allclose(slope, jnp.sum((v - prox(v, tau)) / tau * direction), rtol=1e-7)


@pytest.mark.parametrize(("prox", "penalty"), PROXES)
def test_prox_at_the_ends(prox, penalty):
    v = random_matrix(4)
    np.testing.assert_allclose(prox(v, 0.0), v, atol=1e-12)
    np.testing.assert_array_equal(prox(v, 1e3), jnp.zeros_like(v))
    zero = prox(jnp.zeros_like(v), 0.5)
    np.testing.assert_array_equal(zero, jnp.zeros_like(v))


def test_l1_is_the_group_threshold_of_entries():
    v = random_matrix(5)
    np.testing.assert_allclose(soft_threshold(v, 0.4), group_soft_threshold(v, 0.4, ENTRIES), atol=1e-14)


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda g: g.name)
def test_groups_partition_the_entries(grouping):
    v = random_matrix(6)
    norms = grouping.norms(v)
    assert norms.shape == (grouping.count(SHAPE),)
    np.testing.assert_allclose(jnp.sum(norms**2), jnp.sum(v**2))
    labels = grouping.expand(jnp.arange(norms.size, dtype=v.dtype), SHAPE)
    by_label = [jnp.linalg.norm(v[labels == i]) for i in range(norms.size)]
    np.testing.assert_allclose(norms, jnp.stack(by_label))
    rank = max(np.linalg.matrix_rank(np.where(labels == i, v, 0)) for i in range(norms.size))
    assert rank == grouping.max_rank(SHAPE)


def test_a_channel_owns_every_c_in_th_column():
    labels = channels(3).expand(jnp.arange(3.0), (2, 6))
    np.testing.assert_array_equal(labels[0], [0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda g: g.name)
def test_projection_keeps_the_largest_groups_for_a_traced_number(grouping):
    v = random_matrix(7)
    norms = np.asarray(grouping.norms(v))
    project, traces = counted(lambda v, k: project_groups(v, k, grouping))
    for k in (0, 1, 2, norms.size - 1, norms.size):
        point = project(v, k)
        kept = np.asarray(grouping.norms(point)) > 0
        assert kept.sum() == k
        assert set(np.flatnonzero(kept)) == set(np.argsort(-norms)[:k])
        np.testing.assert_array_equal(point, np.where(grouping.expand(jnp.asarray(kept), SHAPE), v, 0))
    assert len(traces) == 1


def test_projection_breaks_ties_by_index_and_survives_zeros():
    np.testing.assert_array_equal(project_groups(jnp.ones((2, 5)), 2), [[1, 1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(project_groups(jnp.zeros((2, 5)), 3), np.zeros((2, 5)))


@pytest.mark.parametrize("shape", [(6, 8), (12, 4)])
def test_rank_projection_is_the_truncated_svd_for_a_traced_rank(shape):
    v = random_matrix(8, shape)
    u, s, vh = np.linalg.svd(np.asarray(v), full_matrices=False)
    project, traces = counted(project_rank)
    for rank in (0, 1, 3, 4):
        point, sigma = project(v, rank)
        np.testing.assert_allclose(point, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-12)
        np.testing.assert_allclose(sigma[:rank], s[:rank])
        assert not np.any(sigma[rank:])
    assert len(traces) == 1


def test_singular_values_are_those_of_the_svd():
    v = random_matrix(9)
    sigma = np.linalg.svd(np.asarray(v), compute_uv=False)
    np.testing.assert_allclose(singular_value_threshold(v, 1.0)[1], np.maximum(sigma - 1, 0), atol=1e-12)


def test_float32_resolves_singular_values_below_the_gram_noise():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    w, _ = np.linalg.qr(rng.normal(size=(40, 5)))
    sigma = np.array([1, 0.3, 1e-2, 5e-4, 5e-5])  # the last is far below 3.5e-4
    v = jnp.asarray((u * sigma) @ w.T, jnp.float32)
    point, shrunk = singular_value_threshold(v, jnp.float32(2e-4))
    assert point.dtype == jnp.float32
    np.testing.assert_allclose(shrunk, np.maximum(sigma - 2e-4, 0), atol=2e-5)
    np.testing.assert_allclose(point, (u * np.maximum(sigma - 2e-4, 0)) @ w.T, atol=2e-5)
    assert int(jnp.sum(shrunk > 0)) == 4


def test_vmap_is_a_loop():
    v = jnp.stack([random_matrix(i) for i in range(3)])
    for prox in (lambda u: svt(u, 0.5), lambda u: project_groups(u, 3), lambda u: project_rank(u, 2)[0]):
        np.testing.assert_allclose(jax.vmap(prox)(v), jnp.stack([prox(u) for u in v]), atol=1e-12)


def test_a_grouping_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="p=8 columns are not a multiple of c_in=3"):
        channels(3).norms(random_matrix(0))
    with pytest.raises(ValueError, match="c_in=0"):
        channels(0)
    assert hash(channels(3)) == hash(Grouping("channels", (0, 1), 3))

import numpy as np
import pytest

from solvers import extract
from solvers.extract import extract_dense, extract_spatial, extract_two_level
from solvers.terms import Columns, Dense, LowRank, MatrixShape, Spatial

N, P = 9, 24
SHAPE = MatrixShape((), P, N)


def total(terms: tuple, shape: MatrixShape) -> np.ndarray:
    return sum((t.matrix(shape).astype(np.float64) for t in terms), np.zeros((shape.n, shape.p)))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def two_level(rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(P)
    free, tail = np.isin(np.arange(P), order[:5]), np.isin(np.arange(P), order[5:17])
    m = np.zeros((N, P))
    m[:, free] = rng.normal(size=(N, 5))
    m[:, tail] = rng.normal(size=(N, rank)) @ rng.normal(size=(rank, 12))
    return m, free, tail


def spatial(window: tuple[int, int], c_in: int, rank: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rank)
    p, q = window[0] * window[1] * c_in, window[1] * c_in
    first = rng.normal(size=(rank, q))
    columns = np.isin(np.arange(p), rng.permutation(p)[:k])
    m = np.einsum("ois,sq->oiq", rng.normal(size=(N, window[0], rank)), first).reshape(N, p)
    m[:, columns] += rng.normal(size=(N, k))
    return m, np.concatenate([first, np.zeros((3, q))]), columns


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_two_level_round_trip_and_cost(rank, gauge):
    m, free, tail = two_level(rank)
    columns, low_rank = extract_two_level(m, free, tail, rank, gauge=gauge)
    assert isinstance(columns, Columns)
    assert isinstance(low_rank, LowRank)
    assert distance(total((columns, low_rank), SHAPE), m) < 1e-6
    assert columns.num_params + low_rank.num_params == N * 5 + rank * 12 + rank * (N - gauge * rank)
    assert low_rank.rank == rank
    assert len(low_rank.pivots) == gauge * rank
    assert {columns.values.dtype, low_rank.u.dtype, low_rank.v.dtype} == {np.dtype(np.float32)}
    assert {columns.indices.dtype, low_rank.indices.dtype, low_rank.pivots.dtype} == {np.dtype(np.int32)}


def test_pivots_keep_the_entries_small():
    m, free, tail = two_level(4)
    low_rank = extract_two_level(m, free, tail, 4, gauge=True)[1]
    assert np.abs(low_rank.u).max() < 3


def test_the_best_low_rank_part_is_kept_when_noise_is_added():
    m, free, tail = two_level(3)
    noisy = m + 1e-5 * np.random.default_rng(1).normal(size=m.shape) * (free | tail)[None, :]
    terms = extract_two_level(noisy, free, tail, 3, gauge=True)
    assert distance(total(terms, SHAPE), noisy) < 1e-4


def test_large_matrices_are_factored_through_their_range(monkeypatch):
    rng = np.random.default_rng(0)
    m = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 70)) + 1e-7 * rng.normal(size=(60, 70))
    everywhere, nowhere = np.ones(70, bool), np.zeros(70, bool)
    full = extract_two_level(m, nowhere, everywhere, 3, gauge=False)
    monkeypatch.setattr(extract, "_SKETCH_FROM", 50)
    monkeypatch.setattr(np.linalg, "svd", _small_only(np.linalg.svd))
    sketched = extract_two_level(m, nowhere, everywhere, 3, gauge=False)
    shape = MatrixShape((), 70, 60)
    assert sketched[0].rank == 3
    assert distance(total(sketched, shape), total(full, shape)) < 1e-6


def _small_only(svd):
    def checked(a, **options):
        assert min(a.shape) <= 3 + 16
        return svd(a, **options)

    return checked


def test_a_rank_that_is_not_there_is_not_stored():
    m, free, tail = two_level(2)
    low_rank = extract_two_level(m, free, tail, 6, gauge=False)[1]
    assert low_rank.rank == 2


@pytest.mark.parametrize("gauge", [False, True])
def test_empty_terms_are_left_out(gauge):
    m, free, tail = two_level(3)
    nothing = np.zeros(P, bool)
    only_columns = extract_two_level(m * free, free, nothing, 3, gauge=gauge)
    only_rank = extract_two_level(m * tail, nothing, tail, 3, gauge=gauge)
    assert [type(t) for t in only_columns] == [Columns]
    assert [type(t) for t in only_rank] == [LowRank]
    assert extract_two_level(np.zeros((N, P)), nothing, tail, 3, gauge=gauge) == ()


def test_columns_in_both_masks_are_free():
    m, free, tail = two_level(3)
    terms = extract_two_level(m, free, tail | free, 3, gauge=True)
    assert distance(total(terms, SHAPE), m) < 1e-6
    assert not set(terms[0].indices) & set(terms[1].indices)


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize(("window", "c_in", "rank", "k"), [((3, 3), 3, 4, 5), ((2, 4), 3, 3, 0), ((3, 1), 6, 2, 7)])
def test_spatial_round_trip_and_cost(window, c_in, rank, k, gauge):
    m, first, columns = spatial(window, c_in, rank, k)
    shape, q = MatrixShape(window, c_in, N), window[1] * c_in
    terms = extract_spatial(m, first, rank, columns, window, c_in, gauge=gauge)
    assert [type(t) for t in terms] == [Spatial, Columns][: 1 + (k > 0)]
    assert distance(total(terms, shape), m) < 1e-6
    stored = rank * q + rank * window[0] * N - gauge * rank**2 + N * k
    assert sum(t.num_params for t in terms) == stored
    assert len(terms[0].pivots) == gauge * rank


def test_spatial_of_rank_zero_is_columns():
    m, first, columns = spatial((3, 3), 3, 4, 5)
    terms = extract_spatial(m * columns, first, 0, columns, (3, 3), 3, gauge=True)
    assert [type(t) for t in terms] == [Columns]
    assert extract_spatial(0 * m, first, 0, np.zeros_like(columns), (3, 3), 3, gauge=True) == ()


def test_a_dependent_first_factor_falls_back_to_the_plain_form():
    m, first, columns = spatial((3, 3), 3, 4, 5)
    first[3] = first[0] + first[1]
    m = np.einsum("ois,sq->oiq", np.random.default_rng(0).normal(size=(N, 3, 4)), first[:4]).reshape(N, 27)
    (term,) = extract_spatial(m, first, 4, np.zeros_like(columns), (3, 3), 3, gauge=True)
    assert not len(term.pivots)
    assert distance(term.matrix(MatrixShape((3, 3), 3, N)), m) < 1e-6


def test_a_badly_scaled_first_factor_keeps_its_digits():
    m, first, columns = spatial((3, 3), 3, 4, 0)
    mixed = first.copy()
    mixed[:4] = np.diag([1, 1e-4, 1e3, 1]) @ np.tril(np.ones((4, 4))) @ first[:4]
    terms = extract_spatial(m, mixed, 4, columns, (3, 3), 3, gauge=True)
    assert len(terms[0].pivots) == 4
    assert distance(total(terms, MatrixShape((3, 3), 3, N)), m) < 1e-6


def test_dense():
    m = np.random.default_rng(0).normal(size=(N, P))
    (term,) = extract_dense(m)
    assert isinstance(term, Dense)
    np.testing.assert_array_equal(term.values, m.astype(np.float32))


def test_what_is_not_of_the_structure_is_refused():
    m, free, tail = two_level(4)
    with pytest.raises(ValueError, match="away from what is kept"):
        extract_two_level(m, free, tail, 2, gauge=True)
    with pytest.raises(ValueError, match="rank=-1"):
        extract_two_level(m, free, tail, -1, gauge=True)
    with pytest.raises(ValueError, match="one flag per column"):
        extract_two_level(m, free[:5], tail[:5], 4, gauge=True)
    s, first, columns = spatial((3, 3), 3, 4, 5)
    with pytest.raises(ValueError, match="away from what is kept"):
        extract_spatial(s, first, 2, columns, (3, 3), 3, gauge=False)
    with pytest.raises(ValueError, match="do not fit window"):
        extract_spatial(s, first, 4, columns, (3, 3), 4, gauge=False)


def test_values_that_are_not_finite_are_refused():
    m = np.zeros((N, P))
    m[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        extract_dense(m)

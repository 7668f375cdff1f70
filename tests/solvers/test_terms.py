"""The stored pieces: matrices, sizes, indices, row scaling."""

from dataclasses import replace

import numpy as np
import pytest

from solvers.tensor_terms import Cp3, Cp4, Tucker2
from solvers.terms import Codebook, Columns, Dense, LowRank, MatrixShape, Spatial, figures, index_bits
from unified_approx.layers import KINDS

RNG = np.random.default_rng(0)
SHAPE = MatrixShape((2, 3), 4, 5)  # n = 5, p = 24


def values(*shape):
    return RNG.normal(size=shape).astype(np.float32)


CASES = {
    "dense": (Dense(values(5, 24)), 120, 0),
    "columns": (Columns(values(5, 3), np.array([0, 7, 23], np.int32)), 15, 15),
    "codebook": (Codebook(values(3), RNG.integers(0, 4, (5, 24)).astype(np.int32)), 3, 240),
    "low_rank": (LowRank(values(5, 2), values(2, 24), np.arange(24, dtype=np.int32)), 58, 0),
    "low_rank gauge": (
        LowRank(values(3, 2), values(2, 3), np.array([1, 2, 9], np.int32), np.array([4, 0], np.int32)), 12, 21,
    ),
    "spatial": (Spatial(values(2, 12), values(5, 2, 2)), 44, 0),
    "spatial gauge": (Spatial(values(2, 10), values(5, 2, 2), np.array([11, 3], np.int32)), 40, 8),
    "tucker2": (Tucker2(values(2, 4), values(3, 6, 2), values(5, 3)), 59, 0),
    "cp3": (Cp3(first=values(3, 4), middle=values(3, 6), last=values(5, 3)), 45, 0),
    "cp4": (Cp4(first=values(3, 4), height=values(3, 2), width=values(3, 3), last=values(5, 3)), 42, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sizes_and_row_scaling(name):
    term, params, bits = CASES[name]
    assert term.num_params == params
    assert term.index_bits(SHAPE) == bits
    matrix = term.matrix(SHAPE)
    assert matrix.shape == (5, 24)
    assert matrix.dtype == np.float32
    scale = np.array([1, 2, 0.5, -1, 3], np.float32)
    np.testing.assert_allclose(
        term.with_rows_scaled(scale).matrix(SHAPE), matrix * scale[:, None], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kept", [[0, 1, 3, 4], [1, 2, 3], [0, 1, 2, 4], [2, 4], [3]])
def test_rows_and_channels_alone(name, kept):
    term, rows = CASES[name][0], np.asarray(kept)
    cut = term.with_rows(rows)
    matrix = term.matrix(SHAPE)[rows]
    small = MatrixShape(SHAPE.window, SHAPE.c_in, len(rows))
    np.testing.assert_allclose(cut.matrix(small), matrix, rtol=1e-6)
    read = cut.channels_read(small)
    np.testing.assert_array_equal(read, matrix.reshape(-1, 4).any(axis=0))
    channels = np.flatnonzero(read)
    narrow = cut.with_channels(channels, small)
    columns = np.isin(np.arange(24) % 4, channels)
    less = MatrixShape(SHAPE.window, len(channels), len(rows))
    np.testing.assert_allclose(narrow.matrix(less), matrix[:, columns], rtol=1e-6)


def test_rows_without_influence_take_factors_and_columns_along():
    values = np.asarray([[1, 0, 2], [0, 3, 0]], np.float32)
    np.testing.assert_array_equal(
        Columns(values, np.array([3, 4, 9], np.int32)).with_rows(np.array([0])).indices, [3, 9]
    )
    u = np.asarray([[1, 0], [2, 0], [3, 0], [0, 1]], np.float32)
    v = np.asarray([[1, 0, 2], [0, 3, 0]], np.float32)
    cut = LowRank(u, v, np.array([3, 4, 9], np.int32)).with_rows(np.array([0, 1, 2]))
    assert cut.rank == 1
    np.testing.assert_array_equal(cut.indices, [3, 9])
    few = LowRank(u, v, np.array([3, 4, 9], np.int32)).with_rows(np.array([0, 3]))
    assert isinstance(few, Columns)  # two factors of rank 2 for two rows store more


def test_spatial_drops_the_channels_between_that_nothing_reads():
    term = CASES["spatial gauge"][0]
    second = term.second.copy()
    second[:3, :, 0] = 0
    cut = Spatial(term.first, second, term.pivots).with_rows(np.array([0, 2]))
    assert cut.rank == 1
    expected = Spatial(term.first, second, term.pivots).matrix(SHAPE)[[0, 2]]
    np.testing.assert_allclose(cut.matrix(MatrixShape((2, 3), 4, 2)), expected, rtol=1e-6)


def test_figures():
    terms = [CASES[name][0] for name in ("columns", "low_rank gauge")]
    assert figures(terms, SHAPE) == {"params": 27, "index_bits": 36, "kept_columns": 3, "rank": 2}


def test_every_kind_is_covered():
    assert {type(case[0]) for case in CASES.values()} == {layer.term_type for layer in KINDS.values()}


def test_gauge_rows_are_unit_vectors():
    term = CASES["low_rank gauge"][0]
    np.testing.assert_array_equal(term.full_u(5)[[4, 0]], np.eye(2))
    np.testing.assert_array_equal(term.full_u(5)[[1, 2, 3]], term.u)


def test_spatial_matrix_is_two_convolutions():
    term = CASES["spatial gauge"][0]
    first, second = term.full_first(12), term.second
    np.testing.assert_array_equal(first[:, [11, 3]], np.eye(2))
    kernel = term.matrix(SHAPE).reshape(5, 2, 3, 4)
    for o, i, j, c in [(0, 0, 0, 0), (4, 1, 2, 3), (2, 1, 0, 1)]:
        np.testing.assert_allclose(kernel[o, i, j, c], second[o, i] @ first[:, j * 4 + c], rtol=1e-5)


def test_tensor_terms_are_their_sums():
    """By the definitions, entry by entry, in float64."""
    places = list(np.ndindex(2, 3))
    for name, at in (("tucker2", (4, 5, 1)), ("cp3", (0, 2, 3)), ("cp4", (3, 4, 0))):
        term, (o, s, c) = CASES[name][0], at
        f = {key: np.asarray(array, np.float64) for key, array in vars(term).items()}
        if name == "tucker2":
            expected = sum(f["last"][o, a] * f["core"][a, s, b] * f["first"][b, c] for a in range(3) for b in range(2))
        elif name == "cp3":
            expected = sum(f["last"][o, r] * f["middle"][r, s] * f["first"][r, c] for r in range(3))
        else:
            i, j = places[s]
            expected = sum(f["last"][o, r] * f["height"][r, i] * f["width"][r, j] * f["first"][r, c] for r in range(3))
        np.testing.assert_allclose(term.matrix(SHAPE).reshape(5, 6, 4)[o, s, c], expected, rtol=1e-5)


def test_tensor_terms_drop_what_the_remaining_rows_do_not_use():
    """Rows 0 and 2 read one channel after the core, which reads one before it; likewise components."""
    tucker = CASES["tucker2"][0]
    last, core = tucker.last.copy(), tucker.core.copy()
    last[[0, 2], 1:], core[0, :, 1] = 0, 0
    cut = Tucker2(tucker.first, core, last).with_rows(np.array([0, 2]))
    assert (cut.first.shape, cut.core.shape, cut.last.shape) == ((1, 4), (1, 6, 1), (2, 1))
    for name in ("cp3", "cp4"):
        term = CASES[name][0]
        used = term.last.copy()
        used[[0, 2], :2] = 0
        assert replace(term, last=used).with_rows(np.array([0, 2])).rank == 1


def test_index_bits_take_the_cheaper_code():
    assert index_bits(24, 24) == 0
    assert index_bits(2, 24) == 10
    assert index_bits(20, 24) == 24

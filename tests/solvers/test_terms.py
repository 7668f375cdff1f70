"""The stored pieces: matrices, sizes, indices, row scaling."""

import numpy as np
import pytest

from solvers.terms import TERMS, Columns, Dense, LowRank, MatrixShape, Spatial, index_bits

RNG = np.random.default_rng(0)
SHAPE = MatrixShape((2, 3), 4, 5)  # n = 5, p = 24


def values(*shape):
    return RNG.normal(size=shape).astype(np.float32)


CASES = {
    "dense": (Dense(values(5, 24)), 120, 0),
    "columns": (Columns(values(5, 3), np.array([0, 7, 23], np.int32)), 15, 15),
    "low_rank": (LowRank(values(5, 2), values(2, 24), np.arange(24, dtype=np.int32)), 58, 0),
    "low_rank gauge": (
        LowRank(values(3, 2), values(2, 3), np.array([1, 2, 9], np.int32), np.array([4, 0], np.int32)), 12, 21,
    ),
    "spatial": (Spatial(values(2, 12), values(5, 2, 2)), 44, 0),
    "spatial gauge": (Spatial(values(2, 10), values(5, 2, 2), np.array([11, 3], np.int32)), 40, 8),
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


def test_every_kind_is_covered():
    assert {type(case[0]) for case in CASES.values()} == set(TERMS.values())


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


def test_index_bits_take_the_cheaper_code():
    assert index_bits(24, 24) == 0
    assert index_bits(2, 24) == 10
    assert index_bits(20, 24) == 24

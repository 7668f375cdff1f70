"""Sizes against the terms themselves, limits against all ranks there are."""

from itertools import product

import numpy as np
import pytest

from solvers.factor_sizes import (
    FACTORED,
    check_ranks,
    cost,
    factor_sizes,
    full_ranks,
    largest_ranks,
    mode_tails,
    refusal,
)
from solvers.tensor_terms import Cp3, Cp4, Tucker2
from solvers.terms import LowRank, MatrixShape, Spatial

SHAPE = MatrixShape((2, 3), 5, 7)
RNG = np.random.default_rng(0)
TAILS = mode_tails(RNG.normal(size=(7, 6, 5)))


def zeros(*shape):
    return np.zeros(shape, np.float32)


def term_of(form, ranks):
    r = ranks[0]
    ends = {"first": zeros(r, 5), "last": zeros(7, r)}
    return {
        "low_rank": lambda: LowRank(zeros(7, r), zeros(r, 30), np.arange(30, dtype=np.int32)),
        "spatial": lambda: Spatial(zeros(r, 15), zeros(7, 2, r)),
        "tucker2": lambda: Tucker2(zeros(ranks[-1], 5), zeros(r, 6, ranks[-1]), zeros(7, r)),
        "cp3": lambda: Cp3(middle=zeros(r, 6), **ends),
        "cp4": lambda: Cp4(height=zeros(r, 2), width=zeros(r, 3), **ends),
    }[form]()


@pytest.mark.parametrize("form", FACTORED)
def test_sizes_are_those_of_the_term(form):
    for ranks in ((3, 2), (1, 1)) if form == "tucker2" else ((3,), (1,)):
        sizes = factor_sizes(form, SHAPE, ranks)
        assert sum(sizes) == cost(form, SHAPE, ranks) == term_of(form, ranks).num_params
        weights = RNG.uniform(1, 5, len(sizes)).tolist()
        assert cost(form, SHAPE, ranks, weights) == pytest.approx(np.dot(weights, sizes))


@pytest.mark.parametrize("form", FACTORED)
@pytest.mark.parametrize("limit", [20.0, 60.0, 111.0, 400.0])
def test_largest_ranks_against_all_there_are(form, limit):
    weights = [1.0, 1.25, 1.5, 1.75][: len(factor_sizes(form, SHAPE, (1, 1)))]
    found = largest_ranks(form, SHAPE, limit, TAILS, weights)
    candidates = list(product(*(range(1, most + 1) for most in full_ranks(form, SHAPE))))
    allowed = [ranks for ranks in candidates if cost(form, SHAPE, ranks, weights) <= limit]
    if found is None:
        assert not allowed
    elif form != "tucker2":
        assert found == max(allowed)
    else:
        # musco-pytorch pairs the outputs' rank with the inputs' number of channels: it misses the rate off the square.
        lost = [TAILS[0][r_out] + TAILS[1][r_in] for r_out, r_in in allowed]
        assert TAILS[0][found[0]] + TAILS[1][found[1]] == pytest.approx(min(lost))
        assert found in allowed


def test_full_ranks_and_layers_without_a_window():
    assert [full_ranks(form, SHAPE) for form in FACTORED[:3]] == [(7,), (14,), (7, 5)]
    for form in ("cp3", "cp4"):
        (rank,) = full_ranks(form, SHAPE)
        assert cost(form, SHAPE, (rank,)) < 7 * 30 <= cost(form, SHAPE, (rank + 1,))
    dense, line = MatrixShape((), 6, 4), MatrixShape((3,), 6, 4)
    assert [bool(refusal(form, dense)) for form in FACTORED] == [False, True, True, True, True]
    assert [bool(refusal(form, line)) for form in FACTORED] == [False, True, False, False, True]


def test_tails_are_what_a_truncated_decomposition_loses():
    tensor = RNG.normal(size=(7, 6, 5))
    outputs, inputs = mode_tails(tensor)
    s = np.linalg.svd(tensor.reshape(7, -1), compute_uv=False)
    np.testing.assert_allclose(outputs, [np.sum(s[r:] ** 2) for r in range(8)], atol=1e-12)
    np.testing.assert_allclose([inputs[0], inputs[-1]], [np.sum(tensor**2), 0], atol=1e-12)


@pytest.mark.parametrize(
    ("form", "ranks", "message"),
    [
        ("waves", (1,), "is not a factored form"),
        ("low_rank", (8,), "at most"),
        ("tucker2", (3,), "outputs, inputs"),
        ("tucker2", (3, 0), "at least 1"),
        ("cp3", (31,), "at most"),
    ],
)
def test_ranks_that_do_not_fit(form, ranks, message):
    with pytest.raises(ValueError, match=message):
        check_ranks(form, SHAPE, ranks)
    with pytest.raises(ValueError, match="has one place"):
        check_ranks("cp4", MatrixShape((1, 1), 3, 3), (1,))

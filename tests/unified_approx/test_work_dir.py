"""Solved layers on disk."""

import numpy as np
import pytest

from solvers.terms import Columns, Dense, LowRank, MatrixShape, Spatial
from unified_approx import zoo
from unified_approx.work_dir import WorkDir, fingerprint

RNG = np.random.default_rng(0)


def values(*shape):
    return RNG.normal(size=shape).astype(np.float32)


TERMS = (
    Dense(values(4, 12)),
    Columns(values(4, 3), np.array([0, 5, 7], np.int32)),
    LowRank(values(2, 2), values(2, 3), np.array([1, 2, 9], np.int32), np.array([3, 0], np.int32)),
    Spatial(values(2, 4), values(4, 2, 2), np.array([1, 5], np.int32)),
)


def test_terms_come_back_bit_for_bit(tmp_path):
    work = WorkDir(tmp_path, "run")
    assert work.fetch(0) is None
    work.store(0, TERMS, np.arange(4, dtype=np.float32), {"name": "a/b"})
    terms, bias, row = WorkDir(tmp_path, "run").fetch(0)
    shape = MatrixShape((2, 2), 3, 4)
    for old, new in zip(TERMS, terms, strict=True):
        assert type(old) is type(new)
        np.testing.assert_array_equal(old.matrix(shape), new.matrix(shape))
    np.testing.assert_array_equal(bias, np.arange(4))
    assert row == {"name": "a/b"}


def test_fingerprint_sees_settings_and_every_value():
    model, other = (zoo.create("digits", seed=seed) for seed in (0, 1))
    base = fingerprint({"a": 1}, model, {"x": np.zeros(3)})
    assert fingerprint({"a": 1}, zoo.create("digits"), {"x": np.zeros(3)}) == base
    others = [
        ({"a": 2}, model, {"x": np.zeros(3)}),
        ({"a": 1}, other, {"x": np.zeros(3)}),
        ({"a": 1}, model, {"x": np.array([0, 0, 1e-9])}),
        ({"a": 1}, model, {"x": np.zeros((3, 1))}),
    ]
    assert all(fingerprint(*other) != base for other in others)


def test_foreign_folder(tmp_path):
    (tmp_path / "something").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        WorkDir(tmp_path, "run")

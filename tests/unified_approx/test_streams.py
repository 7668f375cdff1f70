"""All images only where they are needed, and the same rows then as with one capture of everything."""

import numpy as np
import pytest

from unified_approx import datasets, streams, zoo
from unified_approx.calling import forward
from unified_approx.capture import Capture
from unified_approx.streams import Streams

HELD_OUT_FROM = 50


@pytest.fixture
def both(monkeypatch):
    monkeypatch.setattr(streams, "_CORE", (20, 5))
    x = zoo.entry("digits").preprocess(datasets.load("digits").x_train[:60])
    model = zoo.load("digits")
    return Streams(model, x, HELD_OUT_FROM, 10, forward), Capture(model, [(x[i : i + 10],) for i in range(0, 60, 10)])


def test_the_core_alone_while_it_has_rows_enough(both):
    parted, _ = both
    seen = parted.observe(parted.sites[0], rows=20 * 64)
    assert sorted(set(seen.image_index)) == [*range(20), *range(50, 55)]


def test_all_images_when_more_rows_are_wanted(both):
    parted, whole = both
    for index, (a, b) in enumerate(zip(parted.sites, whole.sites, strict=True)):
        full = whole.observe(b)
        seen = parted.observe(a, rows=1 if index < 2 else 10**6)
        if index >= 2:
            order = np.argsort(seen.image_index, kind="stable")
            np.testing.assert_array_equal(seen.image_index[order], full.image_index)
            np.testing.assert_allclose(seen.x[order], full.x, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(seen.response[order], full.response, rtol=1e-4, atol=1e-4)
        if index == 0:
            parted.keep(a)
            whole.keep(b)
        else:  # layers replaced before the other images were first looked at, and after
            shape = a.geometry.matrix_shape
            matrix = np.random.default_rng(index).normal(size=(shape.n, shape.p)).astype(np.float32) * 0.1
            parted.replace(a, matrix, np.zeros(shape.n, np.float32))
            whole.replace(b, matrix, np.zeros(shape.n, np.float32))
    again = parted.again()
    assert again.observe(again.sites[1], rows=1).image_index.max() == 54

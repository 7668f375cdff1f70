"""The rivals keep what they say: the largest filters, and the leading singular vectors."""

import jax
import numpy as np
import pytest
import rivals
from flax import nnx

from unified_approx import cost, evaluate, zoo


@pytest.fixture(scope="module")
def network():
    return zoo.create("resnet20"), np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


def test_smallest_filters_are_cut_out_with_all_that_reads_them(network):
    model, x = network
    new = rivals.l1_filters(model, x, 0.5)
    masked = nnx.clone(model)
    for i, block in enumerate(masked.blocks):
        norms = np.abs(np.asarray(block.conv1.kernel[...])).sum((0, 1, 2))
        largest = np.argsort(norms)[len(norms) // 2 :]
        assert new.blocks[i].conv1.geometry.c_out == new.blocks[i].conv2.geometry.c_in == len(largest)
        keep = np.isin(np.arange(len(norms)), largest)
        block.conv2.kernel[...] = block.conv2.kernel[...] * keep[None, None, :, None]
    np.testing.assert_allclose(evaluate.predict(new, x), evaluate.predict(masked, x), rtol=1e-3, atol=1e-3)


def test_spatial_svd_loses_the_small_singular_values(network):
    model, x = network
    new = rivals.spatial_svd(model, x, 0.5)
    layer, kernel = new.blocks[0].conv1, np.asarray(model.blocks[0].conv1.kernel[...])
    rank = int(0.5 * 16 * 9 * 16 / (3 * 16 + 3 * 16))
    unfolded = kernel.transpose(3, 0, 1, 2).reshape(16 * 3, 3 * 16)
    lost = np.linalg.svd(unfolded, compute_uv=False)[rank:]
    gap = np.linalg.norm(np.asarray(layer.kernel()) - kernel)
    assert gap == pytest.approx(np.sqrt(np.sum(lost**2)), rel=1e-4)


def test_the_ratio_is_reached_and_hardly_more(network):
    model, x = network
    new = rivals.at_ratio(rivals.spatial_svd, model, x, 2.0)
    before, after = (cost.network_cost(each, jax.numpy.asarray(x)) for each in (model, new))
    assert 2.0 <= cost.cr(before, after) < 2.2
    with pytest.raises(ValueError, match="more than this method reaches"):
        rivals.at_ratio(rivals.spatial_svd, model, x, 1e4)

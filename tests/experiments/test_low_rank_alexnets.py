"""Multiply-adds of published low-rank networks."""

import low_rank_alexnets as table
import pytest


@pytest.mark.parametrize(("scheme", "version"), [("scheme_1", "v1"), ("scheme_2", "v5")])
def test_counts_are_the_published_ones(scheme, version):
    published = table.NETWORKS[scheme][version]
    assert table.macs(table.caffe_layers(), published.ranks, scheme) / 1e6 == pytest.approx(published.mflops, abs=1)


def test_a_layer_never_takes_more_than_dense():
    layers = table.caffe_layers()
    assert table.macs(layers, (10_000,) * 8, "scheme_1") == table.dense_macs(layers)

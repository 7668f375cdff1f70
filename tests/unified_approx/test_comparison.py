import networks
import numpy as np
import pytest

from solvers.terms import Columns
from unified_approx import comparison
from unified_approx.im2col import Geometry
from unified_approx.layers import FactoredConv
from unified_approx.narrow import narrow_layer

GEOMETRY = Geometry((3, 3), 4, 4, (1, 1), "SAME")


def factored():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 12)).astype(np.float32)
    return FactoredConv.from_terms([Columns(values, np.arange(12, dtype=np.int32))], None, GEOMETRY)


def net():
    """Two convolutions of one shape, the second called twice, and a third that stays."""
    return networks.build(
        lambda: networks.Fn(
            lambda m, x: m.c(m.b(m.b(m.a(x)))), a=networks.conv(4, 4), b=networks.conv(4, 4), c=networks.conv(4, 2)
        )
    )


@pytest.fixture
def clock(monkeypatch):
    """Replaces the stopwatch: the original takes 3 ms a call, the factored layer 2 ms. Counts what was measured."""
    measured = []

    def latency(candidates, *inputs, rounds):
        measured.append(tuple(x.shape for x in inputs))
        assert all(module(*inputs).shape[:-1] == inputs[0].shape[:-1] for module in candidates.values())
        return {"original": 3e-3, "compressed": 2e-3}

    monkeypatch.setattr(comparison, "measure_latency", latency)
    return measured


def test_layer_latencies_are_per_layer_over_all_calls_and_equal_layers_are_measured_once(clock):
    original, compressed = net(), net()
    compressed.a, compressed.b = factored(), factored()
    x = np.zeros((2, 5, 5, 4), np.float32)
    found = comparison.layer_latencies(original, compressed, x, rounds=2, batch_size=3)
    assert set(found) == {"a", "b"}
    assert found["a"] == pytest.approx({"original_ms": 3, "compressed_ms": 2, "speedup": 1.5})
    assert found["b"] == pytest.approx({"original_ms": 6, "compressed_ms": 4, "speedup": 1.5})
    assert clock == [((3, 5, 5, 4), (3, 5, 5, 4))]


def test_a_layer_that_lost_input_channels_is_timed_on_what_it_sees(clock):
    def chain():
        return networks.build(
            lambda: networks.Fn(lambda m, x: m.b(m.a(x)), a=networks.conv(4, 4), b=networks.conv(4, 4))
        )

    original, compressed = chain(), chain()
    compressed.b = factored()
    rows, kept = np.arange(4), np.array([1, 3])
    compressed.a = narrow_layer(compressed.a, kept, rows)
    term = Columns(np.ones((4, 2), np.float32), np.array([1, 3], np.int32))
    layer = FactoredConv.from_terms([term], None, GEOMETRY)
    compressed.b = narrow_layer(layer, rows, kept)
    found = comparison.layer_latencies(original, compressed, np.zeros((2, 5, 5, 4), np.float32), rounds=2, batch_size=3)
    assert set(found) == {"a", "b"}
    assert ((3, 5, 5, 4), (3, 5, 5, 2)) in clock

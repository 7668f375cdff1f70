from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from solvers.terms import Columns, LowRank, MatrixShape, Spatial
from unified_approx import cost, latency
from unified_approx.assemble import with_executions
from unified_approx.im2col import Geometry
from unified_approx.layers import Factored, FactoredConv, FactoredLinear
from unified_approx.macs import walk

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def filled(make):
    """A network with random weights, without running its initialisers."""
    model = nnx.eval_shape(make)
    state = nnx.state(model, nnx.Not(nnx.RngState))
    nnx.update(model, jax.tree.map(lambda s: jnp.asarray(np.abs(normal(*s.shape)), s.dtype), state))
    model.eval()
    return model


class Net(nnx.Module):
    """conv (no bias) -> bn -> relu -> conv (bias) -> bn -> relu -> bn (alone) -> dense; 6x6 images, 3 channels."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(4, 8, (3, 3), 2, rngs=rngs)])
        self.bn2 = nnx.BatchNorm(8, rngs=rngs)
        self.bn3 = nnx.BatchNorm(8, rngs=rngs)
        self.fc = nnx.Linear(72, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.blocks[0](x)))
        return self.fc(self.bn3(x).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def net():
    return filled(lambda: Net(nnx.Rngs(0)))


X = jnp.asarray(normal(2, 6, 6, 3))
CONV2 = Geometry((3, 3), 4, 8, (2, 2), "SAME")
COLUMNS = np.asarray([i * 4 + c for i in range(9) for c in (0, 2)], np.int32)
CONV_MACS = {"conv1": 36 * 27 * 4, "blocks": 9 * 36 * 8, "fc": 72 * 5}


def compressed(net, terms=None, execution="auto"):
    clone = nnx.clone(net)
    terms = terms or [Columns(normal(8, 18), COLUMNS)]
    clone.blocks[0] = FactoredConv.from_terms(terms, normal(8), CONV2, execution=execution)
    clone.fc = FactoredLinear.from_terms(
        [LowRank(normal(5, 2), normal(2, 72), np.arange(72, dtype=np.int32))], None, Geometry((), 72, 5)
    )
    return clone


def test_cost_of_a_plain_network(net):
    found = cost.network_cost(net, X)
    assert {str(row.path[0]): row.macs for row in found.layers if row.macs} == CONV_MACS
    assert found.macs == sum(CONV_MACS.values())
    # folded: bn1 leaves a bias, bn2 nothing since its layer has one, bn3 follows a relu: scale and shift
    assert {str(row.path[0]): row.params for row in found.layers if "bn" in str(row.path[0])} == {
        "bn1": 4,
        "bn2": 0,
        "bn3": 16,
    }
    assert found.params == (108 + 4) + (288 + 8) + 16 + (360 + 5)
    assert found.bits == 32 * found.params
    unfolded = cost.network_cost(net, X, fold=False)
    assert unfolded.params == 108 + 4 * 4 + 288 + 8 + 4 * 8 + 4 * 8 + 365
    assert unfolded.macs == found.macs
    assert cost.network_cost(net, X[:1]).macs == found.macs  # per image
    assert found.layer(("blocks", 0)).kind == "Conv"
    with pytest.raises(ValueError, match="path="):
        found.layer(("nowhere",))
    with pytest.raises(ValueError, match="example"):
        cost.network_cost(net, 1.0)


def test_cost_of_a_compressed_network_and_ratios(net):
    model = compressed(net)
    original, found = cost.network_cost(net, X, file_bytes=3000), cost.network_cost(model, X, file_bytes=2000)
    row = found.layer(("blocks", 0))
    assert row.kind == "FactoredConv(columns)"
    assert row.params == 8 * 18 + 8
    assert row.index_bits == 36  # a bitmap of 36 beats 18 x 6 bits
    assert row.bits == 32 * row.params + 36
    assert row.macs == 9 * 18 * 8
    assert found.layer(("fc",)).macs == 72 * 2 + 2 * 5
    assert found.index_bits == 36
    assert cost.params_ratio(original, found) == original.params / found.params > 1
    assert cost.cr(original, found) == pytest.approx(original.bits / (32 * found.params + 36))
    assert cost.macs_ratio(original, found) == original.macs / found.macs > 1
    assert cost.bytes_ratio(original, found) == 1.5
    with pytest.raises(ValueError, match="file_bytes"):
        cost.bytes_ratio(original, cost.network_cost(model, X))


@pytest.mark.parametrize("terms", ["columns", "low rank + columns", "spatial"])
def test_counted_macs_are_those_the_layers_state(net, terms):
    scattered = np.asarray([0, 1, 5, 6, 11, 17, 20, 33], np.int32)
    rest = np.setdiff1d(np.arange(36), scattered).astype(np.int32)
    sums = {
        "columns": [Columns(normal(8, 8), scattered)],
        "low rank + columns": [
            LowRank(normal(6, 2), normal(2, 28), rest, np.asarray([7, 2], np.int32)),
            Columns(normal(8, 8), scattered),
        ],
        "spatial": [Spatial(normal(2, 12), normal(8, 3, 2))],
    }
    model = compressed(net, sums[terms])
    for name in model.blocks[0].executions():
        other: Any = with_executions(model, {("blocks", 0): name})
        assert other.blocks[0].execution == name
        counted = cost.network_cost(other, X).layer(("blocks", 0))
        assert counted.macs == other.blocks[0].macs((6, 6)), name
        assert counted.params == sum(t.num_params for t in sums[terms]) + 8


def test_shapes_and_shares(net):
    found = cost.network_cost(net, X)
    row = found.layer(("blocks", 0))
    assert (row.input_shape, row.output_shape) == ((6, 6, 4), (3, 3, 8))
    assert found.layer(("fc",)).output_shape == (5,)
    console = Console(width=200)
    with console.capture() as seen:
        console.print(cost.cost_table(found))
    assert "6 × 6 × 4" in seen.get()
    assert f"{100 * row.macs / found.macs:.1f}" in seen.get()


def test_bfloat16_values_count_16_bits():
    layer = FactoredConv.from_terms([Columns(normal(8, 18), COLUMNS)], normal(8), CONV2, param_dtype="bfloat16")
    assert cost.network_cost(layer, jnp.ones((1, 6, 6, 4))).bits == 16 * (8 * 18 + 8) + 36


class Looping(nnx.Module):
    """The same dense layer in a scan, in a branch, in a while loop, and a product of data with data."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        kernel = self.fc.kernel[...]
        x, _ = jax.lax.scan(lambda c, _: (c @ kernel, None), x, length=5)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ kernel @ kernel, lambda x: x, x)
        x = jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ kernel, x)
        x = jax.checkpoint(lambda x: nnx.jit(lambda x: x @ kernel)(x))(x)
        return x @ x.T


def test_macs_inside_control_flow():
    model = filled(lambda: Looping(nnx.Rngs(0)))
    found = cost.network_cost(model, jnp.ones((3, 4)))
    assert found.layer(("fc",)).macs == 16 * (5 + 2 + 1 + 1)
    assert found.layer(()).macs == 3 * 3 * 4 // 3
    assert found.layer(()).kind == "data"
    flagged = cost.network_cost(model, jnp.ones((3, 4)), call=lambda m, x: m.fc(x))
    assert flagged.macs == 16


def test_layer_calls_give_the_input_shapes(net):
    for model in (net, compressed(net)):
        calls = cost.layer_calls(model, X)
        assert {path: [c.input_shape for c in found] for path, found in calls.items()} == {
            ("conv1",): [(2, 6, 6, 3)],
            ("blocks", 0): [(2, 6, 6, 4)],
            ("fc",): [(2, 72)],
        }
    shared = filled(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    twice = cost.layer_calls(shared, X[:, :, :, :1].reshape(2, 9, 4), call=lambda m, x: m(m(x)[:1]))
    assert [c.input_shape for c in twice[()]] == [(2, 9, 4), (1, 9, 4)]


def test_term_cost_and_break_even():
    shape = MatrixShape((3, 3), 4, 8)
    columns = Columns(normal(8, 18), COLUMNS)
    pair = LowRank(normal(6, 2), normal(2, 36), np.arange(36, dtype=np.int32), np.asarray([0, 1], np.int32))
    assert cost.term_cost([columns, pair], shape) == (144 + 12 + 72, 36 + 6)
    limit = cost.break_even(shape)
    dense = 32 * 8 * 36
    assert 32 * 8 * limit.columns + 36 < dense <= 32 * 8 * (limit.columns + 1)
    assert limit.rank * (8 + 36) < 8 * 36 <= (limit.rank + 1) * (8 + 36)
    assert limit.spatial_rank is not None
    assert limit.spatial_rank * (12 + 24) < 8 * 36 <= (limit.spatial_rank + 1) * (12 + 24)
    assert cost.break_even(MatrixShape((), 4, 8)).spatial_rank is None


def test_latency_is_interleaved_and_tells_fast_from_slow():
    order = []

    def slow(x):
        jax.debug.callback(lambda: order.append("slow"))
        for _ in range(6):
            x = x @ x / 300
        return x

    def fast(x):
        jax.debug.callback(lambda: order.append("fast"))
        return x + 1

    found = latency.measure_latency({"slow": slow, "fast": fast}, jnp.ones((300, 300)), rounds=5)
    assert found["slow"] > found["fast"] > 0
    assert order[2:] == ["slow", "fast"] * 5  # the first two are the warm-up
    with pytest.raises(ValueError, match="rounds=0"):
        latency.measure_latency({"fast": fast}, X, rounds=0)
    with pytest.raises(ValueError, match="candidates"):
        latency.measure_latency({}, X)


def test_choose_executions_keeps_the_function(net, monkeypatch):
    model = compressed(net)
    prefer = {"matmul": 1.0, "merged": 2.0, "factored:patches": 0.5}
    asked = []

    def pretend(forms, x, call=None, rounds=0):
        if not all(isinstance(form, Factored) for form in forms.values()):
            return {name: slow if isinstance(network.conv1, Factored) else 2.0 for name, network in forms.items()}
        asked.append(x.shape)
        return {name: prefer.get(name, 3.0) for name in forms}

    monkeypatch.setattr(latency, "measure_latency", pretend)
    chosen: Any
    chosen, table = latency.choose_executions(model, X)
    assert {row.path: row.chosen for row in table} == {("blocks", 0): "factored:patches", ("fc",): "merged"}
    assert sorted(asked) == [(2, 6, 6, 4), (2, 72)]
    assert chosen.blocks[0].execution == "factored:patches"
    assert model.blocks[0].execution == "factored:channels"  # the argument is not changed
    run = nnx.jit(lambda m, x: m(x))
    expected = run(model, X)
    np.testing.assert_allclose(run(chosen, X), expected, atol=1e-4 * float(jnp.abs(expected).max()))

    dense: Any
    slow = 3.0  # products are faster alone, but not in the network
    dense, _ = latency.fastest_dense(net, X)
    assert isinstance(dense.conv1, nnx.Conv)
    slow = 1.0
    dense, table = latency.fastest_dense(net, X)
    assert {row.path: row.chosen for row in table} == {("conv1",): "matmul", ("blocks", 0): "matmul"}
    assert dense.conv1.execution == "matmul"
    expected = run(net, X)
    np.testing.assert_allclose(run(dense, X), expected, atol=1e-4 * float(jnp.abs(expected).max()))
    assert cost.network_cost(dense, X).params == cost.network_cost(net, X).params


def test_what_is_faster_alone_but_not_in_the_network_is_merged(net, monkeypatch):
    model = compressed(net)
    asked = []

    def pretend(candidates, *x, call=None, rounds=0):
        if all(isinstance(form, Factored) for form in candidates.values()):
            return {name: {"merged": 3.0, "matmul": 2.0}.get(name, 1.5) for name in candidates}
        forms = {name: network.blocks[0].execution for name, network in candidates.items()}
        asked.append(set(forms.values()))
        return {name: 1.0 if form == "matmul" else 2.0 for name, form in forms.items()}

    monkeypatch.setattr(latency, "measure_latency", pretend)
    new: Any = latency.fastest(model, X)
    assert len(asked[0]) == 3
    assert {"matmul", "merged"} < asked[0]
    assert new.blocks[0].execution == "matmul"
    assert new.conv1.execution == "matmul"  # left dense, but not left slow
    expected = nnx.jit(lambda m, x: m(x))(model, X)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(new, X), expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_measured_dense_form_reports_both():
    choice = latency.fastest_dense_form(Geometry((3, 3), 4, 4, (1, 1), "SAME"), (2, 4, 4, 4), rounds=3)
    assert set(choice.seconds) == {"merged", "matmul"}
    assert choice.seconds[choice.chosen] == min(choice.seconds.values()) > 0


def test_equal_layers_are_measured_once(net, monkeypatch):
    counted = []
    monkeypatch.setattr(
        latency, "measure_latency", lambda forms, x, rounds: counted.append(x.shape) or dict.fromkeys(forms, 1.0)
    )
    layer = FactoredConv.from_terms([Columns(normal(8, 18), COLUMNS)], None, CONV2)
    twin = FactoredConv.from_terms([Columns(normal(8, 18), COLUMNS)], None, CONV2)
    pair = nnx.List([layer, twin])
    _, table = latency.choose_executions(pair, jnp.ones((2, 6, 6, 4)), call=lambda m, x: (m[0](x), m[1](x), m[0](x)))
    assert counted == [(2, 6, 6, 4)]
    assert [row.seconds["merged"] for row in table] == [2.0, 1.0]


def test_walk_sees_the_layer_before_a_norm(net):
    follows = walk(net, (X,), None).follows
    assert follows[("bn1",)] == ("conv1",)
    assert follows[("bn2",)] == ("blocks", 0)
    assert follows[("bn3",)] is None

"""The traced graph and its piecewise execution."""

from typing import Any

import jax
import jax.numpy as jnp
import networks as nets
import numpy as np
import pytest
from flax import nnx
from networks import Fn, conv, linear, norm

from unified_approx.execution import Execution
from unified_approx.graph import Graph, trace

RNG = np.random.default_rng(3)
IMAGES = jnp.asarray(RNG.standard_normal((4, 8, 8, 3)), jnp.float32)
VECTORS = jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32)


def traced(model: nnx.Module, *args: Any) -> Graph:
    model.eval()
    return trace(model, args, lambda m, *a: m(*a))


def run(graph: Graph, *args: Any) -> Any:
    execution = Execution(graph, [jax.tree.leaves(args)])
    (values,) = execution.compute(graph.outputs, [])
    return jax.tree.unflatten(graph.out_tree, [values[v] for v in graph.outputs])


def test_operands_have_the_paths_of_their_variables_through_nested_calls():
    model = nets.build(nets.nested)
    graph = traced(model, IMAGES)
    convolutions = [op for op in graph.ops if op.name == "conv_general_dilated"]
    assert [graph.origins[op.inputs[1]] for op in convolutions] == [{(p, "kernel")} for p in "abc"]
    assert not any(op.is_loop or op.name in ("jit", "remat2", "checkpoint", "custom_jvp_call") for op in graph.ops)
    np.testing.assert_allclose(run(graph, IMAGES), model(IMAGES), rtol=1e-6, atol=1e-6)


def test_equal_inner_calls_get_numbers_of_their_own():
    graph = traced(nets.build(nets.mlp), VECTORS)
    outputs = [v for op in graph.ops for v in op.outputs]
    assert len(outputs) == len(set(outputs))


def test_dead_operations_and_weight_only_operations_are_gone():
    def call(m: Any, x: jax.Array) -> jax.Array:
        m.unused(x)
        return m.used(x) * jnp.exp(m.gain + 1.0)

    model = nets.build(lambda: Fn(call, used=linear(6, 4), unused=linear(6, 5), gain=nnx.Param(jnp.zeros(4))))
    graph = traced(model, VECTORS)
    assert [op.name for op in graph.ops] == ["dot_general", "add", "mul"]
    (gain,) = (v for v in graph.ops[-1].inputs if graph.is_constant(v))
    assert graph.origins[gain] == {("gain",)}
    np.testing.assert_allclose(graph.per_channel(gain, 4), np.exp(np.asarray(model.gain[...]) + 1), rtol=1e-6)


def test_large_broadcasts_of_weights_are_not_stored():
    graph = traced(nets.build(nets.nested), jnp.tile(IMAGES, (16, 2, 2, 1)))
    assert max(np.size(v) for v in graph.constants.values()) < 200
    model = nets.build(lambda: Fn(lambda m, x: x + jnp.broadcast_to(m.a * 2.0, x.shape), a=nnx.Param(jnp.zeros(3))))
    data = jnp.tile(IMAGES, (16, 2, 2, 1))
    graph = traced(model, data)
    np.testing.assert_allclose(run(graph, data), model(data), rtol=1e-6)


def constant_graph(value: Any) -> tuple[Graph, int]:
    """A graph with one operation, and the number of its operand that does not depend on the data."""
    model = nets.build(lambda: Fn(lambda m, x: x + m.a[...], a=nnx.Param(jnp.zeros(value.shape))))
    model.a[...] = jnp.asarray(value, jnp.float32)
    graph = traced(model, jnp.zeros((4, 2, 3)))
    (number,) = (v for v in graph.ops[-1].inputs if graph.is_constant(v))
    return graph, number


@pytest.mark.parametrize(
    ("value", "per_channel", "scalar"),
    [
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3], None),
        (np.array([2.0, 2.0, 2.0]), [2, 2, 2], 2.0),
        (np.array([[5.0]]), [5, 5, 5], 5.0),
        (np.array([[[1.0, 2.0, 3.0]] * 2] * 4), [1, 2, 3], None),
        (np.array([[1.0], [2.0]]), None, None),
    ],
)
def test_operands_per_channel(value: np.ndarray, per_channel: list[float] | None, scalar: float | None):
    graph, number = constant_graph(value)
    found = graph.per_channel(number, 3)
    if per_channel is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, per_channel)
    assert graph.scalar(number) == scalar


def test_per_channel_needs_a_matching_last_axis():
    graph, number = constant_graph(np.array([1.0, 2.0, 3.0]))
    assert graph.per_channel(number, 5) is None


@jax.custom_vjp
def _square(x: jax.Array) -> jax.Array:
    return x * x


_square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))


def test_loops_branches_and_nested_outputs_are_replayed():
    def call(m: Any, data: dict[str, jax.Array]) -> dict[str, Any]:
        x, _ = jax.lax.scan(lambda c, _: (nnx.relu(c @ m.a.kernel[...]), None), data["x"], length=3)
        y = jax.lax.cond(data["y"].sum() > 0, lambda v: v + 1, lambda v: v - 1, data["y"])
        jax.debug.print("{}", y.sum())
        return {"one": (_square(x), y), "two": [jnp.float32(3.0), data["x"], m.a.bias[...]]}

    model = nets.build(lambda: Fn(call, a=linear(6, 6)))
    data = {"x": VECTORS, "y": VECTORS[:, :2]}
    got, want = run(traced(model, data), data), model(data)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_batch_norm_in_training_mode_is_refused():
    batch = lambda m, x: m.bn(m.a(x), use_running_average=False)  # noqa: E731
    for options in ({}, {"use_scale": False, "use_bias": False}):
        model = nets.build(lambda options=options: Fn(batch, a=linear(6, 4), bn=norm(4, **options)))
        with pytest.raises(ValueError, match="'bn' runs in training mode"):
            traced(model, VECTORS)


def test_a_stack_of_batch_norms_in_evaluation_mode_is_not_taken_for_training():
    def make() -> nnx.Module:
        layers = nnx.vmap(lambda rngs: nnx.BatchNorm(6, rngs=rngs))(nnx.Rngs(0).split(2))
        axes = nnx.StateAxes({...: 0})
        forward = nnx.scan(lambda bn, x: bn(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        return Fn(lambda m, x: forward(m.layers, x), layers=layers)

    graph = traced(nets.build(make), VECTORS)
    assert any(op.is_loop for op in graph.ops)


@pytest.fixture
def chain() -> tuple[Graph, Execution, list[int]]:
    """x -> exp -> sin -> cos, and the sum of exp and cos; two chunks."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = jnp.exp(x)
        return jnp.cos(jnp.sin(y)) + y

    graph = traced(nets.build(lambda: Fn(call, a=linear(2, 2))), VECTORS)
    numbers = [op.outputs[0] for op in graph.ops]
    return graph, Execution(graph, [[VECTORS], [VECTORS + 1]]), numbers


def test_execution_runs_only_what_is_missing_and_keeps_only_what_is_needed(
    chain: tuple[Graph, Execution, list[int]],
):
    _, execution, (exp, sin, cos, out) = chain
    first = list(execution.compute([sin], later=[out]))
    assert execution.num_runs == [1, 1, 0, 0]
    np.testing.assert_allclose(first[1][sin], np.sin(np.exp(VECTORS + 1)), rtol=1e-5)
    assert execution.stored == {exp, sin}
    list(execution.compute([cos], later=[out]))
    assert execution.stored == {exp, cos}
    last = list(execution.compute([out], later=[]))
    assert execution.num_runs == [1, 1, 1, 1]
    assert execution.stored == set()
    np.testing.assert_allclose(last[0][out], np.cos(np.sin(np.exp(VECTORS))) + np.exp(VECTORS), rtol=1e-5)


def test_volatile_values_are_computed_again(chain: tuple[Graph, Execution, list[int]]):
    _, execution, (exp, sin, cos, out) = chain
    assert execution.dependents([sin]) == {sin, cos, out}
    list(execution.compute([cos], later=[out], volatile=execution.dependents([sin])))
    assert execution.stored == {exp}
    execution.override(sin, exp, lambda y: 2.0 * y)
    values = list(execution.compute([out], later=[out]))
    assert execution.num_runs == [1, 2, 2, 1]
    y = np.exp(VECTORS)
    np.testing.assert_allclose(values[0][out], np.cos(2 * y) + y, rtol=1e-5, atol=1e-6)


def test_the_model_is_not_changed():
    model = nets.build(lambda: Fn(lambda m, x: nnx.relu(m.bn(m.a(x))), a=conv(3, 4), bn=norm(4)))
    before = jax.tree.map(np.asarray, nnx.state(model))
    traced(model, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)

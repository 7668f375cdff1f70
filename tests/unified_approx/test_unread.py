"""Channels that nothing reads: found by following them through the network, removed without changing the outputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import unified_approx as ua
from solvers.terms import Columns, LowRank, Spatial, Term
from tests.unified_approx.networks import BasicBlock, Fn, build, conv, flat, linear, norm
from unified_approx import datasets, zoo
from unified_approx.assemble import get, put
from unified_approx.cost import network_cost
from unified_approx.evaluate import outputs_once
from unified_approx.latency import choose_executions
from unified_approx.layers import Factored, FactoredLinear, factored_class, geometry_of
from unified_approx.storage import load, save

IMAGES = np.random.default_rng(5).standard_normal((6, 8, 8, 3)).astype(np.float32)
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1]).astype(np.float32)


def columns(n: int, c_in: int, channels: list[int], places: int = 9) -> Columns:
    """Every second window position of the given channels."""
    indices = [place * c_in + c for place in range(0, places, 2) for c in channels]
    return Columns(normal(n, len(indices)), np.asarray(indices, np.int32))


def factored(model: nnx.Module, path: tuple[Any, ...], *terms: Term, **options: Any) -> nnx.Module:
    """The network with the layer at `path` replaced by these terms."""
    old = get(model, path)
    geometry = geometry_of(old)
    bias = None if old.bias is None else np.asarray(old.bias[...])
    return put(model, path, factored_class(geometry).from_terms(terms, bias, geometry, **options))


def blind(model: nnx.Module, path: tuple[Any, ...], channels: list[int]) -> nnx.Module:
    """The network whose dense layer at `path` ignores these input channels."""
    layer = get(model, path)
    layer.kernel[...] = layer.kernel[...].at[..., jnp.asarray(channels), :].set(0)
    return model


def outputs(model: nnx.Module, x: Any = IMAGES) -> np.ndarray:
    return np.asarray(outputs_once(model, x)[0])


def check(model: nnx.Module, removed: dict[str, int], x: Any = IMAGES) -> Any:
    """Remove; the counts are as expected, the outputs as before, the model is not touched."""
    before, state = outputs(model, x), jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    new, counts = ua.remove_unread(model, x)
    assert counts == removed
    np.testing.assert_allclose(outputs(new, x), before, rtol=2e-5, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, state, nnx.to_pure_dict(nnx.state(model)))
    if not removed:
        assert new is model
    return new


def vgg() -> nnx.Module:
    """conv bn relu, conv relu pool, conv bn relu pool, flatten, linear relu linear."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        x = nnx.relu(m.bn1(m.conv1(x)))
        x = nnx.max_pool(nnx.relu(m.conv2(x)), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(m.bn3(m.conv3(x))), (2, 2), (2, 2))
        return m.fc2(nnx.relu(m.fc1(flat(x))))

    return Fn(
        call,
        conv1=conv(3, 8, use_bias=False),
        bn1=norm(8),
        conv2=conv(8, 6),
        conv3=conv(6, 8, use_bias=False),
        bn3=norm(8),
        fc1=linear(32, 10),
        fc2=linear(10, 4),
    )


def compressed_vgg() -> nnx.Module:
    model = build(vgg)
    model = factored(model, ("conv2",), columns(6, 8, [0, 2, 3, 7]), execution="factored:patches")
    model = factored(model, ("conv3",), columns(8, 6, [0, 1]), columns(8, 6, [1, 4]))
    rest = np.asarray([c + 8 * i for i in range(4) for c in (0, 1, 5)], np.int32)  # of the flattened 2x2x8 image
    model = factored(model, ("fc1",), LowRank(normal(7, 3), normal(3, 12), rest, np.asarray([9, 0, 4], np.int32)))
    return factored(model, ("fc2",), columns(4, 10, [0, 1, 4, 8], places=1))


VGG_REMOVED = {"conv1": 4, "conv2": 3, "conv3": 5, "fc1": 6}


def test_chain_with_norms_pooling_and_flattening():
    new = check(compressed_vgg(), VGG_REMOVED)
    assert new.conv2.geometry.c_in == 4
    assert new.conv2.execution == "factored:patches"
    assert new.conv3.geometry.c_in == 3
    assert new.fc1.geometry == geometry_of(linear(12, 4))
    assert (new.bn1.num_features, new.bn3.num_features) == (4, 3)
    assert new.conv1.replaces == geometry_of(build(vgg).conv1)
    np.testing.assert_array_equal(new.bn1.mean[...], build(vgg).bn1.mean[...][jnp.asarray([0, 2, 3, 7])])


def test_costs_fall_and_the_fastest_forms_can_be_chosen():
    model = compressed_vgg()
    new = check(model, VGG_REMOVED)
    before, after = (network_cost(m, IMAGES) for m in (model, new))
    assert after.macs < 0.7 * before.macs
    assert after.params < 0.7 * before.params
    assert after.layer(("conv1",)).params == 3 * 9 * 4
    fast, choices = choose_executions(new, IMAGES, rounds=1)
    assert {c.path[0] for c in choices} == {"conv1", "conv2", "conv3", "fc1", "fc2"}
    np.testing.assert_allclose(outputs(fast), outputs(model), rtol=1e-4, atol=1e-5)
    assert ua.remove_unread(new, IMAGES)[1] == {}


def test_saved_and_loaded(tmp_path):
    new = check(compressed_vgg(), VGG_REMOVED)
    save(tmp_path / "net", new)
    for like in (build(vgg, seed=3), nnx.eval_shape(vgg)):
        like.eval()
        again = load(tmp_path / "net", like=like)
        np.testing.assert_array_equal(outputs(again), outputs(new))
        assert again.conv2.execution == new.conv2.execution
        assert ua.remove_unread(again, IMAGES)[1] == {}
    wider = build(vgg)
    wider.bn1 = build(lambda: norm(9))
    with pytest.raises(ValueError, match="'bn1': saved for a batch norm of 8 features"):
        load(tmp_path / "net", like=wider)
    wider = build(vgg)
    wider.conv2 = build(lambda: conv(9, 6))
    with pytest.raises(ValueError, match="'conv2': saved for Geometry"):
        load(tmp_path / "net", like=wider)


def test_a_zoo_network_needs_no_original(tmp_path):
    model = blind(blind(zoo.load("digits"), ("conv2",), [0, 5]), ("conv3",), [1])
    data = zoo.entry("digits").preprocess(datasets.load("digits").x_test[:8])
    new = check(model, {"conv1": 2, "conv2": 1}, data)
    save(tmp_path / "net", new)
    np.testing.assert_array_equal(outputs(load(tmp_path / "net"), data), outputs(new, data))


def test_removal_goes_on_upwards():
    """Without the rows that go, a producer's own columns are useless, and so on."""

    def chain() -> nnx.Module:
        return Fn(lambda m, x: m.c(nnx.relu(m.b(nnx.relu(m.a(x))))), a=conv(3, 6), b=conv(6, 6), c=conv(6, 2))

    model = blind(build(chain), ("c",), [4, 5])
    values = np.eye(6, dtype=np.float32)[:, [0, 1, 4, 5]]  # columns 2 and 3 serve outputs 4 and 5 only
    values[1, 0] = 0.5
    used = np.asarray([0, 1, 4, 5], np.int32)
    new = check(factored(model, ("b",), Columns(values, used)), {"b": 2, "a": 4})
    assert new.b.terms[0].values.shape == (4, 2)

    model = blind(build(chain), ("c",), [4, 5])
    u = np.zeros((6, 2), np.float32)
    u[:5, 0], u[5, 1] = 1, 1
    v = np.asarray([[1, 2, 0, 0], [0, 0, 3, 4]], np.float32)
    new = check(factored(model, ("b",), LowRank(u, v, used)), {"b": 2, "a": 4})
    assert new.b.terms[0].rank == 1

    model = blind(build(chain), ("c",), [4, 5])
    first, second = np.zeros((2, 18), np.float32), np.zeros((6, 3, 2), np.float32)
    first[0, [0, 7]], first[1, [2, 9]] = 1, 1
    second[:4, :, 0], second[4:, :, 1] = 1, 1
    new = check(factored(model, ("b",), Spatial(first, second)), {"b": 2, "a": 4})
    assert new.b.terms[0].rank == 1


def test_the_inside_of_residual_blocks():
    def net() -> nnx.Module:
        def call(m: Any, x: jax.Array) -> jax.Array:
            x = nnx.relu(m.bn(m.stem(x)))
            return m.fc(m.block2(m.block1(x)).mean((1, 2)))

        blocks = {"block1": BasicBlock(4, 4, 1, False), "block2": BasicBlock(4, 6, 2, True)}
        return Fn(call, stem=conv(3, 4, use_bias=False), bn=norm(4), fc=linear(6, 3), **blocks)

    model = build(net)
    blind(blind(model, ("block1", "conv1"), [1]), ("fc",), [0])  # channels of the sums have to stay
    for block, channels in (("block1", [1, 2]), ("block2", [0, 3, 5])):
        n = get(model, (block, "conv2")).out_features
        model = factored(model, (block, "conv2"), columns(n, n, channels))
    new = check(model, {"block1/conv1": 2, "block2/conv1": 3})
    assert new.block1.bn1.num_features == 2
    assert new.block1.conv2.geometry.c_in == 2
    assert isinstance(new.stem, nnx.Conv)


def between(function: Any) -> nnx.Module:
    """Layer a, the function (of the network, a's outputs and the images), relu, layer b that ignores two of six."""

    def net() -> nnx.Module:
        return Fn(
            lambda m, x: m.b(nnx.relu(function(m, m.a(x), x))),
            a=conv(3, 6),
            depthwise=conv(6, 6, feature_group_count=6),
            other=conv(3, 6),
            scale=nnx.Param(jnp.ones(6)),
            slope=nnx.Param(jnp.ones(1)),
            norm=norm(6),
            rows=norm(6, axis=1),
            b=conv(6, 2),
        )

    return blind(build(net), ("b",), [0, 3])


UNDERSTOOD = {
    "norm after relu": lambda m, x, image: m.norm(nnx.relu(x)),
    "gate": lambda m, x, image: x * nnx.sigmoid(x.mean((1, 2), keepdims=True)),
    "bias again": lambda m, x, image: nnx.relu(x) * m.a.bias[...],
    "learned slope": lambda m, x, image: jnp.where(x > 0, x, m.slope[...] * x),
    "axes moved": lambda m, x, image: jnp.swapaxes(x, 1, 2)[:, ::2, ::-1],
    "padding": lambda m, x, image: jnp.pad(x, [(0, 0), (1, 2), (0, 0), (0, 0)]),
    "two in one image": lambda m, x, image: jnp.concatenate([x, nnx.gelu(x)], axis=1),
    "batch of one": lambda m, x, image: jax.vmap(nnx.relu)(x[:, None]).squeeze(1),
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_what_keeps_channels_apart_is_followed(kind):
    check(between(UNDERSTOOD[kind]), {"a": 2})


LEFT_ALONE = {
    "depthwise": lambda m, x, image: m.depthwise(x),
    "unknown op": lambda m, x, image: jnp.cumsum(x, axis=3),
    "softmax": lambda m, x, image: nnx.softmax(x),
    "concatenation": lambda m, x, image: jnp.concatenate([x, image], axis=-1)[..., :6],
    "addition": lambda m, x, image: x + m.other(image),
    "split": lambda m, x, image: x.reshape(*x.shape[:3], 2, 3).reshape(x.shape),
    "loop": lambda m, x, image: jax.lax.fori_loop(0, 2, lambda i, v: v * 0.5, x),
    "own scale": lambda m, x, image: x * m.scale[...],
    "constant": lambda m, x, image: x * jnp.arange(1.0, 7.0),
    "norm of rows": lambda m, x, image: m.rows(x[:, :6]),
    "norm read elsewhere": lambda m, x, image: m.norm(x) * jnp.sum(m.norm.mean[...] * image[..., :1], 3, keepdims=True),
    "norm of two": lambda m, x, image: m.norm(x) * (1 + 0 * m.norm(m.other(image))[..., :1]),
    "hard-coded shape": lambda m, x, image: x.reshape(-1, 8, 8, 6),
    "hard-coded check": lambda m, x, image: x if x.shape[-1] == 6 else 2 * x,
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_is_not_understood_is_left_alone(kind):
    check(between(LEFT_ALONE[kind]), {})


def test_one_layer_that_cannot_change_does_not_stop_the_others():
    def net() -> nnx.Module:
        def call(m: Any, x: jax.Array) -> jax.Array:
            x = nnx.relu(m.a(x))
            assert x.shape[-1] == 6
            return m.c(nnx.relu(m.b(x)))

        return Fn(call, a=conv(3, 6), b=conv(6, 6), c=conv(6, 2))

    check(blind(blind(build(net), ("b",), [1]), ("c",), [0, 2]), {"b": 2})


@pytest.mark.parametrize("name", ["a", "b"])
def test_masked_layers_are_left_alone(name):
    model: Any = between(lambda m, x, image: x)
    layer = getattr(model, name)
    layer.mask = nnx.data(jnp.ones(layer.kernel.shape))
    check(model, {})


def test_several_readers_and_layers_called_twice():
    def net() -> nnx.Module:
        def call(m: Any, x: jax.Array) -> Any:
            x = nnx.relu(m.a(x))
            twice = m.c(nnx.relu(m.c(nnx.relu(m.b(x)))))
            return {"one": m.d(x), "two": m.e(nnx.relu(twice))}

        shape = {"a": (3, 6), "b": (6, 6), "c": (6, 6), "d": (6, 2), "e": (6, 2)}
        return Fn(call, **{name: conv(*channels) for name, channels in shape.items()})

    model = build(net)
    for name, channels in {"b": [0, 1, 2], "d": [1, 2, 3], "c": [4], "e": [4, 5]}.items():
        blind(model, (name,), channels)
    new, removed = ua.remove_unread(model, IMAGES, lambda m, x: m(x))
    assert removed == {"a": 2}  # c reads its own outputs, and those of b: what differs between its calls stays
    for one, other in zip(*(jax.tree.leaves(m(jnp.asarray(IMAGES))) for m in (model, new)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_a_layer_that_nothing_reads_keeps_one_channel():
    model = blind(build(lambda: Fn(lambda m, x: m.b(m.a(x)), a=conv(3, 6), b=conv(6, 2))), ("b",), list(range(6)))
    new = check(model, {"a": 5})
    assert new.b.geometry.c_in == 1
    empty = factored(build(lambda: Fn(lambda m, x: m.b(m.a(x)), a=conv(3, 6), b=conv(6, 2))), ("b",))
    check(empty, {"a": 5})


def test_small_dtypes_and_other_calls():
    def net() -> nnx.Module:
        options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return Fn(lambda m, x: m.b(nnx.relu(m.a(x))), a=linear(4, 6, **options), b=linear(6, 3, **options))

    model = build(net)
    u, v = normal(3, 2), normal(2, 4)
    gauged = LowRank(u, v, np.asarray([0, 1, 2, 3], np.int32), np.asarray([5, 1], np.int32))
    layer = FactoredLinear.from_terms(
        [LowRank(normal(4, 2), v, gauged.indices, gauged.pivots)],
        normal(6),
        geometry_of(model.a),
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    model = blind(put(model, ("a",), layer), ("b",), [5])
    batch = {"x": IMAGES[:, 0, :4, 0]}
    new, removed = ua.remove_unread(model, batch, lambda m, b: m(b["x"]))
    assert removed == {"a": 1}
    assert new.a.terms[0].u.dtype == jnp.bfloat16
    assert new.a.terms[0].pivots.shape == (0,)  # rounding anew would show
    np.testing.assert_array_equal(*(np.asarray(m(jnp.asarray(batch["x"])), np.float32) for m in (model, new)))


def test_no_layers():
    check(build(lambda: Fn(lambda m, x: m.bn(x), bn=norm(3))), {})


@pytest.fixture(scope="module")
def compressed():
    data, entry = datasets.load("digits"), zoo.entry("digits")
    images = entry.preprocess(data.x_train[:300])
    rules = (ua.Rule(path="conv1", keep=True),)
    options = {
        "group": "channel",
        "form": "columns",
        "rules": rules,
        "rows": 2048,
        "batch_size": 100,
        "allocation": "uniform",
    }
    budget = ua.Budget(params=0.3)
    return ua.compress(zoo.load("digits"), images, budget=budget, progress=lambda e: None, **options), images


def test_compress_removes_what_it_made_useless(compressed, tmp_path):
    result, images = compressed
    rows = {row.name: row for row in result.report.layers}
    assert {name for name, row in rows.items() if row.removed_channels} == {"conv1", "conv2", "conv3"}
    assert result.model.conv2.geometry.c_in == 32 - rows["conv1"].removed_channels
    assert rows["conv1"].reason.endswith(f"{rows['conv1'].removed_channels} output channels that nothing reads removed")
    assert rows["conv1"].status == "kept"
    assert not any("nothing reads" in warning for warning in result.report.warnings)
    assert result.budget_met
    for name, row in rows.items():
        layer = get(result.model, (name,))
        assert isinstance(layer, Factored)
        assert layer.geometry.c_out == row.shape[0] - row.removed_channels
        assert row.params == sum(v.size for k, v in layer.tensors().items() if k.endswith("values"))
        assert row.kept_columns == (0 if name == "conv1" else layer.terms[0].values.shape[1])
    cost = network_cost(result.model, images[:2])
    assert (cost.params, cost.macs) == (result.report.params, result.report.macs)
    assert sum(row.macs for row in rows.values()) == cost.macs
    result.save(tmp_path / "net")
    np.testing.assert_array_equal(outputs(load(tmp_path / "net"), images), outputs(result.model, images))


def test_numbers_of_channels_are_multiples(compressed):
    result, images = compressed
    options = {"group": "channel", "form": "columns", "rows": 2048, "batch_size": 100, "allocation": "uniform"}
    budget = ua.Budget(params=0.3)
    rounded = ua.compress(zoo.load("digits"), images, budget=budget, round_to=8, progress=lambda e: None, **options)
    for row in rounded.report.layers:
        positions = 9 if row.kind == "conv" else 1
        assert row.kept_columns % (8 * positions) == 0 or row.name == "conv1"  # which has one input channel
    assert rounded.model.conv3.geometry.c_in % 8 == 0
    assert rounded.report.params <= result.report.params + rounded.model.conv1.geometry.c_out * 9


def test_finetuning_keeps_the_structure(compressed):
    result, _ = compressed
    data, entry = datasets.load("digits"), zoo.entry("digits")
    images, labels = entry.preprocess(data.x_train[:256]), data.y_train[:256]
    recipe = ua.Recipe(epochs=1, batch_size=128, learning_rate=0.01, augment=None)
    trained = ua.finetune(result, images, labels, recipe).model
    assert trained.conv1.geometry == result.model.conv1.geometry
    assert ua.remove_unread(trained, images)[1] == {}

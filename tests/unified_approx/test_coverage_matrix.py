"""Which networks are read right, and which layers are left out with a reason: one row each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networks as nets
import numpy as np
import pytest
from flax import nnx
from networks import Fn, conv, flat, linear, norm

from unified_approx.assemble import assemble, get
from unified_approx.capture import Capture, LayerSite, Skipped

RNG = np.random.default_rng(5)
IMAGES = RNG.standard_normal((7, 8, 8, 3)).astype(np.float32)
VECTORS = RNG.standard_normal((7, 6)).astype(np.float32)
SERIES = RNG.standard_normal((7, 5, 6)).astype(np.float32)
VOLUMES = RNG.standard_normal((7, 3, 3, 3, 2)).astype(np.float32)


def batches(data: Any) -> list[tuple[Any, ...]]:
    return [(data[:4],), (data[4:],)]


# Each layer: activation, and what else was found: "bn" folded, "+" offset, "2x" called twice.
SUPPORTED = {
    "mlp": (nets.mlp, VECTORS, {"a": "relu", "b": "relu", "c": "none"}),
    "lenet": (nets.lenet, IMAGES, {"conv1": "relu", "conv2": "relu", "fc1": "relu", "fc2": "none"}),
    "vgg": (lambda: nets.vgg(False), IMAGES, {"layers/0": "relu", "layers/2": "relu", "layers/5": "none"}),
    "vgg_bn": (lambda: nets.vgg(True), IMAGES, {"layers/0": "relu bn", "layers/3": "relu bn", "layers/7": "none"}),
    "resnet_padded": (
        lambda: nets.resnet(False),
        IMAGES,
        {
            "stem": "relu bn",
            "blocks/0/conv1": "relu bn",
            "blocks/0/conv2": "relu bn +",
            "blocks/1/conv1": "relu bn",
            "blocks/1/conv2": "relu bn +",
            "fc": "none",
        },
    ),
    "resnet_projected": (
        lambda: nets.resnet(True),
        IMAGES,
        {
            "stem": "relu bn",
            "blocks/0/conv1": "relu bn",
            "blocks/0/conv2": "relu bn +",
            "blocks/1/conv1": "relu bn",
            "blocks/1/conv2": "relu bn +",
            "blocks/1/down": "relu bn +",
            "fc": "none",
        },
    ),
    "preactivation": (
        nets.preactivation,
        IMAGES,
        {"stem": "none", "conv1": "relu bn", "conv2": "none +", "fc": "none"},
    ),
    "nin": (nets.nin, IMAGES, {"conv1": "relu", "cccp1": "relu", "cccp2": "relu"}),
    "inception": (
        nets.inception,
        IMAGES,
        {"b1": "relu", "b3_reduce": "relu", "b3": "relu", "pool": "relu", "fc": "none"},
    ),
    "containers": (
        nets.containers,
        VECTORS,
        dict.fromkeys(
            ["in_list/0", "in_list/1", "in_dict/first", "in_tuple/0", "in_tuple/1", "nnx_list/0", "nnx_dict/a"], "relu"
        ),
    ),
    "shared": (nets.shared, IMAGES, {"stem": "none", "again": "relu 2x", "middle": "relu"}),
    "shared_one_norm": (lambda: nets.shared_norms(True), VECTORS, {"layer": "relu bn 2x"}),
    "shared_two_norms": (lambda: nets.shared_norms(False), VECTORS, {"layer": "none 2x"}),
    "nested_jit_remat": (nets.nested, IMAGES, {"a": "relu", "b": "relu bn", "c": "none"}),
    "hand_written_scale": (nets.hand_written_scale, VECTORS, {"a": "relu", "b": "none"}),
    "vmapped": (nets.vmapped, IMAGES, {"a": "relu bn"}),
    "tokens": (nets.tokens, IMAGES, {"a": "relu", "b": "none"}),
    "bfloat16": (nets.small_dtype, IMAGES, {"a": "relu bn", "b": "none"}),
    "bare_linear": (lambda: linear(6, 3), VECTORS, {"": "none"}),
    "bare_conv": (lambda: conv(3, 4), IMAGES, {"": "none"}),
    "strided_dilated": (
        lambda: Fn(
            lambda m, x: m.c(m.b(m.a(x))),
            a=conv(3, 4, strides=2, padding=[(0, 1), 2]),
            b=conv(4, 4, kernel_dilation=2, padding="valid"),
            c=conv(4, 3, strides=(1, 2), kernel_dilation=(2, 1), padding="SAME"),
        ),
        np.concatenate([IMAGES, IMAGES], axis=1),
        {"a": "none", "b": "none", "c": "none"},
    ),
    "norm_behind_pool": (  # a negative scale does not commute with the pooling
        lambda: Fn(lambda m, x: nnx.relu(m.bn(nnx.max_pool(m.a(x), (2, 2), (2, 2)))), a=conv(3, 4), bn=norm(4)),
        IMAGES,
        {"a": "none"},
    ),
    "norm_for_two": (
        lambda: Fn(
            lambda m, x: nnx.relu(m.bn(m.a(x))) - nnx.relu(m.bn(m.b(x))), a=conv(3, 4), b=conv(3, 4), bn=norm(4)
        ),
        IMAGES,
        {"a": "relu", "b": "relu"},
    ),
    "subtracted": (
        lambda: Fn(lambda m, x: nnx.relu(m.a(x) - m.b(x)), a=linear(6, 4), b=linear(6, 4)),
        VECTORS,
        {"a": "relu +", "b": "none"},
    ),
    "layer_norm": (
        lambda: Fn(lambda m, x: nnx.relu(m.ln(m.a(x))), a=linear(6, 4), ln=nnx.LayerNorm(4, rngs=nnx.Rngs(0))),
        VECTORS,
        {"a": "none"},
    ),
    "series": (lambda: Fn(lambda m, x: nnx.relu(m.a(x)), a=linear(6, 4)), SERIES, {"a": "relu"}),
}


def describe(site: LayerSite) -> str:
    marks = [site.activation.name, "bn" if site.norm else "", "+" if site.has_offset else ""]
    return " ".join(m for m in [*marks, f"{site.num_calls}x" if site.num_calls > 1 else ""] if m)


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_network_is_read_and_rebuilt(name: str):
    make, data, expected = SUPPORTED[name]
    model = nets.build(make)
    capture = Capture(model, batches(data))
    assert {site.name: describe(site) for site in capture.sites} == expected
    assert capture.skipped == []

    replacements = {}
    for site in capture.sites:
        observation = capture.observe(site)
        assert observation.x.shape[0] == observation.response.shape[0] == len(observation.image_index)
        matrix, bias = nets.exact(model, site)
        capture.replace(site, matrix, bias)
        replacements[site.path] = nets.plain_layer(model, site, matrix, bias)
    original, compressed = capture.outputs()
    assert set(capture.original.num_runs) == {1}  # nothing of the original ran twice, or not at all

    reference = nnx.clone(model)
    reference.eval()
    rebuilt = assemble(model, replacements, capture.sites)
    rebuilt.eval()
    tolerance = 5e-2 if name == "bfloat16" else 1e-5
    expected_outputs = np.asarray(reference(data[:4]))  # the chunks' shape: nothing new to compile
    for outputs in (original[:4], compressed[:4], np.asarray(rebuilt(data[:4]))):
        np.testing.assert_allclose(outputs, expected_outputs, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(compressed, original, rtol=tolerance, atol=tolerance)
    # What the observation saw is what the replaced layers see: the folded norms are gone.
    folded = [site.norm for site in capture.sites if site.norm]
    assert all(not isinstance(get(rebuilt, path), nnx.BatchNorm) for path in folded)


class Doubling(nnx.Linear):
    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return 2.0 * super().__call__(inputs)


class Closure(nnx.Module):
    def __init__(self):
        weights = np.ones((6, 4), np.float32)
        self.function = lambda x: x @ weights

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x)


def stack() -> nnx.Module:
    layers = nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs))(nnx.Rngs(0).split(3))
    forward = nnx.scan(lambda layer, x: nnx.relu(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return Fn(lambda m, x: forward(m.layers, x), layers=layers)


def tied() -> nnx.Module:
    a, b = linear(6, 6), linear(6, 6)
    b.kernel = a.kernel
    return Fn(lambda m, x: m.b(m.a(x)), a=a, b=b)


def masked(m: Any, x: jax.Array) -> jax.Array:
    m.a.mask = nnx.data(jnp.asarray(np.arange(108).reshape(3, 3, 3, 4) % 2, jnp.float32))
    return m.a(x)


def attention() -> nnx.Module:
    layer = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=nnx.Rngs(0))
    return Fn(lambda m, x: m.attention(x), attention=layer)


def one(layer: Callable[[], nnx.Module], call: Callable[[Any, Any], Any] = lambda m, x: m.a(x)) -> Callable[[], Fn]:
    return lambda: Fn(call, a=layer())


def free(kind: Callable[..., nnx.Module], *args: Any, **options: Any) -> Callable[[], nnx.Module]:
    return lambda: kind(*args, rngs=nnx.Rngs(0), **options)


GENERAL = free(nnx.LinearGeneral, 6, (2, 2))
UNSUPPORTED = {
    "grouped": (one(lambda: conv(3, 6, feature_group_count=3)), IMAGES, {"a": "depthwise"}),
    "depthwise": (
        one(lambda: conv(4, 4, feature_group_count=2), lambda m, x: m.a(jnp.tile(x, 2)[..., :4])),
        IMAGES,
        {"a": "grouped"},
    ),
    "transposed": (one(free(nnx.ConvTranspose, 3, 4, (3, 3))), IMAGES, {"a": "neither an nnx.Conv"}),
    "1-D": (one(free(nnx.Conv, 6, 4, 3)), SERIES, {"a": "1-D convolution"}),
    "3-D": (one(free(nnx.Conv, 2, 3, (3, 3, 3))), VOLUMES, {"a": "3-D convolution"}),
    "linear_general": (one(GENERAL), VECTORS, {"a": "neither an nnx.Conv"}),
    "einsum": (one(free(nnx.Einsum, "bi,ijk->bjk", (6, 2, 2), (2, 2))), VECTORS, {"a": "neither an nnx.Conv"}),
    "attention": (
        attention,
        SERIES,
        {f"attention/{part}": "neither an nnx.Conv" for part in ("key", "out", "query", "value")},
    ),
    "scan": (stack, VECTORS, {"layers": "inside scan"}),
    "closure": (Closure, VECTORS, {"": "closure"}),
    "input_dilation": (one(lambda: conv(3, 4, input_dilation=2, padding=1)), IMAGES, {"a": "input dilation"}),
    "circular": (one(lambda: conv(3, 4, padding="CIRCULAR")), IMAGES, {"a": "padding 'CIRCULAR'"}),
    "masked": (one(lambda: conv(3, 4), masked), IMAGES, {"a": "transformed"}),
    "tied": (tied, VECTORS, {"a": "shared by the modules a, b", "b": "shared by the modules a, b"}),
    "tied_transposed": (
        one(lambda: linear(6, 6), lambda m, x: nnx.relu(m.a(x)) @ m.a.kernel[...].T),
        VECTORS,
        {"a": "transformed"},
    ),
    "contracted_otherwise": (
        one(lambda: linear(6, 6), lambda m, x: jax.lax.dot_general(x, m.a.kernel[...], (((1,), (1,)), ((), ())))),
        VECTORS,
        {"a": "other parameters"},
    ),
    "bias_not_added": (one(lambda: linear(6, 6), lambda m, x: x @ m.a.kernel[...]), VECTORS, {"a": "bias is not"}),
    "kernel_as_data": (
        one(lambda: linear(6, 6), lambda m, x: x * m.a.kernel[...].sum()),
        VECTORS,
        {"a": "used by mul"},
    ),
    "own_call": (one(lambda: Doubling(6, 4, rngs=nnx.Rngs(0))), VECTORS, {"a": "its own __call__"}),
    "never_called": (one(lambda: linear(6, 4), lambda m, x: x + 1), VECTORS, {"a": "never called"}),
    "constant_input": (
        one(lambda: linear(6, 4), lambda m, x: x.sum() + m.a(jnp.ones((4, 6)))),
        VECTORS,
        {"a": "not as by a plain call"},
    ),
    "two_scales": (
        one(lambda: conv(3, 3), lambda m, x: m.a(x).mean((1, 2)) + m.a(x[:, ::2]).mean((1, 2))),
        IMAGES,
        {"a": "different shapes"},
    ),
    "time_first": (
        one(lambda: linear(6, 4), lambda m, x: jnp.swapaxes(m.a(jnp.swapaxes(x, 0, 1)), 0, 1)),
        SERIES,
        {"a": "does not run over"},
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layer_is_listed_with_the_reason(name: str):
    make, data, expected = UNSUPPORTED[name]
    model = nets.build(make)
    capture = Capture(model, batches(data))
    assert capture.sites == []
    assert {s.name for s in capture.skipped} == set(expected)
    for entry in capture.skipped:
        assert expected[entry.name] in entry.reason
        if entry.path:
            assert capture.find(entry.name) == entry
    original, compressed = capture.outputs()
    np.testing.assert_array_equal(original, compressed)
    if name != "constant_input":
        np.testing.assert_allclose(original[:4], np.asarray(model(data[:4])), rtol=1e-5, atol=1e-5)


def test_an_unsupported_layer_does_not_hide_the_others():
    def call(m: Any, x: jax.Array) -> jax.Array:
        return m.fc(flat(nnx.relu(m.grouped(nnx.relu(m.a(x))))))

    make = lambda: Fn(call, a=conv(3, 4), grouped=conv(4, 4, feature_group_count=2), fc=linear(256, 3))  # noqa: E731
    capture = Capture(nets.build(make), batches(IMAGES))
    assert [site.name for site in capture.sites] == ["a", "fc"]
    assert capture.skipped == [Skipped(("grouped",), "Conv", "grouped convolution")]

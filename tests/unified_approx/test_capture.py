"""What a layer sees, in the network compressed so far; what is wanted of it; what follows it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networks as nets
import numpy as np
import pytest
from flax import nnx
from networks import Fn, conv, linear, norm

from solvers.activation import IDENTITY, NAMED, RELU
from unified_approx.assemble import assemble, get
from unified_approx.capture import Capture, LayerSite
from unified_approx.im2col import Geometry

RNG = np.random.default_rng(11)
IMAGES = RNG.standard_normal((7, 8, 8, 3)).astype(np.float32)
VECTORS = RNG.standard_normal((7, 6)).astype(np.float32)


def capture_of(make: Callable[[], nnx.Module], data: np.ndarray) -> tuple[Any, Capture, dict[str, LayerSite]]:
    model = nets.build(make)
    capture = Capture(model, [(data[:4],), (data[4:],)])
    model.eval()
    return model, capture, {site.name: site for site in capture.sites}


def random_weights(site: LayerSite) -> tuple[np.ndarray, np.ndarray]:
    rng, shape = np.random.default_rng(len(site.name)), site.geometry.matrix_shape
    matrix = rng.standard_normal((shape.n, shape.p)) / np.sqrt(shape.p)
    return matrix.astype(np.float32), rng.standard_normal(shape.n).astype(np.float32)


def convolve(x: Any, matrix: np.ndarray, bias: np.ndarray, site: LayerSite) -> jax.Array:
    g = site.geometry
    kernel = matrix.T.reshape(*g.window, g.c_in, g.c_out)
    padding = g.padding if isinstance(g.padding, str) else list(g.padding)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, jnp.asarray(kernel), g.strides, padding, dimension_numbers=numbers) + bias


def test_input_and_offset_come_from_the_compressed_network_and_the_response_from_the_original():
    model, capture, sites = capture_of(lambda: nets.resnet(True), IMAGES)
    block, x0 = model.blocks[1], IMAGES
    # By hand: the original up to the block, then everything in it that is asked for.
    h = nnx.relu(model.bn(model.stem(x0)))
    u = model.blocks[0](h)
    response1 = block.bn1(block.conv1(u))
    response2 = block.bn2(block.conv2(nnx.relu(response1))) + block.down_bn(block.down(u))

    observation = capture.observe(sites["stem"])
    np.testing.assert_array_equal(observation.x, x0)
    np.testing.assert_allclose(observation.response, model.bn(model.stem(x0)), rtol=1e-4, atol=1e-4)
    stem = random_weights(sites["stem"])
    capture.replace(sites["stem"], *stem)
    capture.keep(sites["blocks/0/conv1"])
    # blocks/0/conv2 is passed over; the new stem's response reaches the next block through both.
    h_new = nnx.relu(convolve(x0, *stem, sites["stem"]))
    u_new = model.blocks[0](h_new)

    observation = capture.observe(sites["blocks/1/conv1"])
    assert observation.offset is None
    np.testing.assert_allclose(observation.x, u_new, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(observation.response, response1, rtol=1e-4, atol=1e-4)
    conv1 = random_weights(sites["blocks/1/conv1"])
    capture.replace(sites["blocks/1/conv1"], *conv1)
    x2 = nnx.relu(convolve(u_new, *conv1, sites["blocks/1/conv1"]))

    observation = capture.observe(sites["blocks/1/conv2"])
    assert observation.offset is not None
    np.testing.assert_allclose(observation.x, x2, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(observation.response, response2, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(observation.offset, block.down_bn(block.down(u_new)), rtol=1e-4, atol=1e-4)
    conv2 = random_weights(sites["blocks/1/conv2"])
    capture.replace(sites["blocks/1/conv2"], *conv2)

    observation = capture.observe(sites["blocks/1/down"])
    assert observation.offset is not None
    np.testing.assert_allclose(observation.x, u_new, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(observation.response, response2, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(observation.offset, convolve(x2, *conv2, sites["blocks/1/conv2"]), rtol=1e-4, atol=1e-4)

    original, compressed = capture.outputs()
    assert set(capture.original.num_runs) == {1}
    weights = {"stem": stem, "blocks/1/conv1": conv1, "blocks/1/conv2": conv2}
    new = {sites[n].path: nets.plain_layer(model, sites[n], *weights[n]) for n in weights}
    rebuilt: Any = assemble(model, new, capture.sites)
    np.testing.assert_allclose(original, model(IMAGES), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(compressed, rebuilt(IMAGES), rtol=1e-4, atol=1e-4)
    assert np.abs(compressed - original).max() > 0.1
    again = capture.outputs()
    np.testing.assert_array_equal(again[1], compressed)
    assert set(capture.original.num_runs) == {1}


def test_sites_that_are_never_observed():
    model, capture, sites = capture_of(lambda: nets.resnet(False), IMAGES)
    chosen = ["blocks/0/conv2", "blocks/1/conv1"]
    replaced = {}
    for name in chosen:  # replaced without a look at them, and in the wrong order
        replaced[sites[name].path] = nets.plain_layer(model, sites[name], *random_weights(sites[name]))
    for name in reversed(chosen):
        capture.replace(sites[name], *random_weights(sites[name]))
    observation = capture.observe(sites["fc"])
    rebuilt: Any = assemble(model, replaced, capture.sites)
    _, compressed = capture.outputs()
    np.testing.assert_allclose(compressed, rebuilt(IMAGES), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(observation.response, model(IMAGES), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rebuilt.fc(observation.x), compressed, rtol=1e-4, atol=1e-4)


def test_outputs_midway_do_not_disturb_the_rest():
    model, capture, sites = capture_of(nets.mlp, VECTORS)
    original, compressed = capture.outputs()
    np.testing.assert_array_equal(original, compressed)
    for name in "abc":
        capture.observe(sites[name])
        capture.replace(sites[name], *random_weights(sites[name]))
    new = {s.path: nets.plain_layer(model, s, *random_weights(s)) for s in capture.sites}
    rebuilt: Any = assemble(model, new, capture.sites)
    np.testing.assert_allclose(capture.outputs()[1], rebuilt(VECTORS), rtol=1e-4, atol=1e-5)
    assert set(capture.original.num_runs) == {1}


def test_rows_of_a_shared_layer_are_stacked_call_by_call():
    model, capture, sites = capture_of(nets.shared, IMAGES)
    site = sites["again"]
    assert site.homes == (("again",), ("layer",))
    observation = capture.observe(site)
    first = model.stem(IMAGES)
    second = nnx.relu(model.middle(nnx.relu(model.layer(first))))
    np.testing.assert_allclose(observation.x, np.concatenate([first, second]), rtol=1e-4, atol=1e-5)
    expected = np.concatenate([model.layer(first), model.layer(second)])
    np.testing.assert_allclose(observation.response, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(observation.image_index, [*range(7), *range(7)])
    capture.replace(site, *random_weights(site))
    new = {site.path: nets.plain_layer(model, site, *random_weights(site))}
    rebuilt: Any = assemble(model, new, capture.sites)
    np.testing.assert_allclose(capture.outputs()[1], rebuilt(IMAGES), rtol=1e-4, atol=1e-5)


def test_an_offset_of_one_call_only_is_zero_in_the_others():
    def call(m: Any, x: jax.Array) -> jax.Array:
        return nnx.relu(m.a(nnx.relu(m.a(x))) + x)

    model, capture, sites = capture_of(lambda: Fn(call, a=linear(6, 6)), VECTORS)
    offset = capture.observe(sites["a"]).offset
    assert offset is not None
    np.testing.assert_array_equal(offset, np.concatenate([np.zeros_like(VECTORS), VECTORS]))


def test_rows_that_the_network_merges_with_the_images_stay_identifiable():
    model, capture, sites = capture_of(nets.tokens, IMAGES)
    observation = capture.observe(sites["a"])
    assert capture.input_shape(sites["a"]) == (16, 48)
    np.testing.assert_array_equal(observation.x, IMAGES.reshape(28, 48))
    np.testing.assert_array_equal(observation.image_index, np.repeat(np.arange(7), 4))
    np.testing.assert_allclose(observation.response, model.a(IMAGES.reshape(28, 48)), rtol=1e-4, atol=1e-5)


def test_scale_and_shift_hold_batch_norm_and_bias():
    make = lambda: Fn(lambda m, x: nnx.relu(m.bn(m.a(x))), a=linear(6, 4), bn=norm(4))  # noqa: E731
    model, _, sites = capture_of(make, VECTORS)
    kernel = np.asarray(model.a.kernel[...], np.float64)
    z = sites["a"].scale * (VECTORS @ kernel) + sites["a"].shift
    np.testing.assert_allclose(z, model.bn(model.a(VECTORS)), rtol=1e-4, atol=1e-5)
    assert sites["a"].scale.dtype == np.float64
    np.testing.assert_array_equal(sites["a"].outer_scale, 1)


def test_channels_that_the_network_multiplies_by_zero():
    model = nets.build(nets.hand_written_scale)
    model.gamma[...] = model.gamma[...].at[1].set(0.0)  # type: ignore[attr-defined]
    capture = Capture(model, [(VECTORS,)])
    site = capture.sites[0]
    weights = random_weights(site)
    capture.replace(site, *weights)
    rebuilt: Any = assemble(model, {site.path: nets.plain_layer(model, site, *weights)}, capture.sites)
    np.testing.assert_allclose(capture.outputs()[1], rebuilt(VECTORS), rtol=1e-4, atol=1e-5)


def test_geometry_is_the_modules():
    make = lambda: Fn(  # noqa: E731
        lambda m, x: m.b(m.a(x)), a=conv(3, 4, 5, strides=2, padding=[1, (2, 0)]), b=conv(4, 2, 1, kernel_dilation=2)
    )
    _, _, sites = capture_of(make, IMAGES)
    assert sites["a"].geometry == Geometry((5, 5), 3, 4, (2, 2), ((1, 1), (2, 0)), (1, 1))
    assert sites["b"].geometry == Geometry((1, 1), 4, 2, (1, 1), "SAME", (2, 2))


@jax.custom_vjp
def _custom_relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


_custom_relu.defvjp(lambda x: (jnp.maximum(x, 0), x), lambda x, g: (jnp.where(x > 0, g, 0),))

SPELLINGS: dict[str, tuple[Callable[[jax.Array], jax.Array], str]] = {
    "nnx.relu": (nnx.relu, "relu"),
    "maximum": (lambda x: jnp.maximum(0.0, x), "relu"),
    "where": (lambda x: jnp.where(x < 0, jnp.zeros_like(x), x), "relu"),
    "product": (lambda x: x * (x > 0), "relu"),
    "clip": (lambda x: jnp.clip(x, 0), "relu"),
    "half_sum": (lambda x: (x + jnp.abs(x)) / 2, "relu"),
    "jit": (jax.jit(lambda x: jax.lax.max(x, 0.0)), "relu"),
    "checkpoint": (jax.checkpoint(nnx.relu), "relu"),
    "custom_vjp": (_custom_relu, "relu"),
    "relu_twice": (lambda x: nnx.relu(nnx.relu(x)), "relu"),
    "relu6": (nnx.relu6, "relu6"),
    "clip_to_6": (lambda x: jnp.clip(x, 0, 6), "relu6"),
    "leaky_relu": (nnx.leaky_relu, "leaky_relu"),
    "gelu": (nnx.gelu, "gelu"),
    "silu": (lambda x: x / (1 + jnp.exp(-x)), "silu"),
    "elu": (nnx.elu, "elu"),
    "tanh": (jnp.tanh, "tanh"),
    "sigmoid": (jax.nn.sigmoid, "sigmoid"),
    "softmax": (nnx.softmax, "none"),
    "nothing": (lambda x: x, "none"),
    "affine": (lambda x: 2 * x + 1, "none"),
    "relu_and_itself": (lambda x: nnx.relu(x) + x.sum(-1, keepdims=True), "none"),
    "average_pool": (lambda x: nnx.relu(x.reshape(-1, 2, 3).mean(1)), "none"),
    "sum_over_axis": (lambda x: nnx.relu(jnp.cumsum(x, axis=1)), "none"),
    "maximum_over_axis": (lambda x: nnx.relu(x.max(axis=1)), "relu"),
    "padded_with_zero": (lambda x: nnx.relu(jnp.pad(x, ((0, 0), (0, 2)))), "relu"),
    "padded_with_one": (lambda x: nnx.relu(jnp.pad(x, ((0, 0), (0, 2)), constant_values=1)), "none"),
    "one_relu_per_branch": (lambda x: nnx.relu(x[:, :2]) * nnx.relu(x[:, 2:4]), "relu"),
    "one_branch_without": (lambda x: nnx.relu(x[:, :2]) * x[:, 2:4], "none"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_activation_is_recognised_by_value(name: str):
    function, expected = SPELLINGS[name]
    _, capture, sites = capture_of(lambda: Fn(lambda m, x: function(m.a(x)), a=linear(6, 6)), VECTORS)
    assert sites["a"].activation is NAMED[expected]


def test_an_unknown_activation_is_traced_and_shared_between_layers():
    swish = lambda x: x * jnp.clip(x + 3.0, 0, 6) / 6  # noqa: E731
    make = lambda: Fn(lambda m, x: swish(m.b(swish(m.a(x)))), a=linear(6, 6), b=linear(6, 6))  # noqa: E731
    _, capture, sites = capture_of(make, VECTORS)
    activation = sites["a"].activation
    assert activation is sites["b"].activation
    assert activation not in NAMED.values()
    t = jnp.linspace(-5.0, 5.0, 41).reshape(1, 41)
    for f in (activation, jax.jit(activation)):
        value = f(t)
        assert value.shape == t.shape
        np.testing.assert_allclose(value, 6 * swish(t), rtol=1e-5)  # the division belongs to what follows
    assert jax.grad(lambda v: activation(v).sum())(t).shape == t.shape


def test_a_learned_slope_is_part_of_the_activation():
    make = lambda: Fn(  # noqa: E731
        lambda m, x: jnp.where(m.a(x) > 0, m.a(x), m.slope * m.a(x)), a=linear(6, 4), slope=nnx.Param(jnp.zeros(()))
    )
    model = nets.build(make)
    model.slope[...] = jnp.float32(0.3)  # type: ignore[attr-defined]
    prelu = Fn(lambda m, z: jnp.where(z > 0, z, m.slope * z), slope=model.slope)  # type: ignore[attr-defined]
    network = Fn(lambda m, x: m.act(m.a(x)), a=model.a, act=prelu)  # type: ignore[attr-defined]
    (site,) = Capture(network, [(VECTORS,)]).sites
    np.testing.assert_allclose(site.activation(jnp.array([-2.0, 3.0])), [-0.6, 3.0], rtol=1e-6)


def test_an_output_of_the_network_is_not_followed_further():
    def call(m: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = m.a(x)
        return z, nnx.relu(z)

    _, capture, sites = capture_of(lambda: Fn(call, a=linear(6, 4)), VECTORS)
    assert sites["a"].activation is IDENTITY
    original, _ = capture.outputs()
    np.testing.assert_array_equal(np.maximum(original[0], 0), original[1])


def test_nested_arguments_and_outputs_and_a_call_of_ones_own():
    def call(m: Any, data: dict[str, jax.Array], flag: bool) -> dict[str, Any]:
        out = nnx.relu(m.bn(m.a(data["x"]), use_running_average=flag)) + data["y"]
        return {"out": [out], "count": jnp.float32(2.0)}

    model = nets.build(lambda: Fn(call, a=linear(6, 4), bn=norm(4)))
    batches = [({"x": VECTORS[i : i + 4], "y": VECTORS[i : i + 4, :4]},) for i in (0, 4)]
    with pytest.raises(ValueError, match="training mode"):
        Capture(model, batches, call=lambda m, d: m(d, False))
    capture = Capture(model, batches, call=lambda m, d: m(d, True))
    assert [(s.name, s.activation, s.norm) for s in capture.sites] == [("a", RELU, ("bn",))]
    original, _ = capture.outputs()
    expected: Any = model({"x": VECTORS, "y": VECTORS[:, :4]}, True)  # type: ignore[operator]
    np.testing.assert_allclose(original["out"][0], expected["out"][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(original["count"], [2.0, 2.0])


def test_the_model_is_not_changed():
    model: Any = nets.build(lambda: nets.vgg(True))
    before = jax.tree.map(np.asarray, nnx.state(model))
    capture = Capture(model, [(IMAGES,)])
    capture.observe(capture.sites[0])
    capture.replace(capture.sites[0], *random_weights(capture.sites[0]))
    capture.outputs()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert model.layers[1].use_running_average is False


def test_find():
    _, capture, sites = capture_of(nets.shared, IMAGES)
    for path in (("layer",), "layer", "again"):
        assert capture.find(path) is sites["again"]
    assert capture.find(()).reason == "not a convolution or dense layer"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no module 'tail'; layers are: stem, again, middle"):
        capture.find(("tail",))


def test_a_network_without_layers():
    capture = Capture(Fn(lambda m, x: x + 1), [(VECTORS,)])
    assert capture.sites == []
    assert capture.skipped == []
    np.testing.assert_allclose(capture.outputs()[0], VECTORS + 1)


def test_sites_are_used_in_order_and_once():
    _, capture, sites = capture_of(nets.mlp, VECTORS)
    capture.observe(sites["b"])
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"'{name}' is observed out of execution order"):
            capture.observe(sites[name])
    with pytest.raises(ValueError, match="'a' was replaced or kept already"):
        capture.replace(sites["a"], *random_weights(sites["a"]))
    capture.keep(sites["c"])
    with pytest.raises(ValueError, match="'c' was replaced or kept already"):
        capture.keep(sites["c"])
    with pytest.raises(ValueError, match="out of execution order"):
        capture.observe(sites["c"])
    other = capture_of(nets.mlp, VECTORS)[2]["b"]
    with pytest.raises(ValueError, match="'b' is not one of this capture's sites"):
        capture.keep(other)


def test_weights_that_do_not_fit_change_nothing():
    _, capture, sites = capture_of(nets.mlp, VECTORS)
    matrix, bias = random_weights(sites["a"])
    for wrong in ((matrix.T, matrix[0]), (matrix[1:], bias[1:])):
        with pytest.raises(ValueError, match=r"do not fit layer 'a'; \(5, 6\) and \(5,\) do"):
            capture.replace(sites["a"], *wrong)
    capture.replace(sites["a"], matrix, bias)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        ([VECTORS], "must be a tuple of arguments, got ndarray"),
        ([()], "must be a tuple"),
        ([(VECTORS, VECTORS[1:])], "must all run over the same images"),
        ([(VECTORS, 1.0)], "must all run over the same images"),
        ([(VECTORS[:0],)], "must all run over the same images"),
        ([(VECTORS,), (VECTORS, VECTORS)], "batch 1 differs from the first"),
        ([(VECTORS,), (VECTORS[:, 1:],)], "batch 1 differs from the first"),
        ([(VECTORS,), (VECTORS.astype(np.int32),)], "batch 1 differs from the first"),
        ([(VECTORS[:3],), (VECTORS,)], "batch 1 has 7 images, the first 3"),
        ([(VECTORS,), (VECTORS[:3],), (VECTORS,)], "only the last may have fewer"),
    ],
)
def test_batches_that_make_no_sense(batches: list[Any], message: str):
    with pytest.raises(ValueError, match=f"batches.*{message}"):
        Capture(Fn(lambda m, *a: a[0]), batches)


def test_sites_have_names_and_matching_modules():
    model, capture, _ = capture_of(nets.containers, VECTORS)
    for site in capture.sites:
        assert site.name == "/".join(map(str, site.path))
        assert isinstance(get(model, site.path), nnx.Linear)

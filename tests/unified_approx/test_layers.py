import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from solvers.tensor_terms import Cp3, Cp4, Tucker2
from solvers.terms import Codebook, Columns, Dense, LowRank, Spatial
from unified_approx.cost import network_cost
from unified_approx.im2col import Geometry, convolve, matrix_to_kernel
from unified_approx.layers import KINDS, FactoredConv, FactoredLinear, Index, factored_class, geometry_of, layer_class

RNG = np.random.default_rng(0)
GEOMETRIES = {
    "same": (Geometry((3, 3), 6, 5, (1, 1), "SAME"), (5, 4)),
    "strided, dilated": (Geometry((3, 3), 6, 5, (2, 1), "SAME", (1, 2)), (6, 7)),
    "lopsided, explicit": (Geometry((2, 3), 6, 5, (1, 2), ((1, 0), (0, 2))), (4, 6)),
    "1x1 strided": (Geometry((1, 1), 6, 5, (2, 2), "VALID"), (5, 4)),
    "1-D": (Geometry((3,), 6, 5, (2,), "SAME"), (7,)),
    "dense": (Geometry((), 12, 5), ()),
}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def whole_channels(geometry, channels):
    places = int(np.prod(geometry.window))
    return np.asarray([i * geometry.c_in + c for i in range(places) for c in channels], np.int32)


def terms_for(geometry):
    """Sums of every kind of term the geometry takes, gauges included."""
    n, p = geometry.matrix_shape.n, geometry.matrix_shape.p
    some = np.sort(RNG.choice(p, p // 3, replace=False)).astype(np.int32)
    rest = np.setdiff1d(np.arange(p), some).astype(np.int32)
    channels = whole_channels(geometry, (1, 4))
    pivots = np.asarray([3, 0], np.int32)
    sums = {
        "dense": [Dense(normal(n, p))],
        "columns": [Columns(normal(n, len(some)), some)],
        "channels": [Columns(normal(n, len(channels)), channels)],
        "codebook": [Codebook(normal(3), RNG.integers(0, 4, (n, p)).astype(np.int32))],
        "codebook + columns": [
            Codebook(normal(20), RNG.integers(0, 21, (n, p)).astype(np.int32)),
            Columns(normal(n, len(some)), some),
        ],
        "low rank": [LowRank(normal(n, 2), normal(2, p), np.arange(p, dtype=np.int32))],
        "two-level": [
            Columns(normal(n, len(some)), some),
            LowRank(normal(n - 2, 2), normal(2, len(rest)), rest, pivots),
        ],
    }
    if geometry.window:
        places = int(np.prod(geometry.window))
        sums["tucker2"] = [Tucker2(normal(2, geometry.c_in), normal(3, places, 2), normal(n, 3))]
        sums["cp3 + columns"] = [
            Cp3(first=normal(3, geometry.c_in), middle=normal(3, places), last=normal(n, 3)),
            Columns(normal(n, len(some)), some),
        ]
    if len(geometry.window) == 2:
        kh, kw = geometry.window
        sums["cp4"] = [
            Cp4(first=normal(4, geometry.c_in), height=normal(4, kh), width=normal(4, kw), last=normal(n, 4))
        ]
        wide = kw * geometry.c_in
        sums["spatial"] = [Spatial(normal(3, wide), normal(n, kh, 3))]
        gauge = Spatial(normal(2, wide - 2), normal(n, kh, 2), np.asarray([4, 1], np.int32))
        sums["spatial + columns"] = [gauge, Columns(normal(n, len(some)), some)]
    return sums


def dense_kernel(terms, geometry):
    return matrix_to_kernel(jnp.asarray(sum(t.matrix(geometry.matrix_shape) for t in terms)), geometry)


@nnx.jit
def every_form(forms, x, kernel):
    """What all forms of one layer give, its kernel, and the convolution it stands for: one compilation."""
    first = next(iter(forms.values()))
    return {name: layer(x) for name, layer in forms.items()}, first.kernel(), convolve(x, kernel, first.geometry)


def check_every_form(geometry, spatial, terms):
    x, bias = jnp.asarray(normal(2, *spatial, geometry.c_in)), normal(geometry.c_out)
    layer = factored_class(geometry).from_terms(terms, bias, geometry)
    forms = {name: layer.with_execution(name) for name in layer.executions()}
    assert all(form.execution == name and form.macs(spatial) > 0 for name, form in forms.items())
    kernel = dense_kernel(terms, geometry)
    outputs, own_kernel, expected = every_form(forms, x, kernel)
    np.testing.assert_allclose(own_kernel, kernel, atol=1e-5)
    for name, y in outputs.items():
        np.testing.assert_allclose(y, expected + bias, atol=5e-5, err_msg=name)
    return set(forms)


@pytest.mark.parametrize(("geometry", "spatial"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_every_execution_is_the_sum_of_the_matrices(geometry, spatial):
    sums = terms_for(geometry)
    names = check_every_form(geometry, spatial, sums["two-level"])
    if geometry.window:
        assert {"merged", "matmul", "factored:channels+patches", "factored:patches+channels"} <= names
    else:
        assert names == {"merged", "factored:channels+channels"}
    if len(geometry.window) == 2:
        names = check_every_form(geometry, spatial, sums["spatial + columns"])
        assert {"factored:convolution+channels", "factored:convolution+patches"} <= names


@pytest.mark.parametrize("name", ["strided, dilated", "lopsided, explicit", "1-D", "1x1 strided"])
def test_tensor_terms_stride_pad_and_dilate_where_the_layer_does(name):
    """musco-pytorch drops dilation and padding modes."""
    geometry, spatial = GEOMETRIES[name]
    sums = terms_for(geometry)
    for kind in ("tucker2", "cp3 + columns", *(("cp4",) if len(geometry.window) == 2 else ())):
        names = check_every_form(geometry, spatial, sums[kind])
        assert len(names) >= 4


@pytest.mark.parametrize("name", ["same", "strided, dilated", "lopsided, explicit"])
def test_multiply_adds_are_those_of_the_traced_program(name):
    geometry, spatial = GEOMETRIES[name]
    for kind in ("tucker2", "cp3 + columns", "cp4", "spatial"):
        layer = FactoredConv.from_terms(terms_for(geometry)[kind], None, geometry)
        for execution in layer.executions():
            form = layer.with_execution(execution)
            assert network_cost(form, np.zeros((2, *spatial, 6), np.float32)).macs == form.macs(spatial), (
                kind,
                execution,
            )


@pytest.mark.parametrize("kind", ["dense", "columns", "channels", "low rank", "spatial", "tucker2", "cp4"])
def test_every_kind_alone(kind):
    geometry, spatial = GEOMETRIES["same"]
    names = check_every_form(geometry, spatial, terms_for(geometry)[kind])
    assert (names == {"merged", "matmul"}) == (kind == "dense")


def test_a_layer_without_terms_is_its_bias():
    geometry, spatial = GEOMETRIES["same"]
    nothing = Columns(np.zeros((5, 0), np.float32), np.zeros(0, np.int32))
    layer = FactoredConv.from_terms([nothing], np.arange(5, dtype=np.float32), geometry)
    assert len(layer.terms) == 0
    assert layer.executions() == ("merged", "matmul")
    y = layer(jnp.ones((2, *spatial, 6)))
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(5.0), (2, 5, 4, 5)))
    assert layer.macs(spatial) == layer.macs_per_position() == 0
    assert not np.any(layer.kernel())
    # v without columns has no values, u has: the term stays and adds nothing
    empty = LowRank(normal(5, 2), np.zeros((2, 0), np.float32), np.zeros(0, np.int32))
    assert not np.any(
        FactoredConv.from_terms([empty], None, geometry, execution="factored:channels")(jnp.ones((2, 5, 4, 6)))
    )


def test_auto_takes_the_form_of_fewest_macs():
    geometry = Geometry((3, 3), 8, 8, (1, 1), "SAME")
    channels = whole_channels(geometry, (0, 3, 5))
    scattered = np.arange(0, 72, 3, dtype=np.int32)  # every channel is read
    make = FactoredConv.from_terms
    whole = make([Columns(normal(8, len(channels)), channels)], None, geometry)
    assert whole.execution == "factored:channels"
    assert whole.macs((4, 4)) == 16 * 8 * 27
    assert whole.macs_per_position() == 8 * 27
    mixed = make([Columns(normal(8, 24), scattered)], None, geometry)
    assert mixed.execution == mixed.with_execution("factored").execution == "factored:patches"
    assert mixed.macs((4, 4)) == 16 * 8 * 24
    assert mixed.with_execution("merged").macs((4, 4)) == 16 * 8 * 72
    thin = make([LowRank(normal(8, 2), normal(2, 72), np.arange(72, dtype=np.int32))], None, geometry)
    assert thin.execution == "factored:channels"
    assert thin.macs((4, 4)) == 16 * (2 * 72 + 2 * 8)
    thick = make([LowRank(normal(8, 8), normal(8, 72), np.arange(72, dtype=np.int32))], None, geometry)
    assert thick.execution == "merged"
    spatial = make([Spatial(normal(2, 24), normal(8, 3, 2))], None, geometry)
    assert spatial.macs((4, 4)) == 16 * (2 * 24 + 8 * 6)


def test_spatial_macs_count_the_rows_between_the_convolutions():
    geometry = Geometry((3, 3), 4, 6, (2, 2), "SAME")
    layer = FactoredConv.from_terms([Spatial(normal(2, 12), normal(6, 3, 2))], None, geometry)
    assert layer.macs((8, 8), "factored:convolution") == 8 * 4 * 2 * 12 + 4 * 4 * 6 * 6


def test_variables_are_shared_trained_and_kept_apart():
    geometry, spatial = GEOMETRIES["same"]
    layer: Any = FactoredConv.from_terms(terms_for(geometry)["two-level"], normal(5), geometry, execution="merged")
    other: Any = layer.with_execution("factored:patches+channels")
    assert other.terms[0].values is layer.terms[0].values
    assert other.bias is layer.bias
    assert all(not isinstance(v, nnx.Param) for v in jax.tree.leaves(nnx.state(layer, Index)))
    assert sum(v.size for v in jax.tree.leaves(nnx.state(layer, nnx.Param))) == sum(
        t.term().num_params for t in layer.terms
    ) + len(layer.bias)

    x, target = jnp.asarray(normal(4, *spatial, 6)), jnp.asarray(normal(4, *spatial, 5))
    before = jax.tree.map(jnp.copy, nnx.state(other, Index))
    grads = nnx.jit(nnx.grad(lambda m: jnp.mean((m(x) - target) ** 2)))
    for a, b in zip(jax.tree.leaves(grads(layer)), jax.tree.leaves(grads(other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)

    optimizer = nnx.Optimizer(other, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grad = nnx.value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2))(model)
        optimizer.update(model, grad)
        return loss

    losses = [float(step(other, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(other, Index)))
    np.testing.assert_allclose(layer(x), other(x), atol=1e-4)  # the other form sees what was trained


def test_split_merge_clone_and_compilation():
    geometry, spatial = GEOMETRIES["same"]
    terms = terms_for(geometry)["two-level"]
    layer = FactoredConv.from_terms(terms, normal(5), geometry, execution="factored:channels+channels")
    x = jnp.asarray(normal(2, *spatial, 6))
    expected = layer(x)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(layer))(x), expected)
    np.testing.assert_array_equal(nnx.clone(layer)(x), expected)
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    run(layer, x)
    run(FactoredConv.from_terms(terms, normal(5), geometry, execution=layer.execution), x)
    assert len(traces) == 1  # static attributes are equal: layers of one structure share a compilation


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "inputs"),
    [
        (None, "float32", [((2, 1, 5, 4, 6), "float32"), ((5, 4, 6), "int32")]),
        (None, "bfloat16", [((2, 5, 4, 6), "float32"), ((5, 4, 6), "bfloat16")]),
        ("bfloat16", "float32", [((2, 5, 4, 6), "float32")]),
    ],
)
def test_shapes_and_dtypes_are_those_of_flax(dtype, param_dtype, inputs):
    geometry = GEOMETRIES["same"][0]
    conv = nnx.eval_shape(
        lambda: nnx.Conv(6, 5, (3, 3), dtype=dtype, param_dtype=jnp.dtype(param_dtype), rngs=nnx.Rngs(0))
    )
    terms = terms_for(geometry)["spatial + columns"]
    layer: Any = FactoredConv.from_terms(terms, normal(5), geometry, dtype=dtype, param_dtype=param_dtype)
    conv.kernel, conv.bias = nnx.Param(layer.kernel()), nnx.Param(layer.bias[...])
    assert conv.kernel.dtype == param_dtype
    names = ("merged", "matmul", "factored:convolution+patches")
    run = nnx.jit(lambda layers, x: [layer(x) for layer in layers])
    for shape, input_dtype in inputs:
        x = jnp.asarray(4 * normal(*shape), input_dtype)
        expected, *outputs = run(nnx.List([conv, *(layer.with_execution(name) for name in names)]), x)
        tolerance = 4e-2 if "bfloat16" in (dtype, param_dtype) else 1e-5
        for name, y in zip(names, outputs, strict=True):
            assert (y.shape, y.dtype) == (expected.shape, expected.dtype), name
            assert float(jnp.abs(y - expected).max()) <= tolerance * float(jnp.abs(expected).max()), name


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_spec_and_tensors_rebuild_the_layer_bit_for_bit(param_dtype):
    for geometry, _ in (GEOMETRIES["lopsided, explicit"], GEOMETRIES["dense"]):
        for terms in terms_for(geometry).values():
            cls = factored_class(geometry)
            layer = cls.from_terms(terms, normal(5), geometry, param_dtype=param_dtype, dtype="float32")
            layer = layer.with_execution(layer.executions()[-1])
            spec = json.loads(json.dumps(layer.spec()))
            arrays = {name: np.asarray(a) for name, a in layer.tensors().items()}
            again = cls.from_spec(spec, arrays)
            assert nnx.graphdef(again) == nnx.graphdef(layer)
            for a, b in zip(jax.tree.leaves(nnx.state(layer)), jax.tree.leaves(nnx.state(again)), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


def test_terms_come_back_as_they_went_in():
    geometry = GEOMETRIES["same"][0]
    for terms in terms_for(geometry).values():
        layer = FactoredConv.from_terms(terms, None, geometry)
        for term, kept in zip(terms, layer.terms, strict=True):
            back = kept.term()
            assert type(back) is type(term)
            assert layer_class(term).kind == kept.kind
            assert back.index_bits(geometry.matrix_shape) == term.index_bits(geometry.matrix_shape)
            for name, array in vars(term).items():
                np.testing.assert_array_equal(getattr(back, name), array)


def test_geometry_of_reads_flax_layers():
    def make(**options):
        return nnx.eval_shape(lambda: nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options))

    assert geometry_of(make()) == Geometry((3, 3), 4, 6, (1, 1), "SAME", (1, 1))
    assert geometry_of(make(strides=2, padding=1)).padding == ((1, 1), (1, 1))
    assert geometry_of(make(padding=[1, (0, 2)], strides=None)).padding == ((1, 1), (0, 2))
    assert geometry_of(nnx.eval_shape(lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)))) == Geometry((), 4, 3)
    refused = {
        "feature_group_count=2": {"feature_group_count": 2},
        "input_dilation=2": {"input_dilation": 2},
        "CIRCULAR": {"padding": "CIRCULAR"},
    }
    for word, options in refused.items():
        with pytest.raises(ValueError, match=word):
            geometry_of(make(**options))
    with pytest.raises(ValueError, match="mask"):
        geometry_of(make(mask=jnp.ones((3, 3, 4, 6))))


CONV = GEOMETRIES["same"][0]
INDEX = np.asarray([0, 5, 9], np.int32)
WRONG = {
    "values.shape": [Columns(normal(4, 3), INDEX)],
    "indices: must be strictly increasing": [Columns(normal(5, 3), INDEX[::-1].copy())],
    "indices: need integers": [Columns(normal(5, 3), INDEX + 50)],
    r"values.shape=\(5, 3\)": [Dense(normal(5, 3))],
    "codes.shape": [Codebook(normal(2), np.zeros((5, 9), np.int32))],
    "codes: from 0 to 3; 2 values": [Codebook(normal(2), np.eye(5, 54, dtype=np.int32) * 3)],
    "u.shape": [LowRank(normal(5, 2), normal(2, 3), INDEX, np.asarray([1, 0], np.int32))],
    "pivots: 1 of them": [LowRank(normal(4, 2), normal(2, 3), INDEX, np.asarray([1], np.int32))],
    "pivots: has repeated": [LowRank(normal(3, 2), normal(2, 3), INDEX, np.asarray([1, 1], np.int32))],
    "first.shape": [Spatial(normal(2, 5), normal(5, 3, 2))],
    "core.shape": [Tucker2(normal(2, 6), normal(2, 4, 2), normal(5, 2))],
    r"ranks=\(0, 1\)": [Tucker2(normal(1, 6), normal(0, 9, 1), normal(5, 0))],
    "middle.shape": [Cp3(first=normal(2, 6), middle=normal(2, 8), last=normal(5, 2))],
    "width.shape": [Cp4(first=normal(2, 6), height=normal(2, 3), width=normal(2, 4), last=normal(5, 2))],
    "second.shape": [Spatial(normal(2, 18), normal(5, 2, 2))],
}


@pytest.mark.parametrize("message", WRONG)
def test_terms_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        FactoredConv.from_terms(WRONG[message], None, CONV)


def test_other_bad_input_is_refused():
    columns = [Columns(normal(5, 3), INDEX)]
    with pytest.raises(ValueError, match="execution='fast'.*merged, matmul, factored:channels"):
        FactoredConv.from_terms(columns, None, CONV, execution="fast")
    with pytest.raises(ValueError, match="execution='matmul'"):
        FactoredLinear.from_terms([Columns(normal(5, 3), INDEX)], None, Geometry((), 12, 5), execution="matmul")
    with pytest.raises(ValueError, match="bias.shape"):
        FactoredConv.from_terms(columns, normal(4), CONV)
    with pytest.raises(ValueError, match="dtype=int8"):
        FactoredConv.from_terms(columns, None, CONV, param_dtype="int8")
    with pytest.raises(ValueError, match=r"window=\(\)"):
        FactoredConv.from_terms(columns, None, Geometry((), 12, 5))
    with pytest.raises(ValueError, match="2-D convolution"):
        FactoredLinear.from_terms([Spatial(normal(1, 12), normal(5, 1, 1))], None, Geometry((), 12, 5))
    with pytest.raises(ValueError, match="no layer for a MyColumns"):
        layer_class(type("MyColumns", (Columns,), {})(normal(5, 3), INDEX))
    with pytest.raises(ValueError, match="c_in=6"):
        FactoredConv.from_terms(columns, None, CONV)(jnp.ones((1, 5, 4, 3)))
    for kind in ("low_rank", "spatial"):
        empty = {
            "low_rank": LowRank(normal(5, 0), normal(0, 3), INDEX),
            "spatial": Spatial(normal(0, 18), normal(5, 3, 0)),
        }
        with pytest.raises(ValueError, match="rank=0"):
            KINDS[kind].from_term(empty[kind], CONV)
    layer = FactoredConv.from_terms(columns, normal(5), CONV)
    arrays = {name: np.asarray(a) for name, a in layer.tensors().items()}
    with pytest.raises(ValueError, match="do not belong"):
        FactoredConv.from_spec(layer.spec(), arrays | {"terms.1.values": arrays["bias"]})
    with pytest.raises(ValueError, match="needs"):
        FactoredConv.from_spec(layer.spec(), {"bias": arrays["bias"], "terms.0.values": arrays["terms.0.values"]})
    with pytest.raises(ValueError, match="kind='tucker'"):
        FactoredConv.from_spec(layer.spec() | {"terms": [{"kind": "tucker", "execution": "x"}]}, arrays)


def test_training_avoids_gathers_where_the_product_is_small():
    def columns(n, share):
        geometry = Geometry((3, 3), 64, n, (1, 1), "SAME")
        kept = np.sort(RNG.choice(geometry.matrix_shape.p, int(share * geometry.matrix_shape.p), replace=False))
        return FactoredConv.from_terms([Columns(normal(n, len(kept)), kept.astype(np.int32))], None, geometry)

    assert columns(16, 0.4).execution == "factored:patches"
    assert columns(16, 0.4).execution_for_training() == "merged"
    assert columns(512, 0.1).execution_for_training() == "factored:patches"
    geometry = Geometry((3, 3), 6, 5, (1, 1), "SAME")
    low_rank = FactoredConv.from_terms(
        [LowRank(normal(5, 2), normal(2, 54), np.arange(54, dtype=np.int32))], None, geometry
    )
    assert low_rank.execution_for_training() == "factored:channels"


@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("execution", ["factored:decode", "factored:lookup", "merged"])
def test_the_gradient_of_a_shared_weight_is_the_sum_over_all_that_share_it(k, execution):
    codes = RNG.integers(0, k + 1, (5, 54)).astype(np.int32)
    layer = FactoredConv.from_terms([Codebook(normal(k), codes)], None, CONV, execution=execution)
    x = jnp.asarray(normal(2, 5, 5, 6))

    def loss(kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, CONV)))

    of_kernel = jax.grad(loss)(layer.kernel()).reshape(54, 5).T
    found = nnx.grad(lambda own: jnp.sum(jnp.sin(own(x))))(layer)["terms"][0]["values"][...]
    expected = [np.sum(of_kernel, where=codes == i) for i in range(1, k + 1)]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)


def test_codes_take_a_byte_each_and_are_not_trained():
    codes = RNG.integers(0, 17, (5, 54)).astype(np.int32)
    layer = FactoredConv.from_terms([Codebook(normal(16), codes)], None, CONV)
    assert layer.terms[0].codes.dtype == jnp.uint8
    assert sum(v.size for v in jax.tree.leaves(nnx.state(layer, nnx.Param))) == 16


def test_a_sum_of_many_terms_is_made_and_read_at_once():
    """Thirty terms of two forms each have 2^30 executions."""
    terms = [Columns(normal(5, 2), np.asarray([i, i + 7], np.int32)) for i in range(30)]
    layer = FactoredConv.from_terms(terms, None, CONV)
    assert len(layer.executions()) == 4
    mixed = layer.with_execution(f"factored:{'+'.join(['channels', 'patches'] * 15)}")
    again = FactoredConv.from_spec(mixed.spec(), {n: np.asarray(a) for n, a in mixed.tensors().items()})
    assert again.execution == mixed.execution
    x = jnp.asarray(normal(1, 5, 4, 6))
    np.testing.assert_allclose(again(x), layer.with_execution("merged")(x), atol=1e-4)
    assert layer.execution_for_training() == "merged"
    assert layer.factored_macs((5, 4)) == sum(min(t.macs((5, 4), f) for f in t.executions()) for t in layer.terms)
    with pytest.raises(ValueError, match="this layer offers merged, matmul, factored:channels"):
        layer.with_execution("factored:channels")


def test_the_cheapest_execution_is_that_of_all_that_are_listed():
    for name, (geometry, spatial) in GEOMETRIES.items():
        for kind, terms in terms_for(geometry).items():
            layer: Any = factored_class(geometry).from_terms(terms, None, geometry)
            factored = [e for e in layer.executions() if e.startswith("factored")]
            for asked, choice in (("auto", ["merged", *factored]), ("factored", factored or ["merged"])):
                best = min(choice, key=layer.macs_per_position)
                assert layer.with_execution(asked).execution == best, (name, kind)
            least = min((layer.macs(spatial, e) for e in factored), default=layer.macs(spatial, "merged"))
            assert layer.factored_macs(spatial) == least, (name, kind)


def test_values_of_a_codebook_are_in_one_axis():
    term = Codebook(normal(3), RNG.integers(0, 4, (5, 54)).astype(np.int32))
    object.__setattr__(term, "values", normal(3, 1))
    with pytest.raises(ValueError, match=r"values.shape=\(3, 1\): the layer's geometry needs \(3,\)"):
        FactoredConv.from_terms([term], None, CONV)

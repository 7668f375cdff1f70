from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unified_approx.im2col import (
    Geometry,
    convolve,
    explicit_padding,
    kernel_to_matrix,
    matrix_to_kernel,
    normalize,
    output_shape,
    patches,
    sample_positions,
    sample_rows,
    take_positions,
)

GEOMETRIES = {
    "3x3 same": (Geometry((3, 3), 3, 5, (1, 1), "SAME", (1, 1)), (6, 5)),
    "3x3 same stride 2, even side": (Geometry((3, 3), 2, 4, (2, 2), "SAME"), (6, 8)),
    "3x3 explicit stride 2": (Geometry((3, 3), 2, 4, (2, 2), ((1, 1), (1, 1))), (6, 7)),
    "3x3 dilated": (Geometry((3, 3), 2, 3, (1, 2), "SAME", (2, 1)), (8, 7)),
    "5x2 valid, strides 3, 1": (Geometry((5, 2), 2, 3, (3, 1), "VALID"), (9, 4)),
    "lopsided padding": (Geometry((2, 3), 1, 2, (1, 1), ((2, 0), (0, 3)), (1, 2)), (4, 5)),
    "1x1 stride 2": (Geometry((1, 1), 4, 3, (2, 2), "VALID"), (5, 5)),
    "1-D": (Geometry((4,), 3, 2, (2,), "SAME", (2,)), (11,)),
    "3-D": (Geometry((2, 3, 2), 2, 3, (1, 2, 1), "SAME"), (3, 4, 3)),
    "dense": (Geometry((), 7, 4), ()),
    "dense on sequences": (Geometry((), 7, 4), (3,)),
}


@pytest.fixture(params=GEOMETRIES.values(), ids=list(GEOMETRIES))
def case(request):
    geometry, spatial = request.param
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *spatial, geometry.c_in)).astype(np.float32)
    kernel = rng.standard_normal((*geometry.window, geometry.c_in, geometry.c_out)).astype(np.float32)
    return geometry, x, kernel


def flax_layer(geometry, kernel):
    """The Flax layer of that geometry, made without running an initialiser."""
    if geometry.window:
        padding = geometry.padding if isinstance(geometry.padding, str) else list(geometry.padding)
        layer = nnx.eval_shape(
            lambda: nnx.Conv(
                geometry.c_in,
                geometry.c_out,
                geometry.window,
                geometry.strides or 1,
                padding=padding,
                kernel_dilation=geometry.dilation or 1,
                use_bias=False,
                rngs=nnx.Rngs(0),
            )
        )
    else:
        layer = nnx.eval_shape(lambda: nnx.Linear(geometry.c_in, geometry.c_out, use_bias=False, rngs=nnx.Rngs(0)))
    layer.kernel = nnx.Param(jnp.asarray(kernel))
    return layer


def test_patches_times_matrix_is_the_flax_layer(case):
    geometry, x, kernel = case
    expected = flax_layer(geometry, kernel)(jnp.asarray(x))
    rows = patches(jnp.asarray(x), geometry)
    assert expected.shape == (len(x), *output_shape(x.shape[1:-1], geometry), geometry.c_out)
    assert rows.shape == (*expected.shape[:-1], geometry.matrix_shape.p)
    np.testing.assert_allclose(rows @ kernel_to_matrix(jnp.asarray(kernel)).T, expected, atol=2e-5)
    np.testing.assert_allclose(convolve(jnp.asarray(x), jnp.asarray(kernel), geometry), expected, atol=2e-5)


def test_sampled_rows_are_rows_of_patches(case):
    geometry, x, _ = case
    out = output_shape(x.shape[1:-1], geometry)
    positions = sample_positions(len(x), out, 10_000, seed=1)
    assert len(positions) == len(x) * int(np.prod(out))
    everything = np.asarray(patches(jnp.asarray(x), geometry))
    rows = sample_rows(x, geometry, positions)
    np.testing.assert_array_equal(rows, everything.reshape(-1, everything.shape[-1]))
    some = positions[::-3]
    np.testing.assert_array_equal(sample_rows(jnp.asarray(x), geometry, some), take_positions(everything, some))


def test_kernel_and_matrix_round_trip(case):
    geometry, _, kernel = case
    matrix = kernel_to_matrix(jnp.asarray(kernel))
    assert matrix.shape == (geometry.matrix_shape.n, geometry.matrix_shape.p)
    np.testing.assert_array_equal(matrix_to_kernel(matrix, geometry), kernel)
    if geometry.window[1:] > (1,) and len(geometry.window) == 2:  # input channel fastest
        c_in = geometry.c_in
        np.testing.assert_array_equal(matrix[:, c_in : 2 * c_in], kernel[0, 1].T)


def test_patches_keep_the_dtype_and_work_under_jit():
    geometry = GEOMETRIES["3x3 same"][0]
    x = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.bfloat16).reshape(2, 4, 4, 3)
    rows = jax.jit(patches, static_argnames="geometry")(x, geometry)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, patches(x, geometry))


@pytest.mark.parametrize("d", [1, 5, 7, 40, 96])
def test_positions_are_distinct_even_and_deterministic(d):
    out = (4, 4)
    positions = sample_positions(6, out, d, seed=3)
    assert positions.shape == (d, 3)
    assert len(np.unique(positions, axis=0)) == d
    assert (positions >= 0).all()
    assert (positions < [6, 4, 4]).all()
    counts = np.bincount(positions[:, 0], minlength=6)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(positions, sample_positions(6, out, d, seed=3))
    if d == 40:
        assert (positions != sample_positions(6, out, d, seed=4)).any()
        # every pixel gets its turn: with one fixed grid for all images most of the 16 would stay empty
        assert len(np.unique(positions[:, 1:], axis=0)) > 12


def test_normalize_writes_everything_out():
    g = normalize(Geometry((3, 1), 2, 2, strides=(1, 1), padding=((1, 1), (0, 0))))
    assert g == Geometry((3, 1), 2, 2, (1, 1), ((1, 1), (0, 0)), (1, 1))
    assert hash(g) == hash(normalize(g))
    assert explicit_padding((5, 4), replace(g, padding="SAME", strides=(2, 1))) == ((1, 1), (0, 0))


GOOD = Geometry((3, 3), 2, 2)
BAD = {
    "window": replace(GOOD, window=(0, 3)),
    "c_in": replace(GOOD, c_in=0),
    "strides=": replace(GOOD, strides=(2,)),
    "strides": replace(GOOD, strides=(2, 0)),
    "dilation": replace(GOOD, dilation=(1, 1, 1)),
    "padding='CIRCULAR'": replace(GOOD, padding="CIRCULAR"),
    "padding=": replace(GOOD, padding=((1, 1), (-1, 0))),
    "padding": replace(GOOD, padding=((1, 1),)),
}


@pytest.mark.parametrize("word", BAD)
def test_bad_geometry_is_refused_by_name(word):
    with pytest.raises(ValueError, match=word):
        normalize(BAD[word])


def test_bad_input_is_refused():
    x = jnp.zeros((2, 4, 4, 2))
    with pytest.raises(ValueError, match="c_in=2"):
        patches(x[..., :1], GOOD)
    with pytest.raises(ValueError, match="smaller than window"):
        patches(x[:, :2], GOOD)
    with pytest.raises(ValueError, match="2 spatial axes"):
        output_shape((4,), GOOD)
    with pytest.raises(ValueError, match="positions"):
        sample_rows(x, GOOD, np.array([[0, 2, 0]]))
    with pytest.raises(ValueError, match="positions"):
        sample_rows(x, GOOD, np.array([[0, 1]]))
    with pytest.raises(ValueError, match="num_images=0"):
        sample_positions(0, (4, 4), 5, 0)
    with pytest.raises(ValueError, match="d=0"):
        sample_positions(3, (4, 4), 0, 0)
    with pytest.raises(ValueError, match="matrix"):
        matrix_to_kernel(jnp.zeros((2, 17)), GOOD)

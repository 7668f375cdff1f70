"""Kernel gradients summed over parts of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tiny import convolutions

from unified_approx.kernel_gradients import for_gradients

LAYOUTS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}


def example(layout, batch=67, side=24, c_in=4, c_out=6, groups=1):
    rng = np.random.default_rng(0)
    sizes = {"N": batch, "H": side, "W": side, "C": c_in}
    of_kernel = {"H": 3, "W": 2, "I": c_in // groups, "O": c_out}
    x, kernel = (
        jnp.asarray(rng.normal(size=[named[axis] for axis in spec]), jnp.float32)
        for named, spec in zip((sizes, of_kernel), LAYOUTS[layout][:2], strict=True)
    )
    return x, kernel


def gradients(x, kernel, layout, exchange, **options):
    def loss(x, kernel):
        options.setdefault("window_strides", (1, 1))
        out = jax.lax.conv_general_dilated(x, kernel, padding="SAME", dimension_numbers=LAYOUTS[layout], **options)
        return jnp.sum(jnp.sin(out))

    gradient = jax.grad(exchange(loss), (0, 1))
    return jax.jit(gradient)(x, kernel), len(convolutions(gradient, x, kernel))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"window_strides": (2, 1)}, {"rhs_dilation": (1, 2)}, {"feature_group_count": 2}], ids=str
)
def test_same_gradients_in_parts(layout, options):
    x, kernel = example(layout, groups=options.get("feature_group_count", 1))
    plain, few = gradients(x, kernel, layout, lambda f: f, **options)
    own, many = gradients(x, kernel, layout, for_gradients, **options)
    assert many > few  # one for each part, and 67 images are no multiple of the parts
    for a, b in zip(own, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_small_batches_are_one_part():
    x, kernel = example("NHWC", batch=2, side=8)
    assert gradients(x, kernel, "NHWC", for_gradients)[1] == gradients(x, kernel, "NHWC", lambda f: f)[1]


def test_a_part_is_at_least_one_image():
    x, kernel = example("NHWC", batch=2, side=80, c_in=30)
    own, many = gradients(x, kernel, "NHWC", for_gradients)
    plain, few = gradients(x, kernel, "NHWC", lambda f: f)
    assert many == few + 1
    np.testing.assert_allclose(own[1], plain[1], rtol=1e-3, atol=1e-3)

"""The forms in which a network trains fastest on a CPU; the same on every machine, so that runs resume exactly."""

from math import prod

import numpy as np
from flax import nnx
from jaxtyping import PyTree

from solvers.terms import Dense
from unified_approx.assemble import get, homes, modules, put, with_executions
from unified_approx.calling import Call
from unified_approx.cost import layer_calls
from unified_approx.im2col import Geometry, kernel_to_matrix, output_shape
from unified_approx.layers import Factored, factored_class, geometry_of
from unified_approx.layers.factored import MATMUL, MERGED
from unified_approx.macs import LayerCall, factored_layers

_FEW = 9
"""Output positions of an image up to which patches times matrix are faster than XLA's convolution: with 512 channels
on 2x2 images 50 times, with its derivatives."""


def for_training(model: nnx.Module, *example: PyTree, call: Call | None = None) -> nnx.Module:
    """The network with its layers in other forms, computing the same; see `as_before` for the way back.

    Factored layers take the form of fewest multiply-adds, where a value gathered counts as many. Convolutions onto few
    positions become products of patches; a Flax convolution becomes a factored layer for that.

    Args:
        model: any network; not changed.
        *example: the arguments of one call.
        call: how the network is called.
    """
    seen = layer_calls(model, *example, call=call)
    forms = {}
    for path, layer in factored_layers(model).items():
        form = layer.execution_for_training()
        few = form == MERGED and _onto_few(layer.geometry, seen.get(path, ()))
        forms[path] = MATMUL if few else form
    new = with_executions(model, forms)
    for path, conv in modules(model).items():
        if type(conv) is nnx.Conv and (product := _as_product(conv, seen.get(path, ()))) is not None:
            for home in homes(model, path):
                new = put(new, home, product)
    return new


def as_before(trained: nnx.Module, model: nnx.Module) -> nnx.Module:
    """A network that `for_training` made of `model`, trained since, with the layers and forms of `model`."""
    before = factored_layers(model)
    new = with_executions(trained, {path: layer.execution for path, layer in before.items()})
    for path, layer in factored_layers(trained).items():
        if path in before:
            continue
        conv = nnx.clone(get(model, path))
        conv.kernel[...] = layer.kernel()
        if layer.bias is not None:
            conv.bias[...] = layer.bias[...]
        for home in homes(model, path):
            new = put(new, home, conv)
    return new


def _onto_few(geometry: Geometry, calls: tuple[LayerCall, ...]) -> bool:
    """Whether a convolution is run on small images only."""
    sizes = [prod(output_shape(c.input_shape[1:-1], geometry)) for c in calls]
    return bool(geometry.window) and bool(sizes) and max(sizes) <= _FEW


def _as_product(conv: nnx.Conv, calls: tuple[LayerCall, ...]) -> Factored | None:
    """The convolution as patches times matrix, where that is faster."""
    try:
        geometry = geometry_of(conv)
    except ValueError:  # groups, masks and the like
        return None
    dtype = conv.kernel.dtype.name
    if not _onto_few(geometry, calls) or dtype not in ("float32", "bfloat16", "float16"):
        return None
    matrix = np.asarray(kernel_to_matrix(conv.kernel[...]), np.float32)
    bias = None if conv.bias is None else np.asarray(conv.bias[...], np.float32)
    options = {"execution": MATMUL, "dtype": conv.dtype, "param_dtype": dtype}
    return factored_class(geometry).from_terms([Dense(matrix)], bias, geometry, **options)

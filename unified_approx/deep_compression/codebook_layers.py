"""Layers that store codes and values, and compute from them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from solvers import compressions, terms
from unified_approx.assemble import get, homes, put
from unified_approx.layers import Factored, factored_class, geometry_of
from unified_approx.learning_compression import LcResult
from unified_approx.learning_compression.rebuild import is_plain
from unified_approx.pieces import Piece


def with_codebook_layers(result: LcResult) -> nnx.Module:
    """The network with a codebook term in place of every layer whose kernel has its own codebook.

    Layers that factored layers cannot stand for (groups, masks, circular padding) stay as they are. A replaced layer
    trains its values as any other parameter; `as_dense` decodes it once. In memory a weight takes the bytes of its
    code.
    """
    model = nnx.clone(result.model)
    for piece, theta in zip(result.pieces, result.thetas, strict=True):
        if not isinstance(theta, compressions.Codebook) or not piece.matrix or not piece.kernels[0]:
            continue
        path = piece.paths[0][:-1]
        if not is_plain(get(model, path)):
            continue
        new = _layer(get(model, path), piece, theta)
        for home in homes(model, path):
            model = put(model, home, new)
    return model


def _layer(old: nnx.Conv | nnx.Linear, piece: Piece, theta: compressions.Codebook) -> Factored:
    has_zero = isinstance(piece.compression, compressions.PruneQuantize)
    codes = np.asarray(theta.codes, np.int32) + (0 if has_zero else 1)
    term = terms.Codebook(np.asarray(theta.centers, np.float32), codes)
    geometry = geometry_of(old)
    bias = None if old.bias is None else jnp.asarray(old.bias[...])
    return factored_class(geometry).from_terms([term], bias, geometry, execution="merged", dtype=old.dtype)

"""Batch normalisations put back where compression folded them, for training, and folded again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from solvers.extract import with_gauge
from solvers.terms import LowRank, Term
from unified_approx.assemble import Identity, get, homes, modules, put
from unified_approx.calling import Call, forward
from unified_approx.layers import Factored, factored_class
from unified_approx.macs import walk
from unified_approx.narrow import run_as, terms_of
from unified_approx.sites import Path
from unified_approx.tap import outputs_of

_MOMENTUM = 0.9  # of the running statistics: a few epochs are short for more


def insert_batch_norms(model: nnx.Module, example: PyTree, call: Call = forward) -> tuple[nnx.Module, tuple[Path, ...]]:
    """The network with a batch norm in place of every `Identity` behind a factored layer; it computes the same.

    Mean and variance are those of the example, scale and shift undo them: training starts from the same function, and
    from normalised gradients.

    Args:
        model: a compressed network; it is not changed.
        example: a batch as the network takes it, a few hundred examples.
        call: how the network is called.

    Returns:
        The network, and the paths of the batch norms.
    """
    new = nnx.clone(model)
    new.eval()
    paths = tuple(path for path, module in modules(new).items() if isinstance(module, Identity))
    batch = jax.tree.map(jnp.asarray, example)
    _, seen = outputs_of(new, paths, lambda network: call(network, batch))
    used = tuple(path for path in paths if len(seen[path]) == 1)  # shared ones see several distributions
    for path in used:
        norm = _norm_of(np.asarray(seen[path][0], np.float32))
        for home in homes(model, path):
            new = put(new, home, norm)
    follows = walk(new, (batch,), call).follows
    sources = {path: follows.get(path) for path in used}
    lost = [path for path, source in sources.items() if source is None or not isinstance(get(new, source), Factored)]
    for home in (home for path in lost for home in homes(model, path)):
        new = put(new, home, Identity())  # behind a layer of which nothing is left, for one
    return new, tuple(path for path in used if path not in lost)


def _norm_of(out: np.ndarray) -> nnx.BatchNorm:
    axes = tuple(range(out.ndim - 1))
    mean, var = out.mean(axes), out.var(axes)
    norm = nnx.BatchNorm(out.shape[-1], momentum=_MOMENTUM, use_running_average=True, rngs=nnx.Rngs(0))
    values = {"mean": mean, "var": var, "bias": mean, "scale": np.sqrt(var + norm.epsilon)}
    for name, value in values.items():
        getattr(norm, name)[...] = jnp.asarray(value)
    return norm


def fold_batch_norms(model: nnx.Module, paths: tuple[Path, ...], example: PyTree, call: Call = forward) -> nnx.Module:
    """The network with these batch norms folded into the factored layers that they follow.

    Args:
        model: what `insert_batch_norms` gave, trained since; it is not changed.
        paths: of the batch norms.
        example: a batch as the network takes it.
        call: how the network is called.

    Raises:
        ValueError: a batch norm that does not follow a factored layer directly.
    """
    follows = walk(model, (example,), call).follows
    new = nnx.clone(model)
    for path in paths:
        norm, source = get(model, path), follows.get(path)
        layer: Any = None if source is None else get(new, source)
        if source is None or not isinstance(layer, Factored):
            raise ValueError(f"paths: the batch norm {path} does not follow a factored layer; it cannot be folded")
        scale = np.asarray(norm.scale[...] / jnp.sqrt(norm.var[...] + norm.epsilon))
        bias = 0.0 if layer.bias is None else np.asarray(layer.bias[...], np.float32)
        shift = (bias - np.asarray(norm.mean[...])) * scale + np.asarray(norm.bias[...])
        folded = factored_class(layer.geometry).from_terms(
            [_scaled(term, scale) for term in terms_of(layer)],
            shift,
            layer.geometry,
            dtype=layer.dtype,
            param_dtype=layer.spec()["param_dtype"],
            removed=layer.removed,
        )
        for home in homes(model, source):
            new = put(new, home, run_as(folded, layer))
        for home in homes(model, path):
            new = put(new, home, Identity())
    return new


def _scaled(term: Term, scale: np.ndarray) -> Term:
    """Rows scaled, in the same gauge."""
    new = term.with_rows_scaled(scale.astype(np.float32))
    return with_gauge(new) if isinstance(term, LowRank) and isinstance(new, LowRank) and len(term.pivots) else new

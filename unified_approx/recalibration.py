"""Running statistics of batch norms, estimated anew after the weights before them have changed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from unified_approx import calibration as examples
from unified_approx.calling import Call, forward


def recalibrate_norms(model: nnx.Module, data: PyTree, *, batch_size: int = 200, call: Call = forward) -> nnx.Module:
    """A copy whose batch norms run with mean and variance of these examples: averages over the batches.

    Dropout and everything else runs as in use; weights do not change. MUSCO does this after it has decomposed layers.
    After a solve of this project it does harm: responses are matched as they are, and folded norms are not there.

    Args:
        model: any network with `nnx.BatchNorm`s.
        data: examples as `compress` takes them, a few thousand.
        batch_size: examples that go through the network at a time; what is left over at the end is not used.
        call: how the network is called.

    Raises:
        ValueError: a network without batch norms, or less than one batch of examples.
    """
    new = nnx.clone(model)
    new.eval()
    norms = [module for _, module in nnx.iter_modules(new) if isinstance(module, nnx.BatchNorm)]
    if not norms:
        raise ValueError("model: it has no batch norm; compression folds those that follow compressed layers")
    gathered = examples.gather(data)
    batches = [b for b in examples.split(gathered, batch_size) if examples.count(b) == batch_size]
    if not batches:
        raise ValueError(f"batch_size: {batch_size} of {examples.count(gathered)} examples; give at most that many")
    before = [(norm.use_running_average, norm.momentum) for norm in norms]
    for norm in norms:
        norm.use_running_average, norm.momentum = False, 0.0  # each pass leaves the statistics of its batch
    graphdef, state = nnx.split(new)
    found = [_statistics(graphdef, call, state, jax.tree.map(jnp.asarray, batch)) for batch in batches]
    nnx.update(new, jax.tree.map(lambda *each: sum(each) / len(each), *found))
    for norm, (average, momentum) in zip(norms, before, strict=True):
        norm.use_running_average, norm.momentum = average, momentum
    return new


@partial(jax.jit, static_argnums=(0, 1))
def _statistics(graphdef: Any, call: Call, state: Any, batch: PyTree) -> Any:
    model = nnx.merge(graphdef, state, copy=True)
    call(model, batch)
    return nnx.state(model, nnx.BatchStat)

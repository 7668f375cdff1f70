"""Weight sharing: the weights of a layer that are not zero become few different values, which are trained."""

import re
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from solvers.compressions import AdaptiveCodebook, Compression, PruneQuantize
from unified_approx.deep_compression.masks import as_pruned
from unified_approx.learning_compression import LcResult, Task, direct_compression
from unified_approx.pieces import parameters_of


def share(
    network: nnx.Module | LcResult, bits: int | Mapping[str, int], *, layers: str = ".*", init: str = "linear"
) -> LcResult:
    """The kernels' weights that are not zero, each one of 2^bits values of its layer, by k-means.

    Han et al. (2016), section 3. Train the values with `finetune_compressed`.

    Args:
        network: pruned or not.
        bits: of a code; or by regular expression for whole names of layers.
        layers: regular expression for whole names: what is shared where `bits` is one number.
        init: where k-means starts: "linear", "random", "density" or "k-means++".

    Raises:
        ValueError: bits out of range, patterns that name no layer, or layers with fewer weights than values.
    """
    model = network.model if isinstance(network, LcResult) else network
    wanted = {layers: bits} if isinstance(bits, int) else dict(bits)
    if not wanted or not all(1 <= b <= 16 for b in wanted.values()):
        raise ValueError(f"bits: {bits}; give 1 to 16")
    values = parameters_of(model)
    tasks: list[Task] = []
    for pattern, width in wanted.items():
        for piece in as_pruned(model, pattern).pieces:
            target = piece.pack(values)
            form = _form(int(jnp.count_nonzero(target)), target.size, 2**width, init)
            tasks.append(Task(path=re.escape(piece.name), compression=form))
    return direct_compression(model, tasks)


def _form(kept: int, size: int, k: int, init: str) -> Compression:
    """A codebook; one with zero beside it where there are zeros."""
    return AdaptiveCodebook(min(k, size), init=init) if kept == size else PruneQuantize(kept, min(k, kept), init)

"""How much each layer bears: one layer is pruned, the others are as they were."""

import re
from collections.abc import Callable, Sequence

from flax import nnx

from solvers.compressions import PruneL0
from unified_approx.learning_compression import Task, direct_compression
from unified_approx.learning_compression.tasks import resolve


def scan(
    model: nnx.Module, measure: Callable[[nnx.Module], float], kept: Sequence[float], *, layers: str = ".*"
) -> dict[str, list[float]]:
    """What `measure` says of the network with one layer pruned, for each layer and each fraction that stays.

    Han et al. (2015), figure 6. Nothing is trained.

    Args:
        model: the network.
        measure: accuracy on data that choices may see, say.
        kept: fractions of a layer's weights.
        layers: regular expression for whole names.

    Raises:
        ValueError: a fraction out of range, or a pattern that names no layer.
    """
    if not kept or not all(0 <= f <= 1 for f in kept):
        raise ValueError(f"kept: {list(kept)}; give fractions in [0, 1]")
    pieces = resolve([Task(path=layers, compression=PruneL0(1.0))], model)
    found: dict[str, list[float]] = {}
    for piece in pieces:
        tasks = [[Task(path=re.escape(piece.name), compression=PruneL0(float(f)))] for f in kept]
        found[piece.name] = [float(measure(direct_compression(model, task).model)) for task in tasks]
    return found

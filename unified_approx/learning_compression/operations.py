"""Multiplications and additions of a network with codebooks, counted apart."""

from dataclasses import dataclass
from math import prod
from typing import Any

from solvers.compressions import Codebook
from unified_approx.calling import Call
from unified_approx.cost import layer_calls
from unified_approx.learning_compression.result import LcResult
from unified_approx.sites import path_name


@dataclass(frozen=True)
class Operations:
    """Of one layer, per example; biases are not counted.

    Attributes:
        multiplications: of floating-point numbers.
        additions: likewise.
    """

    multiplications: int
    additions: int


def operations(result: LcResult, *example: Any, call: Call | None = None) -> dict[str, Operations]:
    """What every layer of the rebuilt network takes.

    A layer of k values adds up the inputs of equal weight first: k multiplications an output in place of one a weight.

    Args:
        result: of `lc` and the like.
        *example: the arguments of one call, the images along the first axis.
        call: how the network is called.
    """
    values = {
        path[:-1]: len(theta.centers)
        for piece, theta in zip(result.pieces, result.thetas, strict=True)
        if isinstance(theta, Codebook)
        for path in piece.paths
    }
    found, images = {}, len(example[0])
    for path, calls in layer_calls(result.rebuilt(), *example, call=call).items():
        macs = sum(each.macs for each in calls) // images
        outputs = sum(prod(each.output_shape[1:]) for each in calls)
        multiplications = min(macs, values[path] * outputs) if path in values else macs
        found[path_name(path)] = Operations(multiplications, macs)
    return found

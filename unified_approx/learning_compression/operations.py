"""Multiplications and additions of a network with codebooks, counted apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from solvers.compressions import Additive, Codebook, Compression, FixedCodebook, OneOf, ScaledBinary, ScaledTernary
from solvers.compressions.base import Theta
from unified_approx.calling import Call
from unified_approx.cost import layer_calls
from unified_approx.learning_compression.result import LcResult
from unified_approx.pieces import Piece
from unified_approx.sites import Path, path_name


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
    Signs times one scale are one multiplication an output, and given values of 0, 1 and -1 none. In a sum with such a
    form every part is counted by itself: the values of factors where they are fewer, else the weights other than 0.

    Args:
        result: of `lc` and the like.
        *example: the arguments of one call, the images along the first axis.
        call: how the network is called.
    """
    uses = {}
    for piece, theta in zip(result.pieces, result.thetas, strict=True):
        uses |= _uses(piece, theta)
    found, images = {}, len(example[0])
    for path, calls in layer_calls(result.rebuilt(), *example, call=call).items():
        macs = sum(each.macs for each in calls) // images
        outputs = sum(prod(each.output_shape[1:]) for each in calls)
        found[path_name(path)] = uses[path].operations(macs, outputs) if path in uses else Operations(macs, macs)
    return found


@dataclass(frozen=True)
class _Use:
    """What one layer of a piece with shared values takes.

    Attributes:
        values: multiplications an output.
        weights: multiplications at a place of the output, shared values apart.
        sums: additions at a place.
        size: weights of the dense layer.
    """

    values: int
    weights: int
    sums: int
    size: int

    def operations(self, macs: int, outputs: int) -> Operations:
        """Never more than the dense layer's."""
        places = macs // self.size
        multiplications = self.values * outputs + self.weights * places
        if multiplications >= macs:
            return Operations(macs, macs)
        return Operations(multiplications, self.sums * places)


def _uses(piece: Piece, theta: Theta) -> dict[Path, _Use]:
    """By layer; nothing of a piece none of whose parts shares values."""
    parts = list(_parts(piece.compression, theta))
    shared = [_shared_values(form, own) for form, own in parts]
    if all(count is None for count in shared):
        return {}
    uses = {path[:-1]: _Use(0, 0, 0, prod(shape)) for path, shape in zip(piece.paths, piece.shapes, strict=True)}
    for (form, own), values in zip(parts, shared, strict=True):
        terms = form.terms(own, piece.layers[0]) if values is None and piece.matrix else None
        for path, weights in piece.unpack(form.decompress(own)).items():
            count = sum(term.num_params for term in terms) if terms is not None else int(np.count_nonzero(weights))
            use = uses[path[:-1]]
            more = count if values is None else 0
            uses[path[:-1]] = _Use(use.values + (values or 0), use.weights + more, use.sums + count, use.size)
    return uses


def _parts(form: Compression, theta: Theta) -> Iterator[tuple[Compression, Theta]]:
    """Of a sum, and of what was chosen."""
    if isinstance(form, OneOf):
        which = int(theta.which)
        yield from _parts(form.parts[which], theta.thetas[which])
    elif isinstance(form, Additive):
        for part, own in zip(form.parts, theta, strict=True):
            yield from _parts(part, own)
    else:
        yield form, theta


def _shared_values(form: Compression, theta: Theta) -> int | None:
    """Multiplications an output by the values that weights share; None where they share none."""
    if isinstance(theta, Codebook):
        return len(theta.centers)
    if isinstance(form, ScaledBinary | ScaledTernary):
        return 1
    if isinstance(form, FixedCodebook):
        return len({abs(value) for value in form.values} - {0.0, 1.0})
    return None

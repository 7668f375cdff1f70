"""What the LC algorithm made of a network, in the rows that the project's other methods write too."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import PyTree

from solvers.compressions import Additive, Compression, Each, Half, OneOf
from solvers.compressions.base import FLOAT_BITS, Theta
from unified_approx.coding import Coded
from unified_approx.cost import NetworkCost, network_cost
from unified_approx.learning_compression.result import LcResult
from unified_approx.pieces import Piece, parameters_of
from unified_approx.report import LayerRow, Report
from unified_approx.storage import save


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A compressed network as it is compared and saved.

    Attributes:
        model: the rebuilt network.
        coded: its parameters that are stored as streams.
        report: layers and totals.
    """

    model: nnx.Module
    coded: tuple[Coded, ...]
    report: Report

    def save(self, path: str | PathLike[str]) -> int:
        """Write one file, to be read with `load`; returns its size in bytes."""
        return save(path, self.model, report={**self.report.to_dict(), "method": "lc"}, coded=self.coded)


def reported(original: nnx.Module, result: LcResult, example: PyTree, budget: str) -> Reported:
    """The result with its costs.

    Parameters of a row, and of the network, are the values of smaller layers, and the weights that are not zero of the
    others; bits are those of the streams.

    Args:
        original: network.
        result: of `lc` on it.
        example: a batch of inputs.
        budget: what was asked for, as text.
    """
    model, coded = result.parts()
    before, after = network_cost(original, example), network_cost(model, example)
    rows, params, bits = [], after.params, after.bits
    whole = {path for own in coded for path in own.piece.paths}
    for piece, theta in zip(result.pieces, result.thetas, strict=True):
        row = _row(piece, theta, before, after, result.model, coded=piece.paths[0] in whole)
        rows.append(row)
        if piece.paths[0] in whole:
            params += row.params - piece.size
            bits += piece.compression.bits(theta) - FLOAT_BITS * piece.size
    # Factors that are float16 in truth are pieces of their own.
    own = {path for piece in result.pieces for path in piece.paths}
    for piece in (stream.piece for stream in coded if stream.piece.paths[0] not in own):
        bits -= (FLOAT_BITS - Half.value_bits) * piece.size
    report = Report(
        layers=tuple(rows),
        budget=budget,
        budget_met=None,
        params=params,
        original_params=before.params,
        bits=bits,
        original_bits=before.bits,
        macs=after.macs,
        original_macs=before.macs,
        seconds=sum(sum(line.seconds) for line in result.history),
        seed=0,
        warnings=result.warnings,
    )
    return Reported(model=model, coded=coded, report=report)


def form_name(compression: Compression) -> str:
    """The form as the command line calls it."""
    if isinstance(compression, Additive | OneOf | Each):
        sign = {Additive: " + ", OneOf: " or ", Each: ", "}[type(compression)]
        return sign.join(dict.fromkeys(map(form_name, compression.parts)))
    return compression.word or type(compression).__name__


def _row(
    piece: Piece, theta: Theta, before: NetworkCost, after: NetworkCost, model: nnx.Module, *, coded: bool
) -> LayerRow:
    single = len(piece.paths) == 1 and piece.kernels[0]
    layer = piece.paths[0][:-1]
    values = parameters_of(model)
    nonzero = sum(int(np.count_nonzero(values[path])) for path in piece.paths)
    bias = before.layer(layer).params - piece.size if single else 0
    costs: dict[str, Any] = {}
    if single:
        costs = {"macs": after.layer(layer).macs, "original_macs": before.layer(layer).macs}
    info = piece.compression.info(theta)
    return LayerRow(
        name=piece.name,
        kind=("conv" if len(piece.shapes[0]) > 2 else "linear") if single else "parameters",
        shape=(piece.layers[0].n, piece.layers[0].p) if len(piece.paths) == 1 else (1, piece.size),
        status="compressed",
        form=form_name(piece.compression),
        kept_columns=_total(info, "columns"),
        rank=_total(info, "rank"),
        params=nonzero if coded or not single else after.layer(layer).params - bias,
        original_params=piece.size,
        **costs,
    )


def _total(info: Mapping[str, Any], name: str) -> int:
    """Of a form, or of all parts of a sum."""
    inner = [*info.get("parts", ()), *info.get("layers", ())]
    return int(info.get(name, 0)) + sum(_total(part, name) for part in inner)

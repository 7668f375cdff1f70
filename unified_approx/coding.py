"""Compressed parameters in files: the stream of bits that their compression counts, and how to read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from solvers.compressions.base import Theta
from solvers.compressions.bits import Bits, Reader
from solvers.compressions.spec import from_spec, is_known, to_spec
from unified_approx.pieces import Piece
from unified_approx.sites import Path


@dataclass(frozen=True)
class Coded:
    """A piece and its stream, eight bits to a byte."""

    piece: Piece
    stream: UInt8[np.ndarray, " bytes"]

    def entry(self) -> dict[str, Any]:
        """What a header says of it."""
        piece = self.piece
        named = {"name": piece.name, "compression": to_spec(piece.compression), "matrix": piece.matrix}
        return {**named, "paths": to_spec(piece.paths), "shapes": to_spec(piece.shapes), "kernels": [*piece.kernels]}


def encode(piece: Piece, theta: Theta) -> Coded | None:
    """The piece's stream; None for a compression that nobody else could decode."""
    if not is_known(piece.compression):
        return None
    return Coded(piece, np.packbits(piece.compression.encode(theta)))


def decode(entry: Mapping[str, Any], stream: UInt8[np.ndarray, " bytes"]) -> dict[Path, Float[Array, "..."]]:
    """The parameters, by path.

    Raises:
        ValueError: a compression that this version does not know, or a stream that does not fit it.
    """
    lists = {name: from_spec(entry[name]) for name in ("paths", "shapes", "kernels")}
    piece = Piece(entry["name"], from_spec(entry["compression"]), matrix=entry["matrix"], **lists)
    bits: Bits = np.unpackbits(stream)
    reader = Reader(bits)
    theta = piece.compression.decode(reader, piece.target_shape)
    if reader.left >= 8:
        raise ValueError(f"path: {reader.left} bits too many for {entry['name']!r}; the file is damaged")
    return piece.decompress(theta)

"""Compressed parameters in files: the stream of bits that their compression counts, and how to read it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
from jaxtyping import Array, Float, UInt8

from solvers.compressions import Additive, Compression
from solvers.compressions.base import Theta
from solvers.compressions.bits import Bits, Reader
from solvers.compressions.spec import from_spec, is_known, to_spec
from solvers.terms import MatrixShape
from unified_approx.pieces import Piece
from unified_approx.sites import Path

_MOST_SUMMANDS = 64  # each is held as large as the whole while a stream is read


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

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], stream: UInt8[np.ndarray, " bytes"]) -> "Coded":
        """What `entry` came from, also after a trip through JSON.

        Raises:
            ValueError: a compression that this version does not know, a sum of too many, or layers that are larger
                than the piece.
        """
        if _summands(entry["compression"]) > _MOST_SUMMANDS:
            raise ValueError(f"path: {entry['name']!r} is a sum of more than {_MOST_SUMMANDS} forms")
        lists = {name: from_spec(entry[name]) for name in ("paths", "shapes", "kernels")}
        piece = Piece(entry["name"], from_spec(entry["compression"]), matrix=entry["matrix"], **lists)
        if _largest_layer(piece.compression) > piece.size:
            raise ValueError(f"path: {piece.name!r} is of layers that are larger than its {piece.size} weights")
        return cls(piece, stream)

    def values(self) -> dict[Path, Float[Array, "..."]]:
        """The parameters, by path.

        Raises:
            ValueError: a stream that does not fit the compression.
        """
        bits: Bits = np.unpackbits(self.stream)
        reader = Reader(bits)
        theta = self.piece.compression.decode(reader, self.piece.target_shape)
        if reader.left >= 8:
            raise ValueError(f"path: {reader.left} bits too many for {self.piece.name!r}; the file is damaged")
        return self.piece.decompress(theta)


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
    return Coded.from_entry(entry, stream).values()


def _summands(spec: Any) -> int:
    """Forms that are added up, at most, whatever is nested in what."""
    if isinstance(spec, Mapping):
        if spec.get("kind") == Additive.__name__:
            return sum(map(_summands, spec["parts"]))
        return max(1, max(map(_summands, spec.values()), default=0))
    return max(map(_summands, spec), default=0) if isinstance(spec, list) else 0


def _largest_layer(form: Any) -> int:
    """Weights of the largest layer that a form, or what is nested in it, says it has."""
    if isinstance(form, MatrixShape):
        return form.n * form.p
    if isinstance(form, Compression):
        return _largest_layer(tuple(getattr(form, field.name) for field in fields(cast(Any, form))))
    return max(map(_largest_layer, form), default=0) if isinstance(form, tuple) else 0

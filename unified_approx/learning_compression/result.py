"""What the LC algorithm returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from flax import nnx

from solvers.compressions.base import FLOAT_BITS, Theta
from unified_approx.coding import Coded, encode
from unified_approx.learning_compression.rebuild import halved, rebuilt
from unified_approx.pieces import Piece, parameters_of, with_values
from unified_approx.storage import save


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the history; step 0 is direct compression, before any L step.

    Attributes:
        step: number.
        mu: of this step.
        loss: training loss of the compressed network, w = Delta(theta); None where nothing measures it.
        gap: ||w - Delta(theta)|| / ||w||.
        penalty: what the compressed forms themselves cost; the best step is that of lowest loss + penalty.
        own_loss: training loss of w after the L step, without penalty.
        l_before: loss + penalty before the L step; None for step 0 or where nothing measures it.
        l_after: after it.
        c_before: penalty(theta) + mu/2 ||w - dual / mu - Delta(theta)||^2 before the C step.
        c_after: after it.
        seconds: of the L step and of the C step.
        info: what each piece has become: its rank, its codebook, how many weights it keeps.
        warnings: what the monitors say.
    """

    step: int
    mu: float
    loss: float | None
    gap: float
    penalty: float = 0.0
    own_loss: float | None = None
    l_before: float | None = None
    l_after: float | None = None
    c_before: float | None = None
    c_after: float | None = None
    seconds: tuple[float, float] = (0.0, 0.0)
    info: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Step":
        """Of `dataclasses.asdict`, also after a trip through JSON."""
        tuples = {name: tuple(fields[name]) for name in ("seconds", "info", "warnings")}
        return cls(**{**fields, **tuples})


@dataclass(frozen=True, kw_only=True)
class LcResult:
    """A network compressed by the algorithm.

    Attributes:
        model: the network with w = Delta(theta), of the best step, in the layers that it had.
        thetas: what each piece is stored as.
        pieces: the pieces.
        history: step by step.
        best: number of the best step: lowest training loss of the compressed network plus penalty, the last where none
            is measured.
        original_bits: of all parameters before, 32 each.
        free_bits: of the parameters without a task.
    """

    model: nnx.Module
    thetas: tuple[Theta, ...]
    pieces: tuple[Piece, ...]
    history: tuple[Step, ...]
    best: int
    original_bits: int = field(repr=False)
    free_bits: int = field(repr=False)

    @property
    def bits(self) -> int:
        """Of all parameters as stored; those without a task count 32 each."""
        own = sum(p.compression.bits(t) for p, t in zip(self.pieces, self.thetas, strict=True))
        return own + self.free_bits

    @property
    def cr(self) -> float:
        """Compression ratio: bits, original / compressed."""
        return self.original_bits / self.bits

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all steps."""
        return tuple(f"step {line.step}: {note}" for line in self.history for note in line.warnings)

    def rebuilt(self) -> nnx.Module:
        """The network with smaller layers where there are such: low rank, whole columns, and sums of these.

        Layers that are quantized or pruned weight by weight stay as they are: nothing smaller computes the same.
        """
        return rebuilt(self.model, self.pieces, self.thetas)[0]

    def parts(self) -> tuple[nnx.Module, tuple[Coded, ...]]:
        """The rebuilt network, and what of its parameters is stored as streams of bits."""
        model, left = rebuilt(self.model, self.pieces, self.thetas)
        stored = [(self.pieces[i], self.thetas[i]) for i in left]
        for i in set(range(len(self.pieces))) - set(left):
            stored += halved(model, self.pieces[i], self.thetas[i])
        coded = [encode(*own) for own in stored]
        return model, tuple(stream for stream in coded if stream is not None)

    def save(self, path: str | PathLike[str]) -> int:
        """Write the rebuilt network to one file, in which the other pieces are streams of bits; `load` reads it.

        Returns:
            Its size in bytes.
        """
        model, coded = self.parts()
        return save(path, model, coded=coded)


def compressed(model: nnx.Module, pieces: tuple[Piece, ...], thetas: tuple[Theta, ...]) -> nnx.Module:
    """The network with w = Delta(theta)."""
    values = {}
    for piece, theta in zip(pieces, thetas, strict=True):
        values |= piece.decompress(theta)
    return with_values(model, values)


def make_result(
    model: nnx.Module, pieces: tuple[Piece, ...], thetas: tuple[Theta, ...], history: tuple[Step, ...], best: int
) -> LcResult:
    """The result whose free parameters, and running statistics, are those of `model`."""
    total = sum(value.size for value in parameters_of(model).values())
    return LcResult(
        model=compressed(model, pieces, thetas),
        thetas=thetas,
        pieces=pieces,
        history=history,
        best=best,
        original_bits=FLOAT_BITS * total,
        free_bits=FLOAT_BITS * (total - sum(piece.size for piece in pieces)),
    )

"""The Learning-Compression algorithm: L steps on the network, C steps on its parameters, by turns.

Carreira-Perpinan (2017), Model compression as constrained optimization, with application to neural nets, part I:
min L(w) subject to w = Delta(theta), by the augmented Lagrangian (algorithm 2) or the quadratic penalty.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from solvers.compressions.base import FLOAT_BITS, Theta
from unified_approx.checkpoints import Checkpoints
from unified_approx.learning_compression.l_step import LStep
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.tasks import Piece, Task, Values, parameters_of, resolve, with_values

_TOLERANCE = 1e-4  # relative, of the monitored quantities: they are sums in float32


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the history; step 0 is direct compression, before any L step.

    Attributes:
        step: number.
        mu: of this step.
        loss: training loss of the compressed network, w = Delta(theta); None where nothing measures it.
        gap: ||w - Delta(theta)|| / ||w||.
        l_before: loss + penalty before the L step; None for step 0 or where nothing measures it.
        l_after: after it.
        c_before: penalty(theta) + mu/2 ||w - dual / mu - Delta(theta)||^2 before the C step.
        c_after: after it.
        seconds: of the L step and of the C step.
        warnings: what the monitors say.
    """

    step: int
    mu: float
    loss: float | None
    gap: float
    l_before: float | None = None
    l_after: float | None = None
    c_before: float | None = None
    c_after: float | None = None
    seconds: tuple[float, float] = (0.0, 0.0)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LcResult:
    """A network compressed by the algorithm.

    Attributes:
        model: the network with w = Delta(theta), of the best step.
        thetas: what each piece is stored as.
        pieces: the pieces.
        history: step by step.
        best: number of the best step: lowest training loss of the compressed network, the last where none is measured.
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


@dataclass
class _State:
    """Everything that a resumed run needs."""

    model: nnx.Module
    thetas: list[Theta]
    duals: list[Array]


def lc(
    model: nnx.Module,
    tasks: Sequence[Task],
    l_step: LStep,
    mu_schedule: Sequence[float],
    *,
    augmented: bool = True,
    measure: Callable[[nnx.Module], float] | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    progress: Callable[[Step], None] | None = None,
) -> LcResult:
    """Compress the parameters that the tasks name while training the network.

    Args:
        model: a trained network; it is not changed.
        tasks: what is compressed how; parameters without a task stay free.
        l_step: lowers loss + penalty: `SgdLStep(x, y, schedule)`, or your own.
        mu_schedule: increasing weights of the penalty.
        augmented: keep multipliers (the augmented Lagrangian); otherwise the quadratic penalty method.
        measure: training loss of a network, for the monitors and to keep the best; `l_step.measure` if it has one.
        checkpoint_dir: folder from which an interrupted run goes on, and ends with the same network.
        progress: called after every step.

    Raises:
        ValueError: tasks that overlap or name nothing, sizes out of range, a schedule that does not increase, or the
            checkpoints of another run.
        FloatingPointError: an L step gave a loss or weights that are not finite; the best network so far is stored in
            `checkpoint_dir`, where there is one.
    """
    mus = checked_schedule(mu_schedule)
    pieces = resolve(tasks, model)
    measure = measure or getattr(l_step, "measure", None)
    values = parameters_of(model)
    targets = [piece.pack(values) for piece in pieces]
    thetas = [piece.compression.compress(t, 0.0) for piece, t in zip(pieces, targets, strict=True)]
    state = _State(nnx.clone(model), thetas, [jnp.zeros_like(t) for t in targets])
    history = [_direct(state, pieces, measure)]
    best = (0, list(state.thetas), _parameters(state.model))
    identity = {"tasks": [repr(task) for task in tasks], "mu": mus, "augmented": augmented}
    store = None if checkpoint_dir is None else Checkpoints(checkpoint_dir, identity)
    if store is not None and (found := store.latest(_saved(state, best))) is not None:
        history = [
            Step(**{**h, "seconds": tuple(h["seconds"]), "warnings": tuple(h["warnings"])}) for h in found["history"]
        ]
        state, best = _restored(model, found, _best(history))
    for step in range(len(history) - 1, len(mus)):
        line = _one(state, pieces, l_step, mus[step], step, augmented, measure)
        history.append(line)
        if _best(history) == line.step:
            best = (line.step, list(state.thetas), _parameters(state.model))
        if store is not None:
            store.save(line.step, _saved(state, best), [asdict(h) for h in history])
        if progress is not None:
            progress(line)
    number, thetas, free = best
    values = dict(free)
    for piece, theta in zip(pieces, thetas, strict=True):
        values |= piece.decompress(theta)
    total = sum(value.size for value in values.values())
    return LcResult(
        model=with_values(state.model, values),
        thetas=tuple(thetas),
        pieces=pieces,
        history=tuple(history),
        best=number,
        original_bits=FLOAT_BITS * total,
        free_bits=FLOAT_BITS * (total - sum(piece.size for piece in pieces)),
    )


def checked_schedule(mu_schedule: Sequence[float]) -> list[float]:
    """The schedule as floats; a ValueError unless it is positive and never falls."""
    mus = [float(mu) for mu in mu_schedule]
    if not mus or not all(np.isfinite(mu) and mu > 0 for mu in mus):
        raise ValueError(f"mu_schedule: {mus}; give positive numbers")
    for i, (before, after) in enumerate(zip(mus, mus[1:], strict=False)):
        if after < before:
            raise ValueError(
                f"mu_schedule: it falls from {before:g} to {after:g} at step {i + 1}; give increasing numbers"
            )
    return mus


def _parameters(model: nnx.Module) -> dict[Any, Array]:
    return dict(parameters_of(model))


def _saved(state: _State, best: tuple[int, list[Theta], Values]) -> dict[str, Any]:
    now = nnx.state(state.model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {
        "now": nnx.to_pure_dict(now),
        "thetas": state.thetas,
        "duals": state.duals,
        "best_thetas": best[1],
        "best": list(best[2].values()),
    }


def _restored(model: nnx.Module, found: dict[str, Any], number: int) -> tuple[_State, tuple[int, list[Theta], Values]]:
    now = nnx.clone(model)
    state = nnx.state(now, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.replace_by_pure_dict(state, found["now"])
    nnx.update(now, state)
    values = dict(zip(parameters_of(model), found["best"], strict=True))
    return _State(now, found["thetas"], found["duals"]), (number, found["best_thetas"], values)


def _compressed(state: _State, pieces: Sequence[Piece]) -> nnx.Module:
    values: dict[Any, Array] = {}
    for piece, theta in zip(pieces, state.thetas, strict=True):
        values |= piece.decompress(theta)
    return with_values(state.model, values)


def _gap(state: _State, pieces: Sequence[Piece]) -> float:
    values = parameters_of(state.model)
    own = [piece.pack(values) for piece in pieces]
    gaps = sum(
        float(jnp.sum((w - p.compression.decompress(t)) ** 2))
        for w, p, t in zip(own, pieces, state.thetas, strict=True)
    )
    return float(np.sqrt(gaps / max(sum(float(jnp.sum(w * w)) for w in own), 1e-30)))


def _direct(state: _State, pieces: Sequence[Piece], measure: Callable[[nnx.Module], float] | None) -> Step:
    loss = None if measure is None else measure(_compressed(state, pieces))
    return Step(step=0, mu=0.0, loss=loss, gap=_gap(state, pieces))


def _objective(piece: Piece, theta: Theta, target: Array, mu: float) -> float:
    gap = jnp.sum((target - piece.compression.decompress(theta)) ** 2)
    return float(piece.compression.penalty(theta) + mu / 2 * gap)


def _one(
    state: _State,
    pieces: Sequence[Piece],
    l_step: LStep,
    mu: float,
    step: int,
    augmented: bool,
    measure: Callable[[nnx.Module], float] | None,
) -> Step:
    """An L step, a C step and the multipliers' step, in place."""
    clock, notes = time.perf_counter(), []
    targets = tuple(
        p.compression.decompress(t) + dual / mu for p, t, dual in zip(pieces, state.thetas, state.duals, strict=True)
    )
    penalty = Penalty(jnp.asarray(mu, jnp.float32), targets, tuple(pieces))

    def lagrangian(network: nnx.Module) -> float | None:
        return None if measure is None else measure(network) + float(penalty(network))

    before = lagrangian(state.model)
    state.model = l_step(state.model, penalty, step)
    after = lagrangian(state.model)
    values = parameters_of(state.model)
    if not all(bool(jnp.isfinite(value).all()) for value in values.values()) or (
        after is not None and not np.isfinite(after)
    ):
        raise FloatingPointError(
            f"l_step: step {step + 1} (mu={mu:g}) gave weights or a loss that are not finite; lower the learning rate"
        )
    if before is not None and after is not None and after > before * (1 + _TOLERANCE):
        notes.append(f"the L step raised loss + penalty from {before:.6g} to {after:.6g}: more epochs or a lower rate")
    middle = time.perf_counter()
    aims = [piece.pack(values) - dual / mu for piece, dual in zip(pieces, state.duals, strict=True)]
    c_before = sum(_objective(p, t, aim, mu) for p, t, aim in zip(pieces, state.thetas, aims, strict=True))
    state.thetas = [
        p.compression.compress(aim, mu, theta) for p, aim, theta in zip(pieces, aims, state.thetas, strict=True)
    ]
    c_after = sum(_objective(p, t, aim, mu) for p, t, aim in zip(pieces, state.thetas, aims, strict=True))
    if c_after > c_before * (1 + _TOLERANCE) + 1e-12:
        notes.append(f"the C step raised its objective from {c_before:.6g} to {c_after:.6g}")
    if augmented:
        state.duals = [
            dual - mu * (p.pack(values) - p.compression.decompress(theta))
            for p, dual, theta in zip(pieces, state.duals, state.thetas, strict=True)
        ]
    return Step(
        step=step + 1,
        mu=mu,
        loss=None if measure is None else measure(_compressed(state, pieces)),
        gap=_gap(state, pieces),
        l_before=before,
        l_after=after,
        c_before=c_before,
        c_after=c_after,
        seconds=(middle - clock, time.perf_counter() - middle),
        warnings=tuple(notes),
    )


def _best(history: Sequence[Step]) -> int:
    """Number of the step of lowest loss, the first of equals; the last where none is measured."""
    known = [line for line in history if line.loss is not None]
    return min(known, key=lambda line: (line.loss, line.step)).step if known else history[-1].step

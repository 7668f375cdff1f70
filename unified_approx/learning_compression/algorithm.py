"""The Learning-Compression algorithm: L steps on the network, C steps on its parameters, by turns.

Carreira-Perpinan (2017), Model compression as constrained optimization, with application to neural nets, part I:
min L(w) subject to w = Delta(theta), by the augmented Lagrangian (algorithm 2) or the quadratic penalty.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from solvers.compressions.base import Theta
from unified_approx.learning_compression.c_step import c_step, direct, squared_gap, target
from unified_approx.learning_compression.l_step import LStep, NotFiniteError
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.result import LcResult, Step, compressed, make_result
from unified_approx.learning_compression.run_state import Best, Run, open_store
from unified_approx.learning_compression.schedules import checked_schedule
from unified_approx.learning_compression.tasks import Task, resolve
from unified_approx.learning_compression.visible import name_of
from unified_approx.pieces import Piece, parameters_of

__all__ = ["LcResult", "LcStoppedError", "Step", "checked_schedule", "lc"]

_TOLERANCE = 1e-4  # relative, of the monitored quantities: they are sums in float32


class LcStoppedError(FloatingPointError):
    """An L step diverged.

    Attributes:
        result: what the algorithm had reached before.
    """

    def __init__(self, message: str, result: LcResult):
        super().__init__(message)
        self.result = result


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
        mu_schedule: increasing weights of the penalty, for example `exponential(9e-5, 1.1, 40)`.
        augmented: keep multipliers (the augmented Lagrangian); otherwise the quadratic penalty method.
        measure: training loss of a network, for the monitors and to keep the best; `l_step.measure` if it has one.
        checkpoint_dir: folder from which an interrupted run goes on, and ends with the same network.
        progress: called after every step.

    Returns:
        The best network, what is stored of it, and the history, which is also where the monitors speak: a C step must
        not raise its objective, an L step should lower loss + penalty.

    Raises:
        ValueError: tasks that overlap or name nothing, sizes out of range, a schedule that decreases, an L step that
            returns no network, or the checkpoints of another run.
        LcStoppedError: an L step gave a loss or weights that are not finite; it holds the best network until then.
    """
    mus = checked_schedule(mu_schedule)
    pieces = resolve(tasks, model)
    moves = getattr(mu_schedule, "moves_multipliers", lambda step: True)
    measure = measure or getattr(l_step, "measure", None)
    alternation = _Alternation(pieces, l_step, measure)
    run = alternation.begin(model)
    store = None
    if checkpoint_dir is not None:
        settings = {"mu": mus, "moves": [moves(step) for step in range(len(mus))], "augmented": augmented}
        settings["measure"] = name_of(measure)
        store = open_store(checkpoint_dir, model, pieces, settings, l_step)
        run = run.restored(store)
    for step in range(len(run.history) - 1, len(mus)):
        mu = mus[step]
        try:
            line = alternation.step(run, mu, step, mu if augmented and moves(step) else 0.0)
        except FloatingPointError as error:
            where = (
                f"l_step: step {step + 1} (mu={mu:g}): {error}; lower the learning rate. The result until then: .result"
            )
            raise LcStoppedError(where, _result(run, pieces)) from error
        run.add(line)
        if store is not None:
            run.store(store)
        if progress is not None:
            progress(line)
    return _result(run, pieces)


def _result(run: Run, pieces: tuple[Piece, ...]) -> LcResult:
    return make_result(run.best_model(), pieces, run.best.thetas, tuple(run.history), run.best.step)


@dataclass(frozen=True)
class _Alternation:
    """What does not change from step to step."""

    pieces: tuple[Piece, ...]
    l_step: LStep
    measure: Callable[[nnx.Module], float] | None

    def begin(self, model: nnx.Module) -> Run:
        """Direct compression, and multipliers of zero."""
        values = parameters_of(model)
        targets = [piece.pack(values) for piece in self.pieces]
        thetas = tuple(direct(p.compression, w) for p, w in zip(self.pieces, targets, strict=True))
        line = Step(
            step=0,
            mu=0.0,
            loss=self._loss(compressed(model, self.pieces, thetas)),
            own_loss=self._loss(model),
            gap=self._gap(thetas, targets),
            penalty=self._penalty_of(thetas),
            info=self._info(thetas),
        )
        duals = tuple(jnp.zeros_like(w) for w in targets)
        return Run(nnx.clone(model), thetas, duals, [line], Best.of(0, model, thetas))

    def step(self, run: Run, mu: float, step: int, dual_step: float) -> Step:
        """An L step, a C step and the multipliers' step, which change `run`."""
        clock = time.perf_counter()
        penalty = self._penalty(run, mu)
        before = self._lagrangian(run.history[-1].own_loss, penalty, run.model)
        if penalty.pieces:
            run.model = self._trained(run.model, penalty, step)
        own_loss = self._loss(run.model)
        after = self._lagrangian(own_loss, penalty, run.model)
        if after is not None and not np.isfinite(after):
            raise NotFiniteError(f"the loss is {after}")
        middle = time.perf_counter()
        values = parameters_of(run.model)
        targets = [piece.pack(values) for piece in self.pieces]
        c_before, c_after = self._compress(run, targets, mu, dual_step, penalty)
        return Step(
            step=step + 1,
            mu=mu,
            loss=self._loss(compressed(run.model, self.pieces, run.thetas)),
            own_loss=own_loss,
            gap=self._gap(run.thetas, targets),
            penalty=self._penalty_of(run.thetas),
            l_before=before,
            l_after=after,
            c_before=c_before,
            c_after=c_after,
            seconds=(middle - clock, time.perf_counter() - middle),
            info=self._info(run.thetas),
            warnings=_warnings(before, after, c_before, c_after),
        )

    def _penalty(self, run: Run, mu: float) -> Penalty:
        """Of all pieces but those that a batch norm leaves without any hold: see `Task.norm_after`."""
        triples = zip(self.pieces, run.thetas, run.duals, strict=True)
        targets = [(p, target(p.compression, theta, dual, mu)) for p, theta, dual in triples if _is_held(p, theta)]
        return Penalty(jnp.asarray(mu, jnp.float32), tuple(t for _, t in targets), tuple(p for p, _ in targets))

    def _trained(self, model: nnx.Module, penalty: Penalty, step: int) -> nnx.Module:
        new = self.l_step(model, penalty, step)
        if not isinstance(new, nnx.Module):
            raise ValueError(f"l_step: it returned a {type(new).__name__}; return the network")
        if not all(bool(jnp.isfinite(value).all()) for value in parameters_of(new).values()):
            raise NotFiniteError("there are weights that are not finite")
        return new

    def _compress(
        self, run: Run, targets: Sequence[Array], mu: float, dual_step: float, penalty: Penalty
    ) -> tuple[float, float]:
        """C steps and multipliers; the objectives' sum before and after."""
        done = []
        for piece, w, dual, theta in zip(self.pieces, targets, run.duals, run.thetas, strict=True):
            held = float(piece in penalty.pieces)
            done.append(c_step(piece.compression, w, held * dual, mu, theta, held * dual_step))
        run.thetas, run.duals = (tuple(own) for own in zip(*((d.theta, d.dual) for d in done), strict=True))
        return float(sum(d.before for d in done)), float(sum(d.after for d in done))

    def _loss(self, model: nnx.Module) -> float | None:
        return None if self.measure is None else float(self.measure(model))

    def _lagrangian(self, loss: float | None, penalty: Penalty, model: nnx.Module) -> float | None:
        return None if loss is None else loss + float(penalty(model))

    def _gap(self, thetas: Sequence[Theta], targets: Sequence[Array]) -> float:
        """||w - Delta(theta)|| / ||w||."""
        pairs = [squared_gap(p.compression, t, w) for p, t, w in zip(self.pieces, thetas, targets, strict=True)]
        gap, size = (float(sum(part)) for part in zip(*pairs, strict=True))
        return float(np.sqrt(gap / max(size, 1e-30)))

    def _penalty_of(self, thetas: Sequence[Theta]) -> float:
        return float(sum(p.compression.penalty(theta) for p, theta in zip(self.pieces, thetas, strict=True)))

    def _info(self, thetas: Sequence[Theta]) -> tuple[dict, ...]:
        return tuple(p.compression.info(theta) for p, theta in zip(self.pieces, thetas, strict=True))


def _is_held(piece: Piece, theta: Theta) -> bool:
    return not piece.norm_after or bool(jnp.any(piece.compression.decompress(theta) != 0))


def _warnings(l_before: float | None, l_after: float | None, c_before: float, c_after: float) -> tuple[str, ...]:
    """What the monitors of the LC papers say: both steps must lower what they minimise."""
    notes = []
    if l_before is not None and l_after is not None and l_after > l_before * (1 + _TOLERANCE):
        notes.append(
            f"the L step raised loss + penalty from {l_before:.6g} to {l_after:.6g}: more epochs or a lower rate"
        )
    if c_after > c_before * (1 + _TOLERANCE) + 1e-12:
        notes.append(f"the C step raised its objective from {c_before:.6g} to {c_after:.6g}")
    return tuple(notes)

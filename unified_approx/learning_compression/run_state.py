"""Where a run of the LC algorithm stands, and how it is kept in checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from solvers.compressions.base import Theta
from unified_approx.checkpoints import Checkpoints
from unified_approx.learning_compression.result import Step
from unified_approx.pieces import Piece
from unified_approx.sites import path_name
from unified_approx.work_dir import fingerprint


class Best(NamedTuple):
    """The best step.

    Attributes:
        step: its number.
        state: of the network then.
        thetas: of the pieces then.
    """

    step: int
    state: Any
    thetas: tuple[Theta, ...]

    @classmethod
    def of(cls, step: int, model: nnx.Module, thetas: tuple[Theta, ...]) -> "Best":
        """Copies: an L step may consume, or write into, the arrays of its network."""
        return cls(step, jax.tree.map(jnp.copy, nnx.state(model)), thetas)


@dataclass
class Run:
    """All that a step changes.

    Attributes:
        model: the network after the last L step.
        thetas: of the pieces.
        duals: multipliers.
        history: lines so far.
        best: the best step.
    """

    model: nnx.Module
    thetas: tuple[Theta, ...]
    duals: tuple[Array, ...]
    history: list[Step]
    best: Best

    def add(self, line: Step) -> None:
        """A step is over."""
        self.history.append(line)
        if _best_step(self.history) == line.step:
            self.best = Best.of(line.step, self.model, self.thetas)

    def best_model(self) -> nnx.Module:
        """The network of the best step, before compression."""
        return _with_state(self.model, self.best.state)

    def _arrays(self) -> dict[str, Any]:
        best = {"best_state": self.best.state, "best_thetas": self.best.thetas}
        return {"state": nnx.state(self.model), "thetas": self.thetas, "duals": self.duals, **best}

    def store(self, store: Checkpoints) -> None:
        """Write a checkpoint."""
        store.save(self.history[-1].step, self._arrays(), [asdict(line) for line in self.history])

    def restored(self, store: Checkpoints) -> "Run":
        """Where the folder's last checkpoint stood; itself if there is none."""
        found = store.latest(self._arrays())
        if found is None:
            return self
        history = [Step.from_dict(line) for line in found["history"]]
        best = Best(_best_step(history), found["best_state"], found["best_thetas"])
        return Run(_with_state(self.model, found["state"]), found["thetas"], found["duals"], history, best)


def _with_state(model: nnx.Module, state: Any) -> nnx.Module:
    new = nnx.clone(model)
    nnx.update(new, jax.tree.map(jnp.copy, state))
    return new


def _best_step(history: list[Step]) -> int:
    """Number of the step of lowest objective, the first of equals; the last where none is measured.

    A loss that is not finite is the highest.
    """
    known = {line.step: line.loss + line.penalty for line in history if line.loss is not None}
    finite = {step: value if isfinite(value) else inf for step, value in known.items()}
    return min(finite, key=lambda step: (finite[step], step)) if finite else history[-1].step


def open_store(
    folder: str | PathLike[str],
    model: nnx.Module,
    pieces: tuple[Piece, ...],
    settings: Mapping[str, Any],
    l_step: Any,
) -> Checkpoints:
    """The checkpoints of this run.

    Raises:
        ValueError: the folder holds another run's, with other tasks, another schedule, L step or network.
    """
    tasks = [
        [p.name, [path_name(path) for path in p.paths], repr(p.compression), p.matrix, p.norm_after] for p in pieces
    ]
    network = fingerprint({}, model, None)
    return Checkpoints(
        folder, {"tasks": tasks, **settings, "network": network, "l_step": getattr(l_step, "identity", None)}
    )

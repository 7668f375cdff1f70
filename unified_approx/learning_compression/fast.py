"""Fast LC: compression that knows the loss by a quadratic model alone, without data, labels or training.

Carreira-Perpinan & Zharmagambetov (2018), Fast model compression. `TaylorLStep` makes `lc` do it; `fast_lc` does it in
one compiled loop for each piece, or at once where the model is diagonal and the compression has a solution.
"""

import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from solvers.compressions.base import Compression, Theta
from solvers.taylor import Taylor, alternate
from solvers.taylor_solutions import is_solvable, solve
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.piece_model import PieceModel, minimum_of, part_l_step, quadratic_of
from unified_approx.learning_compression.result import LcResult, Step, make_result
from unified_approx.learning_compression.schedules import checked_schedule
from unified_approx.learning_compression.tasks import Task, resolve
from unified_approx.learning_compression.taylor import NetworkTaylor
from unified_approx.pieces import Piece, Values, parameters_of, with_values
from unified_approx.work_dir import fingerprint

MU_SCHEDULE = tuple(np.geomspace(1e-2, 1e2, 90).tolist())
"""In units of the mean curvature of a piece: from where the model rules to where the compression does."""

DAMPING = 0.01
"""In the same unit."""


class TaylorLStep:
    """The L step of `lc` in closed form: every weight at the minimum of the model and the penalty.

    Attributes:
        taylor: the model, as it is: no damping, its gradient included.
        move_free: put parameters without a task at the model's minimum; otherwise they stay as trained.
    """

    def __init__(self, taylor: NetworkTaylor, *, move_free: bool = False):
        """Keep the model."""
        self.taylor, self.move_free = taylor, move_free
        self.identity = {"taylor": [taylor.fingerprint, dict(taylor.origin)], "move_free": move_free}
        self._sizes = {path: part.w.size for path, part in taylor.parts.items()}
        self._least = {path: float(jnp.min(part.h)) for path, part in taylor.parts.items()}

    def __call__(self, model: nnx.Module, penalty: Penalty, step: int) -> nnx.Module:
        """See `LStep`.

        Raises:
            ValueError: a mu at which the model plus the penalty has no minimum, or a model of another network.
        """
        shapes = {path: value.shape for path, value in self._parameters(model).items()}
        # Parameters without a penalty are not moved by it.
        least = min((self._least[path] for piece in penalty.pieces for path in piece.paths), default=0.0)
        if not float(penalty.mu) > -least:
            raise ValueError(
                f"mu_schedule: {float(penalty.mu):g} at step {step + 1}, but the curvature falls to {least:g}; "
                f"give values above {-least:g}, or damp the model"
            )
        values = {path: part.minimum() if self.move_free else part.w for path, part in self.taylor.parts.items()}
        for piece, target in zip(penalty.pieces, penalty.targets, strict=True):
            for path, aim in piece.unpack(target).items():
                values[path] = part_l_step(self.taylor.parts[path], aim, penalty.mu)
        return with_values(model, {path: value.reshape(shapes[path]) for path, value in values.items()})

    def measure(self, model: nnx.Module) -> float:
        """Loss of a network by the model."""
        return self.taylor.loss + float(self.taylor.value(self._parameters(model)))

    def _parameters(self, model: nnx.Module) -> Values:
        values = parameters_of(model)
        if {path: value.size for path, value in values.items()} != self._sizes:
            raise ValueError("taylor: made for a network with other parameters; give `taylor_of` this one")
        return values


def fast_lc(
    model: nnx.Module,
    tasks: Sequence[Task],
    taylor: NetworkTaylor,
    *,
    mu_schedule: Sequence[float] = MU_SCHEDULE,
    damping: float = DAMPING,
    gradient: bool = False,
    exact: bool = True,
    augmented: bool = True,
    move_free: bool = False,
) -> LcResult:
    """Compress a network by a quadratic model of its loss alone.

    The model is a sum over the pieces, so each is solved by itself: at once where that is possible, else by alternating
    L and C steps from direct compression on, the best theta kept.

    Args:
        model: the network that the model was made for; it is not changed.
        tasks: as for `lc`.
        taylor: `taylor_of(model, x, y)`, or `load_taylor(path, model)`.
        mu_schedule: increasing, in units of the mean curvature of each piece.
        damping: added to the curvature, in the same unit. Without it weights of no curvature move freely.
        gradient: use the gradient too. A trained network's is near zero, and what is left of it moves the minimum,
            w - g/h, far beyond the loss's own wherever curvatures are small or weights work together.
        exact: solve pieces at once where that is possible; otherwise always alternate.
        augmented: keep multipliers.
        move_free: put parameters without a task at the (damped) minimum; otherwise they stay as they are.

    Returns:
        As `lc`; the history has one step, the result, and its loss is that of the model.

    Raises:
        ValueError: tasks, sizes or schedule as for `lc`; negative damping; a model made for other weights.
    """
    clock = time.perf_counter()
    mus = checked_schedule(mu_schedule)
    _check(model, taylor, damping)
    pieces = resolve(tasks, model)
    thetas, loss = [], taylor.loss
    for piece in pieces:
        quadratic, unit = quadratic_of(piece, taylor, damping, gradient=gradient)
        thetas.append(_solve(quadratic, unit, piece.compression, mus, exact, augmented))
        loss += float(_value(quadratic, piece.compression, thetas[-1]))
    base = _moved(model, taylor, damping, gradient) if move_free else model
    return _at_once(base, pieces, thetas, loss, clock)


def direct_compression(model: nnx.Module, tasks: Sequence[Task]) -> LcResult:
    """Every piece as close to the trained weights as its form can be: what knows nothing of the loss.

    It is fast LC with a curvature of 1 for all weights, whose problem is that of a single C step at mu = 1. The loss in
    the history is half the squared distance.

    Raises:
        ValueError: tasks or sizes as for `lc`.
    """
    clock = time.perf_counter()
    pieces, values = resolve(tasks, model), parameters_of(model)
    thetas, loss = [], 0.0
    for piece in pieces:
        w = piece.pack(values)
        same = Taylor(w, jnp.zeros_like(w), jnp.ones_like(w))
        exact = is_solvable(piece.compression)
        thetas.append(solve(piece.compression, same) if exact else _one_c_step(piece.compression, w))
        loss += float(_value(same, piece.compression, thetas[-1]))
    return _at_once(model, pieces, thetas, loss, clock)


@partial(jax.jit, static_argnums=0)
def _one_c_step(compression: Compression, w: Float[Array, "..."]) -> Theta:
    return compression.compress(w, jnp.ones((), w.dtype))


def _at_once(model: nnx.Module, pieces: tuple[Piece, ...], thetas: list[Theta], loss: float, clock: float) -> LcResult:
    """The result of a history of one step."""
    info = tuple(piece.compression.info(theta) for piece, theta in zip(pieces, thetas, strict=True))
    seconds = (0.0, time.perf_counter() - clock)
    line = Step(step=0, mu=float("inf"), loss=loss, gap=0.0, seconds=seconds, info=info)
    return make_result(model, pieces, tuple(thetas), (line,), 0)


def _solve(
    quadratic: Taylor | PieceModel,
    unit: Float[Array, ""],
    compression: Compression,
    mus: Sequence[float],
    exact: bool,
    augmented: bool,
) -> Theta:
    if exact and isinstance(quadratic, Taylor) and is_solvable(compression):
        return solve(compression, quadratic)
    schedule = jnp.asarray(mus, jnp.float32) * unit
    return alternate(quadratic, quadratic.w, compression, schedule, augmented=augmented).theta


@partial(jax.jit, static_argnums=1)
def _value(quadratic: Taylor | PieceModel, compression: Compression, theta: Theta) -> Float[Array, ""]:
    return quadratic.value(compression.decompress(theta))


def _moved(model: nnx.Module, taylor: NetworkTaylor, damping: float, gradient: bool) -> nnx.Module:
    values = {path: minimum_of(part, damping, gradient=gradient) for path, part in taylor.parts.items()}
    shapes = {path: value.shape for path, value in parameters_of(model).items()}
    return with_values(model, {path: value.reshape(shapes[path]) for path, value in values.items()})


def _check(model: nnx.Module, taylor: NetworkTaylor, damping: float) -> None:
    if not damping >= 0:
        raise ValueError(f"damping: {damping}; give a number >= 0")
    if taylor.fingerprint != fingerprint({}, model, None):
        raise ValueError("taylor: made for a network with other weights; give that network, or `taylor_of` this one")

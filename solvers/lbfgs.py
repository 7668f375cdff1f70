"""L-BFGS for smooth functions of a matrix whose value and gradient come together, as a small compiled program."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

Objective = Callable[[Float[Array, "r q"]], tuple[Float[Array, ""], Float[Array, "r q"]]]
SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
SHRINK = 0.3


class _Search(NamedTuple):
    """State of the search; `moves` and `turns` hold the last changes of point and gradient, newest last, else zeros."""

    point: Float[Array, "r q"]
    value: Float[Array, ""]
    gradient: Float[Array, "r q"]
    direction: Float[Array, "r q"]
    length: Float[Array, ""]
    moves: Float[Array, "memory r q"]
    turns: Float[Array, "memory r q"]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def _descent_direction(
    gradient: Float[Array, "r q"],
    moves: Float[Array, "memory r q"],
    turns: Float[Array, "memory r q"],
    curvature: float,
) -> Float[Array, "r q"]:
    """-H gradient in the compact form of Byrd, Nocedal & Schnabel (1994), eq. 3.1, with H0 = gamma I.

    gamma = s'y / y'y of the newest pair, 1 / `curvature` without one. Zero pairs have no effect.
    """
    memory, dtype = moves.shape[0], gradient.dtype
    s, y, g = moves.reshape(memory, -1), turns.reshape(memory, -1), gradient.reshape(-1)
    sy, yy = s @ y.T, y @ y.T
    slopes, energies = jnp.diagonal(sy), jnp.diagonal(yy)
    newest = energies[-1] > 0
    gamma = jnp.where(newest, slopes[-1] / jnp.where(newest, energies[-1], 1), jnp.asarray(1 / curvature, dtype))
    upper = jnp.triu(sy) + jnp.diag((slopes == 0).astype(dtype))
    a = solve_triangular(upper, s @ g)
    c = solve_triangular(upper, (jnp.diag(slopes) + gamma * yy) @ a - gamma * (y @ g), trans="T")
    return -(gamma * g + c @ s - gamma * (a @ y)).reshape(gradient.shape)


def _push(history: Float[Array, "memory r q"], item: Float[Array, "r q"]) -> Float[Array, "memory r q"]:
    return jnp.concatenate([history[1:], item[None]])


def minimise(
    evaluate: Objective,
    start: Float[Array, "r q"],
    *,
    offset: Float[Array, ""],
    curvature: float = 1.0,
    max_steps: int = 30,
    memory: int = 8,
    rtol: float = 1e-4,
) -> tuple[Float[Array, "r q"], Float[Array, ""]]:
    """A local minimum of f by L-BFGS with backtracking, and its value; never above f(start).

    One loop in which a step is either taken or shortened, so `evaluate` is compiled once.

    Args:
        evaluate: point -> (f, gradient of f).
        start: first point.
        offset: constant for which f + offset >= 0; `rtol` refers to f + offset.
        curvature: rough size of the Hessian, for the first step.
        max_steps: evaluations after the first.
        memory: pairs remembered.
        rtol: stop when a full step lowers f + offset by less than this fraction of it.

    Returns:
        The best point and f there; f = inf if it was not finite at `start`.
    """
    dtype = start.dtype

    def step(s: _Search) -> _Search:
        trial = s.point + s.length * s.direction
        value, gradient = evaluate(trial)
        slope = jnp.sum(s.gradient * s.direction)
        taken = value <= s.value + jnp.asarray(SUFFICIENT_DECREASE, dtype) * s.length * slope
        small = s.value - value <= rtol * jnp.maximum(offset + value, 0)
        move, turn = trial - s.point, gradient - s.gradient
        keep = taken & (jnp.sum(move * turn) > 0)
        moves = jnp.where(keep, _push(s.moves, move), s.moves)
        turns = jnp.where(keep, _push(s.turns, turn), s.turns)
        return _Search(
            point=jnp.where(taken, trial, s.point),
            value=jnp.where(taken, value, s.value),
            gradient=jnp.where(taken, gradient, s.gradient),
            direction=jnp.where(taken, _descent_direction(gradient, moves, turns, curvature), s.direction),
            length=jnp.where(taken, jnp.ones_like(s.length), s.length * jnp.asarray(SHRINK, dtype)),
            moves=moves,
            turns=turns,
            steps=s.steps + 1,
            done=(taken & small & (s.length == 1)) | (s.length < 1e-3),
        )

    history = jnp.zeros((memory, *start.shape), dtype)
    nowhere = jnp.zeros_like(start)
    initial = _Search(  # the first step goes nowhere: it only evaluates
        point=start,
        value=jnp.full((), jnp.inf, dtype),
        gradient=nowhere,
        direction=nowhere,
        length=jnp.ones((), dtype),
        moves=history,
        turns=history,
        steps=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
    )
    end = lax.while_loop(lambda s: (s.steps <= max_steps) & jnp.logical_not(s.done), step, initial)
    return end.point, end.value

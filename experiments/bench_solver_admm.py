"""Measurements of the layer ADMM: distance to convex optima, reliability with a ReLU, and a race of the M steps.

Each function returns plain rows (dicts of numbers and strings), ready for JSON.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from solvers.activation import IDENTITY, RELU, Activation
from solvers.admm import AdmmSolution, init, prepare, solve, step, to_solution
from solvers.admm_state import AdmmOptions, AdmmState, Prepared, Status
from solvers.m_step import MajorizeMinimize
from solvers.penalties import Penalized, penalized_fractions
from solvers.reconstruction import LayerProblem
from solvers.sgd import Sgd

Row = dict[str, Any]
DECADES = (0.01, 0.1, 1.0, 10.0, 100.0)  # of tau: four decades of t
LEARNING_RATES = (0.05, 0.1, 0.2, 0.5)
BATCHES_PER_M_STEP = (10, 30, 100)


def random_problem(
    seed: int, d: int, p: int, n: int, activation: Activation, dtype: type = np.float64
) -> tuple[LayerProblem, np.ndarray]:
    """A layer with mixed features, weights of rank 2 plus three columns plus noise; and its weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, p)) @ (np.eye(p) + 0.3 * rng.normal(size=(p, p)))
    w = rng.normal(size=(n, 2)) @ rng.normal(size=(2, p)) + 0.1 * rng.normal(size=(n, p))
    w[:, rng.choice(p, 3, replace=False)] += 2 * rng.normal(size=(n, 3))
    bias = 0.5 * rng.normal(size=n)
    response = x @ w.T + bias
    noise = 0.3 * rng.normal(size=(d, n))
    y = np.maximum(response, 0) if activation == RELU else response + noise
    x, y, bias = (jnp.asarray(value.astype(dtype)) for value in (x, y, bias))
    return LayerProblem(x=x, y=y, bias=bias, activation=activation), w.astype(dtype)


def correlated_problem(seed: int, n: int, p: int, d: int) -> tuple[LayerProblem, np.ndarray]:
    """A layer like those of trained networks, float32: x the ReLU of a Gaussian with spectrum 1/i^0.8, w of rank n/8
    plus p/8 strong columns plus noise, a ReLU whose target is active about a quarter of the time; and its weights.
    """
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(p, p)).astype(np.float32) / np.sqrt(p)
    spectrum = (np.arange(1, p + 1) ** -0.8).astype(np.float32)
    x = np.maximum((rng.normal(size=(d, p)).astype(np.float32) * spectrum) @ mixing, 0)
    x /= np.sqrt(np.mean(x * x))
    w = rng.normal(size=(n, max(n // 8, 1))) @ rng.normal(size=(max(n // 8, 1), p)) / np.sqrt(max(n // 8, 1))
    w[:, rng.choice(p, p // 8, replace=False)] += 2 * rng.normal(size=(n, p // 8))
    w = ((w + 0.3 * rng.normal(size=(n, p))) / np.sqrt(p)).astype(np.float32)
    linear = x @ w.T
    bias = (-linear.mean(axis=0) - 0.7 * linear.std(axis=0)).astype(np.float32)
    y = np.maximum(linear + bias, 0)
    return LayerProblem(x=jnp.asarray(x), y=jnp.asarray(y), bias=jnp.asarray(bias)), w


def convex_optimum(problem: LayerProblem, penalty: Penalized) -> float:
    """The optimum of the penalised problem without activation, by CVXPY with CLARABEL at tolerance 1e-9."""
    import cvxpy as cp

    x, y, bias = (np.asarray(v, np.float64) for v in (problem.x, problem.y, problem.bias))
    shape = (bias.size, x.shape[1])
    a, b = cp.Variable(shape), cp.Variable(shape)
    fit = cp.sum_squares(y - bias - x @ (a + b).T) / (2 * np.sum(y * y))
    groups = cp.sum(cp.norm(a, 2, axis=0))
    objective = fit + np.asarray(penalty.lambda_sparse) * groups + np.asarray(penalty.lambda_rank) * cp.normNuc(b)
    program = cp.Problem(cp.Minimize(objective))
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return float(np.asarray(program.value))


def _with_fractions(problem: LayerProblem, fractions: np.ndarray) -> Penalized:
    return penalized_fractions(problem, jnp.asarray(fractions[0]), jnp.asarray(fractions[1]))


def _convex_cases(num_problems: int, seed: int) -> Iterator[tuple[LayerProblem, Penalized, int]]:
    shapes = ((60, 12, 6), (40, 8, 10), (10, 14, 5))  # tall, more outputs than features, fewer rows than features
    fractions = np.random.default_rng(seed).uniform(0.03, 0.4, size=(num_problems, 2))
    for i in range(num_problems):
        problem, _ = random_problem(seed + i, *shapes[i % len(shapes)], IDENTITY)
        yield problem, _with_fractions(problem, fractions[i]), seed + i


def convex_optimality(num_problems: int = 30, seed: int = 0, taus: tuple[float, ...] = DECADES) -> list[Row]:
    """Relative distance of the objective from CVXPY's optimum, from every t in `taus`; no activation, float64."""
    rows = []
    with jax.enable_x64(True):
        options = AdmmOptions(rtol=1e-5, max_steps=3000)
        for problem, penalty, case in _convex_cases(num_problems, seed):
            optimum = convex_optimum(problem, penalty)
            curvature = float(prepare(problem, options).curvature)
            for tau in taus:
                solution = solve(problem, penalty, options=options, t=tau * curvature)
                gap = float(solution.objective) / optimum - 1
                rows.append(_outcome(solution, problem, case) | {"tau": tau, "optimum": optimum, "gap": gap})
    return rows


def _outcome(solution: AdmmSolution, problem: LayerProblem, case: int) -> Row:
    d, p = problem.x.shape
    return {
        "case": case,
        "n": problem.bias.shape[0],
        "p": p,
        "d": d,
        "objective": float(solution.objective),
        "status": Status(int(solution.status)).name,
        "num_steps": int(solution.num_steps),
        "num_kept": int(jnp.sum(solution.kept)),
        "rank": int(solution.rank),
    }


def relu_optimality(num_problems: int = 10, seed: int = 0) -> list[Row]:
    """The default solve from zero, against the best objective of any method and start in ten times the iterations."""
    rows = []
    with jax.enable_x64(True):
        default = AdmmOptions()
        longer = {"max_steps": 10 * default.max_steps, "rtol": 1e-7}
        rivals = [
            replace(default, **longer, splitting=splitting, m_step=m_step)
            for splitting in ("two_block", "three_block")
            for m_step in (MajorizeMinimize(), MajorizeMinimize(momentum=0.0), Sgd(batch_size=32, steps=10))
        ]
        fractions = np.random.default_rng(seed).uniform(0.02, 0.2, size=(num_problems, 2))
        for i in range(num_problems):
            problem, w = random_problem(seed + i, 120, 16, 8, RELU)
            penalty = _with_fractions(problem, fractions[i])
            solution = solve(problem, penalty, options=default)
            starts = (None, jnp.asarray(w))
            found = [float(solve(problem, penalty, options=o, start=s).objective) for o in rivals for s in starts]
            best = min(*found, float(solution.objective))
            gap = float(solution.objective) / best - 1
            rows.append(_outcome(solution, problem, seed + i) | {"best": best, "gap": gap})
    return rows


@dataclass(frozen=True)
class Trace:
    """Seconds (compilation excluded, preparation included) and best judged objectives, and where it ended."""

    seconds: list[float]
    objectives: list[float]
    steps: list[int]
    state: AdmmState

    def seconds_to(self, objective: float) -> float | None:
        """When the best objective first was at most `objective`; None if never."""
        return next((s for s, o in zip(self.seconds, self.objectives, strict=True) if o <= objective), None)


def _block(
    problem: LayerProblem, penalty: Penalized, prepared: Prepared, state: AdmmState, options: AdmmOptions
) -> AdmmState:
    """Steps up to the next judged one."""
    body = partial(step, problem, penalty, prepared, options)
    state = body(state)
    return lax.while_loop(
        lambda s: (s.status == Status.RUNNING) & (s.num_steps % options.check_every != 0), body, state
    )


def trace(
    problem: LayerProblem, penalty: Penalized, options: AdmmOptions, start: Array | None, seconds_cap: float
) -> Trace:
    """Runs a solve block by block on the clock, until it ends or the time is up."""
    begin: Callable[..., Any] = jax.jit(prepare, static_argnames="options").lower(problem, options=options).compile()
    ready = begin(problem)
    first = jax.jit(init, static_argnames="options")
    opening = first.lower(problem, penalty, ready, options=options, start=start).compile()
    state = opening(problem, penalty, ready, start=start)
    block = jax.jit(_block, static_argnames="options").lower(problem, penalty, ready, state, options=options).compile()
    clock = perf_counter()
    ready = jax.block_until_ready(begin(problem))
    state = jax.block_until_ready(opening(problem, penalty, ready, start=start))
    seconds, objectives, steps = [perf_counter() - clock], [float("inf")], [0]
    while int(state.status) == Status.RUNNING and seconds[-1] < seconds_cap:
        state = jax.block_until_ready(block(problem, penalty, ready, state))
        seconds.append(perf_counter() - clock)
        objectives.append(float(state.best.objective))
        steps.append(int(state.num_steps))
    return Trace(seconds, objectives, steps, state)


def matmul_gflops(x: Float[Array, "d p"], n: int) -> float:
    """Speed of the plain product x m', median of 5."""
    m = jnp.ones((n, x.shape[1]), x.dtype)
    product = jax.jit(lambda x, m: x @ m.T)
    jax.block_until_ready(product(x, m))
    times = []
    for _ in range(5):
        clock = perf_counter()
        jax.block_until_ready(product(x, m))
        times.append(perf_counter() - clock)
    return float(2 * x.shape[0] * x.shape[1] * n / np.median(times) / 1e9)


def step_gflops(problem: LayerProblem, found: Trace, check_every: int) -> float:
    """Speed of the iteration of `MajorizeMinimize`, counting the products it cannot do without: two with x per step
    and one per judgement, two with the eigenvectors, three in the singular value thresholding.
    """
    d, p = problem.x.shape
    n = problem.bias.shape[0]
    small = min(n, p)
    flops = 2 * d * n * p * (2 + 1 / check_every) + 4 * n * p * p + 6 * n * p * small
    per_step = np.diff(found.seconds) / np.maximum(np.diff(found.steps), 1)
    return float(flops / np.median(per_step) / 1e9)


def _race_row(name: str, problem: LayerProblem, found: Trace, **more: object) -> Row:
    solution = to_solution(found.state)
    judged = solution.sparse + solution.low_rank
    gap = jnp.linalg.norm(found.state.sparse.point + found.state.low_rank.point - solution.split)
    return {
        "method": name,
        **_outcome(solution, problem, 0),
        "objective_nonzero": bool(jnp.any(judged != 0)),
        "seconds": found.seconds[-1],
        "seconds_prepare": found.seconds[0],
        "primal_gap": float(gap / jnp.linalg.norm(solution.split)),
        **more,
    }


def m_step_race(
    n: int = 64,
    p: int = 576,
    d: int | None = None,
    seed: int = 0,
    seconds_cap: float = 120.0,
    *,
    problem: LayerProblem | None = None,
    w: np.ndarray | None = None,
    options: AdmmOptions | None = None,
    fraction: float = 0.03,
) -> list[Row]:
    """Objective over time of the paper's penalised problem: `MajorizeMinimize` against 12 settings of `Sgd`.

    Both sides start from the layer's own matrix and take t from the same options. `seconds_cap` holds for each
    side in total: the settings of SGD share it. Each row has the seconds to within 1 % of the best objective that
    anyone found (None if never), the relative gap between a + b and m at the end, and the speed in GFLOP/s.

    Args:
        n: outputs of the synthetic layer.
        p: features.
        d: rows, 4 p if None.
        seed: of the layer.
        seconds_cap: for each side.
        problem: a real layer instead of the synthetic one; needs `w`.
        w: its matrix (n, p).
        options: of both sides, `m_step` aside.
        fraction: of both maxima, the penalty weights.
    """
    if problem is None:
        problem, w = correlated_problem(seed, n, p, d or 4 * p)
    if w is None:
        raise ValueError("w=None: pass the layer's matrix (n, p) with the problem")
    options = options or AdmmOptions(check_every=5, max_steps=2000)
    start = jnp.asarray(w)
    penalty = penalized_fractions(problem, fraction, fraction)
    mm = trace(problem, penalty, replace(options, m_step=MajorizeMinimize()), start, seconds_cap)
    settings = [Sgd(learning_rate=r, steps=s) for r in LEARNING_RATES for s in BATCHES_PER_M_STEP]
    rivals = [trace(problem, penalty, replace(options, m_step=s), start, seconds_cap / len(settings)) for s in settings]
    within = 1.01 * min(t.objectives[-1] for t in (mm, *rivals))
    speed = {
        "step_gflops": step_gflops(problem, mm, options.check_every),
        "matmul_gflops": matmul_gflops(problem.x, start.shape[0]),
    }
    rows = [_race_row("mm", problem, mm, seconds_to_one_percent=mm.seconds_to(within), **speed)]
    for setting, found in zip(settings, rivals, strict=True):
        more = {"learning_rate": setting.learning_rate, "batches_per_m_step": setting.steps}
        rows.append(_race_row("sgd", problem, found, seconds_to_one_percent=found.seconds_to(within), **more))
    return rows

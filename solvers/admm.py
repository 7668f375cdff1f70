"""Column-sparse plus low-rank approximation of one layer's response, by ADMM.

    minimise  L(m) + g1(a) + g2(b)   subject to  a + b = m

with L the loss of `solvers.reconstruction` after the activation, and g1, g2 a penalty of `solvers.penalties`. The
alternation is that of Ma et al., "A unified approximation framework for compressing and accelerating deep neural
networks" (ICTAI 2019); Boyd et al., "Distributed optimization and statistical learning via ADMM" (2011) has the theory.

    a    <- prox of g1 / t at  m1 - dual / t               m1 = m - b (three blocks) or its own variable (two blocks)
    b    <- prox of g2 / t at  m - a - dual / t            (three blocks), at m - m1 - dual / t (two blocks)
    m    <- argmin L(m) + t / (2 q) ||m - (a + b + q dual / t)||^2        q = 1 (three blocks) or 2 (two blocks)
    dual <- dual + t / q (a + b - m)

In two blocks the constraints are a = m1 and b = m2 with m = m1 + m2. After the first update their multipliers are the
same, and minimising over the split of m in closed form leaves half the weight on m and m1 = (a - b + m) / 2. Without an
activation the problem is convex and two blocks converge to an optimum from every t > 0. With a ReLU the loss is not
convex in m, and what is reached is a stationary point: the best point judged on the way is returned.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from solvers.admm_state import (
    AdmmOptions,
    AdmmSolution,
    AdmmState,
    Best,
    History,
    Prepared,
    Status,
    StepInfo,
)
from solvers.penalties import Penalty, Proximal
from solvers.penalty_parameter import STALL_STEPS, Progress, mean_curvature
from solvers.reconstruction import LayerProblem, is_concrete, loss, scale_features, validate

_FLOOR = 1e-3  # of the natural size of m and of the multiplier, in the denominators of relative residuals


def prepare(problem: LayerProblem, options: AdmmOptions) -> Prepared:
    """What is computed once per problem, whatever the penalty."""
    return Prepared(options.m_step.prepare(problem), mean_curvature(problem))


def init(
    problem: LayerProblem,
    penalty: Penalty,
    prepared: Prepared,
    options: AdmmOptions,
    *,
    start: AdmmSolution | Float[Array, "n p"] | None = None,
    key: Key[Array, ""] | None = None,
    t: Float[Array, ""] | None = None,
) -> AdmmState:
    """The state before the first step; arguments as in `solve`."""
    dtype = problem.x.dtype
    zero = jnp.zeros((problem.bias.shape[0], problem.x.shape[1]), dtype)
    if isinstance(start, AdmmSolution):
        a, b, m, dual = start.sparse, start.low_rank, start.split, start.dual
    else:
        a, b, m, dual = zero, zero, zero if start is None else start, zero
    if t is None:
        tau = penalty.default_tau if options.tau is None else options.tau
        t = start.t if isinstance(start, AdmmSolution) else tau * prepared.curvature
    t = jnp.asarray(t, dtype)
    # A proximal step is taken only for the structure (which groups there are); its point is replaced.
    sparse, low_rank = (
        Proximal(point, jnp.zeros_like(p.value), jnp.zeros_like(p.kept))
        for point, p in ((a, penalty.prox_sparse(a, t)), (b, penalty.prox_low_rank(b, t)))
    )
    key = jax.random.key(0) if key is None else key
    inner = options.m_step.init(problem, prepared.inner, m, key, t)
    infinite = jnp.asarray(jnp.inf, dtype)
    share = (a - b + m) / 2 if options.splitting == "two_block" else m - b
    count = jnp.zeros((), jnp.int32)
    return AdmmState(
        sparse, low_rank, inner, share, dual, t, infinite, infinite, infinite, Best(sparse, low_rank, infinite),
        sparse.kept, count, count, count + Status.RUNNING, History.empty(options.max_steps, dtype),
    )  # fmt: skip


def _alternate(
    problem: LayerProblem, penalty: Penalty, prepared: Prepared, options: AdmmOptions, s: AdmmState
) -> AdmmState:
    """The updates of a, b, m and the multiplier, and the residuals."""
    t, m, alpha = s.t, s.inner.m, options.over_relaxation
    two = options.splitting == "two_block"
    v_a = s.sparse_share - s.dual / t
    sparse = penalty.prox_sparse(v_a, t)
    a = sparse.point
    v_b = m - (s.sparse_share if two else a) - s.dual / t
    low_rank = penalty.prox_low_rank(v_b, t)
    b = low_rank.point
    relaxed = alpha * (a + b) + (1 - alpha) * m
    shared = 2 if two else 1
    inner = options.m_step.step(problem, prepared.inner, s.inner, relaxed + (shared / t) * s.dual, t / shared)
    dual = s.dual + (t / shared) * (relaxed - inner.m)
    relaxed_difference = alpha * (a - b) + (1 - alpha) * (2 * s.sparse_share - m)
    share = (relaxed_difference + inner.m) / 2 if two else inner.m - b
    gaps = (t * (v_a - a) + dual, t * (v_b - b) + dual)
    natural = jnp.sqrt(prepared.curvature)  # ||dual|| of m of unit response; 1 / natural is the size of that m
    size_m = jnp.maximum(jnp.linalg.norm(inner.m), jnp.linalg.norm(a + b))
    size_dual = jnp.sqrt(2.0).astype(t.dtype) * jnp.linalg.norm(dual)
    return s._replace(
        sparse=sparse,
        low_rank=low_rank,
        inner=inner,
        sparse_share=share,
        dual=dual,
        primal_residual=jnp.linalg.norm(a + b - inner.m) / jnp.maximum(size_m, _FLOOR / natural),
        dual_residual=jnp.hypot(*map(jnp.linalg.norm, gaps)) / jnp.maximum(size_dual, _FLOOR * natural),
        num_steps=s.num_steps + 1,
    )


def _is_judged(num_steps: Int[Array, ""], options: AdmmOptions) -> Array:
    return (num_steps % options.check_every == 0) | (num_steps == options.max_steps)


def _judge(problem: LayerProblem, s: AdmmState) -> AdmmState:
    """The objective at the feasible point a + b, and the best so far."""
    objective = loss(problem, s.sparse.point + s.low_rank.point) + s.sparse.value + s.low_rank.value
    best = Best(s.sparse, s.low_rank, objective)
    better = objective < s.best.objective
    return s._replace(objective=objective, best=jax.tree.map(partial(jnp.where, better), best, s.best))


def _is_stalled(s: AdmmState) -> Array:
    """Whether the larger residual fell by less than a fifth in the last `STALL_STEPS` steps."""
    then = jnp.maximum(s.num_steps - 1 - STALL_STEPS, 0)
    residual = jnp.maximum(s.history.primal_residual[then], s.history.dual_residual[then])
    now = jnp.maximum(s.primal_residual, s.dual_residual)
    return (s.num_steps > STALL_STEPS) & (now > 0.8 * residual)


def _adapt(penalty: Penalty, options: AdmmOptions, s: AdmmState) -> AdmmState:
    """Lets the rule move t. The multiplier is unscaled and stays."""
    rule = penalty.default_rule if options.rule is None else options.rule
    looks = (s.num_steps % rule.every == 0) & (s.num_changes < rule.max_changes)
    count = jnp.maximum(jnp.sum(s.sparse.kept), 1).astype(s.t.dtype)
    changed = jnp.sum(s.sparse.kept != s.reference_kept).astype(s.t.dtype) / (2 * count)
    progress = Progress(s.primal_residual, s.dual_residual, changed, s.num_steps, _is_stalled(s))
    factor = jnp.where(looks, rule.factor(progress), 1)
    return s._replace(
        t=s.t * factor,
        num_changes=s.num_changes + (factor != 1).astype(jnp.int32),
        reference_kept=jnp.where(looks, s.sparse.kept, s.reference_kept),
    )


def _record(options: AdmmOptions, s: AdmmState) -> AdmmState:
    dtype = s.t.dtype
    kept, rank = jnp.sum(s.sparse.kept, dtype=jnp.int32), jnp.sum(s.low_rank.kept, dtype=jnp.int32)
    judged = jnp.where(_is_judged(s.num_steps, options), s.objective, jnp.nan)
    row = History(judged, s.primal_residual, s.dual_residual, kept.astype(dtype), rank.astype(dtype))
    if options.on_step is not None:
        info = StepInfo(s.num_steps, s.objective, s.primal_residual, s.dual_residual, kept, rank, s.t)
        jax.debug.callback(options.on_step, info)
    return s._replace(history=jax.tree.map(lambda h, v: h.at[s.num_steps - 1].set(v), s.history, row))


def step(
    problem: LayerProblem, penalty: Penalty, prepared: Prepared, options: AdmmOptions, state: AdmmState
) -> AdmmState:
    """One round of the alternation: a, b, m, multiplier; then residuals, judgement, history, t and status."""
    state = _alternate(problem, penalty, prepared, options, state)
    judged = _is_judged(state.num_steps, options)
    state = lax.cond(judged, partial(_judge, problem), lambda s: s, state)
    state = _record(options, state)
    state = _adapt(penalty, options, state)
    return state._replace(status=terminate(state, options))


def terminate(state: AdmmState, options: AdmmOptions) -> Int[Array, ""]:
    """The status: diverged on a non-finite residual or judged objective; converged when, at a judged step, both
    relative residuals are at most `rtol`; stopped at `max_steps`.
    """
    judged = _is_judged(state.num_steps, options)
    within = jnp.maximum(state.primal_residual, state.dual_residual) <= options.rtol
    finite = jnp.isfinite(state.primal_residual) & jnp.isfinite(state.dual_residual)
    finite &= jnp.isfinite(state.objective) | ~judged
    status = jnp.where(state.num_steps >= options.max_steps, Status.MAX_STEPS, Status.RUNNING)
    status = jnp.where(judged & within, Status.CONVERGED, status)
    return jnp.where(finite, status, Status.DIVERGED).astype(jnp.int32)


def to_solution(state: AdmmState) -> AdmmSolution:
    """What a state amounts to: the best judged point, and where the loop stands."""
    best = state.best
    return AdmmSolution(
        sparse=best.sparse.point,
        low_rank=best.low_rank.point,
        split=state.inner.m,
        dual=state.dual,
        t=state.t,
        objective=best.objective,
        primal_residual=state.primal_residual,
        dual_residual=state.dual_residual,
        status=state.status,
        num_steps=state.num_steps,
        history=state.history,
        kept=best.sparse.kept,
        rank=jnp.sum(best.low_rank.kept, dtype=jnp.int32),
    )


def _run(
    problem: LayerProblem,
    penalty: Penalty,
    prepared: Prepared,
    options: AdmmOptions,
    start: AdmmSolution | Float[Array, "n p"] | None,
    key: Key[Array, ""] | None,
    t: Float[Array, ""] | None,
) -> AdmmSolution:
    state = init(problem, penalty, prepared, options, start=start, key=key, t=t)
    body = partial(step, problem, penalty, prepared, options)
    return to_solution(lax.while_loop(lambda s: s.status == Status.RUNNING, body, state))


def _rescale(point: Array, scale: Array | None) -> Array:
    return point if scale is None else point * scale[None, :]


def _in_features(solution: AdmmSolution, scale: Array | None) -> AdmmSolution:
    """The solution for features multiplied by `scale`: matrices go with it, the multiplier (a gradient) against."""
    inverse = None if scale is None else 1 / scale
    fields = {name: _rescale(getattr(solution, name), scale) for name in ("sparse", "low_rank", "split")}
    return AdmmSolution(**{**vars(solution), **fields, "dual": _rescale(solution.dual, inverse)})


def _prepare_features(
    problem: LayerProblem, options: AdmmOptions, start: AdmmSolution | Array | None
) -> tuple[LayerProblem, Array | None, AdmmSolution | Array | None]:
    """The problem and the start in the features the loop works in; the scale leads back."""
    if not options.scale_columns:
        return problem, None, start
    problem, scale = scale_features(problem)
    if start is not None:
        start = _in_features(start, scale) if isinstance(start, AdmmSolution) else _rescale(start, scale)
    return problem, 1 / scale, start


@partial(jax.jit, static_argnames="options")
def _solve(
    problem: LayerProblem,
    penalty: Penalty,
    start: AdmmSolution | Float[Array, "n p"] | None,
    key: Key[Array, ""] | None,
    t: Float[Array, ""] | None,
    *,
    options: AdmmOptions,
) -> AdmmSolution:
    problem, inverse, start = _prepare_features(problem, options, start)
    solution = _run(problem, penalty, prepare(problem, options), options, start, key, t)
    return _in_features(solution, inverse)


@partial(jax.jit, static_argnames="options")
def _path(
    problem: LayerProblem,
    penalties: Penalty,
    start: AdmmSolution | Float[Array, "n p"] | None,
    key: Key[Array, ""] | None,
    t: Float[Array, ""] | None,
    until: Partial | None,
    *,
    options: AdmmOptions,
) -> AdmmSolution:
    problem, inverse, start = _prepare_features(problem, options, start)
    prepared = prepare(problem, options)
    first = jax.tree.map(lambda leaf: leaf[0], penalties)
    # The scan's carry is a solution; before the first penalty it is a state that has not moved.
    before = to_solution(init(problem, first, prepared, options, start=start, key=key, t=t))

    def body(carry: tuple[AdmmSolution, Array], penalty: Penalty) -> tuple[tuple[AdmmSolution, Array], AdmmSolution]:
        previous, over = carry
        solution = lax.cond(
            over, lambda: previous, lambda: _run(problem, penalty, prepared, options, previous, key, None)
        )
        over = over if until is None else over | until(solution)
        return (solution, over), _in_features(solution, inverse)

    return lax.scan(body, (before, jnp.zeros((), bool)), penalties)[1]


def _check(
    problem: LayerProblem,
    penalty: Penalty,
    options: AdmmOptions,
    start: AdmmSolution | Array | None,
    t: Array | float | None,
) -> None:
    validate(problem)
    shape = (problem.bias.shape[0], problem.x.shape[1])
    penalty.validate(shape)
    options.m_step.check(problem)
    m = start.split if isinstance(start, AdmmSolution) else start
    if m is not None and (m.shape != shape or m.dtype != problem.x.dtype):
        raise ValueError(f"start has shape {m.shape} and dtype {m.dtype}, expected {shape} and {problem.x.dtype}")
    if t is not None and is_concrete(t) and not (jnp.isfinite(t) and t > 0):
        raise ValueError(f"t={t}: pass a finite positive penalty parameter, or None")


def solve(
    problem: LayerProblem,
    penalty: Penalty,
    *,
    options: AdmmOptions = AdmmOptions(),  # noqa: B008 (frozen)
    start: AdmmSolution | Float[Array, "n p"] | None = None,
    key: Key[Array, ""] | None = None,
    t: Float[Array, ""] | float | None = None,
) -> AdmmSolution:
    """Minimises L(a + b) + g1(a) + g2(b) over a and b: one compiled loop, which can be jitted and vmapped.

    Compiles once per shape, activation and options; penalties and t are traced. Under vmap every step is judged and
    every M step computes its fallback too (both branches of a `lax.cond` run), so it costs up to 2.5 times as much.

    Args:
        problem: x (d, p), y (d, n), bias (n,), and what else the layer has.
        penalty: `Penalized`, `Constrained`, or any `Penalty`.
        options: static options.
        start: a solution to continue from (its split, multiplier and t are taken too), or a matrix m such as the
            layer's own; None starts from zero.
        key: for `Sgd`; None is `jax.random.key(0)`.
        t: first penalty parameter, raw; None takes the start's, else the scaled default.

    Raises:
        ValueError: an argument is unusable; the text names it, its value and the remedy. Values that are being
            traced are not looked at; a non-finite value among them ends in `Status.DIVERGED`.
    """
    _check(problem, penalty, options, start, t)
    return _solve(problem, penalty, start, key, t, options=options)


def path(
    problem: LayerProblem,
    penalties: Penalty,
    *,
    options: AdmmOptions = AdmmOptions(),  # noqa: B008 (frozen)
    start: AdmmSolution | Float[Array, "n p"] | None = None,
    key: Key[Array, ""] | None = None,
    t: Float[Array, ""] | float | None = None,
    until: Partial | None = None,
) -> AdmmSolution:
    """Solves a stack of penalties one after the other, each started from the last one's solution and t.

    The factorisation is made once and the whole path is one compiled `lax.scan`.

    Args:
        problem: as in `solve`.
        penalties: a penalty whose values have a leading axis, in decreasing strength, such as
            `penalized_fractions(problem, jnp.geomspace(1, 0.01, 20), jnp.geomspace(1, 0.01, 20))`.
        options: as in `solve`.
        start: as in `solve`, for the first.
        key: as in `solve`.
        t: as in `solve`, for the first.
        until: traced predicate of a solution, a `jax.tree_util.Partial`; after the first solution of which it is true
            the others are not solved, and repeat that one.

    Returns:
        A solution whose fields have a leading axis, one entry per penalty.

    Raises:
        ValueError: as `solve`, or the penalties are not a stack.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(penalties)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(f"penalties have leading axes {sorted(lengths)}: pass values of one common length >= 1")
    _check(problem, penalties, options, start, t)
    return _path(problem, penalties, start, key, t, until, options=options)

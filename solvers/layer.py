"""The front door for one layer: one budget, the best form.

Every form in `FORMS` proposes a structure that fits the budget; each is fitted in closed form, the promising ones are
refined after the activation, and the one with the least error on held-out rows wins. The paper's penalised ADMM with
refit always takes part.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from solvers.admm_form import FRACTIONS, admm_candidate, penalized_candidate
from solvers.admm_state import AdmmOptions
from solvers.candidates import Candidate, Context
from solvers.factor_sizes import FACTORED, check_ranks
from solvers.forms import FORMS
from solvers.gram import GramStatistics, best_bias, linear_error, weight_statistics
from solvers.reconstruction import LayerProblem, relative_error
from solvers.refine import RefineOptions, blend_for, refine
from solvers.ridge import selection_statistics
from solvers.structure import Structure, fit
from solvers.terms import Columns, Dense, MatrixShape, Term, figures, total_matrix

FORM_NAMES = (*FORMS, "admm")
# Two-level contains the sum, and has beaten it so far; CP and Tucker-2 are asked for by name.
_TRIED = tuple(name for name in FORM_NAMES if name not in ("sum", "tucker2", "cp3", "cp4"))


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How a layer is solved.

    Attributes:
        form: "best", or one of `FORM_NAMES`, or several of them as a tuple, of which the best is taken; "admm" is the
            paper's penalised ADMM followed by the refit.
        group: what the sparse part keeps or drops whole: "column" (as in the paper) or "channel".
        gauge: store low-rank factors with an identity block, which saves r^2 values.
        ridge: the least that is added to the Gram matrix, relative to its mean diagonal; `solvers.ridge` says when it
            is more.
        refine: refinement after the activation, None to skip it.
        refine_within: refine the forms whose error is within this factor of the best one.
        admm: options of the ADMM.
        admm_rows_per_feature: how many of the rows the ADMM's path of penalties sees, None for all: the support
            settles on few, and a path takes hundreds of passes.
        admm_fractions: the path of penalties, as decreasing fractions of both maxima, that a budget is looked for on;
            each costs a solve.
        float64_up_to: largest p for which selection runs in float64.
        round_to: numbers of kept columns (or channels, with group="channel") and ranks are rounded down to multiples of
            it, for machines that like some sizes. Where less than one multiple fits, sizes stay as they are.
        ranks: of the one factored form that `form` names, in place of a budget: (r,), for "tucker2" (outputs, inputs).
        data_aware: fit the layer's response; otherwise its weights alone, all inputs alike, without a look at the rows.
    """

    form: str | tuple[str, ...] = "best"
    group: str = "column"
    gauge: bool = True
    ridge: float = 1e-6
    refine: RefineOptions | None = RefineOptions()
    refine_within: float = 1.25
    admm: AdmmOptions = AdmmOptions(max_steps=40, check_every=5, rtol=2e-3)
    admm_rows_per_feature: int | None = 8
    admm_fractions: tuple[float, ...] = FRACTIONS
    float64_up_to: int = 1536
    round_to: int = 1
    ranks: tuple[int, ...] | None = None
    data_aware: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.wanted() if name not in FORM_NAMES]
        if unknown or not self.wanted():
            raise ValueError(f"form: {self.form!r} is unknown; choose best or one of {', '.join(FORM_NAMES)}")
        if self.group not in ("column", "channel"):
            raise ValueError(f"group: {self.group!r} is unknown; choose column or channel")
        if self.round_to < 1:
            raise ValueError(f"round_to: {self.round_to!r} is not a whole number from 1 on; 8 suits many machines")
        if self.ranks is not None and self.form not in FACTORED:
            raise ValueError(f"ranks: {self.ranks} for form {self.form!r}; name one of {', '.join(FACTORED)}")
        if not self.data_aware and "admm" in self.wanted():
            raise ValueError("form: the ADMM fits the response; leave it out, or leave data_aware=True")
        fractions = self.admm_fractions
        if not fractions or min(fractions) <= 0 or list(fractions) != sorted(fractions, reverse=True):
            raise ValueError(f"admm_fractions: {fractions} are not decreasing positive fractions, at least one")

    def wanted(self) -> tuple[str, ...]:
        """Names of the forms to try."""
        if self.form == "best":
            return _TRIED if self.data_aware else tuple(FORMS)
        return (self.form,) if isinstance(self.form, str) else self.form


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """One form on one layer; errors are relative, squared, on held-out rows.

    Attributes:
        params: stored values.
        index_bits: bits of the stored indices.
        kept_columns: columns of the sparse part.
        rank: rank of the low-rank part.
        linear: error before the activation, as selected.
        selected: error after the activation, as selected.
        refined: the same after refinement, None if this form was not refined.
    """

    params: int
    index_bits: int
    kept_columns: int
    rank: int
    linear: float
    selected: float
    refined: float | None

    @property
    def error(self) -> float:
        """The best figure after the activation."""
        return self.selected if self.refined is None else self.refined


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """The compressed layer.

    Attributes:
        terms: what is stored; the layer's matrix is their sum.
        bias: (n,).
        form: the form that won; "dense" when nothing smaller was possible.
        status: "ok", or "diverged" when no form gave a finite error (the terms are then empty).
        forms: what each form reached.
        linear_errors: relative squared error before the activation, (calibration, held out).
        errors: the same after the activation.
        num_steps: iterations of the winning form.
        warnings: what the caller should know.
    """

    terms: tuple[Term, ...]
    bias: Float32[np.ndarray, " n"]
    form: str
    status: str
    forms: Mapping[str, FormResult] = field(default_factory=dict)
    linear_errors: tuple[float, float] = (float("nan"), float("nan"))
    errors: tuple[float, float] = (float("nan"), float("nan"))
    num_steps: int = 0
    warnings: tuple[str, ...] = ()

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """The sum of the terms."""
        return total_matrix(self.terms, shape)


def minimum_budget(shape: MatrixShape) -> float:
    """The smallest budget, in stored values, under which a layer of this shape can be anything but zero.

    The cheaper of one column and rank 1, with their indices.
    """
    return min(shape.n + 3 * shape.p / 32, shape.n + shape.p + 1)


@jax.jit
def refit(structure: Structure, stats: GramStatistics, weights: Array | None = None) -> tuple[Array, Array]:
    """Matrix and bias of least squared error, in float32; outputs of `stats` are scaled by sqrt(weights)."""
    m = fit(structure, stats.cross)
    bias = best_bias(stats, m)
    if weights is not None:
        scale = jnp.sqrt(weights).astype(m.dtype)
        m, bias = m / scale[:, None], bias / scale
    return m.astype(jnp.float32), bias.astype(jnp.float32)


def _held_linear(problem: LayerProblem, stats: GramStatistics, matrix: Array) -> Float[Array, ""]:
    scaled = matrix if problem.weights is None else matrix * jnp.sqrt(problem.weights)[:, None]
    return linear_error(stats, scaled)


@jax.jit
def _measure_rows(
    problem: LayerProblem, stats: GramStatistics, matrix: Array, bias: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Relative squared errors before and after the activation; NaN if the matrix is not finite (a ReLU can hide it)."""
    linear, error = _held_linear(problem, stats, matrix), relative_error(problem, matrix, bias)
    return linear, jnp.where(jnp.all(jnp.isfinite(matrix)), error, jnp.nan)


@dataclass
class _Trial:
    """One form on its way: structure, matrix, bias and what is known of its errors."""

    candidate: Candidate
    matrix: Array
    bias: Array
    linear: float
    selected: float
    refined: float | None = None
    steps: int = 0

    @property
    def error(self) -> float:
        return self.selected if self.refined is None else self.refined


class _Solver:
    """One layer's data, statistics and options, through the stages of the front door."""

    def __init__(
        self,
        problem: LayerProblem,
        held_out: LayerProblem,
        shape: MatrixShape,
        options: LayerOptions,
        original: Array | None = None,
    ):
        self.problem, self.held_out, self.shape, self.options = problem, held_out, shape, options
        self.warnings: list[str] = []
        rows, wide = problem.x.shape[0], options.float64_up_to
        found = selection_statistics(problem, held_out, ridge=options.ridge, float64_up_to=wide, original=original)
        self.raw, self.held_stats, self.stats, self.w, ridge, self.wide = found
        if not options.data_aware:
            assert original is not None
            with jax.enable_x64(self.wide):
                self.w = jnp.asarray(original, self.w.dtype)
                self.stats = weight_statistics(self.w, problem.bias)
        elif rows < shape.p or ridge > 1e3 * options.ridge:
            self.warnings.append(f"{rows} rows for {shape.p} features: solved with a ridge of {ridge:g}")

    def context(self, budget: float) -> Context:
        return Context(
            stats=self.stats,
            w=self.w,
            problem=self.problem,
            shape=self.shape,
            budget=budget,
            group=self.options.group,
            gauge=self.options.gauge,
            round_to=self.options.round_to,
            ranks=self.options.ranks,
        )

    def trial(self, candidate: Candidate) -> _Trial:
        """Fit a candidate in closed form and measure it on held-out rows."""
        with jax.enable_x64(self.wide):
            matrix, bias = refit(candidate.structure, self.stats, self.problem.weights)
        linear, error = _measure_rows(self.held_out, self.held_stats, matrix, bias)
        return _Trial(candidate, matrix, bias, float(linear), float(error))

    def refine(self, trial: _Trial) -> None:
        """Refine after the activation in place; the start is kept if nothing is better."""
        assert self.options.refine is not None
        with jax.enable_x64(self.wide):
            structure = trial.candidate.structure.astype(jnp.float32)
            stats = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), self.stats)
        active = float(jnp.mean(self.problem.y > 0))
        kept = int(np.count_nonzero(np.any(np.asarray(trial.matrix) != 0, axis=0)))
        blend = blend_for(self.problem.x.shape[0], active, kept)
        done = refine(
            self.problem, self.held_out, stats, structure, trial.matrix, trial.bias, blend, self.options.refine
        )
        trial.refined = float(done.held_out_errors[done.best_step])
        trial.matrix, trial.bias, trial.steps = done.matrix, done.bias, int(done.best_step)


def _propose(solver: _Solver, budget: float) -> dict[str, Candidate]:
    """Every wanted form's candidate; forms that cannot fit the budget or the kernel are absent."""
    wanted = solver.options.wanted()
    context = solver.context(budget)

    def propose(name: str) -> Candidate | None:
        if name == "admm":
            options = solver.options
            return admm_candidate(context, options.admm, options.admm_rows_per_feature, options.admm_fractions)
        with jax.enable_x64(solver.wide):  # a setting of the thread
            return FORMS[name](context)

    # Forms are independent, and compiling them, like most of what they do, keeps only one core busy.
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(zip(wanted, pool.map(propose, wanted), strict=True))
    return {name: candidate for name, candidate in found.items() if candidate is not None}


def _measure(trials: dict[str, _Trial], solver: _Solver) -> str | None:
    """Refine the promising trials; the name of the winner, None if none is finite."""
    finite = {name: t for name, t in trials.items() if np.isfinite(t.selected)}
    if not finite:
        return None
    best = min(t.selected for t in finite.values())
    refines = solver.options.data_aware and solver.options.refine is not None and solver.options.refine.steps > 0
    if refines:
        for trial in finite.values():
            if trial.selected <= best * solver.options.refine_within:
                solver.refine(trial)
    return min(finite, key=lambda name: finite[name].error)


def _form_result(trial: _Trial, terms: tuple[Term, ...], shape: MatrixShape) -> FormResult:
    return FormResult(
        **figures(terms, shape),
        linear=trial.linear,
        selected=trial.selected,
        refined=trial.refined,
    )


def _errors(solver: _Solver, matrix: Array, bias: Array) -> dict[str, Any]:
    pairs = ((solver.problem, solver.raw), (solver.held_out, solver.held_stats))
    both = [_measure_rows(problem, stats, matrix, bias) for problem, stats in pairs]
    return {"linear_errors": tuple(float(b[0]) for b in both), "errors": tuple(float(b[1]) for b in both)}


def solve(
    problem: LayerProblem,
    held_out: LayerProblem,
    shape: MatrixShape,
    *,
    budget: float | None = None,
    penalties: tuple[float, float] | None = None,
    original: Float[Array, "n p"] | None = None,
    start: Float[Array, "n p"] | None = None,
    options: LayerOptions = LayerOptions(),
) -> LayerFit:
    """The best compressed form of one layer.

    Minimises ||W^(1/2) (y - r(x m' + bias + offset))||^2 over matrices m that cost at most `budget`, by the forms of
    `FORMS`, and keeps the form with the least error on `held_out`.

    Args:
        problem: calibration rows.
        held_out: rows of other images, of the same layer.
        shape: the layer as a matrix.
        budget: stored values, indices counted as bits / 32; None if `options.ranks` says how large the form is.
        penalties: instead of a budget, (lambda_sparse, lambda_rank) as fractions of their maxima: the paper's
            penalised ADMM, refitted.
        original: the layer's own matrix; where rows are few the fit stays near it. Needed without `data_aware`.
        start: where the penalised ADMM starts, for example the matrix found for penalties nearby.
        options: static choices.

    Raises:
        ValueError: none or several of budget, penalties and ranks, a budget below `minimum_budget`, negative penalties,
            or ranks that do not fit.
    """
    _validate(problem, shape, budget, penalties, options)
    if not options.data_aware and original is None:
        raise ValueError("original: None; without data_aware the layer's own matrix is what is fitted")
    solver = _Solver(problem, held_out, shape, options, original)
    if penalties is not None:
        proposals = {"admm": penalized_candidate(solver.context(0.0), penalties, options.admm, start)}
    else:
        proposals = _propose(solver, budget or 0.0)
    trials = {name: solver.trial(candidate) for name, candidate in proposals.items()}
    winner = _measure(trials, solver)
    bias = np.asarray(problem.bias, np.float32)
    if winner is None:
        return LayerFit(terms=(), bias=bias, form="dense", status="diverged", warnings=tuple(solver.warnings))
    finite = {name: t for name, t in trials.items() if np.isfinite(t.error)}
    terms = {name: t.candidate.extract(np.asarray(t.matrix)) for name, t in finite.items()}
    forms = {name: _form_result(t, terms[name], shape) for name, t in finite.items()}
    chosen = trials[winner]
    kept = terms[winner] or (Columns(np.zeros((shape.n, 0), np.float32), np.zeros(0, np.int32)),)
    return LayerFit(
        terms=kept,
        bias=np.asarray(chosen.bias),
        form=winner,
        status="ok",
        forms=forms,
        num_steps=chosen.candidate.num_steps + chosen.steps,
        warnings=tuple(solver.warnings),
        **_errors(solver, chosen.matrix, chosen.bias),
    )


def dense(problem: LayerProblem, w: Float[Array, "n p"], bias: Float[Array, " n"]) -> LayerFit:
    """The layer as it is, in the same result type."""
    terms = (Dense(np.asarray(w, np.float32)),)
    return LayerFit(terms=terms, bias=np.asarray(bias, np.float32), form="dense", status="ok")


def _validate(
    problem: LayerProblem,
    shape: MatrixShape,
    budget: float | None,
    penalties: tuple[float, float] | None,
    options: LayerOptions,
) -> None:
    if sum(given is not None for given in (budget, penalties, options.ranks)) != 1:
        raise ValueError("budget, penalties, options.ranks: give exactly one of them")
    if problem.x.shape[1] != shape.p or problem.y.shape[1] != shape.n:
        raise ValueError(
            f"shape: the rows have {problem.x.shape[1]} features and {problem.y.shape[1]} outputs, "
            f"the layer {shape.p} and {shape.n}"
        )
    if budget is not None and budget < minimum_budget(shape):
        raise ValueError(f"budget: {budget:g} values is below the smallest reachable, {minimum_budget(shape):g}")
    if penalties is not None and not all(0 <= x <= 1 for x in penalties):
        raise ValueError(f"penalties: {penalties} must be fractions of the maxima, in [0, 1]")
    if options.ranks is not None:
        assert isinstance(options.form, str)
        check_ranks(options.form, shape, options.ranks)

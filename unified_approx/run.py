"""One run: the checked arguments, the captured network, and its layers one after another."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from solvers.layer import LayerFit, solve
from solvers.terms import Term, figures, total_matrix
from unified_approx import calibration as examples
from unified_approx.allocation.assign import total_cost
from unified_approx.allocation.knapsack import GAP
from unified_approx.allocation.timing import LayerTimer
from unified_approx.assemble import get, unfold
from unified_approx.cost import NetworkCost, network_cost
from unified_approx.evaluate import outputs_once
from unified_approx.im2col import kernel_to_matrix
from unified_approx.latency import FASTEST, batch_of, fastest
from unified_approx.layers import Factored, factored_class
from unified_approx.layers.factored import AUTO, MATMUL, MERGED
from unified_approx.narrow import terms_of
from unified_approx.report import LayerRow, ProgressCallback, ProgressEvent, Report
from unified_approx.rules import assign
from unified_approx.sampling import default_rows, problems
from unified_approx.settings import Arguments, Settings, check_reachable, check_weights
from unified_approx.sites import LayerSite, Path
from unified_approx.streams import Streams
from unified_approx.threads import lapack_threads
from unified_approx.work_dir import WorkDir, fingerprint

_AGREEMENT = 0.02  # of the largest output: bfloat16 networks stay below it

Calibration = PyTree | Iterable[PyTree] | Callable[[], Iterable[PyTree]]


def _kind(site: LayerSite) -> tuple[Any, ...]:
    """Layers of one kind share a compiled solve."""
    return site.geometry.matrix_shape, site.activation


class Run:
    """One run: checked arguments, captured network, and the layers one after another."""

    def __init__(self, model: nnx.Module, calibration: Calibration, arguments: Arguments):
        check_weights(model)
        self.model, self.arguments = model, arguments
        self.data = examples.gather(calibration)
        self.num_images = examples.count(self.data)
        if self.num_images < 2:
            raise ValueError("calibration: 1 example; give at least 2, since one of them is held out")
        self.held_out_from = self.num_images - max(1, round(arguments.held_out * self.num_images))
        self.capture = Streams(model, self.data, self.held_out_from, arguments.batch_size, arguments.call)
        self.example = self.capture.example
        self.spatial = {site.path: self.capture.output_spatial(site) for site in self.capture.sites}
        self.settings = self._settle()
        self.branched = {_kind(site) for site in self.capture.sites if site.has_offset}
        self.cost = network_cost(model, self.example, call=arguments.call)
        self.latency_ratio: float | None = None
        self.gap: float | None = None
        self.matrices: dict[str, np.ndarray] = {}

    def _settle(self) -> dict[Path, Settings]:
        """Settings of each site by the rules; open where the budget of the whole network decides."""
        if not self.capture.sites:
            reasons = "; ".join(f"{s.name}: {s.reason}" for s in self.capture.skipped)
            raise ValueError(f"model: it has no layer that can be compressed ({reasons or 'no Conv or Linear found'})")
        rules = assign(self.arguments.rules, self.capture.sites, self.capture.skipped)
        settings = {site.path: self.arguments.settings(rules[site.path], site) for site in self.capture.sites}
        if all(s.dense for s in settings.values()):
            raise ValueError("rules: they keep every layer; there is no layer to compress")
        for site in self.capture.sites:
            check_reachable(site, settings[site.path])
        return settings

    def allocation(self) -> dict[str, Any]:
        """What was settled for each layer, in JSON's types."""
        layers = {
            site.name: {
                "fraction": s.fraction,
                "form": s.options.form,
                "dense": s.dense,
                "expected_loss": s.expected_loss,
            }
            for site in self.capture.sites
            for s in (self.settings[site.path],)
        }
        return {"layers": layers, "gap": self.gap}

    def allocate(self, found: Mapping[str, Any]) -> None:
        """Settle the layers as `allocation` of an earlier run of the same arguments says."""
        for site in self.capture.sites:
            own = dict(found["layers"][site.name])
            form = own.pop("form")
            settings = self.settings[site.path]
            options = replace(settings.options, form=form if isinstance(form, str) else tuple(form))
            self.settings[site.path] = replace(settings, options=options, **own)
        self.gap = found["gap"]

    def solve_all(
        self, work: WorkDir | None, progress: ProgressCallback, starts: Mapping[str, np.ndarray]
    ) -> tuple[dict[Path, nnx.Module], list[LayerRow]]:
        """Every layer in network order; the replacements, and a row for each layer."""
        modules: dict[Path, nnx.Module] = {}
        rows: list[LayerRow] = []
        total = len(self.capture.sites)
        for index, site in enumerate(self.capture.sites):
            shape = (site.geometry.matrix_shape.n, site.geometry.matrix_shape.p)
            progress(ProgressEvent(index, total, site.name, shape, None))
            module, row = self._layer(index, site, work, starts.get(site.name))
            if module is not None:
                modules[site.path] = module
            rows.append(row)
            progress(ProgressEvent(index, total, site.name, shape, row))
        return modules, rows

    def fingerprint(self) -> str:
        """Identifies everything that the solved layers depend on."""
        return fingerprint(self.arguments.identity(), self.model, self.data)

    def sensitivity_identity(self, method: str) -> str:
        """Identifies everything that a sensitivity table depends on; budgets do not count."""
        timed = self.arguments.timed
        sizes = {
            site.name: "+".join((settings.options.group, *settings.menu_forms(timed)))
            for site in self.capture.sites
            for settings in (self.settings[site.path],)
        }
        settings = {
            "method": method,
            "timed": timed,
            "groups": sizes,
            "held_out": self.held_out_from,
            "seed": self.arguments.seed,
        }
        return fingerprint(settings, self.model, self.data)

    def positions(self, site: LayerSite) -> int:
        """Output positions of a layer per example, all of its calls together."""
        return prod(self.spatial[site.path]) * site.num_calls

    @cached_property
    def timer(self) -> LayerTimer | None:
        """Times layers and networks on this machine, if the budget limits seconds."""
        return LayerTimer(self.model, self.example, self.arguments.call) if self.arguments.timed else None

    def report(
        self,
        new: nnx.Module,
        fast: nnx.Module,
        layers: Sequence[LayerRow],
        removed: Mapping[str, int],
        seconds: float,
    ) -> Report:
        """Rows of all layers, skipped ones last, and the totals of the whole network.

        Args:
            new: the compressed network, whose multiply-adds count.
            fast: the same as it will run on this machine: `settled`.
            layers: its rows as solved.
            removed: output channels that were removed since, by layer.
            seconds: of the run.
        """
        before, after = self.cost, network_cost(new, self.example, call=self.arguments.call)
        skipped = [
            LayerRow(name=s.name, kind=s.kind, shape=(0, 0), status="skipped", reason=s.reason)
            for s in self.capture.skipped
        ]
        done = [row for row in layers if row.status in ("compressed", "diverged")]
        notes = [f"{row.name}: {row.reason}" for row in done if row.reason]
        layers = [
            self._as_run(self._narrowed(row, site, new, removed), site, fast)
            for row, site in zip(layers, self.capture.sites, strict=True)
        ]
        gap = self.disagreement(fast)
        if not gap <= _AGREEMENT:
            notes.append(f"the new network's outputs differ from the solved layers' by {gap:.1e} of their size")
        if self.gap is not None and self.gap > 2 * GAP:
            notes.append(f"the sizes are proven to be the best only to within {self.gap:.1%} of the expected loss")
        return Report(
            layers=(*layers, *skipped),
            budget=self.arguments.describe(),
            budget_met=self._budget_met(layers, after),
            params=after.params,
            original_params=before.params,
            bits=after.bits,
            original_bits=before.bits,
            macs=after.macs,
            original_macs=before.macs,
            seconds=seconds,
            seed=self.arguments.seed,
            warnings=tuple(notes),
        )

    def _narrowed(self, row: LayerRow, site: LayerSite, new: nnx.Module, removed: Mapping[str, int]) -> LayerRow:
        """The row of a layer after channels were removed from it or from those that it reads, or if it was factored
        before.
        """
        layer, count = get(new, site.path), removed.get(site.name, 0)
        if not isinstance(layer, Factored) or (row.status == "compressed" and not any(layer.removed)):
            return row
        why = f"{count} output channels that nothing reads removed" if count else ""
        return replace(
            row,
            reason="; ".join(text for text in (row.reason, why) if text),
            macs=layer.factored_macs(self.capture.input_shape(site)[1:-1]) * site.num_calls,
            removed_channels=count,
            **figures(terms_of(layer), layer.geometry.matrix_shape),
        )

    def _as_run(self, row: LayerRow, site: LayerSite, fast: nnx.Module) -> LayerRow:
        """The row, with a word where the factors are stored and the layer runs dense."""
        layer = get(fast, site.path)
        measured = self.arguments.execution == FASTEST or self.timer is not None
        if not measured or not isinstance(layer, Factored) or layer.execution not in (MERGED, MATMUL):
            return row
        why = "runs as one dense layer, which is faster here"
        return replace(row, reason="; ".join(text for text in (row.reason, why) if text))

    def disagreement(self, new: nnx.Module) -> float:
        """Largest relative difference, on the first batch, between the new network and what was solved for.

        A network that uses a layer's weights past the layer itself would show here.
        """
        size = examples.count(self.example)
        expected = jax.tree.leaves(self.capture.outputs()[1])
        new.eval()
        found = outputs_once(new, self.example, call=self.arguments.call)
        gaps = [0.0]
        for want, got in zip(expected, found, strict=True):
            if np.shape(got)[:1] == (size,) and len(want) >= size and np.issubdtype(want.dtype, np.floating):
                scale = float(np.max(np.abs(want[:size]))) or 1.0
                gaps.append(float(np.max(np.abs(want[:size] - np.asarray(got, np.float32)))) / scale)
        return max(gaps)

    def _budget_met(self, layers: Sequence[LayerRow], after: NetworkCost) -> bool | None:
        """Whether every rule's fraction and every limit of the whole network are kept; None with penalties only."""
        settings = {site.name: self.settings[site.path] for site in self.capture.sites}
        budget = self.arguments.budget
        if budget is None and all(s.fraction is None for s in settings.values()):
            return None
        kept = all(
            row.params + row.index_bits / 32 <= fraction * row.original_params * (1 + 1e-9)
            for row in layers
            if (fraction := settings[row.name].fraction) is not None
        )
        limits = {} if budget is None else budget.given()
        counted = {name: f for name, f in limits.items() if name != "latency"}
        fast = self.latency_ratio is None or self.latency_ratio <= limits["latency"]
        return fast and kept and all(total_cost(after, k) <= f * total_cost(self.cost, k) for k, f in counted.items())

    def settled(self, new: nnx.Module) -> nnx.Module:
        """The network in its fastest executions, if these are asked for, or if the budget limits seconds: then it is
        timed against the original.
        """
        if self.timer is None:
            example, call = batch_of(self.example), self.arguments.call
            return fastest(new, example, call=call) if self.arguments.execution == FASTEST else new
        fast, self.latency_ratio = self.timer.against_dense(new)
        return fast

    def _layer(
        self, index: int, site: LayerSite, work: WorkDir | None, start: np.ndarray | None
    ) -> tuple[nnx.Module | None, LayerRow]:
        settings = self.settings[site.path]
        row = self.dense_row(site)
        if settings.dense:
            self.capture.keep(site)
            return None, replace(row, status="kept", reason=settings.dense)
        clock = time.perf_counter()
        stored = work.fetch(index) if work is not None else None
        if stored is None:
            terms, bias, row = self._solve(site, settings, row, start)
            row = replace(row, seconds=time.perf_counter() - clock)
            if work is not None:
                work.store(index, terms, bias, asdict(row))
        else:
            terms, bias, saved = stored
            row = LayerRow(**{**saved, "shape": tuple(saved["shape"])})
        if row.status != "compressed":
            self.capture.keep(site)
            return None, row
        self.matrices[site.name] = total_matrix(terms, site.geometry.matrix_shape)
        self.capture.replace(site, self.matrices[site.name], bias)
        return self.module(site, terms, bias), row

    def _solve(
        self, site: LayerSite, settings: Settings, row: LayerRow, start: np.ndarray | None
    ) -> tuple[tuple[Term, ...], np.ndarray, LayerRow]:
        """Solve one layer; the terms, the bias and the filled row."""
        arguments = self.arguments
        seen = self.capture.observe(site, arguments.rows or default_rows(site.geometry.matrix_shape.p))
        problem, held_out = problems(
            site,
            seen,
            self.held_out_from,
            arguments.rows,
            arguments.seed,
            with_offset=_kind(site) in self.branched,
            mesh=arguments.mesh,
        )
        spatial = seen.x.shape[1:-1]
        del seen  # whole feature maps: hundreds of megabytes that the solve does not need
        shape = site.geometry.matrix_shape
        with lapack_threads(shape.p):
            fit = solve(
                problem,
                held_out,
                shape,
                budget=None if settings.options.ranks else settings.values(site),
                penalties=settings.penalties,
                original=self.original(site),
                start=None if start is None else jnp.asarray(start),
                options=settings.options,
            )
        return fit.terms, fit.bias, self._filled(row, site, spatial, fit, problem.x.shape[0])

    def dense_row(self, site: LayerSite) -> LayerRow:
        """The report's row of a layer that is left as it is."""
        return _row(site, self.spatial[site.path])

    def original(self, site: LayerSite) -> Array:
        """The layer's matrix, with what follows it folded in."""
        kernel = get(self.model, site.path).kernel[...]
        return kernel_to_matrix(jnp.asarray(kernel, jnp.float32)) * jnp.asarray(site.scale, jnp.float32)[:, None]

    def _filled(self, row: LayerRow, site: LayerSite, spatial: tuple[int, ...], fit: LayerFit, rows: int) -> LayerRow:
        if fit.status != "ok":
            reason = "no form gave a finite error; left as it was"
            return replace(row, status="diverged", reason=reason, solve_status=fit.status, rows=rows)
        chosen = fit.forms[fit.form]
        layer = factored_class(site.geometry).from_terms(fit.terms, fit.bias, site.geometry)
        if chosen.params >= row.original_params:
            return replace(row, status="kept", reason="no form is smaller", solve_status=fit.status, rows=rows)
        return replace(
            row,
            status="compressed",
            form=fit.form,
            candidates={name: {**asdict(f), "error": f.error} for name, f in fit.forms.items()},
            kept_columns=chosen.kept_columns,
            rank=chosen.rank,
            params=chosen.params,
            index_bits=chosen.index_bits,
            macs=layer.factored_macs(spatial) * site.num_calls,
            error_before=fit.linear_errors[0],
            error_before_held_out=fit.linear_errors[1],
            error_after=fit.errors[0],
            error_after_held_out=fit.errors[1],
            iterations=fit.num_steps,
            solve_status=fit.status,
            rows=rows,
            reason="; ".join(fit.warnings),
        )

    def module(self, site: LayerSite, terms: tuple[Term, ...], bias: np.ndarray) -> Factored:
        """The layer to put in: with what the network itself still applies afterwards taken out of its rows."""
        scale = np.where(site.outer_scale == 0, 1.0, site.outer_scale).astype(np.float32)
        own = tuple(term.with_rows_scaled(1 / scale) for term in terms) if np.any(scale != 1) else terms
        empty = np.zeros((site.geometry.c_out, 0), np.float32)
        own_bias = unfold(site, empty, bias)[1]
        layer = get(self.model, site.path)
        return factored_class(site.geometry).from_terms(
            own,
            own_bias,
            site.geometry,
            execution=AUTO if self.arguments.execution == FASTEST else self.arguments.execution,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
        )


def _row(site: LayerSite, spatial: tuple[int, ...]) -> LayerRow:
    """The row of a layer that is left as it is; `spatial` is the shape of its output image."""
    shape = site.geometry.matrix_shape
    params = shape.n * shape.p
    macs = params * prod(spatial) * site.num_calls
    return LayerRow(
        name=site.name,
        kind=site.kind,
        shape=(shape.n, shape.p),
        status="kept",
        params=params,
        original_params=params,
        macs=macs,
        original_macs=macs,
    )

"""The layers of a network as rank problems: what a rule may look at, gathered as far as the rule asks for it."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Shaped

from solvers.factor_sizes import Ranks
from solvers.gram import GramStatistics, weight_statistics
from solvers.rank_rules import RankProblem, RankRule
from solvers.ridge import selection_statistics
from unified_approx.allocation.build import dense_module
from unified_approx.assemble import assemble, get, homes, put
from unified_approx.evaluate import accuracy
from unified_approx.im2col import Geometry, kernel_to_matrix, output_shape
from unified_approx.run import Run
from unified_approx.sampling import default_rows, problems
from unified_approx.sites import LayerSite

Labelled = tuple[Any, Shaped[np.ndarray, " examples"]]


def factor_positions(form: str, geometry: Geometry, spatial: Sequence[int]) -> tuple[float, ...]:
    """Output positions of each factor of a form, on an input of that spatial shape."""
    low = output_shape(spatial, geometry)
    before, out = float(prod(spatial)), float(prod(low))
    if form == "low_rank":
        return (out, out)
    if form == "spatial":
        return (float(spatial[0] * low[1]), out)
    if form == "cp4":
        return (before, float(low[0] * spatial[1]), out, out)
    return (before, out, out)


class Ranking:
    """One step's layers, in the network as it is before the step.

    The inputs of all of them are those of this network; the layers of a step do not see each other's errors here.
    """

    def __init__(
        self, run: Run, model: nnx.Module, rule: RankRule | None, labelled: Labelled | None, *, data_aware: bool
    ):
        """See `Ranking.problems`.

        Args:
            run: of that network on the calibration data; where the rule needs weights alone, of any like it.
            model: the network, its layers dense.
            rule: decides what is gathered; None: nothing.
            labelled: examples and labels, for rules that need accuracy.
            data_aware: errors are of the response, otherwise of the weights.
        """
        self._run, self._model, self._labelled, self._data_aware = run, model, labelled, data_aware
        self._needs = "nothing" if rule is None else rule.needs
        self._whole: nnx.Module | None = None

    def problems(
        self, chosen: Mapping[str, str], previous: Mapping[str, Ranks | None], without: Collection[str] = ()
    ) -> Iterator[tuple[LayerSite, RankProblem]]:
        """The layers by name in network order, each with its problem.

        Args:
            chosen: the form that each of the layers is to take.
            previous: the ranks that it has in that form.
            without: layers for which the rule is not asked: nothing is gathered.
        """
        run = self._run
        for site in run.capture.sites:
            if site.name not in chosen:
                continue
            geometry, form = site.geometry, chosen[site.name]
            spatial = run.capture.input_shape(site)[1:-1]
            positions = tuple(site.num_calls * p for p in factor_positions(form, geometry, spatial))
            kernel = get(self._model, site.path).kernel[...]
            needs = "nothing" if site.name in without else self._needs
            yield (
                site,
                RankProblem(
                    form=form,
                    shape=geometry.matrix_shape,
                    weights=np.asarray(kernel_to_matrix(kernel), np.float32),
                    positions=positions,
                    previous=previous[site.name],
                    statistics=None if needs == "nothing" else self._statistics(site),
                    trial=self._trial(site) if needs == "accuracy" else None,
                ),
            )

    def _statistics(self, site: LayerSite) -> GramStatistics:
        run, original = self._run, self._run.original(site)
        options = run.settings[site.path].options
        if not self._data_aware:
            return weight_statistics(original, jax.numpy.asarray(site.shift, original.dtype))
        p = site.geometry.matrix_shape.p
        seen = run.capture.observe(site, run.arguments.rows or default_rows(p))
        run.capture.keep(site)
        problem, held_out = problems(site, seen, run.held_out_from, run.arguments.rows, run.arguments.seed)
        return selection_statistics(
            problem, held_out, ridge=options.ridge, float64_up_to=options.float64_up_to, original=original
        ).stats

    def _trial(self, site: LayerSite) -> Callable[[Array, Array], float]:
        """Points that the labelled examples lose with another matrix and bias in this layer."""
        run = self._run
        assert self._labelled is not None
        x, y = self._labelled
        if self._whole is None:
            dense = {s.path: dense_module(run, s, run.original(s), s.shift) for s in run.capture.sites}
            self._whole = assemble(run.model, dense, run.capture.sites)
            self._reference = accuracy(self._whole, x, y, call=run.arguments.call)
        whole, reference = self._whole, self._reference

        def lost(matrix: Array, bias: Array) -> float:
            new, layer = nnx.clone(whole), dense_module(run, site, np.asarray(matrix), np.asarray(bias))
            for home in homes(whole, site.path):
                new = put(new, home, layer)
            return reference - accuracy(new, x, y, call=run.arguments.call)

        return lost

"""Measures a network's sensitivity: one pass over its layers for the menus, and a few forward passes for the losses."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from solvers.curves import error_curves
from solvers.gram import best_bias
from solvers.layer import minimum_budget
from solvers.ridge import SCARCE, selection_statistics
from solvers.terms import Dense
from unified_approx.allocation.menu import Item, LayerMenu, make_items, matrix_of
from unified_approx.allocation.probe import Probe
from unified_approx.allocation.sensitivity import Measured, Sensitivity, spread, with_losses
from unified_approx.allocation.timing import LayerTimer
from unified_approx.assemble import assemble
from unified_approx.layers.factored import MERGED
from unified_approx.sampling import problems
from unified_approx.sites import LayerSite
from unified_approx.streams import Streams
from unified_approx.threads import lapack_threads

if TYPE_CHECKING:
    from unified_approx.run import Run

_LEVELS = {"kl": (0.01, 0.05, 0.2, 0.5), "fisher": (0.05,)}  # relative errors at which the network is asked
_MIN_ROWS = 8192
_IMAGES = 256

Step = Callable[[int, int, str], Any]


def measure_sensitivity(run: "Run", method: str, step: Step, *, images: int = _IMAGES) -> Sensitivity:
    """The menus of all layers whose size is open, with their losses.

    Inputs are the original network's. Each layer is put in alone at a few sizes, as the simple forms give them, and
    the distance of the network's outputs from the original's is measured on the first examples. Under a budget of
    latency every size is timed as well.

    Args:
        run: the network, the data and the settings.
        method: "kl" or "fisher".
        step: called with (index, total, name) before each layer.
        images: examples that the losses are measured on.
    """
    start, timer = time.perf_counter(), run.timer
    capture, sites = run.capture.again(), [site for site in run.capture.sites if run.settings[site.path].open]
    dense = {s.path: dense_module(run, s, run.original(s), s.shift) for s in sites}
    whole = assemble(run.model, dense, run.capture.sites)
    whole.eval()
    used = max(1, min(images, run.num_images) // len(jax.tree.leaves(capture.example)[0]))
    probe = Probe(whole, capture.batches[:used], run.arguments.call)
    ask = probe.loss if method == "kl" else probe.fisher
    menus, measured, own = [], [], {site.path: site for site in capture.sites}
    for index, site in enumerate(sites):
        step(index, len(sites), site.name)
        items, points = _layer(run, own[site.path], capture, ask, _LEVELS[method], timer)
        shape = site.geometry.matrix_shape
        menus.append(LayerMenu(name=site.name, shape=(shape.n, shape.p), positions=run.positions(site), items=items))
        measured.append(tuple(points))
    return Sensitivity(
        identity=run.sensitivity_identity(method),
        method=method,
        menus=tuple(menus),
        measured=tuple(measured),
        seconds=time.perf_counter() - start,
        clock=None if timer is None else timer.dense_seconds(run.capture.sites),
    )


def _layer(
    run: "Run",
    site: LayerSite,
    capture: Streams,
    ask: Callable[..., float],
    levels: tuple[float, ...],
    timer: LayerTimer | None,
) -> tuple[tuple[Item, ...], list[Measured]]:
    """Items with losses, and what was measured, of one layer."""
    options, shape = run.settings[site.path].options, site.geometry.matrix_shape
    rows = max(_MIN_ROWS, SCARCE * shape.p)
    seen = capture.observe(site, rows)
    capture.keep(site)
    problem, held_out = problems(site, seen, run.held_out_from, rows, run.arguments.seed)
    del seen
    original = run.original(site)
    with lapack_threads(shape.p):
        found = selection_statistics(
            problem, held_out, ridge=options.ridge, float64_up_to=options.float64_up_to, original=original
        )
        with jax.enable_x64(found.wide):
            curves = error_curves(found.stats, found.w, shape, options.group)
    forms = run.settings[site.path].menu_forms(timed=timer is not None)
    items = make_items(curves, shape, run.positions(site), minimum_budget(shape), forms=forms)
    if timer is not None:
        items = timer.timed(site, items)
    points = []
    for item in spread(items, levels):
        with jax.enable_x64(found.wide):
            m = matrix_of(item, curves, found.stats)
            bias = np.asarray(best_bias(found.stats, m), np.float32)
        points.append(Measured(error=item.error, loss=ask(site.path, dense_module(run, site, m, bias))))
    return with_losses(items, points), points


def dense_module(run: "Run", site: LayerSite, matrix: Float[Any, "n p"], bias: Float[Any, " n"]) -> nnx.Module:
    """The layer with another matrix, as a `Factored` of one dense term."""
    terms = (Dense(np.asarray(matrix, np.float32)),)
    return run.module(site, terms, np.asarray(bias, np.float32)).with_execution(MERGED)

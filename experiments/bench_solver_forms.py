"""Every form on real layers at equal cost: errors before and after the ReLU, on images that nothing was chosen on."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from time import perf_counter

import jax.numpy as jnp
import numpy as np
import published
from bench_solver_admm import Row

from solvers.admm_state import AdmmOptions
from solvers.gram import best_bias, gram_statistics, least_squares, linear_error, with_ridge
from solvers.layer import LayerFit, LayerOptions, solve
from solvers.reconstruction import LayerProblem, relative_error
from solvers.sgd import Sgd
from solvers.structure import column_structure, fit
from solvers.terms import MatrixShape
from unified_approx import datasets, zoo
from unified_approx.capture import Capture
from unified_approx.sampling import problems
from unified_approx.sites import Observation

FRACTIONS = (0.5, 0.33, 0.2, 0.1)
LAYERS = {  # network -> layers: three of each resolution, strided ones among them
    "resnet20": tuple(
        f"blocks/{i}" for i in ("0/conv1", "1/conv1", "3/conv1", "3/conv2", "4/conv1", "6/conv1", "7/conv1")
    ),
    "lenet300": ("fc2",),
}
_TRIED = ("columns", "low_rank", "two_level", "spatial", "admm_mm")  # what the final choice looks at
_BASE = LayerOptions(refine_within=inf)
_SGD = replace(_BASE.admm, m_step=Sgd())
FORMS: dict[str, LayerOptions] = {
    "low_rank": replace(_BASE, form="low_rank"),
    "columns": replace(_BASE, form="columns"),
    "admm_mm": replace(_BASE, form="admm"),
    "admm_sgd": replace(_BASE, form="admm", admm=_SGD),
    "sum": replace(_BASE, form="sum"),
    "two_level": replace(_BASE, form="two_level"),
    "spatial": replace(_BASE, form="spatial"),
}

Layer = tuple[str, MatrixShape, LayerProblem, LayerProblem, LayerProblem]


def real_layers(data_dir: Path | None, models: Path, images: int, seed: int) -> Iterator[Layer]:
    """Name, shape and the rows of calibration, held-out and fresh images of each layer; inputs are the original's."""
    for network, wanted in LAYERS.items():
        entry = zoo.entry(network)
        data = datasets.load(entry.dataset, data_dir)
        chosen = np.random.default_rng(seed).choice(len(data.x_train), images + images // 5, replace=False)
        x = entry.preprocess(data.x_train[chosen], data)
        capture = Capture(published.load(network, models), [(part,) for part in np.array_split(x, 12)])
        for site in capture.sites:
            if site.name not in wanted:
                continue
            seen = capture.observe(site)
            rows, held_out = problems(site, replace_images(seen, images), int(0.9 * images), None, seed)
            _, fresh = problems(site, seen, images, None, seed)
            yield f"{network} {site.name}", site.geometry.matrix_shape, rows, held_out, fresh


def replace_images(seen: Observation, images: int) -> Observation:
    """The observation without the fresh images."""
    keep = seen.image_index < images
    offset = None if seen.offset is None else seen.offset[keep]
    return type(seen)(seen.x[keep], seen.response[keep], offset, seen.image_index[keep])


def _row(name: str, form: str, fraction: float, shape: MatrixShape, **figures: float) -> Row:
    return {"layer": name, "form": form, "fraction": fraction, "n": shape.n, "p": shape.p, **figures}


def _fresh(fresh: LayerProblem, m: np.ndarray, bias: np.ndarray) -> dict[str, float]:
    stats = gram_statistics(fresh)
    matrix = jnp.asarray(m)
    return {
        "linear": float(linear_error(stats, matrix)),
        "error": float(relative_error(fresh, matrix, jnp.asarray(bias))),
    }


def raw_share(rows: LayerProblem) -> float:
    """Energy of the centred response over that of the raw one, without bias and offset.

    Linear errors elsewhere are relative to the centred response; published ones for these layers are to the raw.
    """
    response = rows.y if rows.response is None else rows.response
    raw = response - rows.bias - (0.0 if rows.offset is None else rows.offset)
    return float(jnp.sum((raw - jnp.mean(raw, axis=0)) ** 2) / jnp.sum(raw**2))


def columns_by_norm(rows: LayerProblem, fresh: LayerProblem, shape: MatrixShape, budget: float) -> dict[str, float]:
    """The columns of largest norm, refitted: what a data-free rule keeps."""
    stats = with_ridge(gram_statistics(rows), 1e-5)
    k = int((budget - shape.p / 32) // shape.n)
    order = jnp.argsort(-jnp.linalg.norm(least_squares(stats), axis=0))
    free = jnp.zeros(shape.p, bool).at[order[:k]].set(True)
    m = fit(column_structure(stats.gram, free, jnp.zeros(shape.p, bool), 0), stats.cross)
    return _fresh(fresh, np.asarray(m), np.asarray(best_bias(stats, m)))


def form_rows(layer: Layer, fraction: float) -> list[Row]:
    """All forms of one layer at one budget, and the final choice, made on the held-out rows."""
    name, shape, rows, held_out, fresh = layer
    budget = fraction * shape.n * shape.p
    table = [_row(name, "columns_by_norm", fraction, shape, **columns_by_norm(rows, fresh, shape, budget))]
    share, fits = raw_share(held_out), dict[str, LayerFit]()
    for form, options in FORMS.items():
        start = perf_counter()
        if form == "spatial" and shape.window[:1] in ((), (1,)):
            continue
        found = solve(rows, held_out, shape, budget=budget, options=options)
        result = found.forms[found.form]
        figures = _fresh(fresh, found.matrix(shape), found.bias)
        cost = (result.params + result.index_bits / 32) / (shape.n * shape.p)
        fits[form] = found
        more = {"selected": result.selected, "held_out": result.error, "cost": cost, "seconds": perf_counter() - start}
        more["linear_selected"] = result.linear * share  # before the refinement
        table.append(_row(name, form, fraction, shape, **figures, **more))
    choice = min((f for f in _TRIED if f in fits), key=lambda f: fits[f].errors[1])
    chosen = next(row for row in table if row["form"] == choice)
    return [*table, {**chosen, "form": "final", "won": choice}]


__all__ = ["FRACTIONS", "AdmmOptions", "form_rows", "real_layers"]

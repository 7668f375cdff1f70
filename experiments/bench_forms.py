"""Linear error of every form at equal stored parameters, on the statistics of one layer.

`form_table` gives plain rows; a form is one function and one line in `FORMS`. As a script it reads statistics from
.npz files (gram, cross, x_mean, target_mean, target_energy, window, c_in) and prints and stores the table:

    python experiments/bench_forms.py --json out.json layer3.1.conv1.npz ...
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from solvers import columns, two_level
from solvers.gram import GramStatistics, least_squares, linear_error, with_ridge
from solvers.structure import column_structure, fit
from solvers.terms import MatrixShape

FRACTIONS = (0.5, 0.33, 0.2, 0.1)
RIDGE = 1e-6

Kept = tuple[jax.Array, jax.Array, int]
Form = Callable[[GramStatistics, jax.Array, MatrixShape, int], Kept | None]


def _only(free: jax.Array) -> Kept:
    return free, jnp.zeros_like(free), 0


def low_rank(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept | None:
    """Data-aware low rank, r (n + p) values."""
    rank = min(budget // (shape.n + shape.p), shape.n, shape.p)
    every = jnp.ones(shape.p, bool)
    return (~every, every, rank) if rank else None


def columns_by_norm(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept:
    """Columns of largest norm."""
    return _only(columns.first_of(jnp.argsort(-jnp.sum(w * w, axis=0)), budget // shape.n))


def columns_obs(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept:
    """Columns by group OBS."""
    return _only(columns.first_of(columns.obs_order(stats.gram, w), budget // shape.n))


def columns_swapped(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept:
    """Columns by group OBS or forward selection, with swaps."""
    return _only(columns.select(stats.gram, w, budget // shape.n))


def input_channels(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept | None:
    """Whole input channels by block OBS; nothing for a dense layer, whose channels are its columns."""
    if not shape.window:
        return None
    k = budget // (shape.n * (shape.p // shape.c_in))
    return _only(columns.select_groups(stats.gram, w, k, np.arange(shape.p) % shape.c_in))


def sum_outside(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept:
    """The paper's sum, v on the columns outside S1."""
    ranks = np.unique(np.maximum(1, np.asarray([1, 2, 4, 6, 8, 12]) * shape.n // 64))
    return _kept(two_level.select_sum(stats, w, budget, ranks, gauge=False))


def two_level_plain(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept:
    """Two levels, U stored whole."""
    return _kept(two_level.best(stats, w, budget, two_level.rank_grid(shape.n, shape.p, gauge=False), gauge=False))


def two_level_gauge(stats: GramStatistics, w: jax.Array, shape: MatrixShape, budget: int) -> Kept:
    """Two levels, U with an identity block."""
    return _kept(two_level.best(stats, w, budget, two_level.rank_grid(shape.n, shape.p), gauge=True))


def _kept(form: two_level.TwoLevel) -> Kept:
    return form.free, form.tail, int(form.rank)


FORMS: dict[str, Form] = {
    "low_rank": low_rank,
    "columns_by_norm": columns_by_norm,
    "input_channels": input_channels,
    "columns_obs": columns_obs,
    "columns_swapped": columns_swapped,
    "sum": sum_outside,
    "two_level_plain": two_level_plain,
    "two_level_gauge": two_level_gauge,
}


def raw_energy(stats: GramStatistics, w: jax.Array) -> float:
    """mean ||w x||^2, means included and the bias left out: what the linear errors of the tables are relative to."""
    return float(stats.target_energy + jnp.sum((w @ stats.x_mean) ** 2))


def form_table(
    stats: GramStatistics,
    w: jax.Array,
    shape: MatrixShape,
    fractions: Sequence[float] = FRACTIONS,
    names: Sequence[str] = tuple(FORMS),
) -> list[dict[str, object]]:
    """One row per form and fraction of the layer's n p parameters: errors after the refit, what is kept, seconds.

    `linear_error` is relative to the raw response, `centred_error` to its variance. Seconds are of a second call.
    """
    scale = float(stats.target_energy) / raw_energy(stats, w)
    rows = []
    for name in names:
        for fraction in fractions:
            budget = int(fraction * shape.n * shape.p)
            if FORMS[name](stats, w, shape, budget) is None:
                continue
            start = time.perf_counter()
            kept = FORMS[name](stats, w, shape, budget)
            assert kept is not None
            free, tail, rank = jax.block_until_ready(kept)
            seconds = time.perf_counter() - start
            m = fit(column_structure(stats.gram, free, tail, rank), stats.cross)
            error = float(linear_error(stats, m))
            gauge = name == "two_level_gauge"
            rows.append(
                {
                    "form": name,
                    "fraction": fraction,
                    "params": int(two_level.cost(free, tail, rank, shape.n, gauge=gauge)),
                    "linear_error": error * scale,
                    "centred_error": error,
                    "free_columns": int(jnp.sum(free)),
                    "tail_columns": int(jnp.sum(tail)),
                    "rank": rank,
                    "seconds": seconds,
                }
            )
    return rows


def load_statistics(path: Path) -> tuple[GramStatistics, MatrixShape]:
    """Statistics of a layer from an .npz file, with the ridge."""
    with np.load(path) as file:
        names = ("gram", "cross", "x_mean", "target_mean", "target_energy")
        stats = GramStatistics(**{name: jnp.asarray(file[name]) for name in names})
        shape = MatrixShape(tuple(file["window"].tolist()), int(file["c_in"]), stats.cross.shape[0])
    return with_ridge(stats, RIDGE), shape


def main() -> None:
    """Tables of the layers whose statistics are given."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("statistics", type=Path, nargs="+")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with jax.enable_x64(True):
        for path in args.statistics:
            stats, shape = load_statistics(path)
            for row in form_table(stats, least_squares(stats), shape, args.fractions):
                rows.append({"layer": path.stem, **row})
                print("{layer:16} {form:16} {fraction:5.2f} {linear_error:9.5f} {seconds:8.2f} s".format(**rows[-1]))
    if args.json:
        args.json.write_text(json.dumps({"command": "bench_forms", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

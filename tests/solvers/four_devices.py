"""Run by test_sharding.py in a process of its own: XLA makes its devices when JAX starts. Prints one JSON object."""

import json
import os
import re
from dataclasses import replace

# Compilation is most of the time.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from problems import near_low_rank

from solvers import admm, gram_statistics, penalized_fractions, refine
from solvers.admm_state import AdmmOptions
from solvers.layer import LayerOptions, solve
from solvers.m_step import ExactLinear, MajorizeMinimize
from solvers.penalties import _lambda_max
from solvers.prox import COLUMNS
from solvers.reconstruction import IDENTITY, LayerProblem
from solvers.sgd import Sgd
from solvers.sharding import _take_split, row_mesh, shard, take_every
from solvers.structure import column_structure
from solvers.terms import MatrixShape

SHAPE = MatrixShape((3, 3), 4, 16)
ROWS = 20_002  # more than one chunk on every device, and two rows left over
MESH = row_mesh(4)
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


def make(d, seed=0):
    """Rows of correlated features with an offset, and the responses of a matrix that is near low rank."""
    x, w = near_low_rank(SHAPE, d, seed)
    rng, n = np.random.default_rng(seed + 1), SHAPE.n
    offset = rng.normal(size=(d, n)).astype(np.float32)
    h = jnp.asarray(x @ w.T - 0.2 + offset)
    return LayerProblem(
        x=jnp.asarray(x),
        y=jnp.maximum(h, 0),
        response=h,
        bias=jnp.full(n, -0.2, jnp.float32),
        offset=jnp.asarray(offset),
        weights=jnp.linspace(0.5, 2, n, dtype=jnp.float32),
    )


def distance(one, four):
    """Largest relative distance of the arrays of two results."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True)
    gaps = [np.linalg.norm(np.asarray(a, float) - np.asarray(b, float)) / np.linalg.norm(a) for a, b in pairs]
    return float(max(gaps))


def program(compiled, rows):
    """What a compiled program communicates, and how often it mentions an array of that many rows."""
    text = compiled.as_text()
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {**counts, "whole": len(re.findall(rf"\[{rows},", text))}


def passes(problem, stats, matrix):
    """Every kind of pass over the rows by name: the compiled program, and its arguments."""
    options = {
        "mm": AdmmOptions(max_steps=30, check_every=5, scale_columns=True),
        "cholesky": AdmmOptions(m_step=MajorizeMinimize(factorization="cholesky"), max_steps=30),
        "sgd": AdmmOptions(m_step=Sgd(), max_steps=5),
    }
    penalty = penalized_fractions(problem, 0.1, 0.1)
    linear = replace(problem, y=problem.response, activation=IDENTITY)
    kept = jnp.arange(SHAPE.p) % 2 == 0
    structure = column_structure(stats.gram, kept, jnp.zeros(SHAPE.p, bool), 0)
    start = jnp.where(kept[None, :], matrix, 0)

    def compiled(function, *arguments, static=(), **options):
        return function.lower(*arguments, *static, **options).compile(), arguments

    rest = (penalty, None, None, None)
    found = {f"admm, {name}": compiled(admm._solve, problem, *rest, options=o) for name, o in options.items()}
    exact = AdmmOptions(m_step=ExactLinear(), max_steps=30)
    return {
        **found,
        "admm, exact": compiled(admm._solve, linear, *rest, options=exact),
        "refine": compiled(refine, problem, problem, stats, structure, start, problem.bias, jnp.float32(1)),
        "gram": compiled(gram_statistics, problem),
        "lambda max": compiled(_lambda_max, problem, static=(COLUMNS, False)),
    }


def summary(name, result):
    """What two runs are compared by: not a multiplier, which may be near zero."""
    if name.startswith("admm"):
        return result.sparse + result.low_rank, result.objective
    return (result.matrix, result.bias, result.held_out_errors) if name == "refine" else result


def front_door(one, four):
    """`solve` with a budget and with penalties, on both."""
    held, few = make(2048, seed=1), make(300, seed=1)  # few: not split
    found = {}
    for name, held_out, target, form in (
        ("budget", held, {"budget": 0.5 * SHAPE.n * SHAPE.p}, ("columns", "admm")),
        ("few held out", few, {"budget": 0.5 * SHAPE.n * SHAPE.p}, "columns"),
        ("penalties", held, {"penalties": (0.05, 0.05)}, "best"),
    ):
        fits = [
            solve(
                problem,
                other,
                SHAPE,
                **target,
                options=LayerOptions(form=form, admm=AdmmOptions(max_steps=10, check_every=5)),
            )
            for problem, other in ((one, held_out), (four, shard(held_out, MESH)))
        ]
        results = [dict(sorted(fit.forms.items())) for fit in fits]
        found[name] = {
            "winners": [fit.form for fit in fits],
            "kept": [[(result.kept_columns, result.rank) for result in each.values()] for each in results],
            "errors": distance(*([result.error for result in each.values()] for each in results)),
            "matrix": distance(*(fit.matrix(SHAPE) for fit in fits)),
        }
    return found


def main():
    """Everything on one device and on four."""
    everything = make(ROWS)
    four = shard(everything, MESH)
    rows = four.x.shape[0]
    one = take_every(everything, 1, rows)
    matrix = jnp.asarray(np.random.default_rng(3).normal(size=(SHAPE.n, SHAPE.p)), jnp.float32)
    stats = gram_statistics(one)
    singles, splits = passes(one, stats, matrix), passes(four, stats, matrix)
    taken = take_every(one, 3, 5002), take_every(four, 3, 5002)
    take = _take_split.lower({"x": four.x}, 3, 5000, MESH).compile()
    found = {
        "devices": jax.device_count(),
        "rows": [rows, [part.data.shape[0] for part in four.x.addressable_shards]],
        "taken": [taken[1].x.shape[0], bool(np.array_equal(taken[0].x[:5000], taken[1].x))],
        "programs": {name: program(compiled, rows) for name, (compiled, _) in splits.items()},
        "take every": program(take, rows),
        "distances": {},
        "front door": front_door(one, four),
    }
    for name, (compiled, arguments) in singles.items():
        on_four = splits[name][0](*splits[name][1])
        found["distances"][name] = distance(summary(name, compiled(*arguments)), summary(name, on_four))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

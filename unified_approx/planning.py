"""What a run would do, with estimates, before anything is solved."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from solvers.layer import minimum_budget
from unified_approx.allocation import Sensitivity
from unified_approx.allocation.assign import total_cost
from unified_approx.run import Run
from unified_approx.sampling import default_rows
from unified_approx.settings import BY_RULE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, before anything is solved.

    Attributes:
        layers: per selected layer its name, (n, p), the stored values asked for and the least reachable, the forms that
            are tried, and the nats that the network's output is expected to lose by it (None where not measured).
        kept: names that a rule keeps.
        skipped: name and reason of the layers that cannot be compressed.
        minimum_params: the smallest budget that all layers together can reach, as a fraction of the network.
        memory_mb: estimate of the peak working memory beyond JAX itself, in MB (10^6 bytes).
        seconds: estimate of the time of the solves.
        dense: name and reason of the layers that the budget leaves as they are.
        sensitivity: the table that the budget was shared by.
        gap: proven bound on how much less another choice of sizes could lose, relative; None without a table.
    """

    layers: tuple[dict[str, Any], ...]
    kept: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    minimum_params: float
    memory_mb: float
    seconds: float
    dense: tuple[tuple[str, str], ...] = ()
    sensitivity: Sensitivity | None = None
    gap: float | None = None


def plan_of(run: Run) -> Plan:
    """What would be done, with estimates from the sizes of the layers."""
    layers, spared, memory, flops = [], 0.0, 0.0, 0.0
    fitted = run.held_out_from
    for site in run.capture.sites:
        settings = run.settings[site.path]
        if settings.dense:
            continue
        shape = site.geometry.matrix_shape
        n, p = shape.n, shape.p
        available = fitted * prod(run.spatial[site.path]) * site.num_calls
        d = min(available, run.arguments.rows or default_rows(p, available))
        layers.append(
            {
                "name": site.name,
                "shape": (n, p),
                "values": settings.values(site),
                "minimum": minimum_budget(shape),
                "rows": d,
                "forms": settings.options.wanted(),
                "expected_loss": settings.expected_loss,
            }
        )
        spared += n * p - minimum_budget(shape)
        memory = max(memory, 1.25 * d * (p + 3 * n) * 4 + 20 * p * p * 8)
        flops += 60.0 * 4 * d * n * p + 2 * d * p * p + 400.0 * 4 * n * p * p
    dense = [(s.name, reason) for s in run.capture.sites if (reason := run.settings[s.path].dense)]
    return Plan(
        gap=run.gap,
        layers=tuple(layers),
        kept=tuple(name for name, reason in dense if reason == BY_RULE),
        dense=tuple((name, reason) for name, reason in dense if reason != BY_RULE),
        skipped=tuple((s.name, s.reason) for s in run.capture.skipped),
        minimum_params=1 - spared / total_cost(run.cost, "params"),
        memory_mb=(memory + 2 * sum(a.nbytes for a in jax.tree.leaves(run.data))) / 1e6,
        seconds=flops / 50e9 + 3.0 * len({row["shape"] for row in layers}),
    )

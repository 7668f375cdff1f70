"""Gradient and curvature of a network's loss at its weights, in one pass over the data.

The curvature is that of the Gauss-Newton form of the Hessian, J' H J with J the derivatives of the outputs and H the
Hessian of the loss with respect to them: exact (one backward pass for each output), by sampled labels, or the
empirical Fisher matrix. Its diagonal is a sum of squared gradients of single examples, which `probes` finds layer by
layer without making them; parameters that no probe understands are differentiated example by example.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from solvers.output_loss import OutputLoss
from unified_approx.calling import Call
from unified_approx.learning_compression.probes import (
    Push,
    Seen,
    Site,
    find_sites,
    rows_of,
    squares,
    strip,
    with_probes,
)
from unified_approx.sites import Path
from unified_approx.tiny import as_products

GAUSS_NEWTON, MONTE_CARLO, FISHER, NONE = "gauss_newton", "monte_carlo", "fisher", "none"
_VALUES_AT_ONCE = 1 << 22  # of single examples' gradients, where no probe helps
_TOLERANCE = 1e-3

Sums = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Program:
    """Everything static of a pass over the data, hashable by identity.

    Attributes:
        graphdef: of the network with probes.
        call: how it is called.
        loss: of its outputs.
        curvature: one of `GAUSS_NEWTON`, `MONTE_CARLO`, `FISHER`, `NONE`.
        samples: labels drawn for an example, for `MONTE_CARLO`.
        factors: whether kernels of probed layers get E[x x'] and E[d d'] in place of the diagonal.
        sites: layers with a probe.
        rest: parameters that no probe understands.
    """

    graphdef: Any
    call: Call
    loss: OutputLoss
    curvature: str
    samples: int
    factors: bool
    sites: tuple[Site, ...]
    rest: tuple[Path, ...]

    def outputs(self, params: Any, push: Any, fixed: Any, x: Array) -> tuple[Float[Array, "batch c"], Any]:
        """What the network gives, and what the probes saw."""
        model = nnx.merge(self.graphdef, params, push, fixed, copy=True)
        z = self.call(model, x).reshape(len(x), -1)
        return z, nnx.split(model, nnx.Param, Push, Seen, ...)[2:4]

    @property
    def factored(self) -> list[Site]:
        """The sites whose kernels get factors."""
        return [site for site in self.sites if self.factors and site.kernel is not None]

    def count(self, outputs: int) -> int:
        """Backward passes for the curvature."""
        return {GAUSS_NEWTON: outputs, MONTE_CARLO: self.samples, FISHER: 1, NONE: 0}[self.curvature]

    def cotangent(self, z: Array, residuals: Array, i: Array, key: PRNGKeyArray) -> Float[Array, "batch c"]:
        """Vectors whose outer products add up to what stands for the Hessian with respect to the outputs."""
        if self.curvature == GAUSS_NEWTON:
            return self.loss.factor(z, i)
        if self.curvature == FISHER:
            return residuals
        return self.loss.sample(z, jax.random.fold_in(key, i)) / np.sqrt(self.samples)


def _flat(state: Any) -> dict[Path, Array]:
    return {cast(Path, path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _at(site: Site, flat: Mapping[Path, Array]) -> Array:
    return next(value for path, value in flat.items() if path[:-1] == site.path)


def prepare(model: nnx.Module, x: Shaped[Array, "batch ..."], **options: Any) -> tuple[Program, Any]:
    """The program and the network's state; probes whose layer is used in ways that they do not see are taken off.

    Args:
        model: in evaluation mode.
        x: examples of the shape and number that each chunk will have.
        **options: further fields of `Program`.
    """
    sites = find_sites(model)
    try:
        found = _assemble(model, x, sites, options)
    except (TraceContextError, ValueError):  # layers under jax.vmap or nnx.vmap, where nothing can be noted
        return _assemble(model, x, (), options)
    understood = _understood(*found, x)
    return found if len(understood) == len(sites) else _assemble(model, x, understood, options)


def _assemble(model: nnx.Module, x: Array, sites: tuple[Site, ...], options: Mapping[str, Any]) -> tuple[Program, Any]:
    probed = with_probes(model, sites)
    graphdef, params, push, fixed = nnx.split(probed, nnx.Param, Push, ...)
    covered = {path for site in sites for path in site.parameters}
    rest = tuple(path for path in (strip(p, sites) for p in _flat(params)) if path not in covered)
    program = Program(graphdef=graphdef, sites=sites, rest=rest, **options)
    _, (shapes, _) = jax.eval_shape(program.outputs, params, push, fixed, x)
    push = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return program, (params, push, fixed)


def _understood(program: Program, state: Any, x: Array) -> tuple[Site, ...]:
    """The sites whose squares are those of the true gradient, for a random derivative at one example's outputs.

    A layer that is called twice or not at all fails, one whose weights are also used elsewhere, and one whose first
    axis does not run over the examples.
    """
    batch = len(x)
    called = [s for s in program.sites if _at(s, _flat(state[1])).ndim and not _at(s, _flat(state[1])).shape[0] % batch]

    @jax.jit
    def compare(params: Any, push: Any, fixed: Any, x: Array) -> list[Array]:
        run = as_products(lambda p, e: program.outputs(p, e, fixed, x))
        z, pull, (_, seen) = jax.vjp(run, params, push, has_aux=True)
        u = jax.random.normal(jax.random.key(0), z.shape[1:], z.dtype)
        gradient, delta = (_flat(part) for part in pull(jnp.zeros_like(z).at[-1].set(u)))
        truth = {strip(path, program.sites): value for path, value in gradient.items()}
        errors = []
        for site in called:
            found = squares(site, batch, _at(site, _flat(seen)), _at(site, delta))
            gaps = [
                (jnp.linalg.norm(value - truth[p] ** 2), jnp.linalg.norm(truth[p] ** 2)) for p, value in found.items()
            ]
            errors.append(jnp.stack([gap / jnp.maximum(size, 1e-30) for gap, size in gaps]).max())
        return errors

    errors = compare(*state, x) if called else []
    return tuple(site for site, error in zip(called, errors, strict=True) if float(error) < _TOLERANCE)


def accumulate(
    program: Program,
    state: Any,
    x: Shaped[np.ndarray, "examples ..."],
    y: Shaped[np.ndarray, "examples ..."] | None,
    batch: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Sums:
    """Sums over the examples: "loss", "g" and "h" by parameter, "inputs" and "outputs" by kernel.

    Args:
        program: what to sum.
        state: the network's.
        x: examples.
        y: labels or targets; None leaves loss and gradient at zero.
        batch: examples at once.
        seed: of the labels that are drawn.
        progress: called with (examples seen, examples) after every batch.
    """
    sums: Sums | None = None
    for number, start in enumerate(range(0, len(x), batch)):
        index = np.arange(start, start + batch)
        own = jnp.asarray(index < len(x), jnp.float32)[:, None]
        labels = None if y is None else jnp.asarray(y[index % len(x)])
        run = _forward(program, state, jnp.asarray(x[index % len(x)]), labels, own)
        key = jax.random.fold_in(jax.random.key(seed), number)
        new = {**_first_order(program, run), **_second_order(program, state, run, key)}
        sums = new if sums is None else _add(sums, new)
        if progress is not None:
            jax.block_until_ready(sums)
            progress(min(start + batch, len(x)), len(x))
    assert sums is not None
    return sums


class _Run(NamedTuple):
    """One batch, forward; `pull` takes derivatives at the outputs to those of the parameters and of the pushes."""

    x: Array
    z: Float[Array, "batch c"]
    own: Float[Array, "batch 1"]  # 0 for examples that only fill the last batch up
    loss: Float[Array, ""]
    residuals: Float[Array, "batch c"]
    seen: dict[Path, Array]
    pull: Callable[[Array], Any]


@partial(jax.jit, donate_argnums=0)
def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


@partial(jax.jit, static_argnums=0)
def _forward(program: Program, state: Any, x: Array, y: Array | None, own: Array) -> _Run:
    params, push, fixed = state
    run = as_products(lambda p, e: program.outputs(p, e, fixed, x))
    z, pull, (_, seen) = jax.vjp(run, params, push, has_aux=True)
    own = own.astype(z.dtype)
    if y is None:
        loss, residuals = jnp.zeros(()), jnp.zeros_like(z)
    else:
        loss, residuals = jnp.sum(program.loss.values(z, y) * own[:, 0]), program.loss.residuals(z, y) * own
    return _Run(x, z, own, loss, residuals, _flat(seen), pull)


@partial(jax.jit, static_argnums=0)
def _first_order(program: Program, run: _Run) -> Sums:
    gradient = {strip(path, program.sites): value for path, value in _flat(run.pull(run.residuals)[0]).items()}
    inputs = {s.kernel: _inputs(s, _at(s, run.seen), run.own) for s in program.factored}
    return {"loss": run.loss, "g": gradient, "inputs": inputs}


def _second_order(program: Program, state: Any, run: _Run, key: PRNGKeyArray) -> Sums:
    """One call for each backward pass: inside a loop of XLA's, its CPU convolutions would be ten times slower."""
    sums: Sums | None = None
    for i in range(program.count(run.z.shape[1])):
        u, found = _backward(program, run, jnp.asarray(i), key)
        found["h"] |= _one_by_one(program, state, run.x, u)
        sums = found if sums is None else _add(sums, found)
    return sums or {"h": {path: jnp.zeros_like(v) for path, v in _originals(program, state).items()}, "outputs": {}}


@partial(jax.jit, static_argnums=0)
def _backward(program: Program, run: _Run, i: Array, key: PRNGKeyArray) -> tuple[Array, Sums]:
    u = program.cotangent(run.z, run.residuals, i, key) * run.own
    delta = _flat(run.pull(u)[1])
    h: dict[Path, Array] = {}
    for site in program.sites:
        h |= squares(site, len(u), _at(site, run.seen), _at(site, delta), kernel=not program.factors)
    return u, {"h": h, "outputs": {s.kernel: _outputs(_at(s, delta), len(u)) for s in program.factored}}


def _inputs(site: Site, seen: Array, own: Float[Array, "batch 1"]) -> Float[Array, "p p"]:
    rows = rows_of(site, seen)
    rows = (rows.reshape(len(own), -1, rows.shape[-1]) * own[:, :, None]).reshape(-1, rows.shape[-1])
    return rows.T @ rows


def _outputs(delta: Array, batch: int) -> Float[Array, "n n"]:
    """Summed over the examples, averaged over the positions, whose sum is in the factor of the inputs."""
    rows = delta.reshape(-1, delta.shape[-1])
    return rows.T @ rows * (batch / len(rows))


def _originals(program: Program, state: Any) -> dict[Path, Array]:
    return {strip(path, program.sites): value for path, value in _flat(state[0]).items()}


def _one_by_one(program: Program, state: Any, x: Array, u: Float[Array, "batch c"]) -> dict[Path, Array]:
    """Squares for the parameters that no probe understands: gradients of a few examples at a time."""
    if not program.rest:
        return {}
    values = _originals(program, state)
    size = _group(len(x), sum(values[path].size for path in program.rest))
    total: dict[Path, Array] | None = None
    for start in range(0, len(x), size):
        found = _gradients(program, state, x[start : start + size], u[start : start + size])
        total = found if total is None else _add(total, found)
    assert total is not None
    return total


@partial(jax.jit, static_argnums=0)
def _gradients(program: Program, state: Any, x: Array, u: Float[Array, "group c"]) -> dict[Path, Array]:
    params, push, fixed = state
    flat = dict(nnx.to_flat_state(params))
    free = {strip(cast(Path, path), program.sites): path for path in flat}
    free = {path: free[path] for path in program.rest}
    still = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), push)  # broadcasts: pushes have the batch's shape

    def score(values: dict[Path, Array], one: Array, own: Array) -> Float[Array, ""]:
        changed = {path: flat[path].replace(values[name]) for name, path in free.items()}
        z, _ = program.outputs(nnx.from_flat_state({**flat, **changed}), still, fixed, one[None])
        return jnp.sum(z[0] * own)

    values = {name: flat[path][...] for name, path in free.items()}
    each = jax.vmap(jax.grad(score), in_axes=(None, 0, 0))(values, x, u)
    return jax.tree.map(lambda g: jnp.sum(g * g, axis=0), each)


def _group(batch: int, values: int) -> int:
    """The most examples at once that divide the batch."""
    most = max(1, _VALUES_AT_ONCE // max(1, values))
    return max(size for size in range(1, batch + 1) if batch % size == 0 and size <= most)

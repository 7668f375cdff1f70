"""Rows of one layer over several devices: data-parallel solves.

A split `LayerProblem` has its (d, .) arrays in equal, contiguous parts on the devices of a mesh, and everything else
whole. All solvers take it as it is: sums over rows are made where the rows are and added up over the mesh, and p x p
and n x p work is the same everywhere. One process; results differ from one device's by the order of summation only.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from solvers.reconstruction import LayerProblem

MIN_ROWS_PER_DEVICE = 128  # with fewer there is nothing to gain, and the rows left over would begin to count
_ROW_FIELDS = ("x", "y", "response", "offset")

Devices: TypeAlias = int | Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm] (jaxlib has no stubs)
T = TypeVar("T")


def row_mesh(devices: Devices) -> Mesh:
    """A mesh with the one axis "rows".

    Args:
        devices: how many of this process's devices, or which.

    Raises:
        ValueError: fewer than 1, more than there are, or one of them twice.
    """
    if isinstance(devices, bool | float | str):
        raise ValueError(f"devices: {devices!r}; give how many, an integer >= 1, or a list of jax devices")
    if isinstance(devices, int):
        chosen = _first(devices)
    else:
        chosen = list(devices)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"devices: {chosen}; give at least one device, and none of them twice")
    return Mesh(np.asarray(chosen), ("rows",))


def _first(count: int) -> list:
    if count < 1:
        raise ValueError(f"devices: {count}; give at least 1, or None for the default device")
    present = jax.local_devices()
    if count > len(present):
        raise ValueError(
            f"devices: {count} were asked for, but JAX has {len(present)} ({present[0].platform}); give at most "
            f"{len(present)}, or, to try it out on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={count} "
            "in the environment before JAX starts"
        )
    return present[:count]


def mesh_for(rows: int, mesh: Mesh | None) -> Mesh | None:
    """The mesh to split so many rows over: None, which leaves them whole, for fewer than 128 per device."""
    return mesh if mesh is not None and rows >= MIN_ROWS_PER_DEVICE * mesh.size else None


def put_rows(rows: Shaped[np.ndarray | Array, "d k"], mesh: Mesh | None) -> Shaped[Array, "whole k"]:
    """Rows on the devices of a mesh; NumPy arrays go there part by part, without a copy of all of them on one device.

    The last d mod devices rows are left out, so that the parts are equal and no padding enters a sum or a mean.
    """
    if mesh is None:
        return jnp.asarray(rows)
    return jax.device_put(rows[: len(rows) // mesh.size * mesh.size], _by_rows(mesh))


def _by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def shard(problem: LayerProblem, mesh: Mesh) -> LayerProblem:
    """The problem with its rows split over a mesh.

    Args:
        problem: its arrays on one device, not committed to it (as `jnp.asarray` makes them).
        mesh: see `row_mesh`; all its axes are used.

    Returns:
        The split problem, without the last d mod devices rows; the problem as it is for fewer than 128 rows per device.
    """
    if mesh_for(problem.x.shape[0], mesh) is None:
        return problem
    parts = {name: getattr(problem, name) for name in _ROW_FIELDS if getattr(problem, name) is not None}
    return replace(problem, **{name: put_rows(array, mesh) for name, array in parts.items()}, mesh=mesh)


def take_every(problem: LayerProblem, stride: int, count: int) -> LayerProblem:
    """The rows 0, stride, 2 stride, ..., `count` of them; of a split problem the same, but for count mod devices."""
    mesh = problem.mesh
    parts = {name: getattr(problem, name) for name in _ROW_FIELDS if getattr(problem, name) is not None}
    if mesh is not None:
        count = count // mesh.size * mesh.size
        return replace(problem, **_take_split(parts, stride, count, mesh))
    return replace(problem, **{name: array[: stride * count : stride] for name, array in parts.items()})


@partial(jax.jit, static_argnums=(1, 2, 3))
def _take_split(parts: dict[str, Array], stride: int, count: int, mesh: Mesh) -> dict[str, Array]:
    taken = {name: array[: stride * count : stride] for name, array in parts.items()}
    return jax.lax.with_sharding_constraint(taken, _by_rows(mesh))


def gathered(tree: T) -> T:
    """Arrays that are on several devices, brought to the default one, so that work on them is done once only.

    They are not committed to it, and may meet split rows again.
    """

    def gather(array: Array) -> Array:
        return jnp.asarray(np.asarray(array)) if len(array.sharding.device_set) > 1 else array

    return jax.tree.map(gather, tree)

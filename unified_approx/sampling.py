"""From what a layer sees to the rows its solver works on."""

from dataclasses import replace
from math import prod

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from solvers.reconstruction import LayerProblem
from solvers.sharding import mesh_for, put_rows
from unified_approx.im2col import sample_positions, sample_rows, take_positions
from unified_approx.sites import LayerSite, Observation

_MIN_ROWS = 32_768  # fewer rows than this save no time worth having
_ROWS_PER_FEATURE = 100  # enough for the refinement after the activation with half of the columns kept
_MAX_VALUES = 2**28  # of x: 1 GB


def default_rows(p: int, available: int | None = None) -> int:
    """How many output positions to sample for p features: 100 p, at least 32,768, as long as x fits 1 GB.

    At most `available`, if given.
    """
    wanted = min(max(_MIN_ROWS, _ROWS_PER_FEATURE * p), max(p, _MAX_VALUES // p))
    wanted = wanted if available is None else min(wanted, available)
    return wanted if wanted < 4096 else wanted // 4096 * 4096


def problems(
    site: LayerSite,
    seen: Observation,
    held_out_from: int,
    rows: int | None,
    seed: int,
    *,
    with_offset: bool = False,
    mesh: Mesh | None = None,
) -> tuple[LayerProblem, LayerProblem]:
    """Sampled rows of the calibration images, and a quarter as many of the held-out images.

    Args:
        site: the layer.
        seen: what it sees.
        held_out_from: images with this number and above are held out.
        rows: how many rows, or None for `default_rows`.
        seed: of the sampled positions.
        with_offset: give a layer without a shortcut branch an offset of zeros, so that it shares the compiled solve of
            one that has a branch.
        mesh: the devices to split the rows over, see `solvers.sharding`.
    """
    held = seen.image_index >= held_out_from
    fitted, other = np.flatnonzero(~held), np.flatnonzero(held)
    positions = prod(seen.response.shape[1:-1])
    available = len(fitted) * positions
    d = min(available, rows or default_rows(site.geometry.matrix_shape.p, available))
    if with_offset and seen.offset is None:
        seen = replace(seen, offset=np.broadcast_to(np.float32(0), seen.response.shape))
    return sample(site, seen, fitted, d, seed, mesh), sample(site, seen, other, max(1, d // 4), seed, mesh)


def sample(
    site: LayerSite,
    seen: Observation,
    entries: Int[np.ndarray, " entries"],
    d: int,
    seed: int,
    mesh: Mesh | None = None,
) -> LayerProblem:
    """At most d rows of the given entries of the first axis (images, where the network calls the layer once).

    Args:
        site: the layer.
        seen: what it sees.
        entries: which entries of the first axis of `seen.x` rows may come from.
        d: how many rows.
        seed: of the sampled positions.
        mesh: devices that the rows are split over.
    """
    positions = sample_positions(len(entries), seen.response.shape[1:-1], d, seed)
    positions[:, 0] = entries[positions[:, 0]]
    mesh = mesh_for(len(positions), mesh)

    def put(rows: np.ndarray) -> Array:
        return put_rows(np.asarray(rows, np.float32), mesh)

    # Gathered on the host: whole feature maps are never copied to the device.
    response = put(take_positions(seen.response, positions))
    return LayerProblem(
        x=put(sample_rows(seen.x, site.geometry, positions)),
        y=site.activation(response),
        response=response,
        bias=jnp.asarray(site.shift, jnp.float32),
        offset=None if seen.offset is None else put(take_positions(seen.offset, positions)),
        activation=site.activation,
        mesh=mesh,
    )

"""From what a layer sees to the rows its solver works on."""

from dataclasses import replace
from math import prod

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from solvers.reconstruction import LayerProblem
from unified_approx.im2col import sample_positions, sample_rows, take_positions
from unified_approx.sites import LayerSite, Observation

_MIN_ROWS = 32_768  # fewer rows than this save no time worth having
_ROWS_PER_FEATURE = 100  # enough for the refinement after the activation with half of the columns kept
_MAX_VALUES = 2**28  # of x: 1 GB


def default_rows(p: int, available: int) -> int:
    """How many output positions to sample for p features: 100 p, at least 32,768, as long as x fits 1 GB."""
    wanted = min(max(_MIN_ROWS, _ROWS_PER_FEATURE * p), max(p, _MAX_VALUES // p), available)
    return wanted if wanted < 4096 else wanted // 4096 * 4096


def problems(
    site: LayerSite,
    seen: Observation,
    held_out_from: int,
    rows: int | None,
    seed: int,
    *,
    with_offset: bool = False,
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
    """
    held = seen.image_index >= held_out_from
    fitted, other = np.flatnonzero(~held), np.flatnonzero(held)
    positions = prod(seen.response.shape[1:-1])
    available = len(fitted) * positions
    d = min(available, rows or default_rows(site.geometry.matrix_shape.p, available))
    if with_offset and seen.offset is None:
        seen = replace(seen, offset=np.broadcast_to(np.float32(0), seen.response.shape))
    return sample(site, seen, fitted, d, seed), sample(site, seen, other, max(1, d // 4), seed)


def sample(site: LayerSite, seen: Observation, entries: Int[np.ndarray, " entries"], d: int, seed: int) -> LayerProblem:
    """At most d rows of the given entries of the first axis (images, where the network calls the layer once).

    Args:
        site: the layer.
        seen: what it sees.
        entries: which entries of the first axis of `seen.x` rows may come from.
        d: how many rows.
        seed: of the sampled positions.
    """
    positions = sample_positions(len(entries), seen.response.shape[1:-1], d, seed)
    positions[:, 0] = entries[positions[:, 0]]
    # Gathered on the host: whole feature maps are never copied to the device.
    response = jnp.asarray(take_positions(seen.response, positions), jnp.float32)
    offset = None if seen.offset is None else take_positions(seen.offset, positions)
    return LayerProblem(
        x=jnp.asarray(sample_rows(seen.x, site.geometry, positions), jnp.float32),
        y=site.activation(response),
        response=response,
        bias=jnp.asarray(site.shift, jnp.float32),
        offset=None if offset is None else jnp.asarray(offset, jnp.float32),
        activation=site.activation,
    )

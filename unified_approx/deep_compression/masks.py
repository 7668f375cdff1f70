"""Which weights of a network are zero, whichever method made them so."""

import re
from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from solvers.compressions import PruneL0
from unified_approx.learning_compression import LcResult, Task, direct_compression
from unified_approx.learning_compression.tasks import kernels_of, resolve
from unified_approx.macs import factored_layers
from unified_approx.pieces import parameters_of, with_values
from unified_approx.sites import Path, path_name

Masks = Mapping[Path, Bool[Array, "..."]]
"""Of kernels and factors, by path: which weights stay."""


def masks_of(model: nnx.Module) -> dict[Path, Bool[Array, "..."]]:
    """Of all matrices and kernels, factors of factored layers too, that have zeros."""
    masks = {path: value != 0 for path, value in parameters_of(model).items() if value.ndim > 1}
    return {path: mask for path, mask in masks.items() if not bool(mask.all())}


def with_masks(model: nnx.Module, masks: Masks) -> nnx.Module:
    """A copy of a network with zeros where the masks say so.

    Raises:
        ValueError: a mask of no parameter, or of another shape.
    """
    values = parameters_of(model)
    for path, mask in masks.items():
        if path not in values or values[path].shape != mask.shape:
            shape = values[path].shape if path in values else "none"
            raise ValueError(f"masks: {path_name(path)!r} is {mask.shape}, the network's is {shape}")
    return with_values(model, {path: jnp.where(mask, values[path], 0) for path, mask in masks.items()})


def as_pruned(model: nnx.Module, layers: str = ".*") -> LcResult:
    """A network with its zeros as something that `finetune_compressed` holds and `share` leaves out.

    Args:
        model: with zeros in kernels, or factors of factored layers, of whatever origin.
        layers: regular expression for whole names of layers.

    Raises:
        ValueError: a pattern that names no layer, or layers without any weight that is not zero.
    """
    pieces = resolve([Task(path=name, compression=PruneL0(1.0)) for name in _names(model, layers)], model)
    values = parameters_of(model)
    tasks = []
    for piece in pieces:
        kept = int(jnp.count_nonzero(piece.pack(values)))
        if kept == 0:
            raise ValueError(f"layers: {piece.name!r} has no weight that is not zero; leave it out")
        tasks.append(Task(path=re.escape(piece.name), compression=PruneL0(kept)))
    found = direct_compression(model, tasks)
    return replace(found, history=())


def _names(model: nnx.Module, layers: str) -> list[str]:
    """Patterns of the layers' kernels and, of factored layers, of their factors; the given one if there are none."""
    values, factored = parameters_of(model), factored_layers(model)
    owners = {path: path[:-1] for path in kernels_of(model)}
    owners |= {p: own for own in factored for p, v in values.items() if p[: len(own)] == own and v.ndim > 1}
    named = [path for path in values if path in owners and re.fullmatch(layers, path_name(owners[path]))]
    return [re.escape(path_name(path if owners[path] in factored else owners[path])) for path in named] or [layers]

"""Putting new layers into a copy of a network.

Paths are tuples of attribute names, list positions and dict keys, as `nnx.iter_modules` gives them; a network that
is a single layer has the path ().
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unified_approx.sites import LayerSite, Path

_CONTAINERS = (list, tuple, dict, nnx.List, nnx.Dict)


class Identity(nnx.Module):
    """Stands where a folded batch normalisation was; takes and ignores any further arguments."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """X as it is."""
        return x


def get(root: Any, path: Path) -> Any:
    """What stands at `path` below `root`.

    Raises:
        ValueError: nothing is there.
    """
    node = root
    for i, key in enumerate(path):
        try:
            container: Any = node if isinstance(node, _CONTAINERS) else None
            node = getattr(node, str(key)) if container is None else container[key]
        except (AttributeError, LookupError, TypeError):
            raise ValueError(f"path {path}: the network has nothing at {path[: i + 1]}") from None
    return node


def put(root: nnx.Module, path: Path, new: Any) -> Any:
    """Put `new` at `path` below `root`, in place; a tuple on the way is replaced by a new tuple.

    Returns:
        `root`, or `new` if the path is ().

    Raises:
        ValueError: the path does not exist.
    """
    if not path:
        return new
    get(root, path)
    _place(root, path, new)
    return root


def _place(root: nnx.Module, path: Path, new: Any) -> None:
    parent, key = get(root, path[:-1]), path[-1]
    if isinstance(parent, tuple):
        position = int(key)
        _place(root, path[:-1], (*parent[:position], new, *parent[position + 1 :]))
    elif isinstance(parent, _CONTAINERS):
        cast(Any, parent)[key] = new
    else:
        # A module refuses a plain tuple of modules unless it is told that it is data.
        setattr(parent, str(key), nnx.data(new) if isinstance(new, tuple) else new)


def homes(model: nnx.Module, path: Path) -> tuple[Path, ...]:
    """Every path of the module at `path`: several if it is shared. The first is `nnx.iter_modules`' path."""
    return next((paths for paths in shared_modules(model) if path in paths), (path,))


def modules(model: nnx.Module) -> dict[Path, nnx.Module]:
    """All modules of a network, itself included, each under its first path."""
    return {cast(Path, path): module for path, module in nnx.iter_modules(model)}


def shared_modules(model: nnx.Module) -> list[tuple[Path, ...]]:
    """For each module that stands at several paths, all of them."""
    return [cast(tuple[Path, ...], tuple(paths)) for paths in nnx.find_duplicates(model, only=nnx.Module)]


def unfold(
    site: LayerSite, matrix: Float[np.ndarray, "n p"], bias: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "n p"], Float[np.ndarray, " n"]]:
    """Weights of a replacement module whose z, after what the network itself still applies, is `x matrix' + bias`.

    With z = outer_scale * module(x) + outer_shift the rows are divided by outer_scale, and the bias is
    (bias - outer_shift) / outer_scale. Rows where outer_scale is 0 have no influence: zero. For a site whose
    batch normalisation was folded and that nothing else follows, the arguments come back as they are.
    """
    zero = site.outer_scale == 0
    scale = np.where(zero, 1.0, site.outer_scale)
    rows = np.where(zero[:, None], 0.0, matrix / scale[:, None])
    shift = np.where(zero, 0.0, (bias - site.outer_shift) / scale)
    return rows.astype(matrix.dtype), shift.astype(bias.dtype)


def assemble(model: nnx.Module, replacements: Mapping[Path, nnx.Module], sites: Iterable[LayerSite]) -> nnx.Module:
    """A copy of the network with the replacements in place of its layers.

    A replacement goes to every path of a shared layer. Where the site's batch normalisation was folded, an
    `Identity` takes its place, so the replacement computes scale * (...) + shift itself; `unfold` gives the weights
    for either case.

    Args:
        model: the original network, not changed.
        replacements: new modules by the path of the site they replace.
        sites: the sites of `Capture.sites`; those without a replacement stay as they are.

    Returns:
        The new network; for a network that is a single layer, the replacement.

    Raises:
        ValueError: a replacement's path is not that of a site.
    """
    by_path = {site.path: site for site in sites}
    unknown = [path for path in replacements if path not in by_path]
    if unknown:
        known = ", ".join(site.name for site in by_path.values())
        raise ValueError(f"replacements: no layer at {unknown[0]}; layers are: {known}")
    clone = nnx.clone(model)
    changes = []
    for path, module in replacements.items():
        changes += [(home, module) for home in by_path[path].homes]
        norm = by_path[path].norm
        if norm is not None:
            identity = Identity()
            changes += [(home, identity) for home in homes(clone, norm)]
    for home, module in changes:
        clone = put(clone, home, module)
    return clone


def with_executions(model: nnx.Module, executions: Mapping[Path, str]) -> nnx.Module:
    """A copy of the network with factored layers, by path, run in the given forms. Variables are copies too."""
    clone = nnx.clone(model)
    for path, name in executions.items():
        layer = get(clone, path).with_execution(name)
        for home in homes(clone, path):
            clone = put(clone, home, layer)
    return clone

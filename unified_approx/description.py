"""What is stored of a network: which modules were replaced, and all arrays by name; and the network of it again."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from unified_approx import zoo
from unified_approx.assemble import Identity, get, homes, modules, put
from unified_approx.layers import Factored, FactoredConv, FactoredLinear, geometry_of
from unified_approx.narrow import narrow_norm, removed_features
from unified_approx.sites import Path, path_name

_FACTORED: dict[str, type[Factored]] = {layer.__name__: layer for layer in (FactoredConv, FactoredLinear)}

Tensors = dict[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True)
class Network:
    """How to make the original network: a name in the zoo and the options it takes."""

    name: str
    options: Mapping[str, Any]


def describe(model: nnx.Module, network: Network | str | None = None) -> dict[str, Any]:
    """In JSON's types: the network's name and options in the zoo, or null, and every replaced or removed module.

    Args:
        model: the network.
        network: the zoo network it was made from; None finds it.
    """
    if isinstance(network, str):
        network = Network(network, {})
    origin = network or _find_in_zoo(model)
    named = None if origin is None else {"name": origin.name, "options": dict(origin.options)}
    return {"network": named, "modules": _replaced(model)}


def build(
    path: str | os.PathLike[str], described: Mapping[str, Any], arrays: Tensors, like: nnx.Module | None
) -> nnx.Module:
    """The network that was described, with these arrays, which are taken out of the dict.

    Args:
        path: of the file, for errors.
        described: what `describe` gave, also after a trip through JSON.
        arrays: what `arrays_of` gave.
        like: the original network, if it is none of the zoo's.

    Raises:
        ValueError: see `unified_approx.storage.load`.
    """
    model = _skeleton(path, described, like)
    kept = []
    for entry in described["modules"]:
        paths = [tuple(home) for home in entry["homes"]]
        narrow = entry["kind"] == nnx.BatchNorm.__name__
        new = _narrow_norm(model, paths[0], entry["spec"]) if narrow else _rebuild(entry, arrays)
        kept += paths if isinstance(new, Factored) else []
        for home in paths:
            _check_home(model, home, new)
            model = put(model, home, new)
    _fill(model, arrays, kept)
    return model


def _replaced(model: nnx.Module) -> list[dict[str, Any]]:
    """One entry for each module that is not the original network's, with all its paths."""
    found = []
    for path, module in modules(model).items():
        if _is_new(module):
            entry = {"homes": [list(home) for home in homes(model, path)], "kind": type(module).__name__}
            found.append(entry | _spec(module))
    return found


def _is_new(module: nnx.Module) -> bool:
    """Whether the module is not one of the original network's."""
    return isinstance(module, Identity | Factored) or _is_narrow(module)


def _is_narrow(module: nnx.Module) -> bool:
    return isinstance(module, nnx.BatchNorm) and removed_features(module) > 0


def _spec(module: nnx.Module) -> dict[str, Any]:
    if isinstance(module, Factored):
        return {"spec": module.spec()}
    if isinstance(module, nnx.BatchNorm):
        sizes = {"num_features": module.num_features, "removed": removed_features(module)}
        return {"kind": nnx.BatchNorm.__name__, "spec": sizes}
    return {}


def _within(path: Path, roots: list[Path]) -> bool:
    return any(path[: len(root)] == root for root in roots)


def _plain_state(model: nnx.Module, without: list[Path]) -> dict[Path, Any]:
    """The Variables to store, by path, but for those below the given modules and random number generators."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {cast(Path, path): leaf for path, leaf in flat if not _within(cast(Path, path), without)}


def arrays_of(model: nnx.Module) -> Tensors:
    """All Variables by name, those of factored layers as these store them; random number generators are left out.

    Raises:
        ValueError: two Variables whose paths read the same.
    """
    layers = {path: m for path, m in modules(model).items() if isinstance(m, Factored)}
    named = [(path_name(path), leaf) for path, leaf in _plain_state(model, list(layers)).items()]
    named += [(path_name((*path, name)), a) for path, layer in layers.items() for name, a in layer.tensors().items()]
    tensors: Tensors = {}
    for name, leaf in named:
        if name in tensors:
            raise ValueError(f"model: two Variables are called {name!r}; rename a dict key or an attribute")
        tensors[name] = np.asarray(leaf[...] if isinstance(leaf, nnx.Variable) else leaf)
    return tensors


def _find_in_zoo(model: nnx.Module) -> Network | None:
    """The zoo network that becomes this model when its replaced modules are put in; None if there is none."""
    if not type(model).__module__.startswith(f"{zoo.__name__}."):
        return None
    for name in zoo.names():
        make = zoo.entry(name).make
        if make.__module__ != type(model).__module__:
            continue
        options = {
            option: getattr(model, option) for option in inspect.signature(make).parameters if hasattr(model, option)
        }
        skeleton = nnx.eval_shape(lambda make=make, options=options: make(**options))
        if type(skeleton) is not type(model):
            continue
        try:
            for path, module in modules(model).items():
                if _is_new(module):
                    for home in homes(model, path):
                        put(skeleton, home, module)
        except ValueError:
            continue  # a network without such a path
        skeleton.eval()
        same = nnx.clone(model)
        same.eval()
        if nnx.graphdef(skeleton) == nnx.graphdef(same) and _shapes(skeleton) == _shapes(same):
            return Network(name, options)
    return None


def _shapes(model: nnx.Module) -> dict[Path, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _plain_state(model, []).items()}


def _skeleton(path: str | os.PathLike[str], header: Mapping[str, Any], like: nnx.Module | None) -> nnx.Module:
    if like is not None:
        return nnx.clone(like)
    if header["network"] is None:
        raise ValueError(f"like: {path} does not hold a network of the zoo; pass like=, the original network")
    make, options = zoo.entry(header["network"]["name"]).make, header["network"]["options"]
    model = nnx.eval_shape(lambda: make(**options))
    model.eval()
    return model


def _rebuild(entry: Mapping[str, Any], arrays: Tensors) -> nnx.Module:
    if entry["kind"] == Identity.__name__:
        return Identity()
    if entry["kind"] not in _FACTORED:
        raise ValueError(f"path: unknown module kind {entry['kind']!r}; upgrade unified-approx")
    start = "".join(f"{part}/" for part in entry["homes"][0])
    names = ["bias"] + [f"terms.{i}." for i in range(len(entry["spec"]["terms"]))]
    own = {n: arrays.pop(n) for n in list(arrays) if n.startswith(tuple(start + name for name in names))}
    return _FACTORED[entry["kind"]].from_spec(entry["spec"], {n.removeprefix(start): a for n, a in own.items()})


def _narrow_norm(model: nnx.Module, home: Path, sizes: Mapping[str, int]) -> nnx.Module:
    """The batch norm at `home` with as many features as were saved."""
    old, kept = get(model, home), sizes["num_features"]
    if not isinstance(old, nnx.BatchNorm) or old.num_features != kept + sizes["removed"]:
        raise ValueError(
            f"like: the weights do not fit at {path_name(home)!r}: saved for a batch norm of "
            f"{kept + sizes['removed']} features"
        )
    return narrow_norm(old, np.arange(kept))


def _check_home(model: nnx.Module, home: Path, new: nnx.Module) -> None:
    """Refuse to put a factored layer where a layer of another geometry stands."""
    old = get(model, home)
    if not isinstance(new, Factored) or not isinstance(old, nnx.Conv | nnx.Linear):
        return
    found = geometry_of(old)
    if found != new.replaces:
        raise ValueError(
            f"like: the weights do not fit at {path_name(home)!r}: saved for {new.replaces}, found {found}"
        )


def _fill(model: nnx.Module, arrays: Tensors, done: list[Path]) -> None:
    """Set every Variable outside `done` to the array of its name; paths and shapes must agree exactly.

    So must types, but that a network may be stored in another floating-point type.
    """
    want = _plain_state(model, done)
    for path, leaf in want.items():
        name = path_name(path)
        if name not in arrays:
            raise ValueError(f"like: the weights do not fit the network: nothing is saved for {name!r}")
        if arrays[name].shape != tuple(leaf.shape):
            raise ValueError(
                f"like: the weights do not fit the network: {name!r} is {arrays[name].shape} in the file, "
                f"{tuple(leaf.shape)} in the network"
            )
        both_float = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (arrays[name], leaf))
        if not both_float and arrays[name].dtype != leaf.dtype:
            raise ValueError(
                f"like: the weights do not fit the network: {name!r} is {arrays[name].dtype} in the file, "
                f"{leaf.dtype} in the network"
            )
    left = set(arrays) - {path_name(path) for path in want}
    if left:
        raise ValueError(f"like: the weights do not fit the network: it has no place for {min(left)!r}")
    filled = [(path, _set(leaf, jnp.asarray(arrays[path_name(path)]))) for path, leaf in want.items()]
    nnx.update(model, nnx.from_flat_state(filled))
    _fill_generators(model)


def _set(leaf: Any, value: jax.Array) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _fill_generators(model: nnx.Module) -> None:
    """Random number generators that have no value yet (after `nnx.eval_shape`) start from key 0, count 0."""
    filled = []
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.RngState)):
        if isinstance(leaf.get_value(), jax.ShapeDtypeStruct):
            empty = jax.random.key(0) if isinstance(leaf, nnx.RngKey) else jnp.zeros((), jnp.uint32)
            filled.append((path, leaf.replace(empty)))
    if filled:
        nnx.update(model, nnx.from_flat_state(filled))

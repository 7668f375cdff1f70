"""Networks on disk: one safetensors file whose metadata describe everything besides the arrays, no pickle.

The metadata's one entry is a JSON header: format version, the zoo's name and options of the network (or null), every
replaced or removed module with its paths, the encoding of arrays, parameters that are stored as streams of bits, a
report (deflated), extras, versions, and a SHA-256 over all of it and all arrays. `load` builds the original network's
skeleton without running an initialiser, puts the described modules in, checks that every array fits, and fills it.
"""

import base64
import hashlib
import inspect
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as FilePath
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from unified_approx import zoo
from unified_approx.assemble import Identity, get, homes, modules, put
from unified_approx.coding import Coded, decode
from unified_approx.layers import Factored, FactoredConv, FactoredLinear, geometry_of
from unified_approx.narrow import narrow_norm, removed_features
from unified_approx.pieces import parameters_of, with_values
from unified_approx.sites import Path, path_name

FORMAT = 2  # 1 had no coded parameters
_KEY = "unified_approx"
_CODED = "coded"  # first part of the names of streams
_VERSIONED = ("unified-approx", "jax", "flax", "numpy", "safetensors")
_FACTORED: dict[str, type[Factored]] = {layer.__name__: layer for layer in (FactoredConv, FactoredLinear)}

Tensors = dict[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True)
class Network:
    """How to make the original network: a name in the zoo and the options it takes."""

    name: str
    options: Mapping[str, Any]


def save(
    path: str | os.PathLike[str],
    model: nnx.Module,
    *,
    network: Network | str | None = None,
    report: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    coded: Sequence[Coded] = (),
) -> int:
    """Write a network, compressed or not, to one file; returns its size in bytes.

    What was replaced is read off the network itself: its `FactoredConv`, `FactoredLinear` and `Identity` modules. All
    Variables are stored but random number generators. The file appears whole or not at all.

    Args:
        path: of the file; its folder must exist.
        model: the network.
        network: the zoo network it was made from; None finds it, if the model is of one of the zoo's classes with its
            default options or attributes of their names.
        report: JSON-able; stored in the header.
        metadata: JSON-able extras, such as what a user must know to prepare inputs; stored in the header.
        coded: parameters of the network that are stored as streams of bits in place of their values.

    Raises:
        ValueError: a report or metadata that JSON cannot say, or two Variables whose paths read the same.
        FileNotFoundError: no such folder.
    """
    target = FilePath(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {target.parent} does not exist; create it first")
    data = serialize(model, network=network, report=report, metadata=metadata, coded=coded)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        partial = FilePath(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            partial.unlink()
            raise
    partial.chmod(0o644)
    partial.replace(target)
    return len(data)


def serialize(
    model: nnx.Module,
    *,
    network: Network | str | None = None,
    report: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    coded: Sequence[Coded] = (),
) -> bytes:
    """The bytes `save` writes; their number is what a network takes on disk."""
    if isinstance(network, str):
        network = Network(network, {})
    origin = network or _find_in_zoo(model)
    raw = _tensors(_without(model, coded))
    tensors = {f"{_CODED}.{i}": own.stream for i, own in enumerate(coded)}
    encodings = {}
    for name, array in raw.items():
        tensors[name], encoding = _encode(array)
        if encoding is not None:
            encodings[name] = encoding
    header = {
        "format": FORMAT,
        "network": None if origin is None else {"name": origin.name, "options": dict(origin.options)},
        "modules": _replaced(model),
        "encodings": encodings,
        "coded": [own.entry() for own in coded],
        "report": None if report is None else _pack(report),
        "metadata": metadata,
        "versions": _versions(),
    }
    digest = _checksum(json.loads(_to_json(header)), tensors)
    return safetensors_numpy.save(tensors, {_KEY: _to_json({**header, "sha256": digest})})


def _to_json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"report, metadata: {error}; give only what JSON can say") from error


def _pack(report: Mapping[str, Any]) -> str:
    """A report's numbers would otherwise take several percent of a small network's file."""
    return base64.b64encode(zlib.compress(_to_json(report).encode(), 9)).decode()


def _unpack(text: str | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(zlib.decompress(base64.b64decode(text)))


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


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


def _tensors(model: nnx.Module) -> Tensors:
    layers = {path: m for path, m in modules(model).items() if isinstance(m, Factored)}
    named = [(path_name(path), leaf) for path, leaf in _plain_state(model, list(layers)).items()]
    named += [(path_name((*path, name)), a) for path, layer in layers.items() for name, a in layer.tensors().items()]
    tensors: Tensors = {}
    for name, leaf in named:
        if name in tensors:
            raise ValueError(f"model: two Variables are called {name!r}; rename a dict key or an attribute")
        tensors[name] = np.asarray(leaf[...] if isinstance(leaf, nnx.Variable) else leaf)
    return tensors


def _without(model: nnx.Module, coded: Sequence[Coded]) -> nnx.Module:
    """The network with zeros, which take no room in a file, in place of what is coded."""
    paths = {path for own in coded for path in own.piece.paths}
    values = parameters_of(model)
    return with_values(model, {path: jnp.zeros_like(values[path]) for path in paths}) if paths else model


def _encode(array: np.ndarray) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The array as stored, and how: increasing indices as a range, a bitmap or small integers; bfloat16 as its bits;
    zeros as nothing.
    """
    if array.dtype == np.float32 and not array.view(np.uint32).any():
        return np.zeros(0, np.uint8), {"form": "zeros", "shape": list(array.shape)}
    if array.dtype == jnp.bfloat16:
        return array.view(np.uint16), {"form": "bfloat16"}
    if array.dtype != np.int32 or array.ndim != 1 or (array < 0).any():
        return array.copy(order="C"), None
    if np.array_equal(array, np.arange(len(array))):
        return np.zeros(0, np.uint8), {"form": "range", "count": len(array)}
    small = array.astype(np.min_scalar_type(int(array.max())))
    if (np.diff(array) > 0).all() and (array[-1] + 8) // 8 < small.nbytes:
        mask = np.zeros(array[-1] + 1, bool)
        mask[array] = True
        return np.packbits(mask), {"form": "bitmap"}
    return small, {"form": "integers"}


def _decode(array: np.ndarray, encoding: Mapping[str, Any] | None) -> np.ndarray:
    form = None if encoding is None else encoding["form"]
    if form is None:
        return array
    if form == "zeros":
        return np.zeros(cast(Mapping[str, Any], encoding)["shape"], np.float32)
    if form == "bfloat16":
        return array.view(jnp.bfloat16)
    if form == "range":
        return np.arange(cast(Mapping[str, Any], encoding)["count"], dtype=np.int32)
    if form == "bitmap":
        return np.flatnonzero(np.unpackbits(array)).astype(np.int32)
    return array.astype(np.int32)


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


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a file that `save` wrote, its report included; the arrays are neither read nor checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated or no safetensors file, that another program wrote, or of a newer format.
    """
    header, _ = _read(path, with_tensors=False)
    try:
        return {**header, "report": _unpack(header.get("report"))}
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"path: the report in {path} is corrupted ({error}); get a fresh copy") from error


def _read(path: str | os.PathLike[str], with_tensors: bool) -> tuple[dict[str, Any], Tensors]:
    if not FilePath(path).is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = _parse(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is truncated or no safetensors file ({error}); get a whole copy") from error
    return header, tensors


def _parse(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    foreign = f"path: {path} was not written by unified_approx.storage.save (no valid {_KEY!r} entry in its metadata)"
    try:
        header = json.loads((metadata or {})[_KEY])
        number = int(header["format"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(foreign) from error
    if number > FORMAT:
        raise ValueError(f"path: {path} has format {number}, this version reads up to {FORMAT}; upgrade unified-approx")
    missing = {"network", "modules", "encodings", "sha256"} - set(header)
    if missing:
        raise ValueError(f"{foreign}: {sorted(missing)} missing")
    return header


def load(path: str | os.PathLike[str], like: nnx.Module | None = None) -> nnx.Module:
    """The network that was saved: same outputs, bit for bit, in the same execution forms.

    Args:
        path: a file of `save`.
        like: the original network, with any weights (made under `nnx.eval_shape` is enough); not changed. Networks of
            the zoo do not need it. What is not stored (random number generators) is taken from it. The result is in
            evaluation mode if the network is from the zoo, else in the mode of `like`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated, foreign, corrupted or of a newer format; a network that is not from the
            zoo without `like`; weights that do not fit the network: the first mismatch is named.
    """
    header, tensors = _read(path, with_tensors=True)
    digest = header.pop("sha256")
    if _checksum(header, tensors) != digest:
        raise ValueError(f"path: {path} is corrupted (its checksum does not match); get a fresh copy")
    streams = [tensors.pop(f"{_CODED}.{i}") for i in range(len(header.get("coded", ())))]
    arrays = {name: _decode(array, header["encodings"].get(name)) for name, array in tensors.items()}
    model = _skeleton(path, header, like)
    kept = []
    for entry in header["modules"]:
        paths = [tuple(home) for home in entry["homes"]]
        narrow = entry["kind"] == nnx.BatchNorm.__name__
        new = _narrow_norm(model, paths[0], entry["spec"]) if narrow else _rebuild(entry, arrays)
        kept += paths if isinstance(new, Factored) else []
        for home in paths:
            _check_home(model, home, new)
            model = put(model, home, new)
    _fill(model, arrays, kept)
    values = {}
    for entry, stream in zip(header.get("coded", ()), streams, strict=True):
        values |= decode(entry, stream)
    return with_values(model, values) if values else model


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
    """Set every Variable outside `done` to the array of its name; paths and shapes must agree exactly."""
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

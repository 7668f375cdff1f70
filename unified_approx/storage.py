"""Networks on disk: one file without pickle, safetensors (`save`) or as small as can be (`pack`).

A safetensors file's metadata describe everything besides the arrays.

The metadata's one entry is a JSON header: format version, the zoo's name and options of the network (or null), every
replaced or removed module with its paths, the encoding of arrays, parameters that are stored as streams of bits, a
report (deflated), extras, versions, and a SHA-256 over all of it and all arrays. `load` builds the original network's
skeleton without running an initialiser, puts the described modules in, checks that every array fits, and fills it.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path as FilePath
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from unified_approx.coding import Coded
from unified_approx.description import Network, Tensors, arrays_of, build, describe
from unified_approx.files import replacing
from unified_approx.packing import arrays, container
from unified_approx.packing.byte_streams import DamagedError, inflate
from unified_approx.pieces import parameters_of, with_values

FORMAT = 2  # 1 had no coded parameters
_KEY = "unified_approx"
_CODED = "coded"  # first part of the names of streams
_FOREIGN = (KeyError, TypeError, AttributeError, ArithmeticError, IndexError, MemoryError, RecursionError)
_VERSIONED = ("unified-approx", "jax", "flax", "numpy", "safetensors")


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
    return _write(path, serialize(model, network=network, report=report, metadata=metadata, coded=coded))


def pack(
    path: str | os.PathLike[str],
    model: nnx.Module,
    *,
    network: Network | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    coded: Sequence[Coded] = (),
    coder: str = "ans",
) -> int:
    """Write a network, compressed in any way or not, in as few bytes as we know how; returns how many.

    Every array is entropy-coded in the form that suits it: values of a codebook by their numbers, zeros by the gaps
    between the others, rising indices by their steps, other values byte by byte. A parameter that is given as a stream
    of bits too, such as a sum of a low-rank matrix and a sparse one, stays a stream where that is shorter. `load` gives
    the same network, bit for bit.

    Args:
        path: of the file; its folder must exist.
        model: the network.
        network: as for `save`.
        metadata: as for `save`.
        coded: as for `save`; with an `LcResult`, `model, coded = result.parts()`.
        coder: "ans", or "huffman" as in Deep Compression.

    Raises:
        ValueError: NaN, a type that cannot be packed, metadata that JSON cannot say, or an unknown coder.
        FileNotFoundError: no such folder.
    """
    model, streams = _shorter_coded(model, coded, coder)
    header = {"format": container.VERSION, **describe(model, network)}
    header |= {} if metadata is None else {"metadata": metadata}
    header |= {_CODED: [own.entry() for own in streams]} if streams else {}
    return _write(path, container.dump(header, _tensors(model, streams), coder))


def _shorter_coded(model: nnx.Module, coded: Sequence[Coded], coder: str) -> tuple[nnx.Module, list[Coded]]:
    """The network with what the streams say, and those streams that are shorter than their values, packed likewise."""
    kept = []
    for own in coded:
        values = own.values()
        if len(arrays.encode(own.stream, coder)) < sum(
            len(arrays.encode(np.asarray(v), coder)) for v in values.values()
        ):
            kept.append(own)
        else:
            model = with_values(model, values)
    return model, kept


def _tensors(model: nnx.Module, coded: Sequence[Coded]) -> Tensors:
    """All arrays of the network by name, and the streams that stand for some of them."""
    return arrays_of(_without(model, coded)) | {f"{_CODED}.{i}": own.stream for i, own in enumerate(coded)}


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file was written by `pack`.

    Raises:
        FileNotFoundError: no such file.
    """
    if not FilePath(path).is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    with FilePath(path).open("rb") as file:
        return file.read(len(container.MAGIC)) == container.MAGIC


def _write(path: str | os.PathLike[str], data: bytes) -> int:
    target = FilePath(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {target.parent} does not exist; create it first")
    with replacing(target) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
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
    tensors, encodings = {}, {}
    for name, array in _tensors(model, coded).items():
        tensors[name], encoding = _encode(array)
        if encoding is not None:
            encodings[name] = encoding
    header = {
        "format": FORMAT,
        **describe(model, network),
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
    return None if text is None else json.loads(inflate(base64.b64decode(text), container.LONGEST_HEADER))


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


def read_header(path: str | os.PathLike[str], largest: int = container.LARGEST) -> dict[str, Any]:
    """The header of a file that `save` wrote, its report included; the arrays are neither read nor checked.

    Args:
        path: of the file.
        largest: bytes that the arrays may take in memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated or no safetensors file, that another program wrote, or of a newer format.
    """
    if is_packed(path):
        return {"report": None, **container.parse(FilePath(path).read_bytes(), largest).header}
    header, _ = _read(path, with_tensors=False)
    try:
        return {**header, "report": _unpack(header.get("report"))}
    except (ValueError, TypeError, DamagedError) as error:
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
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(foreign) from error
    if number > FORMAT:
        raise ValueError(f"path: {path} has format {number}, this version reads up to {FORMAT}; upgrade unified-approx")
    missing = {"network", "modules", "encodings", "sha256"} - set(header)
    if missing:
        raise ValueError(f"{foreign}: {sorted(missing)} missing")
    return header


def load(path: str | os.PathLike[str], like: nnx.Module | None = None, largest: int = container.LARGEST) -> nnx.Module:
    """The network that was saved: same outputs, bit for bit, in the same execution forms.

    Args:
        path: a file of `save` or of `pack`.
        like: the original network, with any weights (made under `nnx.eval_shape` is enough); not changed. Networks of
            the zoo do not need it. What is not stored (random number generators) is taken from it. The result is in
            evaluation mode if the network is from the zoo, else in the mode of `like`.
        largest: bytes that the arrays may take in memory; a file that says it needs more is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated, foreign, corrupted or of a newer format; a network that is not from the
            zoo without `like`; weights that do not fit the network: the first mismatch is named.
    """
    return load_coded(path, like, largest)[0]


def load_coded(
    path: str | os.PathLike[str], like: nnx.Module | None = None, largest: int = container.LARGEST
) -> tuple[nnx.Module, tuple[Coded, ...]]:
    """What `load` gives, and those of its parameters that the file has as streams of bits: to write them again.

    Args:
        path: as for `load`.
        like: as for `load`.
        largest: as for `load`.

    Raises:
        FileNotFoundError: as for `load`.
        ValueError: as for `load`.
    """
    if is_packed(path):
        packed = container.parse(FilePath(path).read_bytes(), largest)
        header, tensors = packed.header, packed.arrays()
        streams = _streams(path, header, tensors)
    else:
        header, tensors = _read(path, with_tensors=True)
        digest = header.pop("sha256")
        if _checksum(header, tensors) != digest:
            raise ValueError(f"path: {path} is corrupted (its checksum does not match); get a fresh copy")
        streams = _streams(path, header, tensors)
        _check_size(path, header["encodings"], largest)
        tensors = {name: _decode(array, header["encodings"].get(name)) for name, array in tensors.items()}
    return _with_streams(path, _built(path, header, tensors, like), header, streams)


def _streams(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Tensors) -> list[np.ndarray]:
    """Those that the header lists, taken out of the dict."""
    entries = header.get(_CODED, [])
    names = [f"{_CODED}.{i}" for i in range(len(entries))] if isinstance(entries, list) else [_CODED]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"path: {path} lists {missing[0]!r} and does not hold it; get a fresh copy")
    return [tensors.pop(name) for name in names]


def _with_streams(
    path: str | os.PathLike[str], model: nnx.Module, header: Mapping[str, Any], streams: Sequence[np.ndarray]
) -> tuple[nnx.Module, tuple[Coded, ...]]:
    """The network with the parameters that the streams stand for; they take the room that its own take.

    Raises:
        ValueError: streams of parameters that the network does not have, or that cannot be decoded.
    """
    if not streams:
        return model, ()
    own, coded, values = parameters_of(model), [], {}
    try:
        for entry, stream in zip(header[_CODED], streams, strict=True):
            coded.append(Coded.from_entry(entry, stream))
            piece = coded[-1].piece
            for parameter, shape in zip(piece.paths, piece.shapes, strict=True):
                found = own[parameter].shape if parameter in own else None
                if found != shape:
                    raise ValueError(f"{piece.name!r} is of a parameter {parameter} of shape {shape}, there is {found}")
            values |= coded[-1].values()
    except (ValueError, *_FOREIGN) as error:
        raise ValueError(f"path: the streams of {path} cannot be decoded ({error!r}); get a fresh copy") from error
    return with_values(model, values), tuple(coded)


def _built(
    path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Tensors, like: nnx.Module | None
) -> nnx.Module:
    try:
        return build(path, header, arrays, like)
    except _FOREIGN as error:
        raise ValueError(
            f"path: {path} describes no network that this version can build ({error!r}); get a fresh copy"
        ) from error


def _check_size(path: str | os.PathLike[str], encodings: Mapping[str, Any], largest: int) -> None:
    """What is stored as nothing takes room once it is read."""
    try:
        sizes = [4 * prod(e.get("shape", (e.get("count", 0),))) for e in encodings.values()]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"path: {path} is corrupted (encodings: {error}); get a fresh copy") from error
    if sum(sizes) > largest or min(sizes, default=0) < 0:
        raise ValueError(
            f"largest: the arrays of {path} take {sum(sizes):,} bytes, {largest:,} are allowed; give more if you trust "
            "them"
        )

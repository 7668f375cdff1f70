"""Arrays and a header in one file, every array entropy-coded, every part with a checksum.

magic, version, length and CRC-32 of the header; the header: JSON, deflated: what the caller put in, and for every array
its name, dtype, shape, bytes and CRC-32; the arrays' streams, in that order.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from unified_approx.packing import arrays
from unified_approx.packing.arrays import ArrayType
from unified_approx.packing.byte_streams import DamagedError, inflate

MAGIC = b"UAPK"
VERSION = 2  # 1 had no streams for parameters and no tables of more than 4096 values
LARGEST = 2**30
"""Bytes of all arrays in memory, unless the caller says otherwise."""
LONGEST_HEADER = 4 * 2**20
"""Bytes of the header before it is deflated; as objects it may take 25 times as many."""
_PREFIX = len(MAGIC) + 1 + 4 + 4

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True)
class Packed:
    """A file taken apart, its arrays not yet decoded.

    Attributes:
        header: what the caller put in.
        types: of the arrays, by name.
        streams: theirs.
    """

    header: dict[str, Any]
    types: dict[str, ArrayType]
    streams: dict[str, memoryview]

    def arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """All of them, decoded.

        Raises:
            ValueError: a damaged stream; it is named.
        """
        found = {}
        for name, kind in self.types.items():
            try:
                found[name] = arrays.decode(self.streams[name], kind)
            except DamagedError as error:
                raise ValueError(f"path: the stream of {name!r} is damaged ({error}); get a fresh copy") from error
        return found


def dump(header: Mapping[str, Any], tensors: Tensors, coder: str = "ans") -> bytes:
    """The bytes of the file.

    Raises:
        ValueError: a header that JSON cannot say, an array that cannot be packed (it is named), or an unknown coder.
    """
    entries, streams = [], []
    for name, array in tensors.items():
        try:
            kind, stream = ArrayType.of(np.asarray(array)), arrays.encode(np.asarray(array), coder)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        entries.append([name, kind.dtype, list(kind.shape), len(stream), zlib.crc32(stream)])
        streams.append(stream)
    text = json.dumps({"header": header, "arrays": entries}, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"metadata: the header takes {len(text):,} bytes, {LONGEST_HEADER:,} are allowed; say less")
    deflated = zlib.compress(text, 9)
    prefix = MAGIC + bytes([VERSION]) + len(deflated).to_bytes(4, "little")
    return b"".join([prefix, zlib.crc32(prefix + deflated).to_bytes(4, "little"), deflated, *streams])


def parse(data: bytes, largest: int = LARGEST) -> Packed:
    """The file taken apart, all checksums seen to.

    Memory: the header's (see `LONGEST_HEADER`) and, when the arrays are decoded, at most 16 bytes a byte of the array.

    Args:
        data: the whole file.
        largest: bytes that the arrays may take together when they are decoded.

    Raises:
        ValueError: no such file, one of a newer version, a damaged one, or arrays that are larger than allowed.
    """
    try:
        return _parse(data, largest)
    except DamagedError as error:
        raise ValueError(f"path: the file is damaged ({error}); get a fresh copy") from error


def _parse(data: bytes, largest: int) -> Packed:
    if data[: len(MAGIC)] != MAGIC or len(data) < _PREFIX:
        raise DamagedError("it does not begin as a packed network does")
    if data[len(MAGIC)] > VERSION:
        raise ValueError(f"path: version {data[len(MAGIC)]}, this one reads up to {VERSION}; upgrade unified-approx")
    length = int.from_bytes(data[_PREFIX - 8 : _PREFIX - 4], "little")
    deflated = data[_PREFIX : _PREFIX + length]
    if zlib.crc32(data[: _PREFIX - 4] + deflated) != int.from_bytes(data[_PREFIX - 4 : _PREFIX], "little"):
        raise DamagedError("the header's checksum does not match")
    header, entries = _header(inflate(deflated, LONGEST_HEADER))
    types = {name: kind for name, kind, _, _ in entries}
    total = sum(kind.nbytes for kind in types.values())
    if total > largest:
        raise ValueError(
            f"largest: the arrays take {total:,} bytes, {largest:,} are allowed; give more if you trust them"
        )
    at, streams = _PREFIX + length, {}
    for name, _, size, checksum in entries:
        stream = memoryview(data)[at : at + size]
        if len(stream) != size or zlib.crc32(stream) != checksum:
            raise DamagedError(f"the checksum of {name!r} does not match")
        streams[name] = stream
        at += size
    if at != len(data):
        raise DamagedError(f"{len(data) - at} bytes too many")
    return Packed(header, types, streams)


def _header(text: bytes) -> tuple[dict[str, Any], list[tuple[str, ArrayType, int, int]]]:
    try:
        found = json.loads(text)
        entries = [
            (str(name), ArrayType(str(dtype), tuple(shape)), int(size), int(checksum))
            for name, dtype, shape, size, checksum in found["arrays"]
        ]
        header = dict(found["header"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DamagedError(f"a header that cannot be read: {error}") from error
    if len({name for name, _, _, _ in entries}) < len(entries) or any(size < 0 for _, _, size, _ in entries):
        raise DamagedError("a header that contradicts itself")
    return header, entries

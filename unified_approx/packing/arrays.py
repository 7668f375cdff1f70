"""One array in as few bytes as we know how, bit for bit: every way is tried, and the shortest is kept.

A way is a class with `encode` and `decode` and a row in `WAYS`. Values are looked at as bit patterns, so that all of
them come back, -0.0 and subnormal numbers too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Integer, Shaped, UInt, UInt8

from unified_approx.packing import symbols
from unified_approx.packing.byte_streams import DamagedError, Reader, Writer

_INTEGERS = tuple(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u"))
DTYPES = ("float64", "float32", "float16", "bfloat16", *_INTEGERS, "bool")
_LARGEST_TABLE = symbols.LARGEST_ALPHABET - 1
_LARGEST_GRID = 2**20
_GAP_BITS = range(2, 13)
_CHUNK = 2**16  # symbols whose places are found at a time

Patterns = UInt[np.ndarray, " n"]


class Way(ABC):
    """How a sequence of bit patterns is written.

    Attributes:
        handicap: factor on its bytes when ways are compared: how much shorter it must be, where it reads slowly.
    """

    handicap: ClassVar[float] = 1.0

    @abstractmethod
    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """The bytes, of patterns in rows of that width; None where this way has nothing to offer."""

    @abstractmethod
    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """What `encode` wrote of so many patterns of that type."""


class Raw(Way):
    """As they are."""

    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """See `Way.encode`."""
        return patterns.astype(patterns.dtype.newbyteorder("<")).tobytes()

    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """See `Way.decode`."""
        data = reader.take(count * dtype.itemsize)
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)


class Planes(Way):
    """Byte by byte: first bytes of all values, second bytes and so on. Signs and exponents of weights are alike."""

    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """See `Way.encode`."""
        out, columns = Writer(), self._bytes(patterns)
        for i in range(columns.shape[1]):
            out.block(symbols.encode(columns[:, i].astype(np.int64), coder))
        return out.done()

    @staticmethod
    def _bytes(patterns: Patterns) -> UInt8[np.ndarray, "n size"]:
        return patterns.astype(patterns.dtype.newbyteorder("<")).view(np.uint8).reshape(len(patterns), -1)

    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """See `Way.decode`."""
        columns = np.empty((count, dtype.itemsize), np.uint8)
        for i in range(dtype.itemsize):
            found = symbols.decode(reader.block(), count)
            if found.max(initial=0) > 255:
                raise DamagedError("a byte above 255")
            columns[:, i] = found
        return columns.reshape(-1).view(dtype.newbyteorder("<")).astype(dtype)


class Table(Way):
    """Values that occur again in a table, and their numbers; those that occur once are escapes, written in order.

    A codebook is found by itself, and corrections added to it are the escapes. Every zero is a symbol, so that a sparse
    array is read several times as fast the other way.
    """

    handicap = 1.002

    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """See `Way.encode`."""
        values, number, counts = np.unique(patterns, return_inverse=True, return_counts=True)
        again = counts > 1
        if not 0 < np.count_nonzero(again) <= _LARGEST_TABLE:
            return None
        place = np.where(again, np.cumsum(again), 0)[number]
        out = Writer()
        out.number(int(np.count_nonzero(again)))
        out.block(symbols.encode(place, coder))
        out.block(_shortest(values[again], 1, coder, _PLAIN))
        out.block(_shortest(patterns[place == 0], 1, coder, _PLAIN))
        return out.done()

    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """See `Way.decode`."""
        size = reader.number(min(_LARGEST_TABLE, count))
        place = symbols.decode(reader.block(), count)
        if place.max(initial=0) > size:
            raise DamagedError("a number beyond the table")
        table = np.zeros(size + 1, dtype)
        table[1:] = _read(reader.block(), size, 1, dtype, _PLAIN)
        found, once = table[place], place == 0
        found[once] = _read(reader.block(), int(np.count_nonzero(once)), 1, dtype, _PLAIN)
        return found


class Book(Way):
    """All values in a table, and their numbers: a codebook so large that some of its values occur once or never."""

    handicap = Table.handicap

    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """See `Way.encode`."""
        values, number = np.unique(patterns, return_inverse=True)
        if len(values) > min(_LARGEST_TABLE, len(patterns) // 2):
            return None
        out = Writer()
        out.number(len(values))
        out.block(symbols.encode(number, coder))
        out.block(_shortest(values, 1, coder, _PLAIN))
        return out.done()

    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """See `Way.decode`."""
        size = reader.number(min(_LARGEST_TABLE, count))
        place = symbols.decode(reader.block(), count)
        if place.max(initial=0) >= size:
            raise DamagedError("a number beyond the table")
        return _read(reader.block(), size, 1, dtype, _PLAIN)[place]


class Sparse(Way):
    """Zeros as the gaps between the other values, those one after the other.

    Gaps as in Deep Compression (Han et al. 2016, section 2): the largest symbol says: so many, and go on. Its size is
    the one that takes the fewest bits.
    """

    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """See `Way.encode`."""
        kept = np.flatnonzero(patterns)
        if len(kept) > 0.7 * len(patterns):
            return None
        gaps = np.diff(kept, prepend=-1) - 1
        sizes = [(symbols.entropy(self._escaped(gaps, 2**bits - 1)), bits) for bits in _GAP_BITS]
        bits = min(sizes)[1]
        escaped = self._escaped(gaps, 2**bits - 1)
        out = Writer()
        for number in (bits, len(kept), len(escaped)):
            out.number(number)
        out.block(symbols.encode(escaped, coder))
        out.block(_shortest(patterns[kept], 1, coder, _PLAIN | _REPEATED))
        return out.done()

    @staticmethod
    def _escaped(gaps: Int[np.ndarray, " kept"], escape: int) -> Int[np.ndarray, " symbols"]:
        out = np.full(int(np.sum(gaps // escape + 1)), escape, np.int64)
        out[np.cumsum(gaps // escape + 1) - 1] = gaps % escape
        return out

    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """See `Way.decode`."""
        escape = 2 ** reader.number(_GAP_BITS[-1]) - 1
        kept = reader.number(count)
        number = reader.number(kept + count // max(1, escape))
        escaped = symbols.decode(reader.block(), number)
        if escaped.max(initial=0) > escape or np.count_nonzero(escaped < escape) != kept:
            raise DamagedError("gaps that do not fit the array")
        values = _read(reader.block(), kept, 1, dtype, _PLAIN | _REPEATED)
        found, at, done = np.zeros(count, dtype), -1, 0
        for start in range(0, number, _CHUNK):
            part = escaped[start : start + _CHUNK].astype(np.int64)
            is_kept = part < escape
            ends = at + np.cumsum(part + is_kept)
            at = int(ends[-1])
            if at >= count:
                raise DamagedError("gaps that do not fit the array")
            places = ends[is_kept]
            found[places] = values[done : done + len(places)]
            done += len(places)
        return found


class Differences(Way):
    """Rising numbers, such as kept columns, by their steps."""

    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """See `Way.encode`."""
        if len(patterns) < 2 or not (patterns[1:] > patterns[:-1]).all():
            return None
        return _shortest(np.diff(patterns, prepend=patterns.dtype.type(0)), 1, coder, _PLAIN | _REPEATED)

    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """See `Way.decode`."""
        return np.cumsum(_read(reader.take(reader.left), count, 1, dtype, _PLAIN | _REPEATED), dtype=dtype)


class Grid(Way):
    """Zeros as a bitmap, where rows or columns differ in how many they have: pixels that are never lit, dead units.

    The counts of rows and columns come first; an entry is not zero with probability row x column / all, and the bits
    are range-coded by these, whatever the coder. It reads slowly, so large arrays go another way.
    """

    handicap = 1.005

    def encode(self, patterns: Patterns, width: int, coder: str) -> bytes | None:
        """See `Way.encode`."""
        kept = (patterns != 0).reshape(-1, max(1, width))
        if not self._is_grid(len(patterns), width) or not 0 < kept.sum() <= 0.7 * kept.size:
            return None
        counts = kept.sum(axis=1), kept.sum(axis=0)
        out = Writer()
        for count in counts:
            out.block(symbols.encode(count, coder))
        out.block(symbols.encode_bits(kept.reshape(-1), self._chances(*counts)))
        out.block(_shortest(patterns[kept.reshape(-1)], 1, coder, _PLAIN | _REPEATED))
        return out.done()

    @staticmethod
    def _is_grid(count: int, width: int) -> bool:
        return 2 <= width < 2**15 and 2 <= count // width < 2**15 and count <= _LARGEST_GRID

    @staticmethod
    def _chances(rows: Integer[np.ndarray, " rows"], columns: Integer[np.ndarray, " columns"]) -> Int[np.ndarray, " n"]:
        """In units of 2^-16; whole numbers, so that encoder and decoder have the same."""
        chances = (rows[:, None].astype(np.int64) * columns[None, :] << 16) // max(1, int(rows.sum()))
        return np.clip(chances, 1, 2**16 - 1).reshape(-1)

    def decode(self, reader: Reader, count: int, width: int, dtype: np.dtype) -> Patterns:
        """See `Way.decode`."""
        if not self._is_grid(count, width):
            raise DamagedError("a grid that is none, or too large")
        rows, columns = (symbols.decode(reader.block(), size) for size in (count // width, width))
        kept = symbols.decode_bits(reader.block(), self._chances(rows, columns))
        found = np.zeros(count, dtype)
        found[kept] = _read(reader.block(), int(np.count_nonzero(kept)), 1, dtype, _PLAIN | _REPEATED)
        return found


WAYS: dict[int, Way] = {0: Raw(), 1: Planes(), 2: Table(), 3: Sparse(), 4: Differences(), 5: Grid(), 6: Book()}
_PLAIN, _REPEATED = frozenset({0, 1}), frozenset({2, 6})
_ALL = frozenset(WAYS)


def _shortest(patterns: Patterns, width: int, coder: str, ways: frozenset[int]) -> bytes:
    """The number of the way, and what it writes."""
    if len(patterns) == 0:
        return b""
    tried = [(number, WAYS[number].encode(patterns, width, coder)) for number in sorted(ways)]
    offered = [(len(data) * WAYS[number].handicap, number, data) for number, data in tried if data is not None]
    _, number, data = min(offered)
    return bytes([number]) + data


def _read(data: bytes | memoryview, count: int, width: int, dtype: np.dtype, ways: frozenset[int]) -> Patterns:
    """What `_shortest` wrote."""
    reader = Reader(data)
    if count == 0:
        reader.finish()
        return np.zeros(0, dtype)
    number = reader.take(1)[0]
    if number not in ways:
        raise DamagedError(f"way {number} is unknown here")
    found = WAYS[number].decode(reader, count, width, dtype)
    reader.finish()
    return found


_LARGEST_SHAPE = 2**48


@dataclass(frozen=True)
class ArrayType:
    """Shape and dtype of an array.

    Attributes:
        dtype: one of `DTYPES`.
        shape: of the array.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DamagedError(f"dtype: {self.dtype!r} cannot be packed; there are {', '.join(DTYPES)}")
        if not all(type(size) is int and size >= 0 for size in self.shape):
            raise DamagedError(f"shape: {self.shape}")
        # An array without values takes no room, whatever its other sizes; NumPy refuses some of them.
        if 0 in self.shape and prod(max(size, 1) for size in self.shape) > _LARGEST_SHAPE:
            raise DamagedError(f"shape: {self.shape} is larger than any array")

    @classmethod
    def of(cls, array: Shaped[np.ndarray, "..."]) -> "ArrayType":
        """Of an array."""
        return cls(array.dtype.name, tuple(array.shape))

    @property
    def nbytes(self) -> int:
        """Of the array in memory."""
        return prod(self.shape) * self.numpy.itemsize

    @property
    def width(self) -> int:
        """Of its rows: the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def numpy(self) -> np.dtype:
        """The type of its values."""
        return np.dtype(jnp.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def patterns(self) -> np.dtype:
        """The type of its values' bit patterns."""
        return np.dtype(f"u{self.numpy.itemsize}")


def encode(array: Shaped[np.ndarray, "..."], coder: str = "ans") -> bytes:
    """The array's values; type and shape are not in it.

    Raises:
        ValueError: a type that cannot be packed, or NaN.
    """
    kind = ArrayType.of(array)
    if "float" in kind.dtype and np.isnan(array.astype(np.float64)).any():
        raise ValueError("array: it has NaN in it; a network with NaN is not packed")
    patterns = np.ascontiguousarray(array, kind.numpy).reshape(-1).view(kind.patterns)
    return _shortest(patterns, kind.width, coder, _ALL)


def decode(data: bytes | memoryview, kind: ArrayType) -> Shaped[np.ndarray, "..."]:
    """What `encode` wrote of an array of that type and shape.

    Raises:
        DamagedError: no such stream.
    """
    patterns = _read(data, prod(kind.shape), kind.width, kind.patterns, _ALL)
    if kind.dtype == "bool" and patterns.max(initial=0) > 1:
        raise DamagedError("a truth value above 1")
    return patterns.view(kind.numpy).reshape(kind.shape)


def way_of(data: Sequence[int] | bytes | memoryview) -> str:
    """What a stream is called: "raw", "planes", "table", "sparse", "differences", "grid", "book"; "empty" for none."""
    return type(WAYS[data[0]]).__name__.lower() if len(data) else "empty"

"""Streams of bits, one bit to an entry of a uint8 array: how compressed forms are stored."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Bool, Float32, Int, UInt8

FLOAT_BITS = 32
_COUNT_BITS, _WIDTH_BITS = 32, 5  # of the header of a stream of gaps
_WIDTHS = range(2, 33)

Bits = UInt8[np.ndarray, " bits"]


def width_of(count: int) -> int:
    """Bits that tell `count` symbols apart."""
    return max(0, int(count - 1).bit_length())


def _word(width: int) -> int:
    """Bytes of the smallest integer type of that many bits."""
    return next(size for size in (1, 2, 4) if width <= 8 * size)


def write_bits(values: Sequence[int] | Int[np.ndarray, "..."] | Bool[np.ndarray, "..."], width: int) -> Bits:
    """Unsigned integers of equal width up to 32, most significant bit first."""
    size = _word(width)
    words = np.ascontiguousarray(np.asarray(values).reshape(-1).astype(f">u{size}"))
    return np.unpackbits(words.view(np.uint8)).reshape(-1, 8 * size)[:, 8 * size - width :].reshape(-1)


def write_floats(values: ArrayLike, bits: int = FLOAT_BITS) -> Bits:
    """Floating-point values of 32 or 16 bits."""
    numbers = np.ascontiguousarray(np.asarray(values).reshape(-1).astype(f">f{bits // 8}"))
    return np.unpackbits(numbers.view(np.uint8))


class Reader:
    """Takes a stream apart, in the order in which it was written."""

    def __init__(self, bits: Bits):
        self._bits, self._at = bits, 0

    def _take(self, count: int) -> Bits:
        if count > self.left:
            raise ValueError(f"bits: {count} more are needed, {self.left} are left; the stream is damaged")
        self._at += count
        return self._bits[self._at - count : self._at]

    @property
    def left(self) -> int:
        """Bits not yet taken."""
        return len(self._bits) - self._at

    def integers(self, count: int, width: int) -> Int[np.ndarray, " count"]:
        """What `write_bits` wrote."""
        size = _word(width)
        taken = self._take(count * width)  # before room is made for what a damaged stream says
        words = np.zeros((count, 8 * size), np.uint8)
        words[:, 8 * size - width :] = taken.reshape(count, width)
        return np.packbits(words, axis=1).view(f">u{size}").reshape(count).astype(np.int64)

    def floats(self, count: int, bits: int = FLOAT_BITS) -> Float32[np.ndarray, " count"]:
        """What `write_floats` wrote."""
        return np.packbits(self._take(count * bits)).view(f">f{bits // 8}").astype(np.float32)


def _gaps(kept: Bool[np.ndarray, " d"]) -> Int[np.ndarray, " kept"]:
    return np.diff(np.flatnonzero(kept), prepend=-1) - 1


def _best_width(gaps: Int[np.ndarray, " kept"]) -> tuple[int, int]:
    """(Width of the symbols with the fewest bits, number of symbols)."""
    if not len(gaps):
        return _WIDTHS[0], 0
    # A symbol as wide as the largest gap needs no escapes, so nothing wider can be better.
    widths = range(_WIDTHS[0], min(_WIDTHS[-1], max(_WIDTHS[0], width_of(int(gaps.max()) + 2))) + 1)
    counts = {width: int(np.sum(gaps // (2**width - 1) + 1)) for width in widths}
    best = min(counts, key=lambda width: width * counts[width])
    return best, counts[best]


def position_bits(kept: Bool[np.ndarray, " d"]) -> int:
    """Bits that `write_positions` needs."""
    width, count = _best_width(_gaps(kept))
    return _COUNT_BITS + _WIDTH_BITS + width * count


def write_positions(kept: Bool[np.ndarray, " d"]) -> Bits:
    """Which of d places are kept: the gaps between them, in symbols of the width that needs the fewest bits.

    The largest symbol says: so many, and go on. Number and width of the symbols come first. Han et al., Deep
    Compression (2016), section 2, where the width is fixed.
    """
    gaps = _gaps(kept)
    width, count = _best_width(gaps)
    escape = 2**width - 1
    symbols = np.full(count, escape, np.int64)
    symbols[np.cumsum(gaps // escape + 1) - 1] = gaps % escape
    header = write_bits([count], _COUNT_BITS), write_bits([width - _WIDTHS[0]], _WIDTH_BITS)
    return np.concatenate([*header, write_bits(symbols, width)])


def read_positions(reader: Reader, places: int) -> Bool[np.ndarray, " d"]:
    """What `write_positions` wrote of that many places."""
    count = int(reader.integers(1, _COUNT_BITS)[0])
    width = int(reader.integers(1, _WIDTH_BITS)[0]) + _WIDTHS[0]
    symbols = reader.integers(count, width)
    is_kept = symbols < 2**width - 1
    at = np.cumsum(symbols + is_kept) - 1
    if count and at[-1] >= places:
        raise ValueError(f"bits: a weight at place {at[-1]} of {places}; the stream is damaged")
    kept = np.zeros(places, bool)
    kept[at[is_kept]] = True
    return kept

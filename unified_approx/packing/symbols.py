"""Sequences of small whole numbers in as few bytes as their frequencies allow, tables included.

Range coding by asymmetric numeral systems comes from constriction (Bamler 2022); Huffman's codes are those of Deep
Compression (Han et al. 2016, section 4).
"""

from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16

from unified_approx.packing import huffman
from unified_approx.packing.byte_streams import DamagedError, Reader, Writer, bits_of

_STREAM = import_module("constriction").stream  # imported thus, its missing types do not matter
_BERNOULLI = _STREAM.model.Bernoulli(perfect=False)
LARGEST_ALPHABET = 2**16
CODERS = ("ans", "huffman")
_CONSTANT, _FIXED, _ANS, _HUFFMAN = range(4)
_CHUNK = 2**16  # symbols read at a time; a multiple of 8, so that chunks begin with a byte
_PRECISIONS = (8, 10, 12, 14, 16)  # bits of the frequencies in the table


def entropy(symbols: Int[np.ndarray, " n"]) -> float:
    """Bits of the whole sequence, at its own frequencies, tables not included."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(np.sum(counts * np.log2(len(symbols) / counts))) if len(symbols) else 0.0


def encode(symbols: Int[np.ndarray, " n"], coder: str = "ans") -> bytes:
    """One block: how it is coded, the table, the code.

    Args:
        symbols: whole numbers from 0 to below `LARGEST_ALPHABET`.
        coder: "ans" or "huffman".

    Raises:
        ValueError: another coder, or symbols out of range.
    """
    if coder not in CODERS:
        raise ValueError(f"coder: {coder!r} is unknown; choose one of {', '.join(CODERS)}")
    if len(symbols) and not (symbols.min() >= 0 and symbols.max() < LARGEST_ALPHABET):
        raise ValueError(f"symbols: {symbols.min()} to {symbols.max()}; they go from 0 to {LARGEST_ALPHABET - 1}")
    if len(symbols) == 0:
        return b""
    counts = np.bincount(symbols)
    if np.count_nonzero(counts) == 1:
        return _block(_CONSTANT, number=int(symbols[0]))
    coded = _ans(symbols, counts) if coder == "ans" else _huffman(symbols, counts)
    return min(coded, _fixed(symbols), key=len)


def decode(data: bytes | memoryview, count: int) -> UInt16[np.ndarray, " count"]:
    """What `encode` wrote of so many symbols.

    Raises:
        DamagedError: no such block.
    """
    if count == 0:
        if len(data):
            raise DamagedError(f"{len(data)} bytes for no symbols")
        return np.zeros(0, np.uint16)
    reader = Reader(data)
    kind = reader.number(_HUFFMAN)
    if kind == _CONSTANT:
        found = np.full(count, reader.number(LARGEST_ALPHABET - 1), np.uint16)
    elif kind == _FIXED:
        found = _read_fixed(reader, count)
    else:
        table = _read_table(reader.block())
        found = _read_ans(reader.block(), table, count) if kind == _ANS else _read_huffman(reader.block(), table, count)
    reader.finish()
    return found


def encode_bits(bits: Bool[np.ndarray, " n"], chances: Int[np.ndarray, " n"]) -> bytes:
    """Range code of bits that are true with probabilities of their own, in units of 2^-16, from 1 to 2^16 - 1."""
    coder = _STREAM.stack.AnsCoder()
    coder.encode_reverse(bits.astype(np.int32), _BERNOULLI, chances / 2.0**16)
    return coder.get_compressed().astype("<u4").tobytes()


def decode_bits(data: bytes | memoryview, chances: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """What `encode_bits` wrote.

    Raises:
        DamagedError: no such code.
    """
    return np.asarray(_coder(data).decode(_BERNOULLI, chances / 2.0**16)).astype(bool)


def _coder(data: bytes | memoryview) -> Any:
    if len(data) % 4:
        raise DamagedError("words of range coding cut short")
    try:
        return _STREAM.stack.AnsCoder(np.frombuffer(data, "<u4").astype(np.uint32))
    except ValueError as error:
        raise DamagedError(str(error)) from error


def _block(kind: int, *, number: int | None = None, blocks: tuple[bytes, ...] = ()) -> bytes:
    out = Writer()
    out.number(kind)
    if number is not None:
        out.number(number)
    for block in blocks:
        out.block(block)
    return out.done()


def _fixed(symbols: Int[np.ndarray, " n"]) -> bytes:
    """All at the same width, the highest bit first."""
    width = int(symbols.max()).bit_length()
    bits = np.empty((len(symbols), width), np.uint8)
    for place in range(width):
        bits[:, width - 1 - place] = symbols >> place & 1
    return _block(_FIXED, number=width, blocks=(np.packbits(bits).tobytes(),))


def _read_fixed(reader: Reader, count: int) -> UInt16[np.ndarray, " count"]:
    width, data = reader.number(16), reader.block()
    if width < 1 or len(data) != -(-count * width // 8):
        raise DamagedError(f"{len(data)} bytes for {count} symbols of {width} bits")
    if width in (8, 16):
        return np.frombuffer(data, f">u{width // 8}").astype(np.uint16)
    found = np.zeros(count, np.uint16)
    for start in range(0, count, _CHUNK):  # one bit takes a byte
        own = found[start : start + _CHUNK]
        bits = bits_of(data[start * width // 8 : (start + _CHUNK) * width // 8 + 1])[: len(own) * width]
        for place in bits.reshape(len(own), width).T:
            own[:] = own << 1 | place
    return found


def _ans(symbols: Int[np.ndarray, " n"], counts: Int[np.ndarray, " alphabet"]) -> bytes:
    table = min((_rounded(counts, bits) for bits in _PRECISIONS), key=lambda table: _total_bits(counts, table))
    coder = _STREAM.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), _model(table))
    words = coder.get_compressed().astype("<u4").tobytes()
    return _block(_ANS, blocks=(_table(table), words))


def _read_ans(data: memoryview, table: Int[np.ndarray, " alphabet"], count: int) -> UInt16[np.ndarray, " count"]:
    if np.count_nonzero(table) < 2:
        raise DamagedError("range coding without a table")
    return np.asarray(_coder(data).decode(_model(table), count)).astype(np.uint16)


def _model(table: Int[np.ndarray, " alphabet"]) -> Any:
    """Frequencies at most 2^16 are exact in float32: encoder and decoder have the same model on every machine."""
    return _STREAM.model.Categorical(_probabilities(table), perfect=False)


def _probabilities(table: Int[np.ndarray, " alphabet"]) -> Float[np.ndarray, " alphabet"]:
    return table.astype(np.float32)


def _rounded(counts: Int[np.ndarray, " alphabet"], bits: int) -> Int[np.ndarray, " alphabet"]:
    """Frequencies of that precision, none of a symbol that occurs 0."""
    scaled = np.maximum(1, np.rint(counts / counts.sum() * 2**bits)).astype(np.int64)
    return np.where(counts > 0, scaled, 0)


def _total_bits(counts: Int[np.ndarray, " alphabet"], table: Int[np.ndarray, " alphabet"]) -> float:
    used = counts > 0
    return float(np.sum(counts[used] * np.log2(table.sum() / table[used])) + np.sum(_gamma_lengths(table + 1)))


def _huffman(symbols: Int[np.ndarray, " n"], counts: Int[np.ndarray, " alphabet"]) -> bytes:
    lengths = huffman.code_lengths(counts)
    return _block(_HUFFMAN, blocks=(_table(lengths), huffman.encode(symbols, lengths)))


def _read_huffman(data: memoryview, lengths: Int[np.ndarray, " alphabet"], count: int) -> UInt16[np.ndarray, " count"]:
    if lengths.max(initial=0) > huffman.LONGEST or not huffman.is_complete(lengths):
        raise DamagedError("lengths that are no Huffman code")
    return huffman.decode(data, lengths, count)


def _table(values: Int[np.ndarray, " alphabet"]) -> bytes:
    """Small numbers in Elias' gamma code: v + 1 as (its length - 1) zeros, then its bits."""
    numbers = values + 1
    lengths = _gamma_lengths(numbers)
    ends = np.cumsum(lengths)
    bits = np.zeros(int(ends[-1]), np.uint8)
    for place in range(int(numbers.max()).bit_length()):
        here = (lengths + 1) // 2 > place
        bits[ends[here] - 1 - place] = numbers[here] >> place & 1
    out = Writer()
    out.number(len(values))
    out.block(np.packbits(bits).tobytes())
    return out.done()


def _gamma_lengths(numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return 2 * np.floor(np.log2(numbers)).astype(np.int64) + 1


def _read_table(data: memoryview) -> Int[np.ndarray, " alphabet"]:
    reader = Reader(data)
    size = reader.number(LARGEST_ALPHABET)
    bits = bits_of(reader.block())
    reader.finish()
    ones = np.flatnonzero(bits)
    values, at = np.zeros(size, np.int64), 0
    for i in range(size):
        place = np.searchsorted(ones, at)
        first = int(ones[place]) if place < len(ones) else len(bits)
        width = first - at + 1
        if width > 20 or first + width > len(bits):
            raise DamagedError("a table cut short")
        values[i] = int("".join(map(str, bits[first : first + width])), 2) - 1
        at = first + width
    if len(bits) - at >= 8:
        raise DamagedError("a table with bytes left")
    return values

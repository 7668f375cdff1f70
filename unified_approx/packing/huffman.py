"""Canonical Huffman codes, as Deep Compression has them; decoding is one table look-up a symbol, compiled."""

import heapq
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8, UInt16

LONGEST = 16  # bits of a code word: the decoder's table has 2^16 entries


def code_lengths(counts: Int[np.ndarray, " symbols"]) -> Int[np.ndarray, " symbols"]:
    """Bits of every symbol's code word, 0 for those that do not occur; at least 1, at most `LONGEST`.

    Rare symbols are counted a little higher until no word is too long, which costs next to nothing.
    """
    used = np.flatnonzero(counts)
    least = 1
    while True:
        lengths = np.zeros(len(counts), np.int64)
        lengths[used] = _optimal(np.maximum(counts[used], least))
        if lengths.max(initial=0) <= LONGEST:
            return lengths
        least *= 2


def _optimal(counts: Int[np.ndarray, " used"]) -> Int[np.ndarray, " used"]:
    """Huffman's lengths."""
    if len(counts) == 1:
        return np.ones(1, np.int64)
    parent = np.zeros(2 * len(counts) - 1, np.int64)
    heap = [(int(count), i) for i, count in enumerate(counts)]
    heapq.heapify(heap)
    for new in range(len(counts), 2 * len(counts) - 1):
        (a, i), (b, j) = heapq.heappop(heap), heapq.heappop(heap)
        parent[i] = parent[j] = new
        heapq.heappush(heap, (a + b, new))
    depth = np.zeros(2 * len(counts) - 1, np.int64)
    for i in range(2 * len(counts) - 3, -1, -1):
        depth[i] = depth[parent[i]] + 1
    return depth[: len(counts)]


def code_words(lengths: Int[np.ndarray, " symbols"]) -> Int[np.ndarray, " symbols"]:
    """The canonical code words: in order of length, then of symbol."""
    words, word, before = np.zeros(len(lengths), np.int64), 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length == 0:
            continue
        word <<= length - before
        words[symbol], before = word, length
        word += 1
    return words


def is_complete(lengths: Int[np.ndarray, " symbols"]) -> bool:
    """Whether every sequence of bits can be read: Kraft's sum is 1, or there is one symbol."""
    used = lengths[lengths > 0]
    return len(used) == 1 or (len(used) > 0 and int(np.sum(2 ** (LONGEST - used))) == 2**LONGEST)


def encode(symbols: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " alphabet"]) -> bytes:
    """The code words, most significant bit first."""
    own, words = lengths[symbols], code_words(lengths)[symbols]
    ends = np.cumsum(own)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(own.max(initial=0))):
        here = own > place
        bits[ends[here] - 1 - place] = words[here] >> place & 1
    return np.packbits(bits).tobytes()


def decode(data: bytes | memoryview, lengths: Int[np.ndarray, " alphabet"], count: int) -> UInt16[np.ndarray, " count"]:
    """What `encode` wrote; where the data end too early, any symbols."""
    words, longest = code_words(lengths), LONGEST
    symbols, steps = np.zeros(2**longest, np.int32), np.ones(2**longest, np.int32)
    for symbol in np.flatnonzero(lengths):
        first, span = words[symbol] << (longest - lengths[symbol]), 2 ** (longest - int(lengths[symbol]))
        symbols[first : first + span], steps[first : first + span] = symbol, lengths[symbol]
    padded = np.zeros(_round_up(len(data) + 4), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    found = _walk(jnp.asarray(padded), jnp.asarray(symbols), jnp.asarray(steps), _round_up(count))
    return np.asarray(found[:count]).astype(np.uint16)


def _round_up(size: int) -> int:
    """To one of few sizes, an eighth more at most beyond 2^13: each is compiled for."""
    step = 2 ** max(10, size.bit_length() - 4)
    return -(-size // step) * step


@partial(jax.jit, static_argnums=3)
def _walk(data: UInt8[Array, " bytes"], symbols: Array, steps: Array, count: int) -> Int[Array, " count"]:
    last = len(data) - 3

    def step(place: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        byte, bit = place
        window = [data[jnp.minimum(byte + i, last + 2)].astype(jnp.int32) for i in range(3)]
        seen = (window[0] << 16 | window[1] << 8 | window[2]) >> (8 - bit) & 0xFFFF
        bit = bit + steps[seen]
        return (jnp.minimum(byte + bit // 8, last), bit % 8), symbols[seen]

    start = jnp.zeros((), jnp.int32)
    return jax.lax.scan(step, (start, start), None, length=count)[1]

"""Bytes read and written piece by piece; reading checks every length."""

import zlib

import numpy as np
from jaxtyping import UInt8

_LONGEST = 10  # bytes of a number below 2^70


class DamagedError(ValueError):
    """A stream that says what cannot be."""


class Writer:
    """Bytes, one piece after the other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def number(self, value: int) -> None:
        """A whole number >= 0, in as many bytes as it needs: seven bits a byte, lowest first."""
        out = bytearray()
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
        self._parts.append(bytes(out))

    def block(self, data: bytes) -> None:
        """Its length, and the bytes."""
        self.number(len(data))
        self._parts.append(data)

    def done(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)


class Reader:
    """Takes a stream apart, in the order in which it was written.

    Attributes:
        left: bytes not yet taken.
    """

    def __init__(self, data: bytes | memoryview):
        self._data, self._at = memoryview(data), 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self._at

    def number(self, largest: int) -> int:
        """What `Writer.number` wrote.

        Raises:
            DamagedError: a number above `largest`.
        """
        value = 0
        for i in range(_LONGEST):
            byte = self.take(1)[0]
            value |= (byte & 127) << (7 * i)
            if byte < 128:
                break
        else:
            raise DamagedError("a number without end")
        if value > largest:
            raise DamagedError(f"the number {value} where at most {largest} can be")
        return value

    def block(self) -> memoryview:
        """What `Writer.block` wrote."""
        return self.take(self.number(self.left))

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        if count > self.left:
            raise DamagedError(f"{count} bytes are needed, {self.left} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def finish(self) -> None:
        """See that nothing is left."""
        if self.left:
            raise DamagedError(f"{self.left} bytes too many")


def bits_of(data: bytes | memoryview) -> UInt8[np.ndarray, " bits"]:
    """One entry a bit."""
    return np.unpackbits(np.frombuffer(data, np.uint8))


def inflate(data: bytes | memoryview, limit: int) -> bytes:
    """What zlib deflated, if it is no longer than the limit.

    Raises:
        DamagedError: no such data, or more of it.
    """
    machine = zlib.decompressobj()
    try:
        out = machine.decompress(bytes(data), limit)
    except zlib.error as error:
        raise DamagedError(str(error)) from error
    if not machine.eof or machine.unused_data:
        raise DamagedError(f"a header cut short, or longer than {limit} bytes")
    return out

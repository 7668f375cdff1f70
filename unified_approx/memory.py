"""Memory policy of a process of our own: the command line and the experiments."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_COMPACT = {_MMAP_THRESHOLD: 1 << 20, _ARENA_MAX: 1}
_FAST = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 256 << 20, _ARENA_MAX: 0}  # where glibc's own adaptation ends


def _set(values: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([bool(mallopt(name, value)) for name, value in values.items()])


@contextmanager
def compact() -> Iterator[bool]:
    """Inside, the C library gives large freed buffers back at once; yields False where it is not glibc.

    Compression allocates and frees feature maps of ever other sizes, from many threads. By default glibc keeps much of
    that: the peak of a ResNet-20 run is twice as high. A network in use, though, allocates the same buffers in every
    call, and would have them mapped again each time, at up to half its speed: so this ends with the solves. A setting
    of the whole process, which libraries should not change.
    """
    try:
        yield _set(_COMPACT)
    finally:
        _set(_FAST)

"""Memory policy of a process of our own: the command line and the experiments."""

import ctypes

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of glibc's malloc.h


def return_freed_memory() -> bool:
    """Let the C library give large freed buffers back at once, and keep its arenas few; False where it is not glibc.

    Compression allocates and frees feature maps of ever other sizes, from many threads. By default glibc keeps much of
    that: the peak of a ResNet-20 run is twice as high. A setting of the whole process, so libraries should not call it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 20)) and bool(mallopt(_ARENA_MAX, 1))

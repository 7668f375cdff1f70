"""How many threads LAPACK takes for a layer."""

from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import threadpool_limits

_SINGLE_BELOW = 2048  # columns


def lapack_threads(p: int) -> AbstractContextManager[Any]:
    """One thread inside for layers of few columns, as many as LAPACK likes for others.

    Below a few thousand columns a second thread costs more than it saves, and far more on a busy machine.
    """
    return threadpool_limits(limits=1 if p < _SINGLE_BELOW else None, user_api="blas")

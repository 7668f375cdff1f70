"""Outputs of a network's modules, taken while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flax import nnx

from unified_approx.assemble import get, homes, put
from unified_approx.sites import Path


class _Tap:
    """Stands in for a module and notes what it gives."""

    def __init__(self, module: Any):
        self._module = module
        self.seen: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        out = self._module(*args, **kwargs)
        self.seen.append(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def _tapped(model: nnx.Module, paths: Sequence[Path]) -> Iterator[list[_Tap]]:
    """The network with taps around the modules at the paths; afterwards as it was."""
    places = [homes(model, path) for path in paths]
    originals = [get(model, path) for path in paths]
    taps = [_Tap(module) for module in originals]
    # Inner modules first, last out: an outer module's tap does not hide the way to the inner one's home.
    try:
        for tap, paths_of_one in zip(taps, places, strict=True):
            for path in paths_of_one:
                put(model, path, tap)
        yield taps
    finally:
        for module, paths_of_one in zip(reversed(originals), reversed(places), strict=True):
            for path in paths_of_one:
                put(model, path, module)


def outputs_of(
    model: nnx.Module, paths: Sequence[Path], run: Callable[[nnx.Module], Any]
) -> tuple[Any, dict[Path, list[Any]]]:
    """What `run(model)` gives, and what each of the modules gave in it, call by call.

    The model is changed while it runs, and only then: hand over one that nobody else has, such as a merged one.

    Args:
        model: the network.
        paths: of modules, none of them the network itself. Modules that the network only runs inside transformations
            of its own (`nnx.jit`, `nnx.scan`, `nnx.remat`) cannot be taken.
        run: runs it.
    """
    with _tapped(model, sorted(paths, key=len, reverse=True)) as taps:
        result = run(model)
    ordered = dict(zip(sorted(paths, key=len, reverse=True), taps, strict=True))
    return result, {path: ordered[path].seen for path in paths}

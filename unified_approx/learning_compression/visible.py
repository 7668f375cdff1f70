"""What can be seen of a function from outside, to tell one run's from another's."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

_DEPTH = 8  # of functions within functions


def name_of(thing: Any) -> str | None:
    """The qualified name of a function, or of the type of what else can be called; None of None."""
    if thing is None:
        return None
    named = thing.func if isinstance(thing, partial) else thing
    return getattr(named, "__qualname__", None) or type(named).__qualname__


def settings_of(make: Any, depth: int = _DEPTH) -> Any:
    """Names and plain values in a function, its closure and its defaults, in JSON's types.

    Arrays and other objects show their type alone: their text may differ from one process to the next.
    """
    if make is None or isinstance(make, bool | int | float | str):
        return make
    if depth == 0:
        return name_of(make)
    inner = depth - 1
    if isinstance(make, dict):
        return {str(key): settings_of(value, inner) for key, value in make.items()}
    if isinstance(make, list | tuple):
        return [settings_of(value, inner) for value in make]
    if isinstance(make, partial):
        return [settings_of(make.func, inner), settings_of(make.args, inner), settings_of(make.keywords, inner)]
    if is_dataclass(make) and not isinstance(make, type):
        own = {field.name: settings_of(getattr(make, field.name), inner) for field in fields(make)}
        return {"name": name_of(make), **own}
    return {"name": name_of(make), **_inside(make, inner)} if hasattr(make, "__code__") else name_of(make)


def _inside(function: Callable[..., Any], depth: int) -> dict[str, Any]:
    found = {}
    code: Any = getattr(function, "__code__", None)
    for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False):
        try:
            found[name] = settings_of(cell.cell_contents, depth)
        except ValueError:  # a cell that nothing was put into yet
            found[name] = None
    defaults = getattr(function, "__defaults__", None) or ()
    return {**found, "defaults": [settings_of(value, depth) for value in defaults]}

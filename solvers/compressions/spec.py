"""Compressions as JSON, for files: only what `solvers.compressions` lists is ever made from one."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from solvers import compressions
from solvers.compressions.base import Compression
from solvers.prox import Grouping
from solvers.terms import MatrixShape

_PARTS = {"Grouping": Grouping, "MatrixShape": MatrixShape}


def _known() -> dict[str, type]:
    listed = {name: getattr(compressions, name) for name in compressions.__all__}
    forms = {n: c for n, c in listed.items() if isinstance(c, type) and issubclass(c, Compression) and is_dataclass(c)}
    return forms | _PARTS


def is_known(compression: Compression) -> bool:
    """Whether the form, and every part of it, can be read back."""
    own = [getattr(compression, field.name) for field in fields(compression)]  # pyright: ignore[reportArgumentType]
    nested = [part for value in own for part in (value if isinstance(value, tuple) else (value,))]
    return _known().get(type(compression).__name__) is type(compression) and all(
        is_known(part) for part in nested if isinstance(part, Compression)
    )


def to_spec(value: Any) -> Any:
    """A compression, or what its fields hold, in JSON's types."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **{f.name: to_spec(getattr(value, f.name)) for f in fields(value)}}
    return [to_spec(item) for item in value] if isinstance(value, tuple) else value


def from_spec(spec: Any) -> Any:
    """What `to_spec` came from.

    Raises:
        ValueError: a kind that this version does not know, or arguments that it does not take.
    """
    if isinstance(spec, list):
        return tuple(from_spec(item) for item in spec)
    if not isinstance(spec, Mapping):
        return spec
    known, kind = _known(), spec.get("kind")
    if kind not in known:
        raise ValueError(f"kind: {kind!r} is no compression of this version ({', '.join(known)}); upgrade")
    try:
        return known[kind](**{name: from_spec(value) for name, value in spec.items() if name != "kind"})
    except TypeError as error:
        raise ValueError(f"kind: {kind!r} cannot be made of {spec} ({error}); upgrade") from error

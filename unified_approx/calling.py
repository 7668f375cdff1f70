"""How a network is called, where that is the caller's to say."""

from collections.abc import Callable
from typing import Any

Call = Callable[..., Any]
"""`call(model, *inputs)`, the network's outputs in any nesting."""


def forward(model: Any, *inputs: Any) -> Any:
    """`model(*inputs)`."""
    return model(*inputs)

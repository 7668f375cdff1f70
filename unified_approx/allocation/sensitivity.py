"""How much the network's output feels each layer's error, and the menus that follow from it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path as FilePath

import numpy as np
from jaxtyping import Float

from unified_approx.allocation.menu import Item, LayerMenu
from unified_approx.allocation.timing import Clock
from unified_approx.files import replacing

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement: the layer alone at one size.

    Attributes:
        error: relative squared error before the activation.
        loss: distance of the network's outputs from the original's, in nats.
    """

    error: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The table behind an allocation. It depends on the network, the data and the grouping, not on the budget.

    Attributes:
        identity: of the network, the data and the settings it was measured with.
        method: "kl" (measured one layer at a time) or "fisher" (second-order expansion of that).
        menus: of every layer that may be compressed, losses filled in.
        measured: per layer what was measured, by increasing error.
        seconds: that measuring took.
        clock: what the layers and the network take dense on this machine, where sizes were timed.
    """

    identity: str
    method: str
    menus: tuple[LayerMenu, ...]
    measured: tuple[tuple[Measured, ...], ...]
    seconds: float
    clock: Clock | None = None

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON."""
        with replacing(path) as partial:
            partial.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1))

    def plot(self, path: str | PathLike[str]) -> FilePath:
        """Write a picture: the expected loss over the size of each layer."""
        from unified_approx.plots import sensitivity_curves

        layers = {}
        for menu in self.menus:
            items = sorted((item for item in menu.items if item.form != "dense"), key=lambda item: item.values)
            total = menu.shape[0] * menu.shape[1]
            layers[menu.name] = [item.values / total for item in items], [item.loss for item in items]
        return sensitivity_curves(path, layers, title=f"one layer at a time, {self.method}")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Sensitivity":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a sensitivity table, or of a newer version.
        """
        try:
            content = json.loads(FilePath(path).read_text())
            if content.pop("version") != _VERSION:
                raise ValueError("another version")
            menus = tuple(
                LayerMenu(**{**m, "shape": tuple(m["shape"]), "items": tuple(Item(**i) for i in m["items"])})
                for m in content.pop("menus")
            )
            measured = tuple(tuple(Measured(**point) for point in points) for points in content.pop("measured"))
            clock = content.pop("clock")
            return cls(menus=menus, measured=measured, clock=None if clock is None else Clock(**clock), **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"sensitivity: {path} is no sensitivity table that this version reads ({error})"
            ) from error


def spread(items: Sequence[Item], levels: Sequence[float]) -> list[Item]:
    """The items whose errors are nearest to the given levels, by increasing error, none twice."""
    smaller = [item for item in items if item.form != "dense" and item.error > 0]
    if not smaller:
        return []
    logs = np.log([item.error for item in smaller])
    chosen = {int(np.argmin(np.abs(logs - np.log(level)))) for level in levels}
    return sorted((smaller[i] for i in chosen), key=lambda item: item.error)


def with_losses(items: Sequence[Item], measured: Sequence[Measured]) -> tuple[Item, ...]:
    """The items with losses interpolated in the logarithms; beyond what was measured, loss is proportional to error."""
    return tuple(replace(item, loss=_interpolate(item.error, measured)) for item in items)


def _interpolate(error: float, measured: Sequence[Measured]) -> float:
    if error <= 0 or not measured:
        return max(error, 0.0)
    errors: Float[np.ndarray, " k"] = np.array([m.error for m in measured])
    # Noise of a small sample must not make more error look better.
    losses = np.maximum.accumulate(np.maximum([m.loss for m in measured], 1e-9))
    if error <= errors[0]:
        return float(losses[0] * error / errors[0])
    if error >= errors[-1]:
        return float(losses[-1] * error / errors[-1])
    return float(np.exp(np.interp(np.log(error), np.log(errors), np.log(losses))))

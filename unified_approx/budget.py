"""How much of a network may remain, or how much accuracy may go."""

from dataclasses import asdict, dataclass
from math import isfinite


class UnreachableBudgetError(ValueError):
    """A budget below what the layers can reach."""


COSTS = ("params", "macs", "bytes", "latency")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Fractions compressed / original of the whole network, layers that stay as they are included.

    Several together must all hold. In a `Rule` a budget is a fraction of each layer that the rule names, and `params`
    is the only one it can have.

    Attributes:
        params: stored values, in (0, 1]; indices of kept columns count as stored, 32 bits to a value.
        macs: multiply-adds per example, in (0, 1].
        bytes: of the stored weights and indices, in (0, 1].
        latency: seconds per batch on this machine, against the original in its fastest dense form, in (0, 1].
        max_drop: instead of all others, the largest loss of accuracy in points (percent of the examples): the smallest
            network that keeps it on the held-out calibration examples (images in shifted copies); without labels, the
            largest share of answers that change.
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if not given:
            raise ValueError("budget: it limits nothing; give a fraction, for example Budget(params=0.5)")
        for name, value in given.items():
            number = isinstance(value, int | float) and isfinite(value)
            if name == "max_drop":
                if not (number and 0 <= value <= 100):
                    raise ValueError(f"budget: max_drop={value!r} is not a number of points in [0, 100]")
            elif not (number and 0 < value <= 1):
                raise ValueError(
                    f"budget: {name}={value!r} is not a fraction in (0, 1]; {name}=0.5 keeps half of the {name}"
                )
        if self.max_drop is not None and len(given) > 1:
            raise ValueError(
                f"budget: {self.describe()} contradicts itself: max_drop asks for the smallest network that keeps the "
                "accuracy, the others for the best network of a size; give one or the other"
            )

    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def describe(self) -> str:
        """As reports and command lines write it."""
        return ",".join(f"{name}={value:g}" for name, value in self.given().items())

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `params=0.5` or `params=0.5,macs=0.4`, the command line's spelling."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            try:
                number = float(value)
            except ValueError:
                number = None
            if name not in (*COSTS, "max_drop") or number is None or name in limits:
                raise ValueError(
                    f"budget: {text!r} is not understood; write NAME=FRACTION with NAME one of {', '.join(COSTS)}, "
                    "several separated by commas, for example params=0.5,macs=0.4, or max_drop=POINTS"
                )
            limits[name] = number
        return cls(**limits)

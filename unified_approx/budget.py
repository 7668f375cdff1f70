"""How much of a network may remain."""

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Fractions compressed / original. Every selected layer gets the same fraction.

    Attributes:
        params: stored parameters of the selected layers, in (0, 1]; indices of kept columns count as stored.
    """

    params: float

    def __post_init__(self) -> None:
        if not (isinstance(self.params, int | float) and isfinite(self.params) and 0 < self.params <= 1):
            raise ValueError(
                f"budget: params={self.params!r} is not a fraction in (0, 1]; params=0.5 keeps half of the parameters"
            )

    def describe(self) -> str:
        """As reports and command lines write it."""
        return f"params={self.params:g}"

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `params=0.5`, the command line's spelling."""
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = None
        if name.strip() != "params" or number is None:
            raise ValueError(f"budget: {text!r} is not understood; write params=FRACTION, for example params=0.5")
        return cls(params=number)

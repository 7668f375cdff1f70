"""Schedules of mu."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True)
class MuSchedule(Sequence[float]):
    """A list of mu in which each value is used several times before the multipliers move.

    Attributes:
        values: increasing.
        repeat: L and C steps at each value; the multipliers are updated after the last of them.
    """

    values: tuple[float, ...]
    repeat: int = 1

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat: {self.repeat}; give at least 1")

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...
    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        return tuple(self)[index]

    def __len__(self) -> int:
        return len(self.values) * self.repeat

    def __iter__(self) -> Iterator[float]:
        return (value for value in self.values for _ in range(self.repeat))

    def moves_multipliers(self, step: int) -> bool:
        """Whether the multipliers are updated after a step, counted from 0."""
        return (step + 1) % self.repeat == 0


def exponential(first: float, factor: float, steps: int, repeat: int = 1) -> MuSchedule:
    """first factor^i for i = 0 ... steps - 1, each `repeat` times.

    The experiments of the LC papers use, of LeNet-300-100 with 40 steps, 9e-5 x 1.1 for pruning, quantization and sums
    of both, 9e-5 x 1.4 for pruning, low rank and quantization of one layer each, 1e-3 x 1.3 for low rank and 1e-3 x 1.1
    for selected ranks; for selected ranks of ResNets 1e-3 x 1.25 with 50 steps, of VGG and NIN 2e-5 x 1.2 with 60.

    Raises:
        ValueError: a value that is not positive, a factor below 1, or no steps.
    """
    if not first > 0 or not factor >= 1 or steps < 1:
        raise ValueError(f"first, factor, steps: {first}, {factor}, {steps}; give first > 0, factor >= 1, steps >= 1")
    return MuSchedule(tuple(first * factor**i for i in range(steps)), repeat)


def checked_schedule(mu_schedule: Sequence[float]) -> list[float]:
    """The schedule as floats.

    Raises:
        ValueError: no numbers, one that is not positive, or one that is smaller than the one before.
    """
    mus = [float(mu) for mu in mu_schedule]
    if not mus or not all(np.isfinite(mu) and mu > 0 for mu in mus):
        raise ValueError(f"mu_schedule: {mus}; give positive numbers")
    for i, (before, after) in enumerate(zip(mus, mus[1:], strict=False)):
        if after < before:
            raise ValueError(
                f"mu_schedule: it falls from {before:g} to {after:g} at step {i + 1}; give increasing numbers"
            )
    return mus

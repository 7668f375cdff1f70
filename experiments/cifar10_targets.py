"""What the rows of the CIFAR-10 table are held to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unified_approx.results import check


@dataclass(frozen=True)
class Target:
    """A figure that a network must reach once it is so much smaller.

    Attributes:
        network: its name.
        trained: whether it was trained after the compression, for 10 epochs at most.
        at: ratios from which the target counts.
        figure: field of the row; "speedup/macs_ratio" is their quotient.
        relation: of the figure to the value.
        value: what must be reached.
    """

    network: str
    trained: bool
    at: Mapping[str, float]
    figure: str
    relation: str
    value: float

    def counts(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is of such a network."""
        same = row["network"] == self.network and (row["finetune_epochs"] > 0) == self.trained
        return same and all(row[ratio] >= least for ratio, least in self.at.items())

    def of(self, row: Mapping[str, Any]) -> float:
        """The row's figure."""
        return row["speedup"] / row["macs_ratio"] if "/" in self.figure else row[self.figure]


TARGETS = (
    Target("vgg16", False, {"cr": 4.44}, "drop", "<=", 0.40),
    Target("vgg16", False, {"cr": 4.44}, "speedup", ">=", 2.2),
    Target("vgg16", False, {"macs_ratio": 3.0}, "speedup/macs_ratio", ">=", 0.7),
    Target("vgg16", True, {"cr": 15.0, "macs_ratio": 5.0}, "drop", "<=", 0.40),
    Target("vgg16", True, {"macs_ratio": 5.0}, "speedup/macs_ratio", ">=", 0.5),
    Target("resnet56", False, {"macs_ratio": 2.0}, "accuracy", ">=", 92.5),
    Target("resnet56", True, {"macs_ratio": 2.1}, "accuracy", ">=", 93.0),
    Target("resnet20", False, {"macs_ratio": 1.5}, "accuracy", ">=", 91.5),
    Target("resnet20", False, {"macs_ratio": 2.0}, "accuracy", ">=", 91.0),
    Target("resnet20", True, {"params_ratio": 3.0, "macs_ratio": 3.0}, "drop", "<=", 1.0),
)


def checks_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The hardest target of each figure that counts for a row; none for rows that others are compared with."""
    if row["form"] != "best" or row["allocation"] != "kl":
        return {}
    chosen = {target.figure: target for target in TARGETS if target.counts(row)}  # the last is the hardest
    return {figure: check(target.of(row), target.relation, target.value) for figure, target in chosen.items()}

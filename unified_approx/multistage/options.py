"""What decides the ranks and their order, and a line of the history."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from solvers.factor_sizes import FACTORED, Ranks
from solvers.rank_rules import RankRule
from unified_approx.budget import Budget
from unified_approx.rules import check_pattern


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the history.

    Attributes:
        number: from 1.
        stage: the pass over the layers that it belongs to, from 1.
        ranks: of the layers of this step that were factored, by name.
        notes: why the others were not, and what else the rule said, by name.
        params: stored values of the network after it.
        macs: multiply-adds per example after it.
        warnings: what the user should know.
    """

    number: int
    stage: int
    ranks: dict[str, Ranks]
    notes: dict[str, str]
    params: int
    macs: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MuscoOptions:
    """What decides the ranks and their order.

    Attributes:
        rank_rule: of `solvers.rank_rules`; None: only the layers in `ranks` are compressed.
        decomposition: of convolutions with a window: one of `solvers.factor_sizes.FACTORED`. 1x1 convolutions and
            dense layers become two low-rank factors.
        layers_per_step: how many layers between two trainings; None: all.
        stages: passes over the layers, at most.
        ranks: by layer name, in place of the rule's: (r,), for "tucker2" (outputs, inputs); None leaves a layer alone.
        keep: regular expressions for whole names of further layers to leave alone.
        target: stop once the whole network is within it: `Budget(params=..., macs=..., bytes=...)`.
        data_aware: fit each layer's response on the calibration data; otherwise its weights alone.
        round_to: ranks are rounded down to multiples of it.
    """

    rank_rule: RankRule | None
    decomposition: str = "tucker2"
    layers_per_step: int | None = None
    stages: int = 1
    ranks: Mapping[str, Ranks | None] | None = None
    keep: Sequence[str] = ()
    target: Budget | None = None
    data_aware: bool = True
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.decomposition not in FACTORED:
            known = ", ".join(FACTORED)
            raise ValueError(f"decomposition: {self.decomposition!r} is unknown; choose one of {known}")
        for name in ("layers_per_step", "stages", "round_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; give at least 1")
        for pattern in self.keep:
            check_pattern("keep", pattern)
        if self.rank_rule is None and not any(self.ranks or {}):
            raise ValueError("rank_rule: None; give a rule, for example Evbmf(), or ranks of some layers")
        if self.target is not None and (self.target.max_drop is not None or self.target.latency is not None):
            raise ValueError(f"target: {self.target.describe()}; it takes params, macs and bytes")

    def describe(self) -> str:
        """As reports write it."""
        rule = "given ranks" if self.rank_rule is None else repr(self.rank_rule)
        return f"musco {self.decomposition}, {rule}, {self.stages} stages"

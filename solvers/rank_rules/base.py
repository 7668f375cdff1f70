"""What a rule is, and what becomes of its choice."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from solvers.factor_sizes import Ranks
from solvers.rank_rules.problem import RankProblem

COSTS = ("params", "macs")


@dataclass(frozen=True)
class RankChoice:
    """What a rule says of one layer.

    Attributes:
        ranks: None if the layer stays as it is.
        note: why, or what the user should know; empty if there is nothing to say.
    """

    ranks: Ranks | None
    note: str = ""


@runtime_checkable
class RankRule(Protocol):
    """Chooses the ranks of one layer at a time.

    Attributes:
        needs: what of the network it looks at beside the weights: "nothing", "response" or "accuracy".
    """

    @property
    def needs(self) -> str:
        """See the class."""
        ...

    def choose(self, problem: RankProblem) -> RankChoice:
        """Ranks within [1, present ranks], or None; not yet compared with what the layer costs."""
        ...


def settle(choice: RankChoice, problem: RankProblem, round_to: int = 1) -> RankChoice:
    """The choice, unless the layer would not become smaller, or need more multiply-adds: then it stays as it is.

    The note says why. Of a convolution with strides, the factors before the window run at every input position.

    Args:
        choice: of a rule.
        problem: the layer.
        round_to: ranks are rounded down to multiples of it; below one multiple they stay.
    """
    if choice.ranks is None:
        return choice
    ranks = tuple(r if r < round_to else r // round_to * round_to for r in choice.ranks)
    if all(r >= most for r, most in zip(ranks, problem.largest, strict=True)):
        settled = "full rank: nothing to leave out" if problem.previous is None else "the ranks have settled"
        return RankChoice(None, _joined(choice.note, settled))
    now, then = problem.current_cost("params"), problem.cost(ranks, "params")
    if then >= now:
        why = f"ranks {ranks} would store {then:,.0f} values in place of {now:,.0f}"
        return RankChoice(None, _joined(choice.note, why))
    now, then = problem.current_cost("macs"), problem.cost(ranks, "macs")
    if then > now:
        why = f"ranks {ranks} would need {then:,.0f} multiply-adds in place of {now:,.0f}"
        return RankChoice(None, _joined(choice.note, why))
    return RankChoice(ranks, choice.note)


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)

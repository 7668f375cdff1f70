"""Which layers are compressed, and how: the first rule whose pattern matches a layer's name wins."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from unified_approx.budget import Budget
from unified_approx.capture import LayerSite, Skipped


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to do with the layers that a pattern names.

    Attributes:
        path: regular expression for the whole layer name, for example `blocks/.*` or `fc`.
        keep: leave these layers as they are.
        budget: in place of the run's budget: `Budget(params=...)`, a fraction of each layer's own parameters.
        lambda_sparse: in place of the run's penalty weight, a fraction of its maximum.
        lambda_rank: in place of the run's penalty weight, a fraction of its maximum.
        form: in place of the run's form, for example "two_level".
        ranks: of that form, one of `solvers.factor_sizes.FACTORED`, in place of a budget: (r,), for "tucker2" (outputs,
            inputs).
        group: "column" or "channel", in place of the run's.
    """

    path: str
    keep: bool = False
    budget: Budget | None = None
    lambda_sparse: float | None = None
    lambda_rank: float | None = None
    form: str | None = None
    group: str | None = None
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and (self.form is None or self.budget is not None or self.keep):
            raise ValueError(
                f"rules: {self.path!r} has ranks; name their form, as in Rule(path={self.path!r}, form='tucker2', "
                "ranks=(16, 16)), and give no budget and no keep=True"
            )
        if self.budget is not None and list(self.budget.given()) != ["params"]:
            raise ValueError(
                f"rules: the budget of {self.path!r} is {self.budget.describe()}; a rule's budget is a fraction of "
                "each layer's own parameters: Budget(params=...)"
            )

    def matches(self, name: str) -> bool:
        """Whether the pattern covers the whole name."""
        return re.fullmatch(self.path, name) is not None


def check_pattern(argument: str, pattern: str) -> None:
    """Raise a ValueError, naming the argument, for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error


def assign(
    rules: Sequence[Rule], sites: Sequence[LayerSite], skipped: Sequence[Skipped]
) -> dict[tuple[str | int, ...], Rule | None]:
    """The first matching rule of each site, None where no rule speaks.

    Raises:
        ValueError: a pattern is no regular expression, a rule matches nothing, or it asks to compress a layer
            that cannot be compressed.
    """
    names = [site.name for site in sites]
    for rule in rules:
        check_pattern("rules", rule.path)
        if any(rule.matches(name) for name in names):
            continue
        refused = [s for s in skipped if rule.matches(s.name)]
        if refused and not rule.keep:
            raise ValueError(
                f"rules: {rule.path!r} names {refused[0].name!r}, which cannot be compressed: {refused[0].reason}; "
                "drop the rule or give it keep=True"
            )
        if not refused:
            raise ValueError(f"rules: {rule.path!r} matches no layer; layers are: {', '.join(names) or 'none'}")
    return {site.path: next((r for r in rules if r.matches(site.name)), None) for site in sites}

"""Tasks as text."""

import pytest

from solvers import compressions
from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    Compression,
    Each,
    LowRank,
    OneOf,
    PruneGroups,
    PruneL0,
    RankSelection,
    powers_of_two,
)
from solvers.prox import CHANNELS
from unified_approx.learning_compression import Task, parse_tasks
from unified_approx.learning_compression.task_language import words

TEXTS = {
    "fc1=prune(0.05)": [Task(path="fc1", compression=PruneL0(0.05))],
    " fc1 = prune(5000, precision=16) ,fc2=quantize(2)": [
        Task(path="fc1", compression=PruneL0(5000, 16)),
        Task(path="fc2", compression=AdaptiveCodebook(2)),
    ],
    "conv[1,2]{1,2}=low_rank(5, scheme=auto)": [Task(path="conv[1,2]{1,2}", compression=LowRank(5, "auto"))],
    r"a(?=b)\(=prune(1)": [],
    "fc.=joint(quantize(2)+prune(1)+each(low_rank(1)))": [
        Task(
            path="fc.",
            compression=Additive((AdaptiveCodebook(2), PruneL0(1), Each((LowRank(1),)))),
            view="vector",
            joint=True,
        )
    ],
    "c=prune_groups(0.5, channels)": [Task(path="c", compression=PruneGroups(0.5, CHANNELS))],
    "c=powers_of_two(0, -3)": [Task(path="c", compression=powers_of_two(0, -3))],
    "c=one_of(prune(1), low_rank(2))": [Task(path="c", compression=OneOf((PruneL0(1), LowRank(2))))],
    "c=sum(prune(1), low_rank(2), rounds=30)": [Task(path="c", compression=Additive((PruneL0(1), LowRank(2)), 30))],
    "c=select_rank(1e-9, cost=macs)": [Task(path="c", compression=RankSelection(1e-9, "macs"))],
    "c=select_rank(1e-9, (3.0, 4.0))": [Task(path="c", compression=RankSelection(1e-9, (3.0, 4.0)))],
}


@pytest.mark.parametrize("text", [text for text, tasks in TEXTS.items() if tasks])
def test_what_a_text_says(text):
    assert parse_tasks(text) == TEXTS[text]


def test_every_compression_has_a_word():
    forms = [getattr(compressions, name) for name in compressions.__all__]
    made = {thing for thing in forms if isinstance(thing, type) and Compression in thing.__mro__}
    without = made - set(words().values()) - {Compression, compressions.FixedCodebook}
    assert not without


BAD = {
    "fc1": "'fc1' is not PATTERN=FORM",
    "fc1=": "has an empty part",
    ",fc1=prune(1)": "has an empty part",
    "fc1=prune": "'prune' is no form; write one of quantize",
    "fc1=prine(3)": "'prine' is unknown; there are quantize",
    "fc1=prune(3": "cannot be read",
    "fc1=prune(1, 2, 3)": "its arguments are .kappa",
    "fc1=prune(kapa=3)": "its arguments are .kappa",
    "fc1=prune(-1)": "'prune.-1.': kappa: -1",
    "fc1=prune(1)-prune(2)": "is no form",
    "fc1=quantize(0)": "k: 0 values",
    "fc1=prune([1][0])": "is no number, word or form",
    "fc1=joint(prune(1), prune(2))": "joint takes one form",
    "fc1=low_rank(2, scheme=foo)": "scheme: 'foo' is unknown",
    "(=prune(1)": "is not PATTERN=FORM",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_texts(text):
    with pytest.raises(ValueError, match=BAD[text]):
        parse_tasks(text)

"""Rules that choose a layer's ranks. A new one is a file here, a line below and a row in the tests.

| rule | what it keeps |
| --- | --- |
| `Evbmf`, `Vbmf` | what variational Bayes takes for signal, weakened towards the present ranks |
| `Rate` | parameters or multiply-adds, divided by a number |
| `Energy` | a share of the energy of the response, or of the weights |
| `Cheapest` | what is worth its price: LC's automatic rank |
| `MaxDrop` | what so many points of accuracy need, tried out or predicted from the layer's error |
"""

from solvers.rank_rules.base import RankChoice, RankRule, settle
from solvers.rank_rules.bayes import Evbmf, Vbmf
from solvers.rank_rules.cheapest import Cheapest
from solvers.rank_rules.energy import Energy
from solvers.rank_rules.max_drop import MaxDrop
from solvers.rank_rules.problem import RankProblem, Trial
from solvers.rank_rules.rate import Rate

__all__ = [
    "Cheapest",
    "Energy",
    "Evbmf",
    "MaxDrop",
    "RankChoice",
    "RankProblem",
    "RankRule",
    "Rate",
    "Trial",
    "Vbmf",
    "settle",
]

"""C steps: the best compressed form of given weights. A new one is a file here, a line below and a row in the tests."""

from solvers.compressions.additive import Additive
from solvers.compressions.base import Compression
from solvers.compressions.each import Each
from solvers.compressions.fixed_codebook import FixedCodebook, binary, fixed_point, powers_of_two
from solvers.compressions.groups import PenaltyGroups, PruneGroups, PruneNofM
from solvers.compressions.half import Half
from solvers.compressions.low_rank import Factors, LowRank, PenaltyNuclear
from solvers.compressions.one_of import OneOf
from solvers.compressions.pruning import PenaltyL0, PenaltyL1, PruneBelow, PruneL0, PruneL1, PruneQuantize
from solvers.compressions.quantization import (
    AdaptiveCodebook,
    Codebook,
    OptimalCodebook,
    ScaledBinary,
    ScaledTernary,
)
from solvers.compressions.rank_selection import RankSelection
from solvers.compressions.tensor import Cp, Tucker2

__all__ = [
    "AdaptiveCodebook",
    "Additive",
    "Codebook",
    "Compression",
    "Cp",
    "Each",
    "Factors",
    "FixedCodebook",
    "Half",
    "LowRank",
    "OneOf",
    "OptimalCodebook",
    "PenaltyGroups",
    "PenaltyL0",
    "PenaltyL1",
    "PenaltyNuclear",
    "PruneBelow",
    "PruneGroups",
    "PruneL0",
    "PruneL1",
    "PruneNofM",
    "PruneQuantize",
    "RankSelection",
    "ScaledBinary",
    "ScaledTernary",
    "Tucker2",
    "binary",
    "fixed_point",
    "powers_of_two",
]

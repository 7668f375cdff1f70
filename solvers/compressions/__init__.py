"""C steps: the best compressed form of given weights. A new one is a file here, a line below and a row in the tests."""

from solvers.compressions.additive import Additive
from solvers.compressions.base import Compression
from solvers.compressions.low_rank import Factors, LowRank, RankSelection, Reshaping
from solvers.compressions.pruning import PenaltyL0, PenaltyL1, PruneGroups, PruneL0, PruneL1, PruneNofM
from solvers.compressions.quantization import (
    AdaptiveCodebook,
    Codebook,
    FixedCodebook,
    OptimalCodebook,
    ScaledBinary,
    ScaledTernary,
    binary,
    fixed_point,
    powers_of_two,
)

__all__ = [
    "AdaptiveCodebook",
    "Additive",
    "Codebook",
    "Compression",
    "Factors",
    "FixedCodebook",
    "LowRank",
    "OptimalCodebook",
    "PenaltyL0",
    "PenaltyL1",
    "PruneGroups",
    "PruneL0",
    "PruneL1",
    "PruneNofM",
    "RankSelection",
    "Reshaping",
    "ScaledBinary",
    "ScaledTernary",
    "binary",
    "fixed_point",
    "powers_of_two",
]

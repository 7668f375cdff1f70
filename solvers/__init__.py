"""Layer solvers: arrays in, arrays out. See the modules; the front door for one layer is `solvers.layer.solve`."""

from solvers.activation import IDENTITY, NAMED, RELU, Activation
from solvers.admm import path, solve
from solvers.admm_state import AdmmOptions, AdmmSolution, Status
from solvers.gram import GramStatistics, gram_statistics
from solvers.layer import LayerFit, LayerOptions
from solvers.m_step import ExactLinear, MajorizeMinimize
from solvers.penalties import Constrained, Penalized, lambda_max, penalized_fractions
from solvers.reconstruction import LayerProblem
from solvers.refine import RefineOptions, refine
from solvers.sgd import Sgd
from solvers.structure import Structure, column_structure, feature_structure, fit
from solvers.terms import MatrixShape

__all__ = [
    "IDENTITY",
    "NAMED",
    "RELU",
    "Activation",
    "AdmmOptions",
    "AdmmSolution",
    "Constrained",
    "ExactLinear",
    "GramStatistics",
    "LayerFit",
    "LayerOptions",
    "LayerProblem",
    "MajorizeMinimize",
    "MatrixShape",
    "Penalized",
    "RefineOptions",
    "Sgd",
    "Status",
    "Structure",
    "column_structure",
    "feature_structure",
    "fit",
    "gram_statistics",
    "lambda_max",
    "path",
    "penalized_fractions",
    "refine",
    "solve",
]

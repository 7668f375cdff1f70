"""The kinds of term a factored layer can have. A new kind is one file and one line here."""

from solvers.terms import Term
from unified_approx.layers.codebook import CodebookTerm
from unified_approx.layers.columns import ColumnsTerm
from unified_approx.layers.common import TermLayer
from unified_approx.layers.cp import Cp3Term, Cp4Term
from unified_approx.layers.dense import DenseTerm
from unified_approx.layers.low_rank import LowRankTerm
from unified_approx.layers.spatial import SpatialTerm
from unified_approx.layers.tucker import Tucker2Term

KINDS: dict[str, type[TermLayer]] = {
    layer.kind: layer
    for layer in (
        DenseTerm,
        ColumnsTerm,
        CodebookTerm,
        LowRankTerm,
        SpatialTerm,
        Tucker2Term,
        Cp3Term,
        Cp4Term,
    )
}


def layer_class(term: Term) -> type[TermLayer]:
    """The layer class of a term.

    Raises:
        ValueError: no kind of layer for terms of that type.
    """
    for layer in KINDS.values():
        if layer.term_type is type(term):
            return layer
    raise ValueError(f"terms: no layer for a {type(term).__name__}; known kinds are {', '.join(KINDS)}")

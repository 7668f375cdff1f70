"""Deep Compression, Han et al. (2016): prune, share weights, encode; retraining in between."""

from unified_approx.deep_compression.codebook_layers import with_codebook_layers
from unified_approx.deep_compression.masks import as_pruned, masks_of, with_masks
from unified_approx.deep_compression.pruning import gradual, prune
from unified_approx.deep_compression.sensitivity import scan
from unified_approx.deep_compression.sharing import share

__all__ = ["as_pruned", "gradual", "masks_of", "prune", "scan", "share", "with_codebook_layers", "with_masks"]

"""Networks in files as small as the entropy of their values: Deep Compression's third stage, for whatever is stored."""

from unified_approx.packing.container import MAGIC, Packed, dump, parse

__all__ = ["MAGIC", "Packed", "dump", "parse"]

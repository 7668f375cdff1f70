"""Bits of a packed network, layer by layer and stage by stage, as Deep Compression counts them."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from flax import nnx
from jaxtyping import Shaped

from solvers.compressions.base import FLOAT_BITS
from solvers.compressions.bits import position_bits, width_of
from unified_approx.assemble import modules
from unified_approx.layers import Factored
from unified_approx.packing.container import Packed
from unified_approx.sites import path_name


@dataclass(frozen=True)
class LayerBits:
    """One layer. Whatever a stage would make larger is counted as it was.

    Attributes:
        name: of the layer.
        weights: of the original layer, bias included.
        dense: bits, 32 for each of these.
        pruned: values that are not zero, and the gaps between them at the best fixed width; of a factored layer what
            its factors store.
        shared: codes of a fixed width in place of these values, and their table.
        coded: in the file.
    """

    name: str
    weights: int
    dense: int
    pruned: int
    shared: int
    coded: int


def bits_by_stage(packed: Packed, model: nnx.Module) -> list[LayerBits]:
    """Of every module that has arrays of its own.

    Args:
        packed: the file taken apart.
        model: the network in it.
    """
    arrays, owners = packed.arrays(), _owners(packed, model)
    lines = []
    for name, own in owners.items():
        module = {path_name(path): m for path, m in modules(model).items()}.get(name)
        weights = sum(arrays[key].size for key in own)
        if isinstance(module, Factored):
            weights = module.replaces.matrix_shape.n * (module.replaces.matrix_shape.p + (module.bias is not None))
        stages = np.sum([_stages(arrays[key]) for key in own], axis=0)
        coded = 8 * sum(len(packed.streams[key]) for key in own)
        lines.append(LayerBits(name, weights, FLOAT_BITS * weights, int(stages[0]), int(stages[1]), coded))
    return lines


def _owners(packed: Packed, model: nnx.Module) -> dict[str, list[str]]:
    """Names of arrays by the layer that they belong to."""
    factored = [f"{path_name(path)}/" for path, module in modules(model).items() if isinstance(module, Factored)]
    found: dict[str, list[str]] = defaultdict(list)
    for key in packed.types:
        whole = [start[:-1] for start in factored if key.startswith(start)]
        found[whole[0] if whole else key.rpartition("/")[0]].append(key)
    return dict(found)


def _stages(array: Shaped[np.ndarray, "..."]) -> tuple[int, int]:
    """Bits pruned, and pruned and shared."""
    values = array.reshape(-1)
    if not np.issubdtype(values.dtype, np.floating):
        plain = 8 * values.nbytes
        return plain, min(plain, values.size * width_of(int(values.max(initial=0)) + 1))
    kept = values != 0
    count = int(np.count_nonzero(kept))
    positions = position_bits(kept) if 0 < count < values.size else 0
    size = 8 * values.dtype.itemsize
    pruned = min(size * values.size, positions + size * count)
    k = len(np.unique(values[kept]))
    return pruned, min(pruned, positions + width_of(k) * count + size * k)

"""Bits of a packed network, layer by layer and stage by stage, as Deep Compression counts them."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Shaped, UInt8

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
            its factors store, of a codebook the values that its codes stand for.
        shared: codes of a fixed width in place of these values, and their table. A parameter that is stored as a stream
            of bits counts as that from `pruned` on.
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
    arrays, streams = packed.arrays(), _streams(packed)
    found, lines = {path_name(path): m for path, m in modules(model).items()}, []
    for name, own in _owners(packed, model, streams).items():
        module = found.get(name)
        weights = sum(arrays[key].size for key in own if key not in streams)
        if isinstance(module, Factored):
            weights = module.replaces.matrix_shape.n * (module.replaces.matrix_shape.p + (module.bias is not None))
        stages = [0, 0]
        for key in own:
            part = _stream_stages(arrays[key]) if key in streams else _stages_of(module, key, arrays[key])
            stages = [total + bits for total, bits in zip(stages, part, strict=True)]
        coded = 8 * sum(len(packed.streams[key]) for key in own)
        lines.append(LayerBits(name, weights, FLOAT_BITS * weights, stages[0], stages[1], coded))
    return lines


def _stages_of(module: object, key: str, array: Shaped[np.ndarray, "..."]) -> tuple[int, int]:
    """Bits pruned, and pruned and shared, of an array of that name in that module."""
    part = key.rpartition("/")[2].split(".")
    if isinstance(module, Factored) and part[0] == "terms" and module.terms[int(part[1])].kind == "codebook":
        return _codebook_stages(array, part[2])
    return _stages(array)


def _stream_stages(stream: UInt8[np.ndarray, " bytes"]) -> tuple[int, int]:
    """Of bits that are pruned and shared already."""
    return 8 * stream.size, 8 * stream.size


def _streams(packed: Packed) -> dict[str, str]:
    """For each array that is a stream of bits, the name of the first parameter that it stands for."""
    return {f"coded.{i}": path_name(tuple(entry["paths"][0])) for i, entry in enumerate(packed.header.get("coded", ()))}


def _owners(packed: Packed, model: nnx.Module, streams: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of arrays by the layer that they belong to."""
    factored = [f"{path_name(path)}/" for path, module in modules(model).items() if isinstance(module, Factored)]
    found: dict[str, list[str]] = defaultdict(list)
    for key in packed.types:
        name = streams.get(key, key)
        whole = [start[:-1] for start in factored if name.startswith(start)]
        found[whole[0] if whole else name.rpartition("/")[0]].append(key)
    return dict(found)


def _stages(array: Shaped[np.ndarray, "..."]) -> tuple[int, int]:
    """Bits pruned, and pruned and shared."""
    values = array.reshape(-1)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        plain, (low, high) = 8 * values.nbytes, (int(f(initial=0)) for f in (values.min, values.max))
        return plain, min(plain, values.size * width_of(high - low + 1))
    kept = values != 0
    positions, count = _positions(kept)
    size = 8 * values.dtype.itemsize
    pruned = min(size * values.size, positions + size * count)
    k = len(np.unique(values[kept].astype(np.float64)))
    return pruned, min(pruned, positions + width_of(k) * count + size * k)


def _codebook_stages(array: Shaped[np.ndarray, "..."], name: str) -> tuple[int, int]:
    """The same of an array of a codebook term, whose codes stand for values, code 0 for zero."""
    if name == "values":
        return 0, 8 * array.nbytes
    positions, count = _positions(array.reshape(-1) != 0)
    pruned = min(FLOAT_BITS * array.size, positions + FLOAT_BITS * count)
    k = len(np.unique(array[array != 0]))
    return pruned, min(pruned, positions + width_of(k) * count, array.size * width_of(k + 1))


def _positions(kept: Bool[np.ndarray, " n"]) -> tuple[int, int]:
    """Bits that say which are kept, and how many are."""
    count = int(np.count_nonzero(kept))
    return position_bits(kept) if 0 < count < kept.size else 0, count

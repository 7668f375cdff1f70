"""Multiply-adds of the low-rank AlexNets of the LC algorithm: as published, and of such ranks on the zoo's AlexNet.

    python experiments/low_rank_alexnets.py [--json FILE]

Idelbayev and Carreira-Perpinan, Low-rank Compression of Neural Nets: Learning the Rank of Each Layer (CVPR 2020), give
ranks and MFLOPs (multiply-adds) of nine networks, made of an AlexNet of Caffe's sizes without groups on 227 x 227
images; the reference of 724 MFLOPs is the one with groups. Scheme 1 is a k x k convolution to r channels and a 1 x 1,
scheme 2 a 1 x k and a k x 1. Ranks and figures: github UCMerced-ML/LC-model-compression, examples/low_rank_alexnets.
Their accuracies need ImageNet and are not measured.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from solvers.terms import LowRank, Spatial, Term
from unified_approx import zoo
from unified_approx.assemble import get
from unified_approx.cost import layer_calls
from unified_approx.im2col import Geometry
from unified_approx.layers import factored_class, geometry_of
from unified_approx.results import check, write_results

RESULT = Path(__file__).parent / "results" / "low_rank_alexnets.json"
MEGA = 1e6


class Published(NamedTuple):
    """Ranks of the eight layers, and multiply-adds in millions."""

    ranks: tuple[int, ...]
    mflops: int


NETWORKS = {
    "scheme_1": {
        "v1": Published((33, 53, 133, 134, 156, 1764, 1748, 703), 436),
        "v2": Published((27, 33, 82, 71, 87, 760, 586, 344), 257),
        "v3": Published((26, 34, 79, 66, 82, 688, 507, 318), 248),
        "v4": Published((25, 31, 76, 62, 76, 602, 429, 290), 231),
    },
    "scheme_2": {
        "v1": Published((11, 46, 148, 172, 199, 1790, 1733, 694), 321),
        "v2": Published((9, 34, 103, 116, 143, 1075, 937, 449), 226),
        "v3": Published((8, 30, 85, 90, 114, 770, 582, 341), 185),
        "v4": Published((8, 28, 76, 79, 99, 606, 428, 288), 166),
        "v5": Published((7, 28, 69, 71, 88, 506, 349, 255), 151),
    },
}


class Layer(NamedTuple):
    """A layer and the height and width of the image that it sees, () for a dense one."""

    geometry: Geometry
    spatial: tuple[int, ...]


def caffe_layers() -> list[Layer]:
    """Of Caffe's AlexNet without groups."""

    def conv(c_in: int, c_out: int, k: int, pad: int, side: int, stride: int = 1) -> Layer:
        return Layer(Geometry((k, k), c_in, c_out, (stride,) * 2, ((pad, pad),) * 2, (1, 1)), (side, side))

    sizes = ((9216, 4096), (4096, 4096), (4096, 1000))
    return [
        conv(3, 96, 11, 2, 227, stride=4),
        conv(96, 256, 5, 2, 27),
        conv(256, 384, 3, 1, 13),
        conv(384, 384, 3, 1, 13),
        conv(384, 256, 3, 1, 13),
        *(Layer(Geometry((), c_in, c_out), ()) for c_in, c_out in sizes),
    ]


def zoo_layers() -> list[Layer]:
    """Of the zoo's AlexNet, torchvision's, on 224 x 224 images."""
    model = zoo.create("alexnet")
    calls = layer_calls(model, np.zeros((1, 224, 224, 3), np.float32))
    layers = [(geometry_of(get(model, path)), seen[0].input_shape[1:-1]) for path, seen in calls.items()]
    return [Layer(geometry, spatial if geometry.window else ()) for geometry, spatial in layers]


def macs(layers: Sequence[Layer], ranks: Sequence[int], scheme: str) -> int:
    """Of the network whose layers have these ranks; a layer for which that does not pay stays dense."""
    return sum(_macs(layer, rank, scheme) for layer, rank in zip(layers, ranks, strict=True))


def dense_macs(layers: Sequence[Layer]) -> int:
    """Of the network as it is."""
    return sum(_layer_macs(layer, (_low_rank(layer.geometry, 1),), "merged") for layer in layers)


def _macs(layer: Layer, rank: int, scheme: str) -> int:
    geometry = layer.geometry
    spatial = scheme == "scheme_2" and bool(geometry.window)
    term = _spatial(geometry, rank) if spatial else _low_rank(geometry, rank)
    return min(_layer_macs(layer, (term,), form) for form in ("factored", "merged"))


def _layer_macs(layer: Layer, terms: tuple[Term, ...], execution: str) -> int:
    made = factored_class(layer.geometry).from_terms(terms, None, layer.geometry, execution=execution)
    return made.macs(layer.spatial)


def _low_rank(geometry: Geometry, rank: int) -> Term:
    n, p = geometry.matrix_shape.n, geometry.matrix_shape.p
    return LowRank(np.ones((n, rank), np.float32), np.ones((rank, p), np.float32), np.arange(p, dtype=np.int32))


def _spatial(geometry: Geometry, rank: int) -> Term:
    (height, width), shape = geometry.window, geometry.matrix_shape
    return Spatial(np.ones((rank, width * shape.c_in), np.float32), np.ones((shape.n, height, rank), np.float32))


def table() -> list[dict[str, Any]]:
    """One row for each published network."""
    theirs, ours = caffe_layers(), zoo_layers()
    whole = dense_macs(ours) / MEGA
    rows = []
    for scheme, networks in NETWORKS.items():
        for version, published in networks.items():
            counted = macs(ours, published.ranks, scheme) / MEGA
            sizes: Mapping[str, Any] = {
                "published_mflops": published.mflops,
                "caffe_mflops": macs(theirs, published.ranks, scheme) / MEGA,
                "zoo_mflops": counted,
                "zoo_dense_mflops": whole,
                "zoo_macs_ratio": whole / counted,
            }
            rows.append({"network": "alexnet", "name": f"{scheme}_{version}", "ranks": published.ranks, **sizes})
    return rows


def main(json_file: Annotated[Path, typer.Option("--json")] = RESULT, seed: int = 0) -> None:
    """Make the table."""
    start, rows = time.perf_counter(), table()
    for row in rows:
        print({key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()})
    worst = max(abs(row["caffe_mflops"] - row["published_mflops"]) for row in rows)
    checks = {"largest difference from the published count, in MFLOPs": check(worst, "<=", 1.0)}
    command = "python experiments/low_rank_alexnets.py"
    write_results(json_file, command, rows, checks, seconds=time.perf_counter() - start, seed=seed)


if __name__ == "__main__":
    typer.run(main)

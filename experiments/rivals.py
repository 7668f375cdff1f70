"""The paper's rivals on the same networks and images: filter pruning by l1 norm, and spatial SVD. Neither uses data.

    python experiments/rivals.py --network vgg16 --cr 4.44 [--data DIR] [--models DIR]

Every layer keeps the same share, the largest for which the network reaches the compression ratio. Filter pruning is
Li et al., Pruning Filters for Efficient ConvNets (2017): in a residual block only the first convolution loses filters.
Spatial SVD is Jaderberg et al. (2014) in the closed form of Tai et al. (2016): a (1, kw) and a (kh, 1) convolution from
the singular vectors of the (kh n, kw c_in) unfolding.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import published
import typer
from flax import nnx

import unified_approx as ua
from solvers.terms import Spatial
from unified_approx import cost, datasets, evaluate, zoo
from unified_approx.assemble import get, put
from unified_approx.im2col import kernel_to_matrix
from unified_approx.layers import factored_class, geometry_of
from unified_approx.results import network_row, write_results
from unified_approx.sites import Path as ModulePath

RESULTS = Path(__file__).parent / "results"
Compress = Callable[[nnx.Module, np.ndarray, float], nnx.Module]


def chains(model: nnx.Module) -> list[tuple[ModulePath, ModulePath]]:
    """(Convolution, the only layer that reads it) of a VGG or a residual network."""
    if hasattr(model, "blocks"):
        return [(("blocks", i, "conv1"), ("blocks", i, "conv2")) for i in range(len(get(model, ("blocks",))))]
    convs = [("convs", i) for i in range(len(get(model, ("convs",))))]
    return list(zip(convs, [*convs[1:], ("fc",)], strict=True))


def l1_filters(model: nnx.Module, example: np.ndarray, share: float) -> nnx.Module:
    """The filters of largest l1 norm stay; the others are cut out, and what reads them with them."""
    new = nnx.clone(model)
    for producer, consumer in chains(model):
        norms = np.abs(np.asarray(get(model, producer).kernel[...])).sum((0, 1, 2))
        dropped = np.argsort(norms)[: len(norms) - max(1, round(share * len(norms)))]
        kernel = get(new, consumer).kernel
        kernel[...] = kernel[...].at[..., dropped, :].set(0)
    return ua.remove_unread(new, jnp.asarray(example))[0]


def spatial_svd(model: nnx.Module, example: np.ndarray, share: float) -> nnx.Module:
    """Every convolution as two thin ones, where that is smaller."""
    new = nnx.clone(model)
    for path in cost.layer_calls(model, jnp.asarray(example)):
        layer = get(model, path)
        if not isinstance(layer, nnx.Conv) or min(layer.kernel_size) == 1:
            continue
        geometry = geometry_of(layer)
        (kh, kw), n, c = geometry.window, geometry.c_out, geometry.c_in
        rank = int(share * n * kh * kw * c / (kw * c + kh * n))
        if not 0 < rank < min(kh * n, kw * c):
            continue
        unfolded = np.asarray(kernel_to_matrix(layer.kernel[...]), np.float64).reshape(n * kh, kw * c)
        u, s, v = np.linalg.svd(unfolded, full_matrices=False)
        root = np.sqrt(s[:rank])
        term = Spatial(
            (root[:, None] * v[:rank]).astype(np.float32), (u[:, :rank] * root).reshape(n, kh, rank).astype(np.float32)
        )
        bias = None if layer.bias is None else np.asarray(layer.bias[...])
        new = put(new, path, factored_class(geometry).from_terms((term,), bias, geometry))
    return new


RIVALS: dict[str, Compress] = {"l1_filters": l1_filters, "spatial_svd": spatial_svd}


def at_ratio(compress: Compress, model: nnx.Module, example: np.ndarray, ratio: float) -> nnx.Module:
    """The largest share that reaches the compression ratio, to a thousandth, and the network it gives."""
    before = cost.network_cost(model, jnp.asarray(example))
    low, high, found = 0.0, 1.0, None
    while high - low > 1e-3:
        share = (low + high) / 2
        new = compress(model, example, share)
        enough = cost.cr(before, cost.network_cost(new, jnp.asarray(example))) >= ratio
        low, high = (share, high) if enough else (low, share)
        found = new if enough else found
    if found is None:
        raise ValueError(f"cr: {ratio:g} is more than this method reaches on this network")
    return found


def row_of(
    name: str, network: str, model: nnx.Module, test: np.ndarray, labels: np.ndarray, reference: float, ratio: float
) -> dict[str, Any]:
    """One rival on one network, whose accuracy is `reference`."""
    new = at_ratio(RIVALS[name], model, test[:16], ratio)
    before, after = (cost.network_cost(each, jnp.asarray(test[:16])) for each in (model, new))
    return network_row(
        network=network,
        method=name,
        budget=f"cr={ratio:g}",
        reference_accuracy=reference,
        accuracy=evaluate.accuracy(new, test, labels),
        params_ratio=cost.params_ratio(before, after),
        cr=cost.cr(before, after),
        macs_ratio=cost.macs_ratio(before, after),
    )


def main(
    network: str = "resnet20",
    cr: float = 2.0,
    seed: Annotated[int, typer.Option(help="Neither method draws anything.")] = 0,
    quick: Annotated[bool, typer.Option(help="Few images, to see that it runs.")] = False,
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Both rivals at one compression ratio."""
    start = time.perf_counter()
    images, model = datasets.load("cifar10", data), published.load(network, models)
    count = 200 if quick else len(images.x_test)
    test, labels = zoo.entry(network).preprocess(images.x_test[:count]), images.y_test[:count]
    reference = evaluate.accuracy(model, test, labels)
    rows = [row_of(name, network, model, test, labels, reference, cr) for name in RIVALS]
    for row in rows:
        print({name: row[name] for name in ("method", "accuracy", "drop", "cr", "macs_ratio")})
    command = f"python experiments/rivals.py --network {network} --cr {cr:g}"
    out = json_file or RESULTS / f"rivals-{network}-cr{cr:g}.json"
    write_results(out, command, rows, seconds=time.perf_counter() - start, seed=seed, quick=quick)


if __name__ == "__main__":
    typer.run(main)

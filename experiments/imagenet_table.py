"""AlexNet and GoogLeNet at ImageNet size: accuracy, size, multiply-adds and measured speed, layer by layer.

    python experiments/imagenet_table.py --network alexnet --images DIR --weights alexnet.safetensors
    python experiments/imagenet_table.py [--data DIR] [--quick]

The first makes a full row. DIR holds `val/<class>/*.JPEG`, and `train/` likewise for calibration; without `train`,
calibration images are taken from `val` and left out of the accuracy. Weights are torchvision's:

    python -c "import torchvision.models as m, safetensors.torch as s; s.save_file(m.alexnet(weights='DEFAULT')
        .state_dict(), 'alexnet.safetensors')"

The second needs neither: initial weights and CIFAR-10 images enlarged to 224 pixels show that the sizes can be done, in
what time and memory, and what the clock says. Accuracy and compression ratio are then null, and the row names the
command that fills them. Solved layers are kept in the work folder, so that a killed run goes on.
"""

import json
import multiprocessing
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from flax import nnx

import unified_approx as ua
from solvers.admm_state import AdmmOptions
from solvers.layer import LayerOptions
from solvers.refine import RefineOptions
from unified_approx import comparison, datasets, evaluate, zoo
from unified_approx.image_folder import ImageFolder, enlarged, open_folder
from unified_approx.memory import compact
from unified_approx.report import ProgressEvent
from unified_approx.results import check, network_row, peak_rss_mb, write_results

NETWORKS = ("alexnet", "googlenet")
RESULTS = Path(__file__).parent / "results"
BATCH = 100  # images decoded and evaluated at a time
# Two-level selection takes hours on thousands of columns; the paper's form is what large dense layers are made with.
LARGE_DENSE = ua.Rule(path="fc6|fc7", form="admm")
NOT_MEASURED = ("reference_accuracy", "accuracy", "drop", "cr")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One network's run.

    Attributes:
        network: its name in the zoo.
        budget: as `Budget.parse` reads it.
        allocation: of the budget over the layers.
        calibration: images.
        rows: sampled output positions per layer, None for as many as pay.
        options: of the layer solver.
        rounds: timed runs.
        side: pixels of the images.
        make: options of the network.
        keep: patterns of layers that stay as they are.
        images: folder of ImageNet, None for enlarged CIFAR-10.
        weights: file, None for initial weights.
        data: folder of CIFAR-10.
        work: where solved layers are kept.
        seed: of images, rows and initial weights.
    """

    network: str
    budget: str
    allocation: str
    calibration: int
    rows: int | None
    options: LayerOptions
    rounds: int
    work: Path
    seed: int
    side: int = 224
    make: tuple[tuple[str, Any], ...] = ()
    keep: tuple[str, ...] = ()
    images: Path | None = None
    weights: Path | None = None
    data: Path | None = None


SMOKE = LayerOptions(
    form=("columns", "low_rank", "admm"),
    refine=RefineOptions(steps=2, pull_steps=1),
    admm=AdmmOptions(max_steps=20, check_every=5, rtol=2e-3),
    admm_fractions=(0.1,),
)
REAL = LayerOptions(admm=SMOKE.admm, admm_fractions=(0.2, 0.1, 0.05))
QUICK: dict[str, Any] = {
    "budget": "macs=0.85",
    "calibration": 16,
    "rows": 256,
    "rounds": 2,
    "side": 64,
    "make": (("width", 1 / 16), ("num_classes", 10)),
}
QUICK_KEEP = {"googlenet": ("inception(3b|4|5).*", "inception3a/branch[134].*")}


def split_folders(settings: Settings) -> tuple[ImageFolder, ImageFolder, str]:
    """Images for calibration, images for the accuracy, and where the former are from."""
    assert settings.images is not None
    classes = zoo.entry(settings.network).num_classes
    val = open_folder(settings.images / "val", classes=classes, crop=settings.side)
    if (settings.images / "train").is_dir():
        train = open_folder(settings.images / "train", classes=classes, crop=settings.side)
        return train.choose(settings.calibration, settings.seed), val, "train"
    order = np.random.default_rng(settings.seed).permutation(len(val))
    chosen, rest = order[: settings.calibration], np.sort(order[settings.calibration :])
    return val.select(chosen), val.select(rest), "val, left out of the accuracy"


def load(settings: Settings) -> tuple[nnx.Module, np.ndarray, ImageFolder | None, str]:
    """The network, raw calibration images, what the accuracy is measured on, and where calibration is from."""
    options = dict(settings.make)
    if settings.images is None:
        cifar = datasets.load("cifar10", settings.data).x_train
        chosen = np.random.default_rng(settings.seed).choice(len(cifar), settings.calibration, replace=False)
        model = zoo.create(settings.network, seed=settings.seed, **options)
        return model, enlarged(cifar[chosen], settings.side), None, "CIFAR-10, enlarged"
    calibration, test, origin = split_folders(settings)
    return zoo.load(settings.network, settings.weights, **options), calibration.images(), test, origin


class Watch:
    """Progress callback that notes the largest resident memory while each layer is solved, where Linux tells.

    What it noted stays beside the solved layers, for a run that goes on after it was killed.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.peaks: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, event: ProgressEvent) -> None:
        """Print the layer and reset the peak; note the peak."""
        if event.row is None:
            print(f"{event.index + 1}/{event.total} {event.name} {event.shape}", flush=True)
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        elif event.name not in self.peaks:
            self.peaks[event.name] = peak_rss_mb()
            self._file.write_text(json.dumps(self.peaks))


def layer_rows(result: ua.Result, peaks: dict[str, int], times: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What was done, and what the clock says, for each layer."""
    fields = (
        "name", "kind", "shape", "status", "reason", "form", "kept_columns", "rank", "original_params", "params",
        "original_macs", "macs", "rows", "iterations", "error_after", "error_after_held_out", "seconds",
    )  # fmt: skip
    rows = []
    for row in result.report.layers:
        more = times.get(row.name, {"original_ms": None, "compressed_ms": None, "speedup": None})
        rows.append({name: asdict(row)[name] for name in fields} | {"peak_rss_mb": peaks.get(row.name)} | more)
    return rows


def accuracies(settings: Settings, test: ImageFolder, *models: nnx.Module) -> list[float]:
    """Percent correct of each network, in one pass over the files per network."""
    prepare = zoo.entry(settings.network).normalization(None)

    def batches() -> Any:
        return ((prepare(x), y) for x, y in test.batches(BATCH))

    return [evaluate.accuracy_of_batches(model, batches()) for model in models]


def fill_command(settings: Settings) -> str:
    """The command that measures what a run without ImageNet cannot."""
    return (
        f"python experiments/imagenet_table.py --network {settings.network} --budget {settings.budget} "
        f"--images DIR --weights {settings.network}.safetensors"
    )


def one_network(settings: Settings) -> dict[str, Any]:
    """One row of the table."""
    model, raw, test, origin = load(settings)
    x = zoo.entry(settings.network).normalization(None)(raw)
    settings.work.parent.mkdir(parents=True, exist_ok=True)
    watch = Watch(settings.work.with_name(f"{settings.work.name}-memory.json"))
    rules = [*(ua.Rule(path=pattern, keep=True) for pattern in settings.keep)]
    if settings.network == "alexnet":
        rules.append(LARGE_DENSE)
    with compact():
        result = ua.compress(
            model,
            x,
            budget=ua.Budget.parse(settings.budget),
            rules=rules,
            options=settings.options,
            rows=settings.rows,
            allocation=settings.allocation,
            seed=settings.seed,
            batch_size=min(32, len(x)),
            work_dir=settings.work,
            progress=watch,
        )
    jax.clear_caches()  # of the solves, before as many programs again are timed
    result = comparison.with_fastest_executions(result, x, rounds=settings.rounds)
    per_layer = comparison.layer_latencies(model, result.model, x, settings.rounds)
    times = comparison.latencies(model, result.model, x, settings.rounds)
    before, after = comparison.file_sizes(model, result, None)
    measured = [None, None] if test is None else accuracies(settings, test, model, result.model)
    row = network_row(
        network=settings.network,
        method="admm",
        budget=settings.budget,
        reference_accuracy=measured[0],
        accuracy=measured[1],
        params_ratio=result.report.params_ratio,
        cr=None if test is None else result.report.cr,
        macs_ratio=result.report.macs_ratio,
        bytes_ratio=before / after,
        file_bytes=after,
        speedup=times["original_ms"] / times["compressed_ms"],
        speedup_batch1=times["original_ms_batch1"] / times["compressed_ms_batch1"],
        budget_met=result.budget_met,
        allocation=settings.allocation,
        calibration=len(x),
        calibration_images=origin,
        weights="initial" if settings.weights is None else settings.weights.name,
        test_images=None if test is None else len(test),
        input_side=settings.side,
        solve_seconds=sum(layer.seconds for layer in result.report.layers),
        solve_peak_rss_mb=max(watch.peaks.values(), default=peak_rss_mb()),
        warnings=list(result.report.warnings),
        latencies=times,
        layers=layer_rows(result, watch.peaks, per_layer),
    )
    missing = {"not_measured": list(NOT_MEASURED), "filled_by": fill_command(settings)}
    return row if test is not None else row | missing


def in_own_process(settings: Settings) -> dict[str, Any]:
    """`one_network` in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(one_network, settings).result()


def main(
    network: Annotated[list[str] | None, typer.Option(help="alexnet, googlenet; both without images.")] = None,
    budget: str = "macs=0.5",
    images: Annotated[Path | None, typer.Option(help="ImageNet: DIR/val/<class>/*.JPEG, DIR/train if there.")] = None,
    weights: Annotated[Path | None, typer.Option(help="torchvision's weights as safetensors.")] = None,
    calibration: Annotated[int | None, typer.Option(help="Images; 128 without ImageNet, 1000 with it.")] = None,
    allocation: Annotated[str | None, typer.Option(help="uniform without ImageNet, kl with it.")] = None,
    seed: int = 0,
    quick: bool = False,
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    work_dir: Annotated[Path, typer.Option(help="Solved layers.")] = Path(".imagenet_table"),
) -> None:
    """Make the table."""
    start = time.perf_counter()
    chosen = tuple(network or NETWORKS)
    real = images is not None
    if real != (weights is not None) or (real and (len(chosen) != 1 or quick)):
        raise typer.BadParameter("--images and --weights go together, with one --network, and without --quick")
    if unknown := set(chosen) - set(NETWORKS):
        raise typer.BadParameter(f"--network: {sorted(unknown)[0]!r} is unknown; choose of {', '.join(NETWORKS)}")
    rows = []
    for name in chosen:
        settings: dict[str, Any] = {
            "network": name,
            "budget": budget,
            "allocation": allocation or ("kl" if real else "uniform"),
            "calibration": calibration or (1000 if real else 128),
            "rows": None if real else 8192,
            "options": REAL if real else SMOKE,
            "rounds": 10,
            "seed": seed,
            "images": images,
            "weights": weights,
            "data": data,
        }
        settings |= {**QUICK, "keep": QUICK_KEEP.get(name, ())} if quick else {}
        parts = (name, settings["budget"].replace("=", ""), settings["allocation"], settings["calibration"], seed)
        work = work_dir / "-".join(map(str, (*parts, "quick" if quick else "real" if real else "smoke")))
        rows.append(in_own_process(Settings(**settings, work=work)))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "layers"}, indent=1), flush=True)
    seconds = time.perf_counter() - start
    peak = max(row["solve_peak_rss_mb"] for row in rows)
    checks = {} if real else {"seconds": check(seconds, "<=", 3600), "peak_rss_mb": check(peak, "<=", 20_000)}
    words = [
        "python",
        "experiments/imagenet_table.py",
        *(w for n in chosen for w in ("--network", n)),
        "--budget",
        budget,
    ]
    words += ["--images", "DIR", "--weights", weights.name] if weights is not None else []
    command = shlex.join([*words, "--seed", str(seed), *(["--quick"] if quick else [])])
    out = json_file or RESULTS / (f"imagenet-{chosen[0]}.json" if real else "imagenet_smoke.json")
    written = write_results(out, command, rows, checks, seconds=seconds, seed=seed, quick=quick)
    print(f"Results in {written}.")


if __name__ == "__main__":
    typer.run(main)

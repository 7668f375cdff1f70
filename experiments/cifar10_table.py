"""Compressed CIFAR-10 networks: accuracy, size, multiply-adds and measured speed at one budget.

    python experiments/cifar10_table.py --network vgg16 --budget macs=0.2 [--epochs 10] [--data DIR] [--models DIR]

Budgets are shared over the layers on calibration images; the test images are only measured on. With --epochs both the
compressed network and the original are trained on by the same recipe, and the drop counts against the better original;
with --match the compressed network learns the original's answers alone, without labels.
Finished stages are kept in the work folder, so that a killed run goes on; one sensitivity table serves all budgets.
"""

import json
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import published
import typer
from cifar10_targets import checks_of
from flax import nnx

import unified_approx as ua
from unified_approx import comparison, datasets, evaluate, zoo
from unified_approx.cli_common import flags
from unified_approx.memory import compact
from unified_approx.results import peak_rss_mb, write_results
from unified_approx.training import Recipe

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 5000  # training images on which epochs are chosen; never calibrated or trained on


class Images(NamedTuple):
    """CIFAR-10: raw training images, some of them held out, and test images prepared."""

    x: np.ndarray
    y: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray]
    test: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls, entry: zoo.ZooEntry, data: Path | None, seed: int, quick: bool = False) -> "Images":
        """From a folder, in an order of the seed; a few of them for a quick run."""
        found = datasets.load("cifar10", data)
        order = np.random.default_rng(seed).permutation(len(found.x_train))
        held, train, test = (128, 512, 500) if quick else (HELD_OUT, len(order), len(found.x_test))
        x, y = found.x_train[order[:train]], found.y_train[order[:train]]
        return cls(x[held:], y[held:], (x[:held], y[:held]), entry.preprocess(found.x_test[:test]), found.y_test[:test])


def main(
    network: str = "resnet20",
    budget: str = "macs=0.5",
    epochs: int = 0,
    skip_original: Annotated[bool, typer.Option(help="Train the compressed network only.")] = False,
    match: Annotated[bool, typer.Option(help="Train without labels, to answer like the original.")] = False,
    calibration: int = 2000,
    allocation: str = "kl",
    form: str = "best",
    group: str = "column",
    keep: Annotated[list[str] | None, typer.Option(help="Layers that stay as they are.")] = None,
    columns: Annotated[list[str] | None, typer.Option(help="Layers of single columns and all forms.")] = None,
    learning_rate: float = 0.02,
    batch_norms: Annotated[bool, typer.Option(help="Put folded batch norms back while training.")] = True,
    batch_size: int = 128,
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Few images, to see that it runs.")] = False,
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    work_dir: Annotated[Path, typer.Option(help="Solved layers and checkpoints.")] = Path(".cifar10_table"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Make one row of the table."""
    start = time.perf_counter()
    asked = {k: v for k, v in locals().items() if k not in ("start", "data", "models", "work_dir", "json_file")}
    own = [*(keep or ()), *(f"{pattern}-columns" for pattern in columns or ()), *(["quick"] if quick else [])]
    kind = re.sub(r"[^\w.-]", "_", "-".join(map(str, (network, allocation, group, calibration, seed, *own))))
    name = f"{kind}-{budget}-{form}".replace("=", "").replace(",", "-")
    entry = zoo.entry(network)
    images, model = Images.load(entry, data, seed, quick), published.load(network, models)
    reference = evaluate.accuracy(model, images.test, images.labels)
    rules = [ua.Rule(path=pattern, keep=True) for pattern in keep or ()]
    rules += [ua.Rule(path=pattern, group="column") for pattern in columns or ()]
    shared = {"rules": rules, "form": form, "group": group, "seed": seed}
    chosen = entry.preprocess(images.x[:calibration])
    resumed = (work_dir / name / "layers").exists()
    with compact():
        table = _table(work_dir / f"{kind}-{form}", model, chosen, allocation, budget, shared)
        result = ua.compress(
            model,
            chosen,
            budget=ua.Budget.parse(budget),
            allocation=allocation,
            sensitivity=table,
            work_dir=work_dir / name / "layers",
            **shared,
        )
    more: dict[str, Any] = {
        "solve_seconds": sum(layer.seconds for layer in result.report.layers),
        "sensitivity_seconds": 0.0 if table is None else table.seconds,
        "solve_peak_rss_mb": None if resumed else peak_rss_mb(),
    }
    if epochs:
        more["accuracy_without_training"] = evaluate.accuracy(result.model, images.test, images.labels)
        recipe = Recipe(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed)
        train = _Training(entry, images, recipe, batch_norms)
        tuned = (train.match if match else train)(result.model, work_dir / name, model)
        result = ua.Result(model=tuned, report=result.report)
        more["labels"] = not match
        if not (skip_original or match):
            again = train(model, work_dir / (f"{network}-quick" if quick else network))
            more["reference_finetuned_accuracy"] = evaluate.accuracy(again, images.test, images.labels)
    row = comparison.compare(
        network,
        model,
        comparison.with_fastest_executions(result, images.test),
        images.test,
        images.labels,
        reference_accuracy=reference,
        out=work_dir / name / "network.safetensors",
        finetune_epochs=epochs,
        **{k: v for k, v in asked.items() if k in ("allocation", "form", "group", "calibration")},
        **more,
        forms={r.name: (r.form, r.params / max(r.original_params, 1)) for r in result.report.layers},
    )
    trained = _how_trained(epochs, learning_rate, batch_norms, match)
    out = json_file or RESULTS / f"cifar10-{name}{trained}.json"
    command = shlex.join(["python", "experiments/cifar10_table.py", *flags(asked)])
    checks, seconds = checks_of(row), time.perf_counter() - start
    write_results(out, command, [row], checks, seconds=seconds, seed=seed, quick=quick)
    print(json.dumps({k: v for k, v in row.items() if k != "forms"}, indent=1, default=str))


def _how_trained(epochs: int, learning_rate: float, batch_norms: bool, match: bool) -> str:
    """What tells the file of a trained row from others of its network and budget; nothing without training."""
    how = f"{'' if batch_norms else '-folded'}{'-match' if match else ''}"
    return f"-{epochs}epochs-{learning_rate:g}{how}" if epochs else ""


def _table(
    stem: Path, model: nnx.Module, chosen: Any, method: str, budget: str, shared: dict[str, Any]
) -> ua.Sensitivity | None:
    """The sensitivity table, measured once for all budgets, those of seconds apart; None where none is asked for."""
    if method == "uniform":
        return None
    timed = "latency" in budget
    file = stem.with_name(f"{stem.name}{'-timed' if timed else ''}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        ua.sensitivity(model, chosen, method=method, timed=timed, **shared).save(file)
    return ua.Sensitivity.load(file)


class _Training(NamedTuple):
    """One recipe for the compressed network and the original."""

    entry: zoo.ZooEntry
    images: Images
    recipe: Recipe
    batch_norms: bool

    def __call__(self, network: nnx.Module, folder: Path, teacher: nnx.Module | None = None) -> nnx.Module:
        """The network after its best epoch; resumes from the folder."""
        kind = () if self.batch_norms else ("folded",)
        more = {"batch_norms": self.batch_norms, "validation": self.images.held_out, **self._shared(folder, *kind)}
        return ua.finetune(network, self.images.x, self.images.y, self.recipe, original=teacher, **more).model

    def match(self, network: nnx.Module, folder: Path, original: nnx.Module) -> nnx.Module:
        """The same without labels: only the outputs of the original are imitated."""
        recipe = replace(self.recipe, weight_decay=0.0)
        more = {"validation": self.images.held_out[0], **self._shared(folder, "match")}
        return ua.match_outputs(network, original, self.images.x, recipe, **more).model

    def _shared(self, folder: Path, *kind: str) -> dict[str, Any]:
        name = "-".join([f"{self.recipe.epochs}-{self.recipe.learning_rate:g}", *kind])
        prepare = self.entry.normalization(None).on_device
        return {"prepare": prepare, "progress": print, "checkpoint_dir": folder / name}


if __name__ == "__main__":
    typer.run(main)

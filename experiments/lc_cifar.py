"""The LC algorithm with training on CIFAR-10: selected ranks, sparse + low rank at the same cost, pruning, codebooks.

    python experiments/lc_cifar.py [--network resnet20] [--form select_rank] --data DIR --models DIR [--quick]

    select_rank      low rank with the rank that pays (Idelbayev & Carreira-Perpinan, CVPR 2020): price per multiply-add
                     (published: 1e-9 to 32e-9), errors relative to each layer's weights
    sparse_low_rank  columns + low rank, as many of both as `ua.compress` shares out at `--budget`; compared with the
                     result of `select_rank` where there is one
    low_rank         low rank alone, shared out in the same way
    prune, quantize  the points that `fast_lc.py` has without training

`--steps` values of mu with `--epochs` of SGD each, then `--finetune` epochs on what is stored. The best step is the one
of lowest training loss. A killed run resumes.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import published
import typer
from flax import nnx

import unified_approx as ua
from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    Compression,
    LowRank,
    PruneGroups,
    PruneL0,
    RankSelection,
)
from unified_approx import comparison, datasets, evaluate, zoo
from unified_approx.learning_compression import (
    LcResult,
    Schedule,
    SgdLStep,
    Task,
    exponential,
    finetune_compressed,
    informed,
    lc,
)
from unified_approx.learning_compression.report import reported
from unified_approx.report import LayerRow
from unified_approx.results import check, write_results
from unified_approx.training import Recipe

RESULTS = Path(__file__).parent / "results"
KERNELS = r"(?!conv1|fc).*"
"""Of a ResNet: all convolutions but the first, whose share of the cost is small."""
HELD_OUT = 5000
WORST = 1.0  # points above the reference, at MACs / 1.8
AGAINST = {"drop": "<=", "macs_ratio": ">="}


@dataclass(frozen=True)
class Asked:
    """What the command line says about the forms.

    Attributes:
        form: name.
        alpha: price of a multiply-add, for `select_rank`.
        budget: for the forms whose sizes `ua.compress` finds.
        share: of the weights that stay, for `prune`.
        k: values of each layer's codebook, for `quantize`.
    """

    form: str
    alpha: float
    budget: str
    share: float
    k: int

    def tasks(self, model: nnx.Module, x: np.ndarray, seed: int) -> list[Task]:
        """One for each layer, or one for all."""
        if self.form == "prune":
            return [Task(path=".*conv.*|fc", compression=PruneL0(self.share), view="vector", joint=True)]
        if self.form == "quantize":
            return [Task(path=".*conv.*|fc", compression=AdaptiveCodebook(self.k))]
        if self.form == "select_rank":
            ranks = RankSelection(self.alpha, cost="macs", scheme="auto")
            return informed([Task(path=KERNELS, compression=ranks)], model, x[:2], normalize=True)
        rules = [ua.Rule(path=pattern, keep=True) for pattern in ("conv1", "fc")]
        form = {"sparse_low_rank": "sum", "low_rank": "low_rank"}[self.form]
        budget = ua.Budget.parse(self.budget)
        done = ua.compress(model, x, budget=budget, form=form, rules=rules, seed=seed)
        found = [(row, _form_of(row)) for row in done.report.layers if row.status == "compressed"]
        return [Task(path=row.name, compression=form) for row, form in found if form is not None]


def _form_of(row: LayerRow) -> Compression | None:
    """As much of both parts as the layer was given."""
    parts: list[Compression] = []
    if row.rank:
        parts.append(LowRank(row.rank))
    if row.kept_columns:
        parts.append(PruneGroups(row.kept_columns))
    return Additive(tuple(parts)) if len(parts) == 2 else next(iter(parts), None)


def compared(row: Mapping[str, Any], file: Path, quick: bool) -> dict[str, Any]:
    """The row against that of selected ranks, if a run as long has left one: no worse, and no more multiply-adds."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    if found.get("quick", False) != quick:
        return {}
    other = found["rows"][0]
    return {f"{name}_against_select_rank": check(row[name], sign, other[name]) for name, sign in AGAINST.items()}


def tuned(result: LcResult, x: np.ndarray, y: np.ndarray, recipe: Recipe, work: Path, **more: Any) -> LcResult:
    """Trained on with its structure fixed."""
    return finetune_compressed(result, x, y, recipe, checkpoint_dir=work / "finetune", progress=print, **more)


def main(
    network: str = "resnet20",
    form: str = "select_rank",
    alpha: float = 2e-9,
    budget: str = "macs=0.5556",
    share: float = 0.3,
    k: int = 8,
    mu: float = 1e-3,
    factor: float = 1.6,
    steps: int = 20,
    epochs: int = 1,
    finetune: int = 5,
    learning_rate: float = 0.01,
    batch_size: int = 128,
    quick: bool = False,
    seed: int = 0,
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    work_dir: Annotated[Path, typer.Option(help="Checkpoints.")] = Path(".lc_cifar"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Make one row."""
    start, asked = time.perf_counter(), Asked(form, alpha, budget, share, k)
    steps, finetune = (2, 1) if quick else (steps, finetune)
    options = {"alpha": alpha, "budget": budget, "share": share, "k": k, "mu": mu, "factor": factor, "steps": steps}
    options |= {"epochs": epochs, "finetune": finetune, "learning-rate": learning_rate, "batch-size": batch_size}
    command = f"python experiments/lc_cifar.py --network {network} --form {form} "
    command += " ".join(f"--{name} {value}" for name, value in options.items()) + (" --quick" if quick else "")
    entry, images = zoo.entry(network), datasets.load("cifar10", data)
    model, test = published.load(network, models), entry.preprocess(images.x_test)
    reference = evaluate.accuracy(model, test, images.y_test)
    order = np.random.default_rng(seed).permutation(len(images.x_train))[HELD_OUT:][: 512 if quick else None]
    x, y = images.x_train[order], images.y_train[order]
    tasks = asked.tasks(model, entry.preprocess(x[:2000]), seed)
    work = work_dir / f"{network}-{form}-{'quick' if quick else 'full'}-{seed}"
    prepare = entry.normalization(None).on_device
    schedule = Schedule(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    l_step = SgdLStep(x, y, schedule, augment="crop_flip", prepare=prepare, measured=2000)
    mus = exponential(mu, factor, steps)
    result = lc(model, tasks, l_step, mus, checkpoint_dir=work / "lc", progress=lambda line: print(line, flush=True))
    before_tuning = evaluate.accuracy(result.model, test, images.y_test)
    if finetune:
        recipe = Recipe(epochs=finetune, batch_size=batch_size, learning_rate=learning_rate / 5, seed=seed)
        result = tuned(result, x, y, recipe, work, prepare=prepare)
    done = comparison.with_fastest_executions(reported(model, result, test[:64], asked.budget), test)
    row = comparison.compare(
        network,
        model,
        done,
        test,
        images.y_test,
        reference_accuracy=reference,
        method="lc",
        finetune_epochs=steps * epochs + finetune,
        accuracy_before_tuning=before_tuning,
        form=form,
        lc_steps=steps,
        tasks=[[task.path, str(task.compression)] for task in tasks],
        gaps=[line.gap for line in result.history],
        losses=[line.loss for line in result.history],
        best_step=result.best,
        seconds_of_steps=sum(sum(line.seconds) for line in result.history),
    )
    out, checks = json_file or RESULTS / f"lc-{network}-{form}.json", {}
    if form == "select_rank":
        checks = {"drop": check(row["drop"], "<=", WORST), "macs_ratio": check(row["macs_ratio"], ">=", 1.8)}
    if form == "sparse_low_rank":
        checks = compared(row, out.with_name(f"lc-{network}-select_rank.json"), quick)
    write_results(out, command, [row], checks, seconds=time.perf_counter() - start, seed=seed, quick=quick)
    print(json.dumps({k: v for k, v in row.items() if k not in ("tasks", "gaps", "losses")}, indent=1, default=str))


if __name__ == "__main__":
    typer.run(main)

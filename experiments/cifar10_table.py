"""Compressed CIFAR-10 networks: accuracy, size, multiply-adds and measured speed at one budget.

    python experiments/cifar10_table.py --network vgg16 --budget macs=0.2 [--epochs 10] [--data DIR] [--models DIR]

Budgets are shared over the layers on calibration images; the test images are only measured on. With --epochs both the
compressed network and the original are trained on by the same recipe, and the drop counts against the better original.
Finished stages are kept in the work folder, so that a killed run goes on.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import published
import typer

import unified_approx as ua
from unified_approx import comparison, datasets, evaluate, zoo
from unified_approx.finetuning import finetune
from unified_approx.memory import compact
from unified_approx.results import network_row, peak_rss_mb, write_results
from unified_approx.training import Recipe

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 5000  # training images on which epochs are chosen; never calibrated or trained on


def main(
    network: str = "resnet20",
    budget: str = "macs=0.5",
    epochs: int = 0,
    calibration: int = 2000,
    allocation: str = "kl",
    form: str = "best",
    group: str = "column",
    keep: Annotated[list[str] | None, typer.Option()] = None,
    learning_rate: float = 0.02,
    batch_size: int = 128,
    seed: int = 0,
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    work_dir: Annotated[Path, typer.Option(help="Solved layers and checkpoints.")] = Path(".cifar10_table"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Make one row of the table."""
    start = time.perf_counter()
    entry, images = zoo.entry(network), datasets.load("cifar10", data)
    model = published.load(network, models)
    fast, _ = ua.fastest_dense(model, entry.preprocess(images.x_test[:64]))
    order = np.random.default_rng(seed).permutation(len(images.x_train))
    chosen = images.x_train[order[HELD_OUT:][:calibration]]
    test = entry.preprocess(images.x_test)
    parts = (network, budget.replace("=", ""), allocation, form, group, calibration, seed)
    name = "-".join(str(part) for part in parts)
    work = work_dir / name
    rules = [ua.Rule(path=pattern, keep=True) for pattern in keep or ()]
    arguments = {"rules": rules, "form": form, "group": group, "allocation": allocation, "seed": seed}
    with compact():
        clock = time.perf_counter()
        result = ua.compress(
            model, entry.preprocess(chosen), budget=ua.Budget.parse(budget), work_dir=work / "layers", **arguments
        )
        solve_seconds = time.perf_counter() - clock
    reference = evaluate.accuracy(fast, test, images.y_test)
    more: dict[str, Any] = {"accuracy_without_training": evaluate.accuracy(result.model, test, images.y_test)}
    if epochs:
        recipe = Recipe(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed)
        train, held = order[HELD_OUT:], order[:HELD_OUT]

        def prepare(x: Any) -> Any:
            n = entry.normalization(None)
            return (x.astype(jnp.float32) / n.scale - n.mean) / n.std

        shared = {"validation": (images.x_train[held], images.y_train[held]), "prepare": prepare, "progress": print}
        xy = images.x_train[train], images.y_train[train]
        tuned = finetune(result, *xy, recipe, original=fast, checkpoint_dir=work / f"compressed-{epochs}", **shared)
        original = finetune(fast, *xy, recipe, checkpoint_dir=work / f"original-{epochs}", **shared)
        more["reference_finetuned_accuracy"] = evaluate.accuracy(original.model, test, images.y_test)
        result = ua.Result(model=tuned.model, report=result.report)
    result = comparison.with_fastest_executions(result, test)
    times = comparison.latencies(model, result.model, test)
    before, after = comparison.file_sizes(model, result, work / "network.safetensors")
    report = result.report
    row = network_row(
        network=network,
        method="admm",
        budget=budget,
        reference_accuracy=reference,
        accuracy=evaluate.accuracy(result.model, test, images.y_test),
        params_ratio=report.params_ratio,
        cr=report.cr,
        macs_ratio=report.macs_ratio,
        bytes_ratio=before / after,
        file_bytes=after,
        speedup=times["original_ms"] / times["compressed_ms"],
        speedup_batch1=times["original_ms_batch1"] / times["compressed_ms_batch1"],
        finetune_epochs=epochs,
        **times,
        **more,
        allocation=allocation,
        form=form,
        group=group,
        calibration=calibration,
        solve_seconds=solve_seconds,
        solve_peak_rss_mb=peak_rss_mb(),
        forms={r.name: (r.form, r.params / max(r.original_params, 1)) for r in report.layers},
    )
    out = json_file or RESULTS / f"cifar10-{name}{f'-{epochs}epochs' if epochs else ''}.json"
    command = f"python experiments/cifar10_table.py --network {network} --budget {budget} --epochs {epochs}"
    command += f" --calibration {calibration} --allocation {allocation} --form {form} --group {group} --seed {seed}"
    write_results(out, command, [row], seconds=time.perf_counter() - start, seed=seed)
    print(json.dumps({k: v for k, v in row.items() if k != "forms"}, indent=1, default=str))


if __name__ == "__main__":
    typer.run(main)

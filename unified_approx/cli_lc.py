"""The command `lc`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from unified_approx.cli_common import (
    FAILED,
    Data,
    DataName,
    Debug,
    Json,
    Network,
    Weights,
    check_outputs,
    command_line,
    console,
    errors,
)

if TYPE_CHECKING:
    from unified_approx.learning_compression import LcResult, Step
    from unified_approx.resolve import Images


def lc(
    network: Network,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="PATTERN=FORM,...",
            help="What becomes of which layers: fc1=prune(0.05),fc2=low_rank(10),fc3=quantize(2); sums with +; "
            "fc.=joint(quantize(2)+prune(0.01)) for one codebook over all of them. A wrong word lists all forms.",
        ),
    ],
    weights: Weights = None,
    data: Data = None,
    dataset: DataName = None,
    mu: Annotated[float, typer.Option(help="First weight of the penalty.")] = 1e-3,
    mu_factor: Annotated[float, typer.Option(help="What it is multiplied by from step to step.")] = 1.1,
    steps: Annotated[int, typer.Option(help="Values of mu.")] = 40,
    repeat: Annotated[int, typer.Option(help="L and C steps at each value.")] = 1,
    quadratic: Annotated[bool, typer.Option("--quadratic", help="No multipliers: the quadratic penalty.")] = False,
    epochs: Annotated[int, typer.Option(help="Of every L step.")] = 10,
    first_epochs: Annotated[
        int | None, typer.Option(help="Of the first L step, 0 to skip it.  [default: --epochs]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per update.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Of the first L step.")] = 0.05,
    decay: Annotated[
        float, typer.Option(help="Factor on the learning rate from L step to L step; from epoch to epoch if --restart.")
    ] = 0.98,
    restart: Annotated[bool, typer.Option("--restart", help="Begin every L step with --learning-rate again.")] = False,
    momentum: Annotated[float, typer.Option(help="Of Nesterov's SGD.")] = 0.9,
    augment: Annotated[bool, typer.Option("--augment", help="Crop and mirror training images at random.")] = False,
    measured: Annotated[
        int | None, typer.Option(help="Training images that the loss is watched on.  [default: all]")
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="For select_rank: errors relative to each layer's weights.")
    ] = False,
    finetune: Annotated[int, typer.Option(help="Epochs of fine-tuning afterwards.")] = 0,
    finetune_rate: Annotated[
        float | None, typer.Option(help="Learning rate of fine-tuning.  [default: --learning-rate / 10]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the images.")] = 0,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Folder from which a killed run goes on.")] = None,
    out: Annotated[Path | None, typer.Option(help="Save the compressed network here (safetensors).")] = None,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Compress while training, by the Learning-Compression algorithm: prune, quantize, low rank, and sums of these."""
    start, command = time.perf_counter(), command_line("lc", locals())
    with errors(debug):
        check_outputs(out=out, json=json_file)
        _check_tuning(finetune, finetune_rate)
        from unified_approx import learning_compression as algorithm
        from unified_approx import resolve
        from unified_approx.evaluate import accuracy

        asked = algorithm.parse_tasks(tasks)
        mus = algorithm.exponential(mu, mu_factor, steps, repeat)
        lengths = {"epochs": epochs, "first_epochs": first_epochs, "batch_size": batch_size, "seed": seed}
        rates = {"learning_rate": learning_rate, "decay": decay, "restart": restart, "momentum": momentum}
        schedule = algorithm.Schedule(**lengths, **rates)
        model = resolve.load_network(network, weights)
        images = resolve.load_images(network, data, dataset)
        known = algorithm.informed(asked, model, images.x_train[:2], normalize=normalize)
        reference = accuracy(model, images.x_test, images.y_test)
        crop = "crop_flip" if augment else None
        l_step = algorithm.SgdLStep(images.x_train, images.y_train, schedule, augment=crop, measured=measured)
        screen, stopped = console(), None
        run: dict[str, Any] = {"augmented": not quadratic, "checkpoint_dir": checkpoint_dir}
        try:
            result = algorithm.lc(model, known, l_step, mus, **run, progress=lambda line: _show_step(screen, line, mus))
        except algorithm.LcStoppedError as error:
            result, stopped = error.result, error
        tuning = finetune if stopped is None else 0
        if tuning:
            result = _tuned(result, images, tuning, batch_size, finetune_rate or learning_rate / 10, augment, seed)
        row = _finish(network, model, result, images, reference, tasks, tuning, out, screen)
        if json_file is not None:
            _write(command, json_file, row, start, seed, result)
        if stopped is not None:
            typer.echo(f"unified-approx: {stopped} is what was written", err=True)
            raise typer.Exit(FAILED)


def _check_tuning(epochs: int, rate: float | None) -> None:
    if epochs < 0:
        raise ValueError(f"--finetune: {epochs} epochs; give at least 0")
    if rate is not None and not rate > 0:
        raise ValueError(f"--finetune-rate: {rate:g}; give a positive number")


def _tuned(
    result: "LcResult", images: "Images", epochs: int, batch_size: int, rate: float, augment: bool, seed: int
) -> "LcResult":
    from unified_approx.learning_compression import finetune_compressed
    from unified_approx.training import Recipe

    crop = "crop_flip" if augment else None
    recipe = Recipe(epochs=epochs, batch_size=batch_size, learning_rate=rate, weight_decay=0.0, augment=crop, seed=seed)
    return finetune_compressed(result, images.x_train, images.y_train, recipe)


def _finish(
    network: str,
    model: Any,
    result: "LcResult",
    images: "Images",
    reference: float,
    tasks: str,
    finetune: int,
    out: Path | None,
    screen: Console,
) -> dict[str, Any]:
    """Show the compressed network beside the original, save it, and give the row."""
    from unified_approx.comparison import compare, comparison_table, speed_sentence, with_fastest_executions
    from unified_approx.learning_compression.report import reported

    done = with_fastest_executions(reported(model, result, images.x_test[:64], tasks), images.x_test)
    test: dict[str, Any] = {"reference_accuracy": reference, "method": "lc", "out": out, "finetune_epochs": finetune}
    row = compare(network, model, done, images.x_test, images.y_test, **test, best_step=result.best)
    screen.print(done.report.table())
    screen.print(comparison_table(row, done))
    screen.print(speed_sentence(row))
    for warning in result.warnings:
        screen.print(f"warning: {warning}")
    return row


def _show_step(screen: Console, line: "Step", mus: Any) -> None:
    losses = "" if line.loss is None else f", loss {line.own_loss:.4f}, compressed {line.loss:.4f}"
    screen.print(
        f"step {line.step}/{len(mus)}: mu {line.mu:.3g}{losses}, distance {line.gap:.4f}, {sum(line.seconds):.1f} s"
    )


def _write(command: str, path: Path, row: dict[str, Any], start: float, seed: int, result: "LcResult") -> None:
    from unified_approx.results import write_results

    seconds = time.perf_counter() - start
    history = [asdict(line) for line in result.history]
    write_results(path, command, [row], seconds=seconds, seed=seed, repeat_row=True, history=history)

"""MUSCO on ResNet-20 and VGG-16: rules that choose ranks side by side, and stages against one shot at equal MACs.

    python experiments/musco.py [--part rules ...] [--data DIR] [--models DIR] [--quick]

Parts: rules (every rank rule on ResNet-20, nothing trained), fits (the same ranks fitted on the weights, on the
response, and after the ReLU), stages (one shot against two stages, the same epochs in all, Tucker-2 whose
multiply-adds are divided by the same number), chain (MUSCO, then Deep Compression), alexnet (with
initial weights: size and measured speed at the parameters' rate of the published 4.90 and 4.73 times). 5,000 training
images are held out: on these epochs are chosen. A killed run resumes. Pictures are written beside the results.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import published
import typer
from flax import nnx
from matplotlib.figure import Figure
from resumable import Rows, kept

import unified_approx as ua
from solvers.layer import LayerOptions
from solvers.rank_rules import Cheapest, Energy, Evbmf, MaxDrop, RankRule, Rate, Vbmf
from unified_approx import comparison, datasets, evaluate, finetune_compressed, zoo
from unified_approx.cost import network_cost
from unified_approx.deep_compression import prune, share
from unified_approx.multistage.options import Step
from unified_approx.pipeline import Result
from unified_approx.results import check, network_row, write_results
from unified_approx.training import Recipe

RESULT = Path(__file__).parent / "results" / "musco.json"
WORK = Path(".musco")
HELD_OUT, CALIBRATION, TRIED = 5000, 2000, 1000
RULES: dict[str, RankRule] = {
    "EVBMF": Evbmf(weakening=1.0),
    "EVBMF, weakened": Evbmf(weakening=0.8),
    "VBMF": Vbmf(weakening=1.0),
    "rate of parameters": Rate(params=2.0),
    "rate of multiply-adds": Rate(macs=2.0),
    "energy of the weights": Energy(kept=0.9, of="weights"),
    "energy of the response": Energy(kept=0.95),
    "LC's automatic rank": Cheapest(alpha=1e-4),
    "accuracy by trial": MaxDrop(points=0.5),
    "accuracy from the error": MaxDrop(points=0.5, by="error"),
}
DECOMPOSITIONS = ("tucker2", "cp3", "spatial", "low_rank")
FITS = {
    "weights": LayerOptions(data_aware=False),
    "response": LayerOptions(refine=None),
    "after the ReLU": LayerOptions(),
}
EQUAL = 0.02  # multiply-adds of one shot and stages differ by no more


@dataclass(frozen=True)
class Case:
    """A comparison of one shot with stages.

    Attributes:
        rate: of multiply-adds, layer by layer, after all stages.
        epochs: in all.
        learning_rate: of every training.
        keep: layers that stay as they are.
    """

    rate: float
    epochs: int
    learning_rate: float
    keep: tuple[str, ...]


CASES = {"resnet20": Case(2.5, 8, 0.02, ("conv1", "fc")), "vgg16": Case(4.0, 4, 0.02, ("convs/0", "fc"))}


class Network:
    """A published network and its images.

    Attributes:
        model: the network.
        x, y: raw images for training.
        held: raw images and labels on which epochs are chosen.
        chosen: images that layers are fitted on.
        tried: images and labels that rules may look at.
    """

    def __init__(self, name: str, data: Path | None, models: Path, quick: bool):
        self.name, self.entry = name, zoo.entry(name)
        found = datasets.load("cifar10", data)
        order = np.random.default_rng(0).permutation(len(found.x_train))
        self.model = published.load(name, models)
        self.held = found.x_train[order[:HELD_OUT]], found.y_train[order[:HELD_OUT]]
        rest = order[HELD_OUT:][: 1000 if quick else None]
        self.x, self.y = found.x_train[rest], found.y_train[rest]
        self.chosen = self.entry.preprocess(self.x[: 100 if quick else CALIBRATION])
        self.tried = self.entry.preprocess(self.x[:TRIED]), self.y[:TRIED]
        count = 500 if quick else None
        self.test = self.entry.preprocess(found.x_test[:count]), found.y_test[:count]
        self.quick = quick

    def accuracy(self, model: nnx.Module) -> float:
        """On the test images, in percent."""
        return evaluate.accuracy(model, *self.test)

    def train(self, result: Result | nnx.Module, recipe: Recipe, folder: Path) -> nnx.Module:
        """With the original as teacher."""
        return ua.finetune(
            result,
            self.x,
            self.y,
            recipe,
            original=self.model,
            batch_norms=True,
            validation=self.held,
            prepare=self.entry.normalization(None).on_device,
            checkpoint_dir=folder,
        ).model

    def row(self, name: str, model: nnx.Module, **more: Any) -> dict[str, Any]:
        """Accuracy, size and multiply-adds."""
        before, after = (network_cost(each, self.test[0][:2]) for each in (self.model, model))
        row = network_row(
            network=self.name,
            method="musco",
            budget=name,
            reference_accuracy=self.accuracy(self.model),
            accuracy=self.accuracy(model),
            params_ratio=before.params / after.params,
            cr=before.bits / after.bits,
            macs_ratio=before.macs / after.macs,
            name=name,
            **more,
        )
        shown = ("network", "name", "accuracy", "params_ratio", "macs_ratio")
        print({key: row[key] for key in shown}, flush=True)
        return row


def rules(network: Network) -> Rows:
    """One row for every rule: Tucker-2 of all 3x3 convolutions but the first, fitted on the response."""
    rows, keep = [], CASES[network.name].keep
    for name, rule in RULES.items():
        clock = time.perf_counter()
        given: dict[str, Any] = {"keep": keep, "progress": lambda event: None}
        x, labels = network.tried if rule.needs == "accuracy" else (network.chosen, None)
        result = ua.musco(network.model, x, rank_rule=rule, labels=labels, **given)
        ranks = {r.name: r.rank for r in result.report.layers if r.status == "compressed"}
        notes = {r.name: r.reason for r in result.report.layers if r.reason}
        seconds = time.perf_counter() - clock
        rows.append(network.row(name, result.model, ranks=ranks, notes=notes, seconds=seconds))
    return rows


def fits(network: Network) -> Rows:
    """Each decomposition of all 3x3 convolutions but the first, at half of the multiply-adds, fitted in three ways."""
    rows, keep = [], CASES[network.name].keep
    for decomposition in DECOMPOSITIONS:
        steps: list[Step] = []
        given: dict[str, Any] = {"keep": keep, "data_aware": False, "on_step": steps.append}
        given |= {"decomposition": decomposition, "progress": lambda event: None}
        ua.musco(network.model, network.chosen, rank_rule=Rate(macs=2.0), **given)
        ranks = {name: own for step in steps for name, own in step.ranks.items()}
        rules = [ua.Rule(path=re.escape(name), form=decomposition, ranks=own) for name, own in ranks.items()]
        rules.append(ua.Rule(path=".*", keep=True))
        for name, options in FITS.items():
            arguments: dict[str, Any] = {"rules": rules, "options": options, "progress": lambda event: None}
            result = ua.compress(network.model, network.chosen, **arguments)
            errors = {r.name: r.error_after_held_out for r in result.report.layers if r.status == "compressed"}
            more = {"decomposition": decomposition, "fit": name, "errors": errors}
            rows.append(network.row(f"{decomposition}, {name}", result.model, **more))
    return rows


def stages(network: Network, work: Path) -> Rows:
    """The same rate at once and in two passes; as many epochs."""
    case, rows = CASES[network.name], []
    for count in (1, 2):
        recipe = Recipe(epochs=1 if network.quick else case.epochs // count, learning_rate=case.learning_rate)
        folder = work / f"{network.name}-{count}"
        result = ua.musco(
            network.model,
            network.chosen,
            rank_rule=Rate(macs=case.rate ** (1 / count)),
            stages=count,
            keep=case.keep,
            train=lambda result, step, folder=folder, recipe=recipe: network.train(
                result, recipe, folder / f"training{step}"
            ),
            work_dir=folder / "layers",
            progress=lambda event: None,
        )
        name = "one shot" if count == 1 else f"{count} stages"
        result.save(work / f"{network.name}-{count}.safetensors")
        rows.append(network.row(name, result.model, finetune_epochs=case.epochs, stages=count))
    return rows


def chain(network: Network, work: Path) -> Rows:
    """MUSCO in two stages, then half of the factors' weights, then 5 bits; the packed file after each."""
    model = ua.load(work / f"{network.name}-2.safetensors")
    recipe = Recipe(epochs=1, learning_rate=0.01, weight_decay=1e-4)
    given: dict[str, Any] = {
        "validation": network.held,
        "prepare": network.entry.normalization(None).on_device,
        "teacher": network.model,
    }
    factors = r".*terms/\d+/(first|core|last|u|v)"
    pruned = prune(model, network.x, network.y, {factors: 0.5}, recipe=recipe, **given)
    shared = share(pruned, 5, layers=factors)
    trained = finetune_compressed(shared, network.x, network.y, recipe, **given)
    rows = []
    for name, each in {
        "original": network.model,
        "musco": model,
        "pruned": pruned.model,
        "shared": trained.model,
    }.items():
        size = ua.pack(work / f"{network.name}-{name}.uapk", each)
        rows.append(network.row(name, each, file_bytes=size))
    return rows


def alexnet(quick: bool) -> Rows:
    """Size and speed; neither depends on what the weights are. Ranks from the weights, nothing trained."""
    model = zoo.create("alexnet", **({"width": 1 / 16, "num_classes": 10} if quick else {}))
    x = np.random.default_rng(0).standard_normal((64, *zoo.entry("alexnet").input_shape)).astype(np.float32)
    x = x[:4] if quick else x
    clock = time.perf_counter()
    given: dict[str, Any] = {"keep": ["conv1"], "data_aware": False, "rows": 256, "progress": lambda event: None}
    result = ua.musco(model, x[:8], rank_rule=Rate(params=4.9), **given)
    seconds = time.perf_counter() - clock
    done = comparison.with_fastest_executions(result, x)
    times = comparison.latencies(model, done.model, x, rounds=3 if quick else 10)
    before, after = network_cost(model, x[:1]), network_cost(done.model, x[:1])
    row = network_row(
        network="alexnet",
        method="musco",
        budget="Rate(params=4.9)",
        reference_accuracy=None,
        accuracy=None,
        params_ratio=before.params / after.params,
        cr=before.bits / after.bits,
        macs_ratio=before.macs / after.macs,
        speedup=times["original_ms"] / times["compressed_ms"],
        speedup_batch1=times["original_ms_batch1"] / times["compressed_ms_batch1"],
        name="alexnet",
        published_size_ratio=4.90,
        published_speedup=4.73,
        seconds=seconds,
    )
    print(row)
    return [row]


def draw(rows: Rows, path: Path) -> None:
    """Accuracy of every rule over multiply-adds, and the ranks that they choose."""
    own = [row for row in rows if row["part"] == "rules"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(layer for row in own for layer in row["ranks"]))
    for row in own:
        (line,) = left.plot(row["macs_ratio"], row["accuracy"], "o", label=row["name"])
        ranks = [row["ranks"].get(name, np.nan) for name in names]
        right.plot(range(len(names)), ranks, ".-", color=line.get_color())
    left.set(xlabel="multiply-adds ÷", ylabel="accuracy, %, nothing trained")
    right.set(xlabel="layer", ylabel="rank (outputs)", xticks=range(len(names)))
    right.set_xticklabels(names, rotation=90, fontsize="x-small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def checks_of(rows: Rows) -> dict[str, Any]:
    """Stages against one shot at equal multiply-adds, fits after the ReLU against those of the weights."""
    found = {}
    for network in CASES:
        own = {row["name"]: row for row in rows if row["part"] == "stages" and row["network"] == network}
        if len(own) < 2:
            continue
        once, staged = (own[name] for name in sorted(own, reverse=True))
        gained, apart = staged["accuracy"] - once["accuracy"], staged["macs_ratio"] / once["macs_ratio"] - 1
        found[f"{network}: points that stages gain"] = check(gained, ">", 0.0)
        found[f"{network}: multiply-adds apart"] = check(abs(apart), "<=", EQUAL)
    fitted = {(row["decomposition"], row["fit"]): row["accuracy"] for row in rows if row["part"] == "fits"}
    for decomposition in dict.fromkeys(decomposition for decomposition, _ in fitted):
        gained = fitted[decomposition, "after the ReLU"] - fitted[decomposition, "weights"]
        found[f"{decomposition}: points that the data gain"] = check(gained, ">", 0.0)
    return found


PARTS = ("rules", "fits", "stages", "chain", "alexnet")


def main(
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    part: Annotated[list[str] | None, typer.Option(help="Parts to make; others are taken if they are there.")] = None,
    network: Annotated[list[str] | None, typer.Option(help="resnet20, vgg16; of stages. Both by default.")] = None,
    quick: bool = False,
    work_dir: Annotated[Path, typer.Option(help="Finished rows, layers and checkpoints.")] = WORK,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Make the tables."""
    start, rows = time.perf_counter(), list[dict[str, Any]]()
    wanted, work = part or list(PARTS), work_dir / ("quick" if quick else "full")
    if set(wanted) - set(PARTS):
        raise typer.BadParameter(f"--part: {wanted} ; there are {', '.join(PARTS)}")
    loaded: dict[str, Network] = {}

    def of(name: str) -> Network:
        if name not in loaded:
            loaded[name] = Network(name, data, models, quick)
        return loaded[name]

    makers = {"rules-resnet20": lambda: rules(of("resnet20"))}
    makers |= {"fits-resnet20": lambda: fits(of("resnet20"))}
    makers |= {f"stages-{n}": lambda n=n: stages(of(n), work) for n in network or CASES}
    makers |= {"chain-resnet20": lambda: chain(of("resnet20"), work), "alexnet-cpu": lambda: alexnet(quick)}
    for stem, make in makers.items():
        if stem.split("-")[0] in wanted or (work / f"{stem}.json").exists():
            rows += kept(work, stem, make)
    seconds = time.perf_counter() - start
    command = "python experiments/musco.py" + (" --quick" if quick else "")
    write_results(json_file, command, rows, checks_of(rows), seconds=seconds, seed=0, quick=quick)
    if any(row["part"] == "rules" for row in rows):
        draw(rows, json_file.with_name("musco_rules.png"))
    print(json.dumps([{k: r[k] for k in ("part", "name", "accuracy", "macs_ratio")} for r in rows], indent=1))


if __name__ == "__main__":
    typer.run(main)

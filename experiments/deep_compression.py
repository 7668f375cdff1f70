"""Deep Compression of the LeNets on MNIST: prune, share weights, encode; the size of the file after every stage.

    python experiments/deep_compression.py --data DIR [--network lenet300 ...] [--quick]

The networks (ReLU) are trained here, with 5,000 training images held out: on these epochs are chosen, the test images
are only measured on. Sizes are of whole files. Beside the three stages of Han et al. (2016): the same with the LC
algorithm in place of pruning and sharing one after the other. A killed run resumes.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from flax import nnx
from resumable import Rows, kept

from unified_approx import datasets, evaluate, finetune_compressed, storage, zoo
from unified_approx.deep_compression import gradual, prune, share
from unified_approx.learning_compression import LcResult, Schedule, SgdLStep, exponential, lc, parse_tasks
from unified_approx.results import check, network_row, read_rows, write_results
from unified_approx.training import Recipe, train

RESULT = Path(__file__).parent / "results" / "deep_compression.json"
WORK = Path(".deep_compression")
HELD_OUT = 5000


@dataclass(frozen=True)
class Setting:
    """How one network is trained and compressed.

    Attributes:
        options: of the network.
        reference: recipe of the network itself.
        kept: fractions that stay, by layer: those of Han et al. (2016), tables 2 and 3, and our smaller ones.
        steps: of the pruning.
        tuning: recipe of the training after every step.
        bits: of codes, by layer.
        tasks: of the LC algorithm, by row: shared weights that stay, and these beside a low rank.
        published: errors in percent of reference and result, and bytes, Han et al. (2016), table 1.
        limits: error in percent of the reference, bytes of the file.
    """

    options: dict[str, Any]
    reference: Recipe
    kept: dict[str, dict[str, float]]
    steps: int
    tuning: Recipe
    bits: dict[str, dict[str, int]]
    tasks: dict[str, str]
    schedule: Schedule
    published: tuple[float, float, int]
    limits: tuple[float, int]


PLAIN: dict[str, Any] = {"augment": None, "batch_size": 128}
SETTINGS = {
    "lenet300": Setting(
        options={"activation": "relu"},
        reference=Recipe(epochs=30, learning_rate=0.1, weight_decay=5e-4, **PLAIN),
        kept={
            "published": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
            "smaller": {"fc1": 0.035, "fc2": 0.08, "fc3": 0.3},
        },
        steps=6,
        tuning=Recipe(epochs=10, learning_rate=0.05, weight_decay=1e-4, **PLAIN),
        bits={"published": {"fc.": 6}, "smaller": {"fc.": 3}},
        tasks={
            "lc": "fc1=prune_quantize(0.03,8),fc2=prune_quantize(0.07,8),fc3=prune_quantize(0.3,8)",
            "lc_sparse_low_rank": "fc1=low_rank(1)+prune_quantize(0.02,8),fc2=low_rank(1)+prune_quantize(0.05,8),"
            "fc3=prune_quantize(0.3,8)",
        },
        schedule=Schedule(epochs=4, batch_size=128, learning_rate=0.05, decay=0.98),
        published=(1.64, 1.58, 27_000),
        limits=(1.64, 27_000),
    ),
    "lenet5": Setting(
        options={},
        reference=Recipe(epochs=12, learning_rate=0.1, weight_decay=5e-4, **PLAIN),
        kept={
            "published": {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19},
            "smaller": {"conv1": 0.5, "conv2": 0.07, "fc1": 0.012, "fc2": 0.15},
        },
        steps=4,
        tuning=Recipe(epochs=3, learning_rate=0.03, weight_decay=1e-4, **PLAIN),
        bits={"published": {"conv.": 8, "fc.": 5}, "smaller": {"conv.": 4, "fc.": 3}},
        tasks={
            "lc": "conv1=prune_quantize(0.5,16),conv2=prune_quantize(0.07,16),fc1=prune_quantize(0.012,8),"
            "fc2=prune_quantize(0.15,8)",
            "lc_sparse_low_rank": "conv1=prune_quantize(0.5,16),conv2=low_rank(1)+prune_quantize(0.05,16),"
            "fc1=low_rank(1)+prune_quantize(0.009,8),fc2=prune_quantize(0.15,8)",
        },
        schedule=Schedule(epochs=1, batch_size=128, learning_rate=0.03, decay=0.98),
        published=(0.80, 0.74, 44_000),
        limits=(0.80, 44_000),
    ),
}
MU = (1e-3, 1.25, 20)  # of the LC algorithm: first value, factor, how many


class Mnist:
    """Images as the network takes them.

    Attributes:
        x, y: for training.
        held: images and labels on which epochs are chosen.
        test: images and labels that are only measured on.
    """

    def __init__(self, network: str, data: Path | None, quick: bool, seed: int = 0):
        entry, found = zoo.entry(network), datasets.load("mnist", data)
        order = np.random.default_rng(seed).permutation(len(found.x_train))
        held, chosen = order[:HELD_OUT], order[HELD_OUT:]
        held, chosen = (held[:500], chosen[:2000]) if quick else (held, chosen)
        x = entry.preprocess(found.x_train, found)
        self.x, self.y = x[chosen], found.y_train[chosen]
        self.held = x[held], found.y_train[held]
        self.test = entry.preprocess(found.x_test, found), found.y_test

    def error(self, model: nnx.Module) -> float:
        """On the test images, in percent."""
        return 100.0 - evaluate.accuracy(model, *self.test)


class Pipeline:
    """The stages of one network; each makes one row and keeps its network in the work folder."""

    def __init__(self, network: str, data: Path | None, work: Path, quick: bool):
        self.name, self.work, self.quick = network, work / network, quick
        self.setting, self.images = SETTINGS[network], Mnist(network, data, quick)
        self.work.mkdir(parents=True, exist_ok=True)
        self.reference_error = 0.0
        self.original_bytes = 0

    def rows(self) -> Rows:
        """All of them."""
        first = self._made("reference", self._reference)
        self.reference_error, self.original_bytes = first[0]["error"], first[0]["dense_bytes"]
        rows = list(first)
        for size in self.setting.kept:
            rows += self._made(f"pruned_{size}", lambda size=size: self._pruned(size))
            rows += self._made(f"shared_{size}", lambda size=size: self._shared(size))
        for row in self.setting.tasks:
            rows += self._made(row, lambda row=row: self._lc(row))
        return rows

    def _made(self, stage: str, make: Callable[[], nnx.Module | LcResult]) -> Rows:
        def run() -> Rows:
            clock, made = time.perf_counter(), make()
            return [self._measured(stage, made, time.perf_counter() - clock)]

        rows = kept(self.work, f"pipeline-{stage}", run)
        shown = ("name", "error", "kept", "file_bytes", "huffman_bytes", "safetensors_bytes", "seconds")
        print({key: rows[0][key] for key in shown}, flush=True)
        return rows

    def _recipe(self, recipe: Recipe) -> Recipe:
        from dataclasses import replace

        return replace(recipe, epochs=1) if self.quick else recipe

    def _train(self, stage: str) -> dict[str, Any]:
        return {"validation": self.images.held, "checkpoint_dir": self.work / f"checkpoints-{stage}"}

    def _load(self, stage: str) -> nnx.Module:
        return storage.load(self.work / f"{stage}.uapk")

    def _reference(self) -> nnx.Module:
        model = zoo.create(self.name, **self.setting.options)
        recipe = self._recipe(self.setting.reference)
        return train(model, self.images.x, self.images.y, recipe, **self._train("reference")).model

    def _pruned(self, size: str) -> nnx.Module:
        steps = 2 if self.quick else self.setting.steps
        fractions = {layer: gradual(f, steps) for layer, f in self.setting.kept[size].items()}
        recipe, stage = self._recipe(self.setting.tuning), f"pruned_{size}"
        return prune(
            self._load("reference"), self.images.x, self.images.y, fractions, recipe=recipe, **self._train(stage)
        ).model

    def _shared(self, size: str) -> nnx.Module:
        before = share(self._load(f"pruned_{size}"), self.setting.bits[size])
        recipe, stage = self._recipe(self.setting.tuning), f"shared_{size}"
        return finetune_compressed(before, self.images.x, self.images.y, recipe, **self._train(stage)).model

    def _lc(self, row: str) -> LcResult:
        l_step = SgdLStep(self.images.x, self.images.y, self.setting.schedule, measured=10_000)
        first, factor, count = MU
        mus = exponential(first, factor, 2 if self.quick else count)
        tasks, folder = parse_tasks(self.setting.tasks[row]), self.work / f"checkpoints-{row}"
        result: LcResult = lc(self._load("reference"), tasks, l_step, mus, checkpoint_dir=folder)
        recipe = self._recipe(self.setting.tuning)
        return finetune_compressed(result, self.images.x, self.images.y, recipe, **self._train(f"{row}-tuned"))

    def _measured(self, stage: str, made: nnx.Module | LcResult, seconds: float) -> dict[str, Any]:
        """A row; the network that is judged is the one that was read from its file again."""
        file = self.work / f"{stage}.uapk"
        model, coded = made.parts() if isinstance(made, LcResult) else (made, ())
        huffman = storage.pack(self.work / f"{stage}.huffman.uapk", model, coder="huffman", coded=coded)
        size = storage.pack(file, model, coded=coded)
        error = self.images.error(storage.load(file))
        weights = [np.asarray(w) for w in jax.tree.leaves(nnx.state(model, nnx.Param)) if np.ndim(w) > 1]
        dense, total = 4 * sum(w.size for w in weights), sum(w.size for w in weights)
        nonzero = sum(int(np.count_nonzero(w)) for w in weights)
        reference = self.reference_error or error
        return network_row(
            network=self.name,
            method="lc" if isinstance(made, LcResult) else "deep_compression",
            budget=stage,
            reference_accuracy=100 - reference,
            accuracy=100 - error,
            params_ratio=total / nonzero,
            cr=None,
            macs_ratio=1.0,
            bytes_ratio=dense / size,
            file_bytes=size,
            name=stage,
            error=error,
            kept=nonzero / total,
            dense_bytes=dense,
            huffman_bytes=huffman,
            safetensors_bytes=len(storage.serialize(model, coded=coded)),
            seconds=seconds,
        )


def checks_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors and sizes that must be reached."""
    found = {}
    for network, setting in SETTINGS.items():
        own = {row["name"]: row for row in rows if row["network"] == network}
        if not own:
            continue
        error, size = setting.limits
        reference = own["reference"]["error"]
        found[f"{network}: error of the reference"] = check(reference, "<=", error)
        ratio = 1 / own["pruned_published"]["kept"]
        found[f"{network}: pruned {ratio:.1f} times, error"] = check(own["pruned_published"]["error"], "<=", reference)
        good = [row["file_bytes"] for row in own.values() if row["error"] <= reference]
        found[f"{network}: smallest file with no more error"] = check(min(good), "<=", size)
        if {"lc", "lc_sparse_low_rank"} <= own.keys():
            both, sparse = (own[name]["file_bytes"] for name in ("lc_sparse_low_rank", "lc"))
            found[f"{network}: file with a low rank beside what stays, against without"] = check(both, "<", sparse)
    return found


def main(
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="lenet300, lenet5; both by default. Rows of others stay in the file.")
    ] = None,
    quick: bool = False,
    work_dir: Annotated[Path, typer.Option(help="Finished stages and checkpoints.")] = WORK,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Make the table."""
    start, chosen = time.perf_counter(), network or list(SETTINGS)
    others = json_file.exists() and not quick
    rows = [row for row in read_rows(json_file) if row["network"] not in chosen] if others else []
    for name in chosen:
        if name not in SETTINGS:
            raise typer.BadParameter(f"--network: {name!r} is unknown; there are {', '.join(SETTINGS)}")
        rows += Pipeline(name, data, work_dir / ("quick" if quick else "full"), quick).rows()
    checks, seconds = checks_of(rows), time.perf_counter() - start
    command = "python experiments/deep_compression.py" + (" --quick" if quick else "")
    write_results(json_file, command, rows, checks, seconds=seconds, seed=0, quick=quick)
    print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    typer.run(main)

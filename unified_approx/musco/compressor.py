"""Multi-stage compression, step by step: some layers are factored, the network is trained, and so on, and around again."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Shaped

from solvers.factor_sizes import FACTORED, Ranks, check_ranks, refusal
from solvers.layer import LayerOptions
from solvers.rank_rules import RankChoice, RankRule, settle
from unified_approx import calibration as examples
from unified_approx.allocation.assign import total_cost
from unified_approx.assemble import get
from unified_approx.budget import Budget
from unified_approx.calling import Call, forward
from unified_approx.cost import network_cost
from unified_approx.files import claim, replacing
from unified_approx.layers import Factored
from unified_approx.macs import factored_layers
from unified_approx.musco.ranking import Ranking
from unified_approx.narrow import as_dense
from unified_approx.pipeline import Calibration, Result, compress
from unified_approx.report import LayerRow, ProgressCallback, Report
from unified_approx.rules import Rule
from unified_approx.run import Run
from unified_approx.settings import make_arguments
from unified_approx.sites import LayerSite
from unified_approx.stages import with_history
from unified_approx.storage import load, save
from unified_approx.work_dir import fingerprint

_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the history.

    Attributes:
        number: from 1.
        stage: the pass over the layers that it belongs to, from 1.
        ranks: of the layers of this step that were factored, by name.
        notes: why the others were not, and what else the rule said, by name.
        params: stored values of the network after it.
        macs: multiply-adds per example after it.
    """

    number: int
    stage: int
    ranks: dict[str, Ranks]
    notes: dict[str, str]
    params: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class MuscoOptions:
    """What decides the ranks and their order.

    Attributes:
        rank_rule: of `solvers.rank_rules`; None: only the layers in `ranks` are compressed.
        decomposition: of convolutions with a window: one of `solvers.factor_sizes.FACTORED`. 1x1 convolutions and
            dense layers become two low-rank factors.
        layers_per_step: how many layers between two trainings; None: all.
        stages: passes over the layers, at most.
        ranks: by layer name, in place of the rule's: (r,), for "tucker2" (outputs, inputs); None leaves a layer alone.
        keep: regular expressions for whole names of further layers to leave alone.
        target: stop once the whole network is within it: `Budget(params=..., macs=..., bytes=...)`.
        data_aware: fit each layer's response on the calibration data; otherwise its weights alone.
        round_to: ranks are rounded down to multiples of it.
    """

    rank_rule: RankRule | None
    decomposition: str = "tucker2"
    layers_per_step: int | None = None
    stages: int = 1
    ranks: Mapping[str, Ranks | None] | None = None
    keep: Sequence[str] = ()
    target: Budget | None = None
    data_aware: bool = True
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.decomposition not in FACTORED:
            known = ", ".join(FACTORED)
            raise ValueError(f"decomposition: {self.decomposition!r} is unknown; choose one of {known}")
        for name in ("layers_per_step", "stages", "round_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; give at least 1")
        if self.rank_rule is None and not any(self.ranks or {}):
            raise ValueError("rank_rule: None; give a rule, for example Evbmf(), or ranks of some layers")
        if self.target is not None and (self.target.max_drop is not None or self.target.latency is not None):
            raise ValueError(f"target: {self.target.describe()}; it takes params, macs and bytes")

    def describe(self) -> str:
        """As reports write it."""
        rule = "given ranks" if self.rank_rule is None else repr(self.rank_rule)
        return f"musco {self.decomposition}, {rule}, {self.stages} stages"


class Musco:
    """A network that is compressed in steps; train `model` between them and put it back.

        compressor = Musco(model, images, MuscoOptions(rank_rule=Evbmf(), layers_per_step=3, stages=2))
        while not compressor.done:
            compressor.compression_step()
            compressor.model = finetune(compressor.model, x, y).model

    Attributes:
        history: step by step.
        names: of the layers that take part, in network order.
    """

    def __init__(
        self,
        model: nnx.Module,
        calibration: Calibration,
        options: MuscoOptions,
        *,
        labels: Shaped[np.ndarray, " examples"] | None = None,
        work_dir: str | PathLike[str] | None = None,
        progress: ProgressCallback | None = None,
        call: Call | None = None,
        **arguments: Any,
    ):
        """See `musco`; `arguments` are those of `compress` that say how layers are observed and run."""
        self.options, self.history = options, list[Step]()
        self._call, self._progress = call or forward, progress
        self._data = examples.gather(calibration)
        self._arguments = {"call": self._call, **arguments}
        self._labels = labels
        self._original, self._model = model, model
        first = self._run(model)
        self._example, self._sites, self._skipped = first.example, first.capture.sites, first.capture.skipped
        self._before, self._rows = first.cost, self._dense_rows(first)
        self.names = self._selected()
        self._check_labels()
        self._trained = 0
        self._folder = None
        if work_dir is not None:
            identity = {"weights, data or settings": self._identity()}
            self._folder = claim(work_dir, "work_dir", identity)
            self._resume()

    def __repr__(self) -> str:
        cost = network_cost(self._model, self._example, call=self._call)
        return (
            f"Musco({self.options.describe()}: step {self.num_steps} of at most {self.max_steps}, "
            f"parameters ÷ {self._before.params / cost.params:.2f}, MACs ÷ {self._before.macs / cost.macs:.2f})"
        )

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return len(self.history)

    @property
    def max_steps(self) -> int:
        """Steps if nothing stops it earlier."""
        return -(-self.options.stages * len(self.names) // self._per_step)

    @property
    def done(self) -> bool:
        """Whether all passes are made, the target is reached, or a whole pass changed nothing."""
        return self.num_steps >= self.max_steps or self._is_settled() or self._reached() is True

    @property
    def awaits_training(self) -> bool:
        """Whether the last step changed the network and it was not trained since."""
        return self._trained < self.num_steps and bool(self.history[-1].ranks)

    @property
    def model(self) -> nnx.Module:
        """The network as it is; assign it trained. Its structure must stay."""
        return self._model

    @model.setter
    def model(self, trained: nnx.Module) -> None:
        self._check_structure(trained)
        self._model, self._trained = trained, self.num_steps
        self._store()

    @property
    def ranks(self) -> dict[str, Ranks | None]:
        """Of all layers that take part; None for those that are dense."""
        return {name: self._present(name, self._form(self._site(name))) for name in self.names}

    @property
    def _per_step(self) -> int:
        return min(self.options.layers_per_step or len(self.names), len(self.names))

    def compression_step(self) -> Step:
        """Factor the next layers; what each was given, and why others stayed as they are.

        Raises:
            ValueError: there is no step left.
        """
        if self.done:
            raise ValueError(f"compression_step: all is done after {self.num_steps} steps; see `done`")
        start = self.num_steps * self._per_step
        stop = min(start + self._per_step, self.options.stages * len(self.names))
        turn = {self.names[i % len(self.names)]: i // len(self.names) for i in range(start, stop)}
        dense = as_dense(self._model)
        choices = self._choices(dense, list(turn))
        chosen = {name: choice.ranks for name, choice in choices.items() if choice.ranks is not None}
        if chosen:
            self._replace(dense, chosen)
        cost = network_cost(self._model, self._example, call=self._call)
        made = {name: ranks for name, ranks in chosen.items() if self._rows[name].status == "compressed"}
        notes = {name: choice.note for name, choice in choices.items() if choice.note}
        notes |= {name: self._rows[name].reason for name in chosen if name not in made}
        step = Step(
            number=self.num_steps + 1,
            stage=1 + max(turn.values()),
            ranks=made,
            notes=notes,
            params=cost.params,
            macs=cost.macs,
        )
        self.history.append(step)
        self._store()
        return step

    def result(self) -> Result:
        """The network as it is, with a report that counts against the original."""
        cost = network_cost(self._model, self._example, call=self._call)
        said = {name: note for step in self.history for name, note in step.notes.items()}
        rows = [replace(row, reason=said.get(name, row.reason)) for name, row in self._rows.items()]
        skipped = [
            LayerRow(name=s.name, kind=s.kind, shape=(0, 0), status="skipped", reason=s.reason) for s in self._skipped
        ]
        return Result(
            model=self._model,
            report=Report(
                layers=(*rows, *skipped),
                budget=self.options.describe() if self.options.target is None else self.options.target.describe(),
                budget_met=self._reached(),
                params=cost.params,
                original_params=self._before.params,
                bits=cost.bits,
                original_bits=self._before.bits,
                macs=cost.macs,
                original_macs=self._before.macs,
                seconds=sum(row.seconds for row in rows),
                seed=self._arguments.get("seed", 0),
            ),
        )

    def _run(self, model: nnx.Module) -> Run:
        """The network captured, no size settled."""
        given = {"budget": Budget(params=1.0), "options": self._layer_options(), **self._arguments}
        return Run(model, self._data, make_arguments(**given))

    def _layer_options(self) -> LayerOptions:
        return LayerOptions(gauge=False, data_aware=self.options.data_aware)

    def _dense_rows(self, run: Run) -> dict[str, LayerRow]:
        return {site.name: run.dense_row(site) for site in run.capture.sites}

    def _site(self, name: str) -> LayerSite:
        return next(site for site in self._sites if site.name == name)

    def _form(self, site: LayerSite) -> str:
        return (
            "low_rank"
            if refusal(self.options.decomposition, site.geometry.matrix_shape)
            else self.options.decomposition
        )

    def _selected(self) -> list[str]:
        """Names of the layers that take part."""
        given, known = dict(self.options.ranks or {}), [site.name for site in self._sites]
        for name, ranks in given.items():
            if name not in known:
                raise ValueError(
                    f"ranks: there is no layer {name!r} that can be compressed; layers are: {', '.join(known)}"
                )
            if ranks is not None:
                check_ranks(self._form(self._site(name)), self._site(name).geometry.matrix_shape, ranks)
        left = [name for name in known if not any(re.fullmatch(p, name) for p in self.options.keep)]
        rule = self.options.rank_rule is not None
        chosen = [name for name in left if (given[name] is not None if name in given else rule)]
        unused = [p for p in self.options.keep if not any(re.fullmatch(p, name) for name in known)]
        if unused:
            raise ValueError(f"keep: {unused[0]!r} matches no layer; layers are: {', '.join(known)}")
        if not chosen:
            raise ValueError("ranks, keep: they leave every layer alone; there is no layer to compress")
        return chosen

    def _check_labels(self) -> None:
        rule = self.options.rank_rule
        if rule is None or rule.needs != "accuracy":
            return
        count = examples.count(self._data)
        if self._labels is None or np.shape(self._labels) != (count,):
            raise ValueError(
                f"labels: {type(rule).__name__} measures accuracy; give one label for each of {count} examples"
            )

    def _identity(self) -> str:
        settings = {k: repr(v) for k, v in {**vars(self.options), **self._arguments}.items() if k != "call"}
        return fingerprint(settings, self._original, self._data)

    def _present(self, name: str, form: str) -> Ranks | None:
        """The ranks that a layer has in a form; None if it is dense, or of another form."""
        layer: Any = get(self._model, self._site(name).path)
        if not isinstance(layer, Factored) or len(layer.terms) != 1 or layer.terms[0].kind != form:
            return None
        term: Any = layer.terms[0]
        return term.ranks if form == "tucker2" else (term.rank,)

    def _choices(self, dense: nnx.Module, names: list[str]) -> dict[str, RankChoice]:
        """Ranks of the layers of one step."""
        given, rule = self.options.ranks or {}, self.options.rank_rule
        forms = {name: self._form(self._site(name)) for name in names}
        previous = {name: self._present(name, form) for name, form in forms.items()}
        run = self._run(dense)
        ranking = Ranking(run, rule, self._labelled(), self.options.data_aware)
        found = {}
        for site, problem in ranking.problems(forms, previous, without=given):
            asked = given.get(site.name)
            choice = RankChoice(asked) if asked is not None else rule.choose(problem) if rule is not None else None
            assert choice is not None
            found[site.name] = settle(choice, problem, 1 if asked is not None else self.options.round_to)
        return found

    def _labelled(self) -> tuple[Any, Any] | None:
        return None if self._labels is None else (self._data, self._labels)

    def _replace(self, dense: nnx.Module, chosen: Mapping[str, Ranks]) -> None:
        """Solve the chosen layers in network order, and put them in."""
        rules = [
            *(Rule(path=re.escape(n), form=self._form(self._site(n)), ranks=r) for n, r in chosen.items()),
            Rule(path=".*", keep=True),
        ]
        folder = None if self._folder is None else self._folder / f"step-{self.num_steps + 1:04d}"
        more = {"options": self._layer_options(), "progress": self._progress, "work_dir": folder}
        result = compress(dense, self._data, rules=rules, **more, **self._arguments)
        for row in result.report.layers:
            if row.name in chosen and (row.status == "compressed" or self._rows[row.name].status != "compressed"):
                old = self._rows[row.name]
                self._rows[row.name] = replace(
                    row, original_params=old.original_params, original_macs=old.original_macs
                )
        self._model = with_history(result.model, factored_layers(self._model))

    def _is_settled(self) -> bool:
        """Whether every layer was looked at, and a whole pass of steps changed nothing."""
        steps = -(-len(self.names) // self._per_step)
        return self.num_steps >= steps and not any(step.ranks for step in self.history[-steps:])

    def _reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.options.target is None:
            return None
        cost = network_cost(self._model, self._example, call=self._call)
        limits = self.options.target.given()
        return all(total_cost(cost, k) <= f * total_cost(self._before, k) for k, f in limits.items())

    def _check_structure(self, trained: nnx.Module) -> None:
        def shapes(model: nnx.Module) -> dict[Any, tuple[int, ...]]:
            return {key: leaf.shape for key, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}

        if shapes(trained) != shapes(self._model):
            raise ValueError(
                "model: its parameters have other shapes than the compressor's; train with the structure fixed"
            )

    def _store(self) -> None:
        if self._folder is None:
            return
        name = f"network-{self.num_steps:04d}-{self._trained:04d}.safetensors"
        save(self._folder / name, self._model)
        lines = {"network": name, "trained": self._trained, "history": [asdict(step) for step in self.history]}
        rows = {name: asdict(row) for name, row in self._rows.items()}
        with replacing(self._folder / _STATE) as partial:
            partial.write_text(json.dumps({**lines, "rows": rows}))
        for other in self._folder.glob("network-*.safetensors"):
            if other.name != name:
                other.unlink()

    def _resume(self) -> None:
        """Go on from what the folder holds, if it holds anything yet."""
        assert self._folder is not None
        file = self._folder / _STATE
        if not file.exists():
            return
        try:
            found = json.loads(file.read_text())
            steps = [{**line, "ranks": {n: tuple(r) for n, r in line["ranks"].items()}} for line in found["history"]]
            rows = {name: LayerRow(**{**row, "shape": tuple(row["shape"])}) for name, row in found["rows"].items()}
            network = self._folder / str(found["network"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"work_dir: {file} is damaged ({error}); give a new folder") from error
        self._model = load(network, like=self._original)
        self.history, self._rows, self._trained = [Step(**step) for step in steps], rows, found["trained"]

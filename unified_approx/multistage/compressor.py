"""Multi-stage compression, step by step: some layers are factored, the network is trained, and around again."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, cast

import numpy as np
from flax import nnx
from jaxtyping import Shaped

from solvers.factor_sizes import Ranks, check_ranks, full_ranks, refusal
from solvers.layer import LayerOptions
from solvers.rank_rules import RankChoice, settle
from unified_approx import calibration as examples
from unified_approx.allocation.assign import total_cost
from unified_approx.assemble import get
from unified_approx.budget import Budget
from unified_approx.calling import Call, forward
from unified_approx.cost import network_cost
from unified_approx.layers import Factored
from unified_approx.multistage.options import MuscoOptions, Step
from unified_approx.multistage.ranking import Ranking
from unified_approx.multistage.store import State, Store
from unified_approx.narrow import as_dense, shape_of
from unified_approx.pipeline import Calibration, Result
from unified_approx.report import LayerRow, ProgressCallback, Report
from unified_approx.rules import Rule
from unified_approx.run import Run
from unified_approx.settings import make_arguments
from unified_approx.sites import LayerSite
from unified_approx.stages import compress_again
from unified_approx.work_dir import fingerprint


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
        self._latest = first = self._run(as_dense(model))
        self._example, self._skipped = first.example, first.capture.skipped
        self._before = network_cost(model, self._example, call=self._call)
        self._rows = {site.name: self._first_row(first, site) for site in first.capture.sites}
        self.names = self._selected()
        self._check_labels()
        self._trained = 0
        self._store = None if work_dir is None else Store(work_dir, self._identity())
        if self._store is not None and (found := self._store.load(model)) is not None:
            self.history, self._trained, self._rows = list(found.history), found.trained, dict(found.rows)
            self._model = found.model

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
        self._save()

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
        warnings = self._replace(chosen) if chosen else ()
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
            warnings=warnings,
        )
        self.history.append(step)
        self._save()
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
                warnings=tuple(dict.fromkeys(w for step in self.history for w in step.warnings)),
            ),
        )

    def _run(self, model: nnx.Module) -> Run:
        """The network captured, no size settled."""
        given = {"budget": Budget(params=1.0), "options": self._layer_options(), **self._arguments}
        return Run(model, self._data, make_arguments(**given))

    def _first_row(self, run: Run, site: LayerSite) -> LayerRow:
        """The report's row of a layer as it was given, dense or factored."""
        cost, row = self._before.layer(site.path), run.dense_row(site)
        layer = get(self._original, site.path)
        if not isinstance(layer, Factored):
            return row
        params = cost.params - (0 if layer.bias is None else layer.bias.size)
        return replace(row, params=params, original_params=params, macs=cost.macs, original_macs=cost.macs)

    def _current(self, dense: nnx.Module, *, weights_only: bool) -> Run:
        """The network captured as it is; where weights alone count, the last time that its layers had these shapes."""
        sites = self._sites
        same = all(shape_of(cast(Any, get(dense, s.path))) == s.geometry.matrix_shape for s in sites)
        if not (weights_only and same):
            self._latest = self._run(dense)
        return self._latest

    @property
    def _sites(self) -> Sequence[LayerSite]:
        return self._latest.capture.sites

    def _layer_options(self) -> LayerOptions:
        return LayerOptions(gauge=False, data_aware=self.options.data_aware)

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
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"ranks: no layer {unknown[0]!r} can be compressed; layers are: {', '.join(known)}")
        for site in self._sites:
            ranks = given.get(site.name)
            if ranks is not None:
                check_ranks(self._form(site), site.geometry.matrix_shape, ranks)
        unused = [p for p in self.options.keep if not any(re.fullmatch(p, name) for name in known)]
        if unused:
            raise ValueError(f"keep: {unused[0]!r} matches no layer; layers are: {', '.join(known)}")
        left = [name for name in known if not any(re.fullmatch(p, name) for p in self.options.keep)]
        by_rule = self.options.rank_rule is not None
        chosen = [name for name in left if (given[name] is not None if name in given else by_rule)]
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
        data = self._data if self._labels is None else (self._data, np.asarray(self._labels))
        return fingerprint(settings, self._original, data)

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
        run = self._current(dense, weights_only=rule is None or rule.needs == "nothing")
        forms = {name: self._form(self._site(name)) for name in names}
        previous = {name: self._present(name, form) for name, form in forms.items()}
        ranking = Ranking(run, dense, rule, self._labelled(), data_aware=self.options.data_aware)
        found = {}
        for site, problem in ranking.problems(forms, previous, without=given):
            asked = given.get(site.name)
            if asked is not None:  # channels that nothing reads may be gone by now
                full = full_ranks(problem.form, problem.shape)
                asked = tuple(min(pair) for pair in zip(asked, full, strict=True))
            choice = RankChoice(asked) if asked is not None else rule.choose(problem) if rule is not None else None
            assert choice is not None
            found[site.name] = settle(choice, problem, 1 if asked is not None else self.options.round_to)
        return found

    def _labelled(self) -> tuple[Any, Any] | None:
        return None if self._labels is None else (self._data, self._labels)

    def _replace(self, chosen: Mapping[str, Ranks]) -> tuple[str, ...]:
        """Solve the chosen layers in network order, and put them in; what the user should know."""
        rules = [
            *(Rule(path=re.escape(n), form=self._form(self._site(n)), ranks=r) for n, r in chosen.items()),
            Rule(path=".*", keep=True),
        ]
        folder = None if self._store is None else self._store.layers_of(self.num_steps + 1)
        more = {"options": self._layer_options(), "progress": self._progress, "work_dir": folder}
        result = compress_again(self._model, self._data, rules=rules, **more, **self._arguments)
        for row in result.report.layers:
            if row.name in chosen and (row.status == "compressed" or self._rows[row.name].status != "compressed"):
                old = self._rows[row.name]
                self._rows[row.name] = replace(
                    row, original_params=old.original_params, original_macs=old.original_macs
                )
        self._model = result.model
        return result.report.warnings

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

    def _save(self) -> None:
        if self._store is not None:
            self._store.save(State(self._model, self.history, self._trained, self._rows))

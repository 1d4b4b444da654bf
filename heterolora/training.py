"""One run: load, search, fine-tune, evaluate, and write everything down."""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar
from safetensors.torch import save_file

from heterolora.allocation import Allocation
from heterolora.allocators.base import placed
from heterolora.backbone import Backbone
from heterolora.calibration import kept_step_times, step_limit
from heterolora.callbacks.allocate import AllocateRanks, Moment, Static
from heterolora.callbacks.progress import track
from heterolora.checkpoints import CURVES
from heterolora.data.module import TextData
from heterolora.data.splits import Splits
from heterolora.errors import SettingError
from heterolora.export import origin_of
from heterolora.findings import FILES, SITE_COLUMNS, Scores, write_findings
from heterolora.history import HISTORY, Decision, append_decision, read_history
from heterolora.inits.base import check_lora, initialise
from heterolora.lit import LitAdapted
from heterolora.model import AdaptedModel
from heterolora.parts import Parts, config_hash
from heterolora.peft_in import start_from
from heterolora.plan import planned
from heterolora.prefix_cache import FrozenPrefix
from heterolora.processes import ALONE, Processes
from heterolora.provenance import code_version, provenance, versions
from heterolora.proxies.base import DegenerateScores, Score, looks_at_batches
from heterolora.proxies.evidence import check_ids
from heterolora.report.files import write_json, write_text, write_whole
from heterolora.report.loggers import Silent
from heterolora.report.memory import peak_mib, reset_peak
from heterolora.report.picture import HISTORY_PICTURE, draw_history
from heterolora.report.plan import print_plan
from heterolora.report.summary import print_summary
from heterolora.resume import Resume
from heterolora.scoring import SearchResult, check_budget, check_trained, rehearse, untracked
from heterolora.shelf import Shelf
from heterolora.space import Space, survey
from heterolora.step_time import StepLimit, StepTimes, in_short, shown
from heterolora.tasks.base import Task
from heterolora.tasks.measure import FirstMetric

_log = logging.getLogger(__name__)


def run_training(
    parts: Parts,
    config: Mapping[str, Any],
    folder: Path,
    resume: Resume | None,
    shelf: Shelf | None = None,
    accept: Callable[[Allocation], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Run everything and leave the results in ``folder``.

    Args:
        parts: the objects.
        config: the resolved config, for the record.
        folder: the run's folder; nothing is written to it before the settings have proved usable.
        resume: an earlier run to go on with.
        shelf: data and backbones that other runs of this process use, too; None: load them for this run.
        accept: looks at the allocation before anything is trained, and raises if it will not do.
        processes: all that work on this run, with the same arguments; the first writes the files.

    Returns:
        The summary that is also written to ``summary.json``; a metric that is not defined is NaN here and null there.
        A dry run trains nothing, and returns what ``plan.json`` holds. Processes beside the first return nothing.
    """
    if not parts.dry:
        parts.trainer.check_processes(processes)
    if not processes.leads:
        shown = [callback for callback in parts.callbacks if isinstance(callback, ProgressBar)]
        parts = replace(parts, logger=Silent(), callbacks=[c for c in parts.callbacks if c not in shown])
    reset_peak()
    threads = torch.get_num_threads()
    try:
        return _Run(parts, config, folder, resume, shelf or Shelf(keep=False), accept, processes).execute()
    finally:
        parts.logger.close(None)
        torch.set_num_threads(threads)


class _Run:
    """The steps of one run; what they share."""

    def __init__(
        self,
        parts: Parts,
        config: Mapping[str, Any],
        folder: Path,
        resume: Resume | None,
        shelf: Shelf,
        accept: Callable[[Allocation], None] | None,
        processes: Processes,
    ) -> None:
        self.parts = parts
        self.config = config
        self.folder = folder
        self.resume = resume
        self.shelf = shelf
        self.accept = accept
        self.processes = processes

    def execute(self) -> dict[str, Any]:
        parts = self.parts
        if parts.trainer.threads is not None:
            torch.set_num_threads(parts.trainer.threads)
        L.seed_everything(parts.seed, verbose=False)
        given = self.config
        material = self.shelf.material(parts, given)
        splits, task = material.splits, material.task
        parts = replace(parts, task=task)
        self.parts = parts = parts.baseline.adopted(parts, self.resume is not None, self.processes)
        self.config = for_the_record(given, task)
        backbone = self.shelf.backbone(parts, given, task.outputs)
        space = parts.search_space.resolve(survey(backbone.model, backbone.layout))
        model = parts.baseline.model(backbone, space, parts.adapter)
        if backbone.gradient_checkpointing:
            model.gradient_checkpointing()
        self.parts = parts = replace(parts, allocator=placed(parts.allocator, space.sites))
        budget = parts.budget.resolve(space)
        check_budget(parts.allocator, budget, space, parts.adapter)
        self._check_allocation()
        self._check_shards(backbone)
        rehearse(parts.allocator, budget, space, parts.adapter)
        if self._scored:
            check_ids("proxy", self._proxy_name, parts.proxy.statistics, space.sites)
            check_trained({self._proxy_name: parts.proxy}, parts.probe, model)
        data = self.shelf.tokens(parts, given, material, backbone).among(self.processes)
        identity = {
            "settings": config_hash(given),
            "backbone weights": backbone.fingerprint,
            "data": digest(splits, task),
        }
        self.processes.check_equal("backbone and data", repr(identity))
        prefix = self._prefix(data, model, backbone)
        steps = parts.trainer.steps(len(data.examples["train"]), data.settings.batch_size)
        module = parts.baseline.module(model, parts, steps, identity, prefix, self.processes)
        if parts.dry:
            return self._plan(module, data, splits) if self.processes.leads else {}
        parts.trainer.compile_model(model)
        allocating = parts.allocation.callback(
            lambda lit, moment: self._search(lit, data, backbone, moment),
            lambda result: self._begin(result, module, data, backbone),
            self._decided,
            lambda lit, count: on_device(data.scoring_batches(count)[0], lit.model),
            parts.allocator,
            self.resume is not None,
        )
        callbacks = [*parts.callbacks, *([] if allocating is None else [allocating])]
        earlier = None if self.resume is None else self.resume.run
        logger = parts.logger.open(self.folder, self.config, earlier)
        trainer = parts.trainer.make(self.folder, callbacks, logger, parts.optimizer.clip, self.processes)
        ckpt_path = None
        if self.resume is not None:
            ckpt_path = self.resume.checkpoint
            if self.processes.leads:
                self._adopt(self.resume)
        module.train()  # backbones are loaded in evaluation mode, and Lightning keeps the mode it finds
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if isinstance(allocating, AllocateRanks):
            allocating.finish(module)
        if self.processes.leads:
            self._settle(module, data, backbone)
        metrics = self._evaluate(trainer, module, data, splits.tests if parts.trainer.test else ())
        if not self.processes.leads:
            return {}
        summary = self._summary(module, metrics, splits, material.origin, backbone, trainer)
        self._write_results(module, summary)
        self._hand_over(module, data, summary)
        print_summary(summary)
        parts.logger.close({f"{s}/{n}": v for s, values in metrics.items() for n, v in values.items()})
        return summary

    def _prefix(self, data: TextData, model: AdaptedModel, backbone: Backbone) -> FrozenPrefix | None:
        """What starts forwards above the frozen blocks; None where they run as always."""
        settings = self.parts.prefix
        if self.parts.trainer.compile and backbone.gradient_checkpointing:
            raise SettingError("trainer.compile", True, "not with model.gradient_checkpointing, which it cannot read")
        settings.check(model)
        if not settings.cache and settings.dropout:
            return None
        if self.parts.trainer.compile:
            raise SettingError(
                "trainer.compile", True, "not with prefix.cache or prefix.dropout=false, which change calls"
            )
        lengths = {split: data.lengths(split) for split in ("train", "validation")}
        return FrozenPrefix(settings, lengths, len(self.parts.task.inputs))

    def _plan(self, module: LitAdapted, data: TextData, splits: Splits) -> dict[str, Any]:
        """What the run would do and need."""
        parts = self.parts
        if self._scored:
            data.scoring_batches(parts.probe.batches)  # refused here as it would be later
        plan = {
            "title": f"dry run of {self._title()}",
            "choices": dict(parts.choices),
            **planned(module, data, parts.budget, parts.probe, parts.trainer, parts.proxy if self._scored else None),
            "sizes": {split: len(table) for split, table in splits.tables.items()},
            "note": splits.note,
            "folder": str(self.folder),
        }
        self._write_config()
        write_json(self.folder / "plan.json", plan)
        print_plan(plan)
        return plan

    @property
    def _scored(self) -> bool:
        """Whether batches are looked at before training."""
        scored = self.parts.allocator.gain_rule is not None and looks_at_batches(self.parts.proxy)
        return scored or self.parts.baseline.looks_at_batches

    # -- search -----------------------------------------------------------------------------------------------------

    @property
    def _proxy_name(self) -> str:
        return str(self.parts.choices.get("proxy", type(self.parts.proxy).__name__))

    def _check_allocation(self) -> None:
        parts = self.parts
        timed = parts.budget.step_time is not None and parts.data.cache_dir is None
        if parts.init is not None:
            check_lora(parts.adapter, parts.init)
            given = parts.choices.get("init")
            if not isinstance(parts.allocation, Static):
                raise SettingError("init", given, "fills the first adapters alone: allocation=static")
            if parts.start_from is not None:
                raise SettingError("init", given, "not with start_from, whose adapter it would replace")
        parts.allocation.check(parts.allocator, parts.probe, parts.adapter, parts.trainer.compile, timed)

    def _check_shards(self, backbone: Backbone) -> None:
        """Refuse what one process does by itself, or in another order than the others, where each holds a share."""
        parts = self.parts
        if parts.trainer.strategy != "fsdp" or parts.dry:
            return
        for setting, given, refused, possible in (
            ("allocation", parts.choices.get("allocation"), not isinstance(parts.allocation, Static), "static"),
            (
                "adapter",
                parts.choices.get("adapter"),
                parts.adapter.needs_weights,
                "lora: whole weights are at no place",
            ),
            ("prefix.cache", True, parts.prefix.cache, "false"),
            ("prefix.dropout", False, not parts.prefix.dropout, "true"),
            ("trainer.compile", True, parts.trainer.compile, "false"),
            ("model.gradient_checkpointing", True, backbone.gradient_checkpointing, "false"),
            ("export.peft", True, parts.export.peft, "false: what is exported is compared on a whole model, later"),
        ):
            if refused:
                raise SettingError(setting, given, f"with trainer.strategy=fsdp: {possible}")

    def _search(self, lit: LitAdapted, data: TextData, backbone: Backbone, moment: Moment) -> SearchResult:
        parts = self.parts
        scored = self._scored
        batches, rows = data.scoring_batches(parts.probe.batches, moment.draw) if scored else ([], [])
        # A head that is trained needs no warming up.
        probe = parts.probe if moment.standing is None else replace(parts.probe, head_warmup_steps=0)
        look = partial(
            parts.baseline.search,
            lit.model,
            lit.scalar_loss,
            on_device(batches, lit.model),
            (on_device([batch], lit.model)[0] for batch in data.warmup_batches()),
            proxy=parts.proxy,
            allocator=parts.allocator,
            budget=parts.allocation.starting_budget(parts.budget),
            probe=probe,
            seed=parts.seed,
            proxy_name=self._proxy_name,
            track=track if moment.standing is None and self.processes.leads else untracked,
            limit=lambda: self._limit(lit, data),
            standing=moment.standing,
            measure=FirstMetric(parts.task),
            processes=self.processes,
        )
        result = self.processes.agreed(look, DegenerateScores)
        found = result.allocation
        lit.add_search(result.seconds)
        if moment.standing is not None:
            return result
        proxy = self.config["proxy"] if parts.allocator.gain_rule is not None else None
        timed = {} if result.step_time is None else {"step_time": result.step_time}
        origin = provenance(self.config, backbone.fingerprint, rows if scored else None, proxy=proxy, **timed)
        allocation = Allocation(found.ranks, found.spent, found.budget, origin)
        self._scored_rows = rows
        if self.accept is not None:
            self.accept(allocation)
        return replace(result, allocation=allocation)

    def _limit(self, lit: LitAdapted, data: TextData) -> StepLimit | None:
        """What ``budget.step_time`` means for this model on this machine."""

        def times() -> StepTimes:
            (batch,) = on_device([data.typical_batch()], lit.model)
            cache = None if self.parts.data.cache_dir is None else Path(self.parts.data.cache_dir)
            return self.processes.once(lambda: kept_step_times(lit.model, lit.scalar_loss, batch, cache, track))

        limit = step_limit(self.parts.budget, lit.model.space.survey, times)
        return limit and replace(limit, cached=self.parts.prefix.cache)

    def _begin(self, result: SearchResult, lit: LitAdapted, data: TextData, backbone: Backbone) -> None:
        """The ranks are enabled: fill them if that is wanted, and write down what was found."""
        parts, model = self.parts, lit.model
        if parts.init is not None:
            start = time.perf_counter()
            batches = on_device(data.scoring_batches(parts.probe.batches)[0], model)
            warmup = (on_device([batch], model)[0] for batch in data.warmup_batches())
            shown = track if self.processes.leads else untracked
            initialise(model, lit.scalar_loss, batches, warmup, parts.init, parts.probe, shown, self.processes)
            lit.add_search(time.perf_counter() - start)
            lit.check_replicas()
        if self.parts.start_from is not None:
            start_from(model, backbone, self.parts.start_from)
        if self.processes.leads:
            self._found(result, model.space, backbone.fingerprint)

    def _found(self, result: SearchResult, space: Space, backbone: str) -> None:
        """Write down what was found, before training starts."""
        self._write_config()
        allocation = result.allocation
        rows = self._write_findings(space, result.scores, self._scored_rows, allocation, backbone)
        self.parts.logger.log_allocation(SITE_COLUMNS, rows, self.folder / "allocation.png")
        if isinstance(self.parts.allocation, Static):
            self.parts.logger.log_decision(Decision(0, result.scores or {}, allocation.ranks, "static"))
        spent = f"{allocation.spent:,}" + ("" if allocation.budget is None else f" of {allocation.budget:,}")
        limit = "" if result.step_time is None else f" ({shown(result.step_time)})"
        _log.info("allocated %s parameters to %d of %d sites%s", spent, len(allocation.active), len(space.sites), limit)

    def _decided(self, decision: Decision) -> None:
        """Write a decision down at once."""
        if self.processes.leads:
            append_decision(self.folder / HISTORY, decision)
            self.parts.logger.log_decision(decision)

    def _settle(self, module: LitAdapted, data: TextData, backbone: Backbone) -> None:
        """Training under changing allocations is over: the last one is the run's, and the history is drawn."""
        history = read_history(self.folder / HISTORY)
        if not history:
            return self._masked(module.model, backbone)
        model = module.model
        space, ranks = model.space, model.ranks
        draw = max(number for number, decision in enumerate(history) if decision.scores or not number)
        scores = history[draw].scores or None
        own = getattr(self.parts.allocation, "scored_by", None)
        looked = scores and self._scored and own is None
        rows = data.scoring_batches(self.parts.probe.batches, draw)[1] if looked else []
        spent = self.parts.adapter.cost(space.sites)(ranks)
        dynamic = {"decisions": len(history), "last": history[-1].step, "scores of decision": draw}
        origin = provenance(
            self.config, backbone.fingerprint, rows or None, proxy=self.config["proxy"], dynamic=dynamic
        )
        # What is frozen stays in the function beyond what the budget pays for; it is counted as held.
        budget = self.parts.budget.resolve(space)
        allowed = None if model.frozen or not isinstance(budget, int) else budget
        found = Allocation(ranks, spent, allowed, origin)
        self._write_findings(space, scores, rows, found, backbone.fingerprint, own)
        draw_history(space, history, self._title(), self.folder / HISTORY_PICTURE)
        self.parts.logger.log_history(history, self.folder / HISTORY_PICTURE)

    def _masked(self, model: AdaptedModel, backbone: Backbone) -> None:
        """A baseline may have masked units of rank, which it still holds: those that act are the run's allocation."""
        before, ranks = json.loads((self.folder / "allocation.json").read_text()), model.ranks
        if ranks == before["ranks"]:
            return
        spent, budget = self.parts.adapter.cost(model.space.sites)(ranks), self.parts.budget.resolve(model.space)
        allowed = budget if isinstance(budget, int) and spent <= budget else None
        origin = before["provenance"] | {"held": {"ranks": before["ranks"], "parameters": before["spent"]}}
        self._write_findings(model.space, None, [], Allocation(ranks, spent, allowed, origin), backbone.fingerprint)

    def _write_findings(
        self,
        space: Space,
        found: Mapping[str, Score] | None,
        rows: Sequence[Sequence[int]],
        allocation: Allocation,
        backbone: str,
        scored_by: str | None = None,
    ) -> list[list[Any]]:
        """The rows of ``sites.csv``, as ``write_findings`` has them."""
        name = scored_by or self._proxy_name
        scores = None if found is None else Scores(name, {name: found}, rows, backbone, self.config["model"])
        return write_findings(self.folder, space, scores, allocation, self.parts.adapter, self._title())

    def _adopt(self, resume: Resume) -> None:
        """Take over what the earlier run's search wrote, its decisions and its curves up to the checkpoint."""
        self._write_config()
        for name in FILES:
            if (resume.run / name).exists():
                write_whole(self.folder / name, partial(shutil.copyfile, resume.run / name))

        checkpoint = torch.load(resume.checkpoint, weights_only=True)
        curves = checkpoint["curves"]
        for decision in read_history(resume.run / HISTORY):
            if decision.step < max(1, checkpoint["global_step"]):
                append_decision(self.folder / HISTORY, decision)
        tables = [pd.read_csv(path) for name in CURVES if (path := resume.run / name).exists()]
        if tables and curves:
            before = pd.concat(tables)[:curves]
            write_whole(self.folder / CURVES[0], partial(before.to_csv, index=False))

    def _write_config(self) -> None:
        write_text(self.folder / "config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False))

    # -- results ----------------------------------------------------------------------------------------------------

    def _evaluate(
        self, trainer: L.Trainer, module: LitAdapted, data: TextData, tests: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Metrics of the last step's weights on validation and these test splits; NaN where one is not defined."""
        if module.validated_step != trainer.global_step:  # the last epoch's validation saw the same weights
            trainer.validate(module, datamodule=data, verbose=False)
        if tests:
            trainer.test(module, datamodule=data, verbose=False)
        metrics = {split: module.found[split] for split in ("validation", *tests)}
        if wrong := [split for split, found in metrics.items() if not math.isfinite(found["loss"])]:
            raise FloatingPointError(f"the loss on {wrong} is not finite after training; lower optimizer.lr")
        return metrics

    def _summary(
        self,
        module: LitAdapted,
        metrics: Mapping[str, Mapping[str, float]],
        splits: Splits,
        origin: str,
        backbone: Backbone,
        trainer: L.Trainer,
    ) -> dict[str, Any]:
        allocation = json.loads((self.folder / "allocation.json").read_text())
        if allocation["spent"] != module.model.active_parameters:
            raise RuntimeError(
                f"{module.model.active_parameters} parameters are active, {allocation['spent']} were allocated"
            )
        predictions = {split: module.predictions(split) for split in metrics}
        collapsed = {
            split: module.task.collapsed(found["prediction"], found["labels"]) for split, found in predictions.items()
        }
        head = sum(value.numel() for value in module.model.head_state_dict().values())
        baseline = self.parts.baseline.report(module.model)
        return {
            "title": self._title(),
            "choices": dict(self.parts.choices),
            "seed": self.parts.seed,
            "metrics": {split: dict(values) for split, values in metrics.items()},
            "collapsed": collapsed,
            "parameters": {
                "held": module.held_parameters,
                "active": module.model.active_parameters,
                "budget": allocation["budget"] if baseline is None else baseline["budget"],
                "unspent": allocation["unspent"],
                "frozen": module.model.frozen_factors,
                "head": head,
                "backbone": module.model.space.survey.parameters,
            },
            "sites": {
                "candidates": len(module.model.space.sites),
                "active": sum(map(bool, module.model.ranks.values())),
            },
            "seconds": {"search": module.search_seconds, "training": module.training_seconds},
            **in_short(allocation["provenance"]),
            "baseline": baseline,
            "peak_memory_mib": peak_mib(),
            "data": {
                "note": splits.note,
                "origin": origin,
                "sizes": {split: len(table) for split, table in splits.tables.items()},
                "sha256": module.identity["data"],
                "labels": None if self.parts.task.labels is None else list(self.parts.task.labels),
            },
            "prefix": None if module.prefix is None else module.prefix.report(),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "backbone": backbone.fingerprint,
            "threads": torch.get_num_threads(),
            "processes": self.processes.size,
            "versions": versions(),
            "commit": code_version(),
            "resumed_from": None if self.resume is None else str(self.resume.run),
            "folder": str(self.folder),
        }

    def _write_results(self, module: LitAdapted, summary: Mapping[str, Any]) -> None:
        for split in summary["metrics"]:
            table = self.parts.task.prediction_table(module.predictions(split))
            write_whole(self.folder / f"predictions_{split}.csv", partial(table.to_csv, index=False))
        state = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
        metadata = {"format": "heterolora-1", "backbone": str(summary["backbone"])}
        write_whole(self.folder / "adapter.safetensors", lambda path: save_file(state, path, metadata))
        self._join_metrics()
        write_json(self.folder / "summary.json", {**summary, "metrics": without_nan(summary["metrics"])})

    def _hand_over(self, module: LitAdapted, data: TextData, summary: dict[str, Any]) -> None:
        """Export the adapters; the run is finished and written down, and stays so whatever comes of it."""
        if not self.parts.export.peft:
            return
        (batch,) = on_device([data.a_few()], module.model)
        allocation = json.loads((self.folder / "allocation.json").read_text())
        written = {**summary, "metrics": without_nan(summary["metrics"])}
        origin = origin_of(self.config, self.parts.task, written, allocation)
        with torch.compiler.set_stance("force_eager"):  # one forward is not worth a compilation
            summary["export"] = self.parts.baseline.hand_over(
                module.model, self.folder, lambda model: self.parts.task.logits(model, batch), self.parts.export, origin
            )
        write_json(self.folder / "summary.json", {**written, "export": summary["export"]})

    def _join_metrics(self) -> None:
        """The curves of the earlier processes, then ours."""
        old, new = (self.folder / name for name in CURVES)
        if old.exists() and new.exists():
            joined = pd.concat([pd.read_csv(old), pd.read_csv(new)])
            write_whole(new, partial(joined.to_csv, index=False))
            old.unlink()

    def _title(self) -> str:
        keys = ["model", "search_space", *self.parts.baseline.chosen, "budget"]
        if "proxy" in keys and self.parts.allocator.gain_rule is None:
            keys.remove("proxy")
        chosen = ", ".join(str(self.parts.choices.get(key, "?")) for key in keys)
        return f"{self.parts.task.name}: {chosen}, seed {self.parts.seed}"


def on_device(batches: Iterable[Mapping[str, torch.Tensor]], model: AdaptedModel) -> list[dict[str, torch.Tensor]]:
    """Batches where the model is."""
    device = next(model.backbone.parameters()).device
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def for_the_record(config: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """The config as it can be used later, from anywhere.

    It holds the names of the classes, which a config may leave to the data, and absolute paths of the data.
    """
    node, data = dict(config["task"]), dict(config["data"])
    if "labels" in node and task.labels is not None:
        node["labels"] = list(task.labels)
    if data["root"]:
        data["root"] = _absolute(data["root"])
    files = {key: _absolute(node["source"][key]) for key in ("train", "validation", "test") if node["source"].get(key)}
    return {**config, "data": data, "task": {**node, "source": {**node["source"], **files}}}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def digest(splits: Splits, task: Task) -> str:
    """SHA-256 over the names of the classes, and the texts and labels of all splits, in their order."""
    found = hashlib.sha256(repr(task.labels and list(task.labels)).encode())
    for name, table in sorted(splits.tables.items()):
        found.update(name.encode() + pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())
    return found.hexdigest()


def without_nan(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Metrics for JSON, which has no NaN: null where one is not defined."""
    return {
        split: {name: None if math.isnan(value) else value for name, value in values.items()}
        for split, values in metrics.items()
    }

"""LoRA, AdaLoRA and EVA as the PEFT library has them."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from heterolora.adapters.base import AdapterFamily
from heterolora.adapters.lora import LoRA
from heterolora.adapters.scaling import Scaling
from heterolora.adapters.svd import SVD
from heterolora.allocation import Allocation
from heterolora.allocators.base import parameters_only
from heterolora.allocators.uniform import Uniform
from heterolora.backbone import Backbone
from heterolora.baselines.export import hand_over
from heterolora.baselines.lit import LitBaseline
from heterolora.baselines.model import PeftBaseline
from heterolora.callbacks.allocate import Static
from heterolora.errors import SettingError
from heterolora.export import Export, Logits, config_to_train
from heterolora.lit import LitAdapted
from heterolora.model import AdaptedModel
from heterolora.prefix_cache import FrozenPrefix
from heterolora.processes import Processes
from heterolora.proxies.constant import Constant
from heterolora.report.card import Origin
from heterolora.scoring import SearchResult, no_gains
from heterolora.space import Space
from heterolora.tasks.base import model_inputs

if TYPE_CHECKING:
    from heterolora.parts import Parts

_log = logging.getLogger(__name__)

_PREFIX = "base_model.model."


class PeftMethod:
    """What the methods have in common: the same rank at every LoRA site of the search space, as large as the budget."""

    chosen: ClassVar[tuple[str, ...]] = ("baseline",)
    looks_at_batches: ClassVar[bool] = False
    cannot_resume: ClassVar[str | None] = None
    """Why its checkpoints hold not all of its state; None: they do."""

    def adopted(self, parts: "Parts", resumed: bool, processes: Processes) -> "Parts":
        """Proxy and allocator have nothing to say, and the adapter's family says scale, dropout and cost alone."""
        choices, trainer = parts.choices, parts.trainer
        own = isinstance(parts.adapter, LoRA)
        possible_adapter = "lora or rslora: PEFT's modules take their scale and dropout from there"
        for setting, given, refused, possible in (
            ("adapter", choices.get("adapter"), not own, possible_adapter),
            ("allocation", choices.get("allocation"), not isinstance(parts.allocation, Static), "static"),
            ("init", choices.get("init"), parts.init is not None, "none"),
            ("budget.step_time", parts.budget.step_time, parts.budget.step_time is not None, "null"),
            ("start_from", parts.start_from, parts.start_from is not None, "null"),
            ("trainer.devices", processes.size, not processes.alone, "1"),
            ("trainer.compile", True, trainer.compile, "false"),
            ("prefix.cache", True, parts.prefix.cache, "false"),
            ("prefix.dropout", False, not parts.prefix.dropout, "true"),
            ("resume", "a checkpoint", resumed and self.cannot_resume is not None, f"false; {self.cannot_resume}"),
        ):
            if refused:
                raise SettingError(setting, given, f"with baseline={choices.get('baseline')}: {possible}")
        assert isinstance(parts.adapter, LoRA)
        _log.info("baseline=%s finds its ranks itself: proxy and allocator are not used", choices.get("baseline"))
        return replace(parts, proxy=Constant(), allocator=Uniform(None), adapter=self.family(parts.adapter))

    def family(self, adapter: Scaling) -> AdapterFamily:
        """A family of ours with the same parameters, at the run's scale."""
        return LoRA(adapter.scaling, adapter.scale, adapter.dropout)

    def model(self, backbone: Backbone, space: Space, family: AdapterFamily) -> AdaptedModel:
        """PEFT's modules in the backbone."""
        return PeftBaseline(backbone, space, family, self)

    def module(
        self,
        model: AdaptedModel,
        parts: "Parts",
        steps: int,
        identity: Mapping[str, str],
        prefix: FrozenPrefix | None,
        processes: Processes,
    ) -> LitAdapted:
        """As ours, and told about steps."""
        _peft(model).steps = steps
        _peft(model).allowed = parameters_only(parts.budget.resolve(model.space), "a baseline")
        return LitBaseline(model, parts.task, parts.optimizer, parts.seed, identity, prefix, processes)

    def search(self, model: AdaptedModel, *args: Any, **settings: Any) -> SearchResult:
        """The method's ranks at the start of training."""
        start = time.perf_counter()
        budget = parameters_only(settings["budget"].resolve(model.space), "a baseline")
        ranks = self.ranks(_peft(model), args[1], budget)
        spent = model.family.cost(model.space.sites)(ranks)
        allocation = Allocation(ranks, spent, budget if spent <= budget else None)
        return SearchResult(None, allocation, time.perf_counter() - start)

    def ranks(self, model: PeftBaseline, batches: Sequence[Mapping[str, torch.Tensor]], budget: int) -> dict[str, int]:
        """The largest rank that all sites can have.

        Args:
            model: no adapter is enabled.
            batches: some of the training split, if the method looks at any.
            budget: parameters.
        """
        sites = model.space.sites
        found = Uniform(None).allocate(no_gains(sites), model.family.cost(sites), budget, model.space.groups)
        return dict(found.ranks)

    def inject(self, model: PeftBaseline, ranks: Mapping[str, int]) -> Any:
        """``peft.get_peft_model``."""
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model.backbone, LoraConfig(**lora_settings(model, ranks, model.family)))

    def settings(self, model: PeftBaseline) -> dict[str, Any]:
        """What PEFT was given and a user may want to know."""
        config = model.peft.peft_config["default"]
        return {"r": config.r, "lora_alpha": config.lora_alpha}

    def report(self, model: AdaptedModel) -> dict[str, Any] | None:
        """For ``summary.json``."""
        ours = _peft(model)
        assert ours.allowed is not None  # known since ``module``
        beyond = max(0, ours.held_parameters - ours.allowed)
        return {
            "method": type(self).__name__.removeprefix("Peft"),
            "peft": version("peft"),
            **self.settings(ours),
            "scale": sorted(set(ours.scales.values())),
            "budget": ours.allowed,
            "beyond_budget": beyond,
        }

    def hand_over(
        self, model: AdaptedModel, run: Path, logits: Logits, settings: Export, origin: Origin
    ) -> dict[str, Any]:
        """What PEFT saves, and the head."""
        return hand_over(_peft(model), run, logits)


def lora_settings(model: PeftBaseline, ranks: Mapping[str, int], family: AdapterFamily) -> dict[str, Any]:
    """Arguments of ``LoraConfig`` at which PEFT's scale is the family's, with nothing about the head, which is ours."""
    content = config_to_train(model.backbone, model.head, model.space, ranks, family)
    return {key: value for key, value in content.items() if key not in ("peft_type", "task_type", "modules_to_save")}


def _peft(model: AdaptedModel) -> PeftBaseline:
    assert isinstance(model, PeftBaseline)
    return model


@dataclass(frozen=True)
class PeftLoRA(PeftMethod):
    """``peft.LoraConfig``: the same rank everywhere, A drawn by PEFT, B = 0."""


class _AdaLoRAModel(PeftBaseline):
    """With AdaLoRA's mask and its regulariser."""

    @property
    def ranks(self) -> dict[str, int]:
        """Triplets of each site that PEFT has not masked; what is held is in ``held_parameters``."""
        held = super().ranks
        pattern = self.peft.peft_config["default"].rank_pattern if self._peft else None
        if not pattern:
            return held
        kept = {name.partition(".lora_E")[0]: sum(mask) for name, mask in pattern.items()}
        return {name: kept[self.modules_of[name]] if rank else 0 for name, rank in held.items()}

    @property
    def active_parameters(self) -> int:
        """Of the triplets that are not masked."""
        return self.family.cost(self.space.sites)(self.ranks)

    def penalty(self) -> torch.Tensor:
        """``orth_reg_weight`` times PEFT's mean of ``||A A^T - I||`` and ``||B^T B - I||``.

        PEFT adds it to a loss that the backbone returns, which ours is not asked for: so it is told of a loss of 0.
        """
        from peft import AdaLoraModel

        inner = self.peft.base_model
        answer = SimpleNamespace(loss=torch.zeros((), device=next(self.parameters()).device))
        stand_in = SimpleNamespace(
            model=SimpleNamespace(forward=lambda: answer, named_parameters=self.backbone.named_parameters),
            peft_config=inner.peft_config,
            trainable_adapter_name=inner.trainable_adapter_name,
        )
        loss: torch.Tensor = AdaLoraModel.forward(stand_in).loss  # type: ignore[arg-type, no-untyped-call]
        return loss

    def after_step(self, step: int) -> None:
        """``update_and_allocate``, as PEFT's documentation has it."""
        self.peft.base_model.update_and_allocate(step)


@dataclass(frozen=True)
class PeftAdaLoRA(PeftMethod):
    """``peft.AdaLoraConfig``: starts with too many triplets, and masks those that matter least.

    Args:
        start: ``budget``: the rank of the beginning, which is held to the end, costs at most the budget; ``paper``:
            the rank aimed at does, and more is held, which the run says.
        ratio: rank of the beginning over the rank aimed at, on average (the paper: 1.5).
        tinit: share of the optimizer steps before the first mask.
        tfinal: share of the steps after the last mask.
        deltaT: optimizer steps between masks.
        beta1: decay of the mean of the importance.
        beta2: decay of the mean of its deviation.
        orth_reg_weight: factor of the regulariser.
    """

    start: Literal["budget", "paper"]
    ratio: float
    tinit: float
    tfinal: float
    deltaT: int  # noqa: N815 - PEFT's name
    beta1: float
    beta2: float
    orth_reg_weight: float

    cannot_resume: ClassVar[str | None] = "its importance scores are in no checkpoint"

    def __post_init__(self) -> None:
        if not 1 < self.ratio < math.inf:
            raise SettingError("ratio", self.ratio, "a number above 1")
        for name in ("tinit", "tfinal"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(name, getattr(self, name), "a share from 0 up to, not including, 1")
        if self.tinit + self.tfinal >= 1:
            raise SettingError("tinit", self.tinit, f"with tfinal={self.tfinal} no step is left for masks")
        if self.deltaT < 1:
            raise SettingError("deltaT", self.deltaT, "a whole number of at least 1")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise SettingError(name, getattr(self, name), "a number between 0 and 1")
        if not 0 <= self.orth_reg_weight < math.inf:
            raise SettingError("orth_reg_weight", self.orth_reg_weight, "a number of at least 0")

    def family(self, adapter: Scaling) -> AdapterFamily:
        """Triplets."""
        return SVD(adapter.scaling, adapter.scale, adapter.dropout, 0.02)

    def model(self, backbone: Backbone, space: Space, family: AdapterFamily) -> AdaptedModel:
        """With a mask."""
        return _AdaLoRAModel(backbone, space, family, self)

    def ranks(self, model: PeftBaseline, batches: Sequence[Mapping[str, torch.Tensor]], budget: int) -> dict[str, int]:
        """The rank of the beginning."""
        ranks = super().ranks(model, batches, budget)
        if self.start == "budget":
            return ranks
        most = min(min(site.in_features, site.out_features) for site in model.space.sites)
        return {name: min(most, math.ceil(self.ratio * rank)) for name, rank in ranks.items()}

    def inject(self, model: PeftBaseline, ranks: Mapping[str, int]) -> Any:
        """``peft.get_peft_model`` with ``AdaLoraConfig``; its schedule counts optimizer steps."""
        from peft import AdaLoraConfig, get_peft_model

        rank, scale = max(ranks.values()), {model.family.scale_at(model.site(n), r) for n, r in ranks.items()}.pop()
        if scale < 0:
            raise SettingError("adapter.scale", scale, "a number above 0: PEFT's AdaLoRA takes no other")
        tinit, tfinal = round(self.tinit * model.steps), round(self.tfinal * model.steps)
        if tinit >= model.steps - tfinal:
            raise SettingError("baseline.tinit", self.tinit, f"of {model.steps} optimizer steps none is left for masks")
        as_lora = LoRA("constant", 1.0, getattr(model.family, "dropout", 0.0))
        shared = lora_settings(model, ranks, as_lora)
        config = AdaLoraConfig(
            init_r=rank,
            target_r=self._target(rank, len(ranks)),  # type: ignore[arg-type]
            lora_alpha=scale * (rank + 1e-5),  # type: ignore[arg-type]  # by which PEFT divides, guard included
            lora_dropout=shared["lora_dropout"],
            target_modules=shared["target_modules"],
            fan_in_fan_out=shared["fan_in_fan_out"],
            tinit=tinit,
            tfinal=tfinal,
            deltaT=self.deltaT,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_reg_weight,
            total_step=model.steps,
        )
        return get_peft_model(model.backbone, config)

    def _target(self, rank: int, modules: int) -> int | float:
        """The rank aimed at: a mean over modules, no whole number where the budget leaves no other."""
        if self.start == "paper":
            units = math.floor(rank / self.ratio + 1e-9) * modules
        else:
            units = round(rank * modules / self.ratio)
        if not 0 < units < rank * modules:
            raise SettingError(
                "baseline.ratio", self.ratio, f"from {rank * modules} triplets it leads to {units}: nothing to mask"
            )
        if units % modules == 0:
            return units // modules
        mean = units / modules
        return mean if int(mean * modules) == units else math.nextafter(mean, math.inf)

    def settings(self, model: PeftBaseline) -> dict[str, Any]:
        """Ranks and schedule."""
        config = model.peft.peft_config["default"]
        keys = ("init_r", "target_r", "lora_alpha", "total_step", "tinit", "tfinal", "deltaT", "orth_reg_weight")
        live, held = sum(model.ranks.values()), config.init_r * len(model.held)
        return {"start": self.start, **{key: getattr(config, key) for key in keys}, "triplets": [live, held]}


@dataclass(frozen=True)
class PeftEVA(PeftMethod):
    """``peft.LoraConfig(init_lora_weights="eva")``: A and ranks from the principal components of each layer's inputs.

    PEFT's ``adjust_scaling_factors`` is on: the scale is the same everywhere, whatever the ranks become.

    Args:
        start: ``budget``: the mean rank is the largest for which what PEFT's ranks cost is within the budget;
            ``paper``: the largest uniform rank within the budget, whatever its redistribution costs; if that is more,
            the run says so.
        rho: largest rank of a module, as a multiple of the mean; 1: no redistribution.
        tau: cosine between a component and its last estimate above which it has converged.
        whiten: divide each row of A by the root of its singular value.
    """

    start: Literal["budget", "paper"]
    rho: float
    tau: float
    whiten: bool

    looks_at_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf:
            raise SettingError("rho", self.rho, "a number of at least 1")
        if not 0 < self.tau <= 1:
            raise SettingError("tau", self.tau, "a cosine above 0")

    def ranks(self, model: PeftBaseline, batches: Sequence[Mapping[str, torch.Tensor]], budget: int) -> dict[str, int]:
        """PEFT's, of which some may be 0."""
        cost = model.family.cost(model.space.sites)
        rank = max(super().ranks(model, batches, budget).values())
        while True:
            components = self.find(model, batches, rank)
            ranks = {name: len(components[module]) for name, module in model.modules_of.items()}
            if self.start == "paper" or (spent := cost(ranks)) <= budget:
                model.components = components
                return ranks
            _log.info("EVA's ranks of mean %d cost %s parameters, more than the budget", rank, f"{spent:,}")
            rank -= 1
            if not rank:
                raise SettingError("budget", budget, f"EVA's ranks of mean 1 cost {spent}; give more, or start=paper")

    def find(
        self, model: PeftBaseline, batches: Sequence[Mapping[str, torch.Tensor]], rank: int
    ) -> dict[str, torch.Tensor]:
        """``peft.get_eva_state_dict`` of the bare backbone: path of a module -> ``[rank, in]``.

        Raises:
            SettingError: if a batch has fewer tokens than PEFT needs, which would wait for ever.
        """
        from peft import LoraConfig, get_eva_state_dict

        most = round(self.rho * rank)
        inputs = [model_inputs(batch) for batch in batches]
        fewest = min(int(batch["attention_mask"].sum()) for batch in inputs)
        narrow = min(min(site.in_features, site.out_features) for site in model.space.sites)
        if most > min(fewest, narrow):
            raise SettingError(
                "baseline.rho",
                self.rho,
                f"asks for {most} components, of batches with {fewest} tokens or more and layers as narrow as {narrow}",
            )
        config = LoraConfig(**self._settings(model, dict.fromkeys(model.modules_of, rank)))
        with torch.random.fork_rng([]):
            found: dict[str, torch.Tensor] = get_eva_state_dict(
                model.backbone,
                inputs,
                config,
                show_progress_bar=False,
            )
        return found

    def _settings(self, model: PeftBaseline, ranks: Mapping[str, int]) -> dict[str, Any]:
        from peft import EvaConfig

        config = EvaConfig(rho=self.rho, tau=self.tau, whiten=self.whiten, adjust_scaling_factors=True)
        return lora_settings(model, ranks, model.family) | {"init_lora_weights": "eva", "eva_config": config}

    def inject(self, model: PeftBaseline, ranks: Mapping[str, int]) -> Any:
        """``get_peft_model``, ``initialize_lora_eva_weights``; a resumed run has ranks and A from its checkpoint."""
        from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights

        mean = max(1, sum(ranks.values()) // len(model.space.sites))
        if model.components is None or ranks != {n: r for n, r in self._found(model).items() if r}:
            site = model.space.sites[0]
            constant = LoRA("constant", model.family.scale_at(site, mean), getattr(model.family, "dropout", 0.0))
            plain = LoraConfig(**lora_settings(model, ranks, constant))
            return get_peft_model(model.backbone, plain)
        config = LoraConfig(**self._settings(model, dict.fromkeys(model.modules_of, mean)))
        peft = get_peft_model(model.backbone, config)
        state = {f"{_PREFIX}{module}": value for module, value in model.components.items()}
        initialize_lora_eva_weights(peft, eva_state_dict=state)
        return peft

    def _found(self, model: PeftBaseline) -> dict[str, int]:
        return {name: len((model.components or {})[module]) for name, module in model.modules_of.items()}

    def settings(self, model: PeftBaseline) -> dict[str, Any]:
        """Mean rank and how it was found."""
        ranks = model.ranks
        mean = sum(ranks.values()) / len(ranks)
        return {"start": self.start, "r": mean, "rho": self.rho, "tau": self.tau, "whiten": self.whiten}

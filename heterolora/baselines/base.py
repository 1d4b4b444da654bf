"""Who makes and trains a run's adapters: this project, or another library in its place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from heterolora.adapters.base import AdapterFamily
from heterolora.backbone import Backbone
from heterolora.export import Export, Logits, hand_over
from heterolora.lit import LitAdapted
from heterolora.model import AdaptedModel
from heterolora.prefix_cache import FrozenPrefix
from heterolora.processes import Processes
from heterolora.report.card import Origin
from heterolora.scoring import SearchResult, search
from heterolora.space import Space

if TYPE_CHECKING:
    from heterolora.parts import Parts


class Baseline(Protocol):
    """What differs from run to run when the adapters may be another library's.

    Backbone, data, head, optimizer, schedule, steps, seeds, evaluation and files are the same for all.

    Attributes:
        chosen: config groups whose options say, in a title, how ranks were found.
        looks_at_batches: whether its search looks at batches, whatever the proxy is.
    """

    chosen: ClassVar[tuple[str, ...]]
    looks_at_batches: ClassVar[bool]

    def adopted(self, parts: "Parts", resumed: bool, processes: Processes) -> "Parts":
        """The run's parts as they are used; what cannot be right with them is refused.

        Args:
            parts: as the config names them.
            resumed: the run goes on from a checkpoint.
            processes: all that work on the run.

        Raises:
            SettingError: naming the setting.
        """

    def model(self, backbone: Backbone, space: Space, family: AdapterFamily) -> AdaptedModel:
        """The model, without adapters."""

    def module(
        self,
        model: AdaptedModel,
        parts: "Parts",
        steps: int,
        identity: Mapping[str, str],
        prefix: FrozenPrefix | None,
        processes: Processes,
    ) -> LitAdapted:
        """What Lightning trains.

        Args:
            model: what ``model`` gave.
            parts: what ``adopted`` gave.
            steps: optimizer steps of the whole training.
            identity: see ``LitAdapted``.
            prefix: likewise.
            processes: likewise.
        """

    def search(self, model: AdaptedModel, *args: Any, **settings: Any) -> SearchResult:
        """Find the ranks; arguments are those of ``scoring.search``."""

    def report(self, model: AdaptedModel) -> dict[str, Any] | None:
        """What ``summary.json`` says of the method, plain values, its ``budget`` among them; None: nothing."""

    def hand_over(
        self, model: AdaptedModel, run: Path, logits: Logits, settings: Export, origin: Origin
    ) -> dict[str, Any]:
        """Write ``RUN/peft``; see ``export.hand_over``."""


@dataclass(frozen=True)
class NoBaseline:
    """The adapters are ours."""

    chosen: ClassVar[tuple[str, ...]] = ("proxy", "allocator")
    looks_at_batches: ClassVar[bool] = False

    def adopted(self, parts: "Parts", resumed: bool, processes: Processes) -> "Parts":
        """As they are."""
        return parts

    def model(self, backbone: Backbone, space: Space, family: AdapterFamily) -> AdaptedModel:
        """Ours."""
        return AdaptedModel(backbone.model, space, family, backbone.head)

    def module(
        self,
        model: AdaptedModel,
        parts: "Parts",
        steps: int,
        identity: Mapping[str, str],
        prefix: FrozenPrefix | None,
        processes: Processes,
    ) -> LitAdapted:
        """Ours."""
        return LitAdapted(model, parts.task, parts.optimizer, parts.seed, identity, prefix, processes)

    def search(self, model: AdaptedModel, *args: Any, **settings: Any) -> SearchResult:
        """Ours."""
        return search(model, *args, **settings)

    def report(self, model: AdaptedModel) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def hand_over(
        self, model: AdaptedModel, run: Path, logits: Logits, settings: Export, origin: Origin
    ) -> dict[str, Any]:
        """As ``export`` does."""
        return hand_over(model, run, logits, settings, origin)

"""The contract of a pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.dialect import Cost
from memcompile.progress import Progress
from memcompile.regions import Refusal, Region, attention_regions
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.selectors import Site


class Exactness(Enum):
    """What a pass promises about the model's outputs, at a setting that is not the identity."""

    SAME_BITS = "same bits"
    SAME_MATH = "same mathematics, other rounding"
    APPROXIMATE = "approximate"


class PassConfig(BaseModel):
    """The axes of a pass: frozen, and closed to keys it does not know.

    `exclusive` holds groups of keys of which one may be given: a plan's own one drops those of its preset.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()


@dataclass(frozen=True, slots=True)
class Preset:
    """A published method as values on a pass's axes. A plan's own values win over them."""

    values: Mapping[str, object]
    paper: str
    summary: str


@dataclass(frozen=True, slots=True)
class Order:
    """What a pass needs to be true of the program, makes true, and makes untrue; the manager orders by it.

    needs: facts without which the pass cannot work.
    after: facts that must be settled before it, if another pass of the plan settles them.
    provides: facts this pass settles.
    invalidates: facts that no longer hold once it ran.
    """

    needs: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    invalidates: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Context:
    """What a plan says beyond the config. heads: the key/value heads asked for in this region; None: all."""

    heads: tuple[int, ...] | None = None
    workload: Workload | None = None


NO_CONTEXT = Context()

RegionT = TypeVar("RegionT", bound=Region)
ConfigT = TypeVar("ConfigT", bound=PassConfig)
FactsT = TypeVar("FactsT")


class Pass(ABC, Generic[RegionT, ConfigT, FactsT]):
    """A rewrite of regions. The docstring of a pass is its card: see `memcompile.rewrite.cards`.

    A pass holds no state: one instance serves every plan.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    exactness: ClassVar[Exactness]
    presets: ClassVar[Mapping[str, Preset]] = {}
    order: ClassVar[Order] = Order()
    takes_heads: ClassVar[bool] = False
    region_kind: ClassVar[str] = "attention region"

    @abstractmethod
    def identity(self) -> ConfigT:
        """The setting at which the rewritten model computes what the original does."""

    @abstractmethod
    def budgets(self) -> tuple[ConfigT, ConfigT]:
        """The smallest and the largest legal setting: what keeps least, and what keeps most."""

    def regions(self, graph_module: fx.GraphModule) -> Sequence[RegionT]:
        """The regions this pass can act on, in graph order."""
        return attention_regions(graph_module)  # type: ignore[return-value]

    def layers(self, config: ConfigT, sites: Sequence[Site]) -> frozenset[int]:
        """The layers the config itself means; the plan's `layers:` narrows them further."""
        del config
        return frozenset(site.layer for site in sites)

    def selected(self, regions: Sequence[RegionT], config: ConfigT) -> Sequence[RegionT]:
        """The regions the config itself means, besides layers.

        Raises:
            MemcompileError: MC301, a selector of the config matches nothing.
        """
        del config
        return regions

    @abstractmethod
    def check(self, region: RegionT, config: ConfigT, context: Context = NO_CONTEXT) -> FactsT | Refusal:
        """What `rewrite` needs to know of `region`, or why it cannot be rewritten. Changes nothing."""

    @abstractmethod
    def rewrite(self, region: RegionT, facts: FactsT, emit: Emit) -> None:
        """Change the region through `emit`."""

    def claim(self, config: ConfigT) -> str:
        """What of a region the config settles; two entries of one plan may settle different things of it."""
        del config
        return ""

    def changes_nothing(self, config: ConfigT, workload: Workload) -> str | None:
        """Why the pass would change nothing at `workload`, if so."""
        del config, workload
        return None

    def needs_calibration(self, config: ConfigT) -> bool:
        """Whether `calibrate` must run before `rewrite`."""
        del config
        return False

    def calibrate(
        self,
        graph_module: fx.GraphModule,
        regions: Sequence[RegionT],
        config: ConfigT,
        data: CalibrationData,
        progress: Progress,
    ) -> Calibration:
        """Measure on calibration data what `rewrite` needs; cached by content, resumable."""
        raise NotImplementedError(f"{self.name} takes no calibration")

    def recovers(self, config: ConfigT) -> bool:
        """Whether `recover` must run after the regions were rewritten; it needs calibration data too."""
        del config
        return False

    def recover(
        self,
        original: fx.GraphModule,
        graph_module: fx.GraphModule,
        config: ConfigT,
        data: CalibrationData,
        progress: Progress,
        emit: Emit,
    ) -> None:
        """Train the rewritten graph towards `original`, the model before any pass of the plan."""
        raise NotImplementedError(f"{self.name} does not recover")

    @abstractmethod
    def cost(self, region: RegionT, facts: FactsT, workload: Workload) -> Cost:
        """Predicted cost of decoding one token in the rewritten region after the workload's prompt."""

    def refuse(self, region: RegionT, reason: str) -> Refusal:
        """A refusal of `region` in this pass's name."""
        place = region.path or region.node.name
        if region.layer is not None:
            place = f"layer {region.layer} ({place})"
        return Refusal(where=place, reason=reason, pass_name=self.name)

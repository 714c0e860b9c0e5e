"""What a method is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, get_args

from lit_prune.allocation import Ranking
from lit_prune.calibration import Needs, Side
from lit_prune.config import SQUARES, Allocator, Granularity
from lit_prune.decoder import all_kept
from lit_prune.errors import ConfigError
from lit_prune.plan import LayerPlan, PruningPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_prune.allocation import Budget
    from lit_prune.calibration import Calibration
    from lit_prune.config import Compensator, PruningConfig
    from lit_prune.decoder import DecoderSpec, SubBlock

# Kept units of every sub-block, ascending; () removes it.
Kept = Mapping["SubBlock", tuple[int, ...]]
# Mean NLL (nats per token) of a side of the text when only these units stay, measured on the masked
# dense model with the compensation of the request.
Judge = Callable[[Kept, Side], float]


class Diverges(Protocol):
    """KL divergence of such a model from the dense one on the choose side, nats per token."""

    def __call__(self, kept: Kept, *, fitted: bool = False) -> float: ...  # noqa: D102


# Options that mean something to some methods only.
ENTROPY_OPTIONS = ("estimator", "entropy_floor", "transfer_target", "kv_group_score")
PAPER_OPTIONS = (
    *ENTROPY_OPTIONS,
    "ratio_map",
    "ratio_temperature",
    "ratio_strength",
    "num_clusters",
    "clustering",
    "cap_clusters",
    "stage_order",
    "exact_hit",
    "search_tolerance",
    "unit_score",
    "sensitivity",
)
CONDITIONAL_OPTIONS = (
    *ENTROPY_OPTIONS,
    "budget",
    "search_tolerance",
    "unit_score",
    "sensitivity",
    "verify_rounds",
    "damping",
)
METHOD_OPTIONS = tuple(dict.fromkeys(PAPER_OPTIONS + CONDITIONAL_OPTIONS))
EVERYTHING: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request on one model, ready to be decided.

    Attributes:
        model: The language model; a method only reads its weights.
        calibration: What was measured on it.
        budget: How much may go, and where; its ``config`` holds every option.
        judge: Measures the loss of a draft; for methods that search by real losses.
        diverges: Measures its KL divergence to the dense model on the choose side, nats per token;
            ``fitted``: compensated as it will be, whatever that costs.
    """

    model: PreTrainedModel
    calibration: Calibration
    budget: Budget
    judge: Judge
    diverges: Diverges

    @property
    def spec(self) -> DecoderSpec:
        """The model as units."""
        return self.budget.spec

    @property
    def config(self) -> PruningConfig:
        """The request."""
        return self.budget.config

    def ranking(self, scores: Mapping[SubBlock, Tensor]) -> Ranking:
        """Return the order in which units leave, from a score for each unit; higher stays."""
        widths = {(index, part.kind): part.unit_width for index, part in self.spec.sub_blocks}
        return Ranking({place: score.numpy() for place, score in scores.items()}, widths)


@dataclass(frozen=True, slots=True)
class Decision:
    """Kept units of every sub-block, and how they were found.

    Attributes:
        kept: Kept units by ``(layer, kind)``, ascending.
        trace: JSON-able record of each stage.
        damage: Predicted damage of removing 0, 1, … all units of each sub-block, where the method
            predicts it; for pictures.
    """

    kept: dict[SubBlock, tuple[int, ...]]
    trace: dict[str, Any] = field(default_factory=dict)
    damage: dict[SubBlock, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, counts: Mapping[SubBlock, int], ranking: Ranking, trace: dict[str, Any] | None = None
    ) -> Decision:
        """Keep the best ``counts`` units of every sub-block."""
        kept = {place: ranking.kept(place, count) for place, count in counts.items()}
        return cls(kept, trace or {})

    @classmethod
    def whole(
        cls,
        spec: DecoderSpec,
        counts: Mapping[SubBlock, int] | None = None,
        trace: dict[str, Any] | None = None,
    ) -> Decision:
        """Keep sub-blocks whole, but for those that ``counts`` gives 0 units."""
        kept = {
            place: tuple(range(units)) if counts is None or counts[place] else ()
            for place, units in all_kept(spec).items()
        }
        return cls(kept, trace or {})

    @property
    def counts(self) -> dict[SubBlock, int]:
        """Number of kept units by ``(layer, kind)``."""
        return {place: len(units) for place, units in self.kept.items()}


def plan_of(spec: DecoderSpec, kept: Kept) -> PruningPlan:
    """Return the plan that keeps these units."""
    layers = tuple(
        LayerPlan(
            block.index,
            kept[block.index, "attention"] if block.attention else (),
            kept[block.index, "mlp"] if block.mlp else (),
        )
        for block in spec.blocks
    )
    return PruningPlan(spec.fingerprint, layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One paper under one name.

    Attributes:
        name: Preset.
        rule: What it goes by, a clause for people.
        source: Authors, title, venue.
        decide: From a case to kept units.
        needs: Statistics that the method reads beside the unit moments.
        granularities: What it can remove.
        allocators: Ways to distribute the budget that it knows; the first is the paper's.
        compensation: What the paper puts in place of what was cut.
        options: Fields of the request marked "Method" that the method reads.
        choices: Values that it knows of those among them that other methods read, too; the first is
            the paper's.
        deviations: Where this implementation differs from the paper or its code, in words.
    """

    name: str
    rule: str
    source: str
    decide: Callable[[Case], Decision]
    needs: Callable[[PruningConfig], Needs] = lambda _config: Needs()
    granularities: tuple[Granularity, ...] = EVERYTHING
    allocators: tuple[Allocator, ...] = ("uniform",)
    compensation: Compensator = "none"
    options: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()

    def resolve(self, config: PruningConfig) -> PruningConfig:
        """Fill in what the request leaves to the method.

        Raises:
            ConfigError: If the request asks for what the method cannot do.
        """
        both = tuple(g for g in config.granularities if g in self.granularities)
        if not both:
            raise ConfigError(
                f"preset {self.name!r} removes {list(self.granularities)} only, granularities "
                f"allows {list(config.granularities)}: nothing could be removed."
            )
        self._refuse_unread(config)
        allocator = config.allocator or self.allocators[0]
        if allocator not in self.allocators:
            raise ConfigError(
                f"preset {self.name!r} knows the allocators {list(self.allocators)}, got "
                f"{allocator!r}."
            )
        if config.add_biases is False:
            self._refuse_biases(config)
        own: dict[str, Any] = {}
        for option, known in self.choices.items():
            own[option] = getattr(config, option) or known[0]
            if own[option] not in known:
                raise ConfigError(
                    f"preset {self.name!r} knows {option} {list(known)}, got {own[option]!r}."
                )
        return replace(
            config,
            granularities=both,
            allocator=allocator,
            compensation=config.compensation or self.compensation,
            **own,
        )

    def _refuse_biases(self, config: PruningConfig) -> None:
        chosen = config.compensation or self.compensation
        if chosen not in ("sequential", "none"):
            raise ConfigError(
                f"compensation {chosen!r} is a bias, and add_biases is false. Take "
                "'sequential', which can do without, or 'none'."
            )

    def _refuse_unread(self, config: PruningConfig) -> None:
        """Refuse an option that would have no effect: its user believes that it has one."""
        read = {*self.options}
        if (config.compensation or self.compensation) in SQUARES:
            read.add("damping")
        for option in METHOD_OPTIONS:
            default = config.__dataclass_fields__[option].default
            if option not in read and getattr(config, option) != default:
                raise ConfigError(
                    f"preset {self.name!r} does not read {option}, got "
                    f"{getattr(config, option)!r}. Leave it out, or choose a preset that reads it."
                )

    def all_needs(self, config: PruningConfig) -> Needs:
        """Return what has to be measured for this (resolved) request."""
        table = Needs(latency=config.budget == "latency")
        if config.pruning_ratio == 0:
            return table
        squares = Needs(covariances=config.compensation in SQUARES)
        return self.needs(config) | squares | table

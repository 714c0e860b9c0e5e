"""What the pictures share: colours, an empty figure, and what a plan does to each sub-block.

Matplotlib is imported where it is used: a machine without it loses the pictures and nothing else.
Figures are made without pyplot: no window, no global register that would keep them alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.decoder import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lit_prune.decoder import DecoderSpec, SubBlockKind
    from lit_prune.decoder.spec import UnitKind
    from lit_prune.plan import PruningPlan

# Okabe and Ito's palette: told apart under every common colour blindness, and in grey.
KEPT, CUT, ORANGE, GREEN = "#0072B2", "#D55E00", "#E69F00", "#009E73"
PALE_KEPT, PALE_CUT, ABSENT, GREY = "#e3eef7", "#f7ddca", "#d0d0d0", "#8c8c8c"
_UNITS: dict[UnitKind, str] = {
    "kv_group": "KV group", "channel": "MLP channel", "expert": "expert"
}  # fmt: skip
_MAX_TICKS = 40


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a plan does to one sub-block.

    Attributes:
        layer: Index of the decoder layer.
        total: Units before; 0 where an earlier pruning has removed the sub-block.
        kept: Kept units, ascending.
    """

    layer: int
    total: int
    kept: tuple[int, ...]

    @property
    def absent(self) -> bool:
        """Whether there was nothing to prune."""
        return self.total == 0

    @property
    def removed(self) -> bool:
        """Whether this plan removes the sub-block whole."""
        return self.total > 0 and not self.kept


def unit_word(spec: DecoderSpec, kind: SubBlockKind) -> str:
    """Return what the units of the attentions, or of the MLPs, of a model are called.

    Example:
        >>> from lit_prune.decoder.spec import BlockSpec, DecoderSpec, MlpSpec
        >>> mlp = MlpSpec(name="mlp", num_channels=4, unit_parameters=6, fixed_parameters=2,
        ...               output_bias=False)
        >>> blocks = (BlockSpec(index=0, name="0", attention=None, mlp=mlp),)
        >>> spec = DecoderSpec(model_type="t", hidden_size=2, blocks=blocks, total_parameters=60,
        ...                    fingerprint="")
        >>> unit_word(spec, "mlp"), unit_word(spec, "attention")
        ('MLP channel', 'KV group')
    """
    there = {part.unit: None for _, part in spec.sub_blocks if part.kind == kind}
    usual: UnitKind = "kv_group" if kind == "attention" else "channel"
    return " or ".join(_UNITS[unit] for unit in (there or {usual: None}))


def outcomes(spec: DecoderSpec, plan: PruningPlan, kind: SubBlockKind) -> list[Outcome]:
    """Return what ``plan`` does to the attention or the MLP of each layer.

    Args:
        spec: The model before pruning.
        plan: A plan for that model.
        kind: ``attention`` or ``mlp``.

    Raises:
        PlanMismatchError: If the plan is for another model.
    """
    plan.validate(spec)
    found = []
    for block, layer in zip(spec.blocks, plan.layers, strict=True):
        part = block.attention if kind == "attention" else block.mlp
        found.append(Outcome(block.index, part.num_units if part else 0, layer.kept(kind)))
    return found


def removed_blocks(spec: DecoderSpec, plan: PruningPlan) -> set[int]:
    """Return the layers that lose everything that they still had."""
    pairs = zip(*(outcomes(spec, plan, kind) for kind in KINDS), strict=True)
    return {a.layer for a, b in pairs if (a.removed or b.removed) and not a.kept and not b.kept}


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty white figure, in inches, that pyplot does not know about."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def clean(axes: Axes) -> Axes:
    """Take the upper and right frame away and return the axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return axes


def layer_ticks(num_layers: int) -> range:
    """Return the layers that get a label: all, or every few where there are many.

    Example:
        >>> list(layer_ticks(3)), len(layer_ticks(96))
        ([0, 1, 2], 32)
    """
    return range(0, num_layers, -(-num_layers // _MAX_TICKS))

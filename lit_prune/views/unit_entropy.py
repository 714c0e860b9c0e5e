"""Picture: the entropy of every unit, layer by layer, and what was cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.errors import ScoreError
from lit_prune.views.canvas import (
    ABSENT,
    CUT,
    PALE_KEPT,
    layer_ticks,
    new_figure,
    outcomes,
    unit_word,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from torch import Tensor

    from lit_prune.decoder import DecoderSpec, SubBlockKind
    from lit_prune.plan import PruningPlan
    from lit_prune.views.canvas import Outcome

_MAX_COLUMNS = 768  # below the pixels of the axes: a column is never lost in drawing
_SEPARATED = 64  # up to here each unit is wide enough to stand apart
_ENTROPY, _STRIP, _GAP = 14, 6, 2  # pixel rows of one layer in the image
_ROWS = _ENTROPY + _STRIP + _GAP


def unit_entropy_heatmap(
    spec: DecoderSpec,
    plan: PruningPlan,
    entropies: Mapping[tuple[int, SubBlockKind], Tensor],
    kind: SubBlockKind,
) -> Figure:
    """Draw unit entropy as layer x unit, with a strip under each layer that shows what was cut.

    Units stand in the order of their index. More than 768 of them are averaged into columns; the
    strip is then as deep in colour as the share of the column that was cut. The colour scale spans
    the 1st to the 99th percentile, so that a few constant channels do not hide the others.

    Args:
        spec: The model before pruning.
        plan: What stays.
        entropies: Entropy of each unit, ``[units]``, nats, by layer and kind; a sub-block that is
            missing, or a value that is not finite, stays blank.
        kind: ``attention`` (KV groups) or ``mlp`` (channels).

    Returns:
        A figure that pyplot does not know about.

    Raises:
        PlanMismatchError: If the plan is for another model.
        ScoreError: If a sub-block has another number of entropies than units.
    """
    from matplotlib.cm import ScalarMappable

    rows = outcomes(spec, plan, kind)
    width = max((row.total for row in rows), default=0)
    columns = max(min(width, _MAX_COLUMNS), 1)
    values, cut = _columns(rows, entropies, kind, columns / max(width, 1), columns)
    height = min(max(0.34 * len(rows), 2.7), 16.0)
    unit = unit_word(spec, kind)
    figure = new_figure(
        12, height + 2.3, f"Entropy of each {unit}, layer by layer, and what was cut"
    )
    axes = figure.add_subplot()
    scale = ScalarMappable(_normalise(values), "viridis")
    axes.imshow(
        _paint(values, cut, scale),
        extent=(-0.5, max(width, 1) - 0.5, len(rows) - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    _cross_out(axes, rows)
    _label(axes, rows, unit, width, columns)
    bar = figure.colorbar(
        scale, ax=axes, extend="both", extendfrac=0.02, pad=0.01, fraction=0.03, aspect=40
    )
    bar.set_label(f"entropy of one {unit} (nats); low: carries little", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    figure.legend(
        handles=_legend(rows, averaged=width > columns),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    return figure


def _columns(
    rows: list[Outcome],
    entropies: Mapping[tuple[int, SubBlockKind], Tensor],
    kind: SubBlockKind,
    shrink: float,
    columns: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean entropy and cut share, ``[layers, columns]`` each, NaN where there is no unit."""
    import numpy as np

    values = np.full((len(rows), columns), np.nan)
    cut = np.full((len(rows), columns), np.nan)
    for i, row in enumerate(rows):
        where = (np.arange(row.total) * shrink).astype(int)
        lost = np.ones(row.total)
        lost[list(row.kept)] = 0
        count = np.bincount(where, minlength=columns)
        np.divide(np.bincount(where, lost, columns), count, out=cut[i], where=count > 0)
        tensor = entropies.get((row.layer, kind))
        if tensor is None:
            continue
        if tensor.shape != (row.total,):
            raise ScoreError(
                f"entropies of layer {row.layer} {kind} have shape {list(tensor.shape)}; "
                f"expected [{row.total}], one for each unit."
            )
        entropy = tensor.detach().double().cpu().numpy()
        known = np.isfinite(entropy)
        count = np.bincount(where[known], minlength=columns)
        total = np.bincount(where[known], entropy[known], columns)
        np.divide(total, count, out=values[i], where=count > 0)
    return values, cut


def _normalise(values: np.ndarray) -> Normalize:
    import numpy as np
    from matplotlib.colors import Normalize

    known = values[np.isfinite(values)]
    if not known.size:
        return Normalize(0.0, 1.0)
    low, high = np.percentile(known, [1, 99])
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    return Normalize(float(low), float(high))


def _paint(values: np.ndarray, cut: np.ndarray, scale: ScalarMappable) -> np.ndarray:
    """Return the image, ``[layers * _ROWS, columns, 3]``: entropy, strip, gap for each layer."""
    import numpy as np
    from matplotlib.colors import to_rgb

    layers, columns = values.shape
    image = np.ones((layers, _ROWS, columns, 3))
    entropy = scale.to_rgba(np.ma.masked_invalid(values))[..., :3]
    entropy[~np.isfinite(values)] = to_rgb(ABSENT)
    image[:, :_ENTROPY] = entropy[:, None]
    share = np.nan_to_num(cut)[..., None]
    strip = (1 - share) * np.array(to_rgb(PALE_KEPT)) + share * np.array(to_rgb(CUT))
    strip[np.isnan(cut)] = to_rgb(ABSENT)
    image[:, _ENTROPY : _ENTROPY + _STRIP] = strip[:, None]
    return image.reshape(layers * _ROWS, columns, 3)


def _cross_out(axes: Axes, rows: list[Outcome]) -> None:
    """Hatch the sub-blocks that go whole: they must not be mistaken for many single units."""
    from matplotlib.patches import Rectangle

    for i, row in enumerate(rows):
        if row.removed:
            box = Rectangle(
                (-0.5, i - 0.5),
                row.total,
                _ENTROPY / _ROWS,
                fill=False,
                hatch="xx",
                edgecolor="white",
                linewidth=0,
            )
            axes.add_patch(box)


def _label(axes: Axes, rows: list[Outcome], unit: str, width: int, columns: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ticks = layer_ticks(len(rows))
    axes.set_yticks(list(ticks), [str(rows[i].layer) for i in ticks])
    axes.set_ylabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    note = (
        f" (each column: the mean of {width / columns:.0f} or so neighbours)"
        if width > columns
        else ""
    )
    axes.set_xlabel(f"index of the {unit} in its layer{note}")
    axes.tick_params(labelsize=9, length=2)
    axes.spines[:].set_visible(False)
    if width <= _SEPARATED:
        for edge in range(1, width):
            axes.axvline(edge - 0.5, color="white", linewidth=2)
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(ticks), [_kept(rows[i]) for i in ticks])
    right.spines["right"].set_visible(False)
    right.tick_params(labelsize=9, length=0)
    for i, text in zip(ticks, right.get_yticklabels(), strict=True):
        if rows[i].removed:
            text.set(color=CUT, fontweight="bold")
    axes.annotate("kept", (1, 1), (4, 5), "axes fraction", "offset points", fontsize=9)


def _kept(row: Outcome) -> str:
    if row.absent:
        return "none left"
    return "removed" if row.removed else f"{len(row.kept)} of {row.total}"


def _legend(rows: list[Outcome], *, averaged: bool) -> list[Patch]:
    from matplotlib.patches import Patch

    handles = [
        Patch(
            color=CUT, label="strip under a layer: cut" + (" (pale: in part)" if averaged else "")
        ),
        Patch(facecolor=PALE_KEPT, edgecolor="#b0c4d4", label="strip: kept"),
    ]
    if any(row.removed for row in rows):
        cross = Patch(facecolor="#31688e", edgecolor="white", hatch="xxxx", linewidth=0)
        cross.set_label("crossed: removed whole")
        handles.append(cross)
    if len({row.total for row in rows}) > 1:
        handles.append(Patch(color=ABSENT, label="no such unit (pruned earlier)"))
    return handles

"""The pictures as values: what they show, what they refuse, and that they leave nothing behind."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lit_prune.views
from lit_prune.decoder import AttentionSpec, BlockSpec, DecoderSpec, MlpSpec
from lit_prune.errors import PlanMismatchError, ScoreError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.views import (
    before_after,
    damage_curves,
    kept_units,
    transfer_entropy,
    unit_entropy_heatmap,
)
from tests.views.conftest import is_drawn


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def draw_all(v):
    return {
        "attention": unit_entropy_heatmap(v.spec, v.plan, v.entropies, "attention"),
        "mlp": unit_entropy_heatmap(v.spec, v.plan, v.entropies, "mlp"),
        "kept": kept_units(v.spec, v.plan),
        "transfer": transfer_entropy(v.spec, v.plan, v.transfer),
        "damage": damage_curves(v.spec, v.plan, v.damage),
        "before_after": before_after(v.report),
    }


def words(figure):
    texts = [t.get_text() for axes in figure.axes for t in axes.findobj(match=is_text)]
    return "\n".join([*texts, *(t.get_text() for x in figure.legends for t in x.get_texts())])


def is_text(artist):
    return hasattr(artist, "get_text")


def synthetic(sizes):
    """A spec from (KV groups, channels) pairs; 0 is a sub-block that an earlier pruning removed."""
    counted = {"unit_parameters": 10, "fixed_parameters": 1, "output_bias": False}
    blocks = tuple(
        BlockSpec(
            index=i,
            name=f"model.layers.{i}",
            attention=AttentionSpec(
                name="a", num_kv_groups=groups, queries_per_group=2, head_dim=8, **counted
            )
            if groups
            else None,
            mlp=MlpSpec(name="m", num_channels=channels, **counted) if channels else None,
        )
        for i, (groups, channels) in enumerate(sizes)
    )
    return DecoderSpec(
        model_type="llama", hidden_size=32, blocks=blocks, total_parameters=10**6, fingerprint="f"
    )


@pytest.fixture(scope="module")
def drawn(unchanged_views):
    return {name: pixels(figure) for name, figure in draw_all(unchanged_views).items()}


def test_no_picture_is_blank(drawn):
    for name, image in drawn.items():
        assert is_drawn(image), name


def test_pyplot_knows_none_of_them(views):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    draw_all(views)
    assert plt.get_fignums() == before


def test_f34_no_view_imports_matplotlib_when_it_is_imported():
    for path in Path(lit_prune.views.__file__).parent.glob("*.py"):
        for node in ast.parse(
            path.read_text()
        ).body:  # the top level; `if TYPE_CHECKING` is no import
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "matplotlib" not in ast.unparse(node), path.name


def test_pictures_change_with_the_plan_and_are_the_same_for_the_same(views, drawn):
    again = unit_entropy_heatmap(views.spec, views.plan, views.entropies, "attention")
    assert np.array_equal(pixels(again), drawn["attention"])
    views.plan = views.planned({0: ((1,), tuple(range(8))), 1: ((0, 1), ())})
    other = {name: pixels(figure) for name, figure in draw_all(views).items()}
    changed = {name for name in drawn if not np.array_equal(drawn[name], other[name])}
    assert changed == {*drawn} - {"before_after"}  # the report is of the old plan


def test_one_unit_more_or_less_is_visible(views, drawn):
    less = views.planned({2: ((), ()), 3: ((0, 1), ()), 4: ((), tuple(range(39)))})
    other = unit_entropy_heatmap(views.spec, less, views.entropies, "mlp")
    assert not np.array_equal(pixels(other), drawn["mlp"])


def test_what_is_removed_is_said_in_words(views):
    text = words(unit_entropy_heatmap(views.spec, views.plan, views.entropies, "mlp"))
    for expected in ("removed", "40 of 48", "32 of 48", "nats", "cut", "crossed: removed whole"):
        assert expected in text
    kept = words(kept_units(views.spec, views.plan))
    assert "KV groups: 6 of 10 kept, 60.0 % (dashed line)" in kept
    assert "the whole layer is removed" in kept
    assert "removed by the plan" in words(transfer_entropy(views.spec, views.plan, views.transfer))


def test_the_strip_is_painted_where_units_are_cut(views):
    from matplotlib.colors import to_rgb

    from lit_prune.views.canvas import CUT

    image = unit_entropy_heatmap(views.spec, views.plan, views.entropies, "mlp").axes[0].images[0]
    painted = np.asarray(image.get_array()).reshape(5, -1, 48, 3)
    cut = np.isclose(painted, to_rgb(CUT)).all(-1).any(1)  # [layer, channel]
    for layer in views.plan.layers:
        assert set(np.flatnonzero(~cut[layer.index])) == set(layer.channels)


def test_many_channels_are_averaged_and_the_caption_says_so():
    spec = synthetic([(4, 3000)] * 2)
    plan = PruningPlan(
        "f", (LayerPlan(0, (0,), tuple(range(1500))), LayerPlan(1, (0,), tuple(range(3000))))
    )
    entropies = {(i, "mlp"): torch.arange(3000, dtype=torch.float64) for i in range(2)}
    figure = unit_entropy_heatmap(spec, plan, entropies, "mlp")
    assert "each column: the mean of 4 or so neighbours" in words(figure)
    assert "pale: in part" in words(figure)
    assert figure.axes[0].images[0].get_array().shape[1] == 768


def test_an_already_pruned_model_has_blank_cells():
    spec = synthetic([(4, 64), (2, 32), (0, 64), (3, 0), (0, 0)])
    plan = PruningPlan.keep_all(spec)
    entropies = {(i, p.kind): torch.rand(p.num_units).double() for i, p in spec.sub_blocks}
    for kind in ("attention", "mlp"):
        text = words(unit_entropy_heatmap(spec, plan, entropies, kind))
        assert "none left" in text
        assert "no such unit (pruned earlier)" in text
    assert "had none (pruned earlier)" in words(kept_units(spec, plan))
    pixels(transfer_entropy(spec, plan, {(0, "block"): 1.0}))


def test_values_that_are_not_finite_or_missing_stay_blank(views):
    entropies = {key: value.clone() for key, value in views.entropies.items() if key[0]}
    entropies[1, "mlp"][:] = math.nan
    entropies[2, "mlp"][0] = -math.inf
    pixels(unit_entropy_heatmap(views.spec, views.plan, entropies, "mlp"))
    pixels(unit_entropy_heatmap(views.spec, views.plan, {}, "mlp"))
    pixels(transfer_entropy(views.spec, views.plan, {**views.transfer, (0, "block"): math.nan}))
    pixels(transfer_entropy(views.spec, views.plan, {}))


def test_equal_entropies_have_a_colour_scale(views):
    entropies = {key: torch.zeros_like(value) for key, value in views.entropies.items()}
    pixels(unit_entropy_heatmap(views.spec, views.plan, entropies, "attention"))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((1.0, 50.0), "linear"),
        ((0.01, 50.0), "log"),
        ((0.0, 0.01, 50.0), "symlog"),
        ((0.0,), "linear"),
    ],
)
def test_transfer_entropy_is_logarithmic_beyond_two_decades(views, values, scale):
    transfer = {(i, "block"): value for i, value in enumerate(values)}
    figure = transfer_entropy(views.spec, views.plan, transfer)
    pixels(figure)
    assert figure.axes[0].get_yscale() == scale
    low, high = figure.axes[0].get_ylim()
    assert all(low < value < high for value in values)


def test_the_dots_of_the_damage_curves_are_what_the_plan_removes(views):
    attention, mlp = damage_curves(views.spec, views.plan, views.damage).axes
    dots = [line for line in mlp.lines if line.get_marker() == "o"]
    curves = [line for line in mlp.lines if line.get_marker() != "o"]
    assert len(dots) == len(curves) == len(views.spec.blocks)
    for layer, (dot, curve) in enumerate(zip(dots, curves, strict=True)):
        damage = views.damage[layer, "mlp"]
        cut = 48 - len(views.plan.layers[layer].channels)
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (cut / 48, float(damage[cut]))
        assert list(curve.get_ydata()) == damage.tolist()
    assert "KV group" in attention.get_title()


def test_before_after_prints_every_row_and_claims_nothing_inside_the_spread(views):
    from matplotlib.colors import to_hex

    from lit_prune.views.canvas import CUT, GREY, KEPT

    figure = before_after(views.report)
    text = words(figure)
    for row in views.report.rows:
        assert row.label in text
    assert "× 3.100" in text
    assert "not compared" in text
    colours = [to_hex(bar.get_facecolor()).upper() for bar in figure.axes[0].patches]
    assert colours == [KEPT, GREY.upper(), KEPT, CUT, CUT]


def test_before_after_of_a_dry_run_and_of_no_rows(views):
    rows = tuple(replace(row, after=None) for row in views.report.rows)
    text = words(before_after(replace(views.report, rows=rows, dry_run=True)))
    assert text.count("not compared") == len(rows)
    pixels(before_after(replace(views.report, rows=())))


def test_a_plan_for_another_model_or_scores_of_another_shape_are_refused(views):
    with pytest.raises(PlanMismatchError, match="fingerprint"):
        kept_units(views.spec, replace(views.plan, model_fingerprint="another"))
    views.entropies[3, "mlp"] = torch.zeros(7)
    with pytest.raises(ScoreError, match=r"layer 3 mlp have shape \[7\]; expected \[48\]"):
        unit_entropy_heatmap(views.spec, views.plan, views.entropies, "mlp")

import pytest
import torch

from lit_prune import planning
from lit_prune.calibration import Row, RowSet
from lit_prune.config import PruningConfig
from lit_prune.decoder import all_kept
from lit_prune.errors import CalibrationError
from lit_prune.measuring import calibrate
from lit_prune.methods.multipruner import decide, score
from lit_prune.planning import make_plan
from tests.methods.cases import KV_HEADS, case_of, check_ratio, model_of, plan
from tests.models import tiny_rows
from tests.state import unchanged

NAME = "multipruner"


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_ratio_is_met(kv_heads, ratio):
    check_ratio(NAME, kv_heads, ratio)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_scores_are_row_norms(kv_heads):
    found = score(case_of(NAME, kv_heads))
    layer = model_of(kv_heads).model.layers[1]
    mlp, attention = layer.mlp, layer.self_attn
    for channel in (0, 17):
        expected = (
            mlp.gate_proj.weight[channel].abs().sum() + mlp.up_proj.weight[channel].abs().sum()
        )
        assert found[1, "mlp"][channel].item() == pytest.approx(expected.item(), rel=1e-5)
    queries = 4 // kv_heads
    for group in range(kv_heads):
        total = 0.0
        for head in range(group * queries, (group + 1) * queries):
            for row in range(8):
                total += attention.q_proj.weight[head * 8 + row].abs().sum().item()
                total += attention.k_proj.weight[group * 8 + row].abs().sum().item()
                total += attention.v_proj.weight[group * 8 + row].abs().sum().item()
        assert found[1, "attention"][group].item() == pytest.approx(total, rel=1e-5)


class Judge:
    """A loss that knows what every unit is worth, and keeps every draft."""

    def __init__(self, worth):
        self.worth, self.drafts = worth, []

    def __call__(self, kept, side):
        assert side == "calibrate"
        self.drafts.append(kept)
        return -sum(self.worth(place) * len(units) for place, units in kept.items())


def decided(worth, kv_heads=4, ratio=0.5, **options):
    judge = Judge(worth)
    case = case_of(NAME, kv_heads, ratio, judge, **options)
    return case, decide(case), judge


def test_stages_come_in_order_and_take_the_cheapest():
    case, decision, judge = decided(lambda place: 1 + place[0])
    steps = decision.trace["steps"]
    assert decision.trace["judged"] == len(judge.drafts)
    stages = [
        "whole" if step["kept"] == 0 else "width" if step["kind"] == "mlp" else "head"
        for step in steps
    ]
    assert stages == sorted(stages, key=["whole", "width", "head"].index)
    assert set(stages) == {"whole", "width", "head"}
    # the shallowest is cheapest here, for as long as it can lose something
    widths = [step["layer"] for step in steps if step["kind"] == "mlp" and step["kept"]]
    assert widths == sorted(widths)
    removed = case.budget.removed(
        {**all_kept(case.spec), **{(s["layer"], s["kind"]): 0 for s in steps if s["kept"] == 0}}
    )
    assert removed >= 0.44 * case.budget.target
    assert removed <= case.budget.target


def test_units_of_least_norm_leave():
    case, decision, _ = decided(lambda place: 1 + place[0])
    scores = score(case)
    for place, units in decision.kept.items():
        if units:
            ranked = sorted(range(len(scores[place])), key=lambda i, p=place: scores[p][i].item())
            assert sorted(ranked[len(ranked) - len(units) :]) == list(units)


def test_judgements_are_bounded():
    for ratio in (0.2, 0.6):
        case, decision, judge = decided(lambda place: 1 + place[0], ratio=ratio)
        layers = len(case.spec.blocks)
        whole = sum(step["kept"] == 0 for step in decision.trace["steps"])
        assert len(judge.drafts) <= whole * 2 * layers + 2 * 64 * layers


def test_an_attention_is_always_left():
    _, decision, _ = decided(lambda place: 1 if place[1] == "attention" else 100, ratio=0.45)
    assert any(units for (_, kind), units in decision.kept.items() if kind == "attention")


@pytest.mark.parametrize("granularities", [("channel",), ("kv_group", "channel")])
def test_stages_that_are_not_allowed_are_left_out(granularities):
    found = check_ratio(NAME, 2, 0.25, granularities=granularities)
    assert all(layer.kv_groups and layer.channels for layer in found.layers)


def test_protected_layers_and_nothing_asked():
    found = check_ratio(NAME, 2, 0.25, protected_layers=(3,))
    assert len(found.layers[3].channels) == 96
    assert all(len(layer.channels) == 96 for layer in plan(NAME, 2, 0.0).layers)


class Whole:
    """Every draft run from its first layer."""

    def __init__(self, _layers, batches):
        self.batches = list(batches)

    def of(self, _plan, measure):
        return measure(self.batches)


@pytest.mark.parametrize("compensation", ["none", "mean", "least_squares"])
def test_losses_are_those_of_whole_forwards(monkeypatch, compensation):
    config = PruningConfig(pruning_ratio=0.4, preset=NAME, compensation=compensation)
    rows = RowSet.of(map(Row.of, tiny_rows(40, uneven=True)))
    calibration = calibrate(model_of(2), rows, config, progress=False)
    resumed = make_plan(model_of(2), calibration, config).plan
    monkeypatch.setattr(planning, "Resumed", Whole)
    whole = make_plan(model_of(2), calibration, config).plan
    assert len(whole.provenance["method"]["steps"]) > 3
    assert resumed.provenance["method"] == whole.provenance["method"]
    assert resumed == whole


def test_f17_out_of_memory_says_that_fewer_search_tokens_take_less(monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(planning, "quality_of", exhausted)
    message = "out of memory in a draft judged on 16384 search_tokens .*3 GiB"
    with unchanged(model_of(2)), pytest.raises(CalibrationError, match=message):
        plan(NAME, 2, 0.3)

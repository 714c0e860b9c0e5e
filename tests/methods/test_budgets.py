"""`conditional` under budgets that are not parameters: met when recounted, exact, planned anew."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from lit_prune import EntropyPruningCallback, measuring
from lit_prune.allocation import cost_of
from lit_prune.calibration import Calibration
from lit_prune.config import RESOURCES, PruningConfig
from lit_prune.decoder import all_kept, spec_for
from lit_prune.errors import ArtifactError, BudgetError, CalibrationError, ConfigError
from lit_prune.measuring import calibrate
from lit_prune.methods import PRESETS, preset
from lit_prune.metrics import SubBlockLatency, footprint_of
from lit_prune.planning import make_plan
from lit_prune.pruner import prune
from lit_prune.report import PruningReport
from lit_prune.surgery import apply_plan
from lit_prune.sweep import sweep
from lit_prune.views.trade_off import trade_off
from tests.allocation.specs import plain_budget
from tests.models import batches_of, tiny_model, tiny_rows
from tests.naive import places_of, uneven_rows
from tests.state import counted_forwards, recount, unchanged

CONTEXT = 112
CONDITIONS = {
    "device": f"cpu ({torch.get_num_threads()} threads)",
    "dtype": "float32",
    "batch_size": 1,
    "prompt_tokens": CONTEXT,
    "new_tokens": 16,
    "warmup": 2,
    "repetitions": 7,
}


def table_for(model):
    """A made-up table: a start, then slow for attention, in steps for MLPs."""
    table = {}
    for index, part in spec_for(model).sub_blocks:
        if part.kind == "attention":
            rows = [(n, 4e-6 + 9e-6 * n) for n in range(1, part.num_units + 1)]
        else:
            rows = [(n, 5e-6 + 1e-6 * (n // 16)) for n in range(4, part.num_units + 1, 4)]
        table[index, part.kind] = torch.tensor(rows, dtype=torch.float64)
    return table


def request(resource, ratio=0.3, **options):
    config = PruningConfig(pruning_ratio=ratio, budget=resource, **options)
    return preset("conditional").resolve(config)


@pytest.fixture(scope="module", params=[4, 2], ids=["MHA", "GQA"])
def model(request):
    return tiny_model(kv_heads=request.param, layers=4)


@pytest.fixture(scope="module")
def calibration(model):
    found = calibrate(model, uneven_rows(30), request("parameters"), progress=False)
    return replace(found, latency=table_for(model), latency_conditions=CONDITIONS)


def planned(model, calibration, resource, ratio=0.3, **options):
    return make_plan(model, calibration, request(resource, ratio, **options))


def counts_of(plan):
    found = {}
    for layer in plan.layers:
        found[layer.index, "attention"] = len(layer.kv_groups)
        found[layer.index, "mlp"] = len(layer.channels)
    return found


def naive_amount(model, resource):
    """What the decoder layers of a real model cost, counted by hand."""
    counted = recount(model)
    if resource == "flops":
        return counted["linear_flops"] + 4 * CONTEXT * sum(counted["query_columns"])
    if resource == "kv_cache_bytes":
        return counted["kv_bytes"]
    return counted["decoder"] * (4 if resource == "weight_bytes" else 1)


def table_amount(model, counts):
    """What a table says of counts, for tables whose steps are all listed."""
    total = 0.0
    for place, rows in table_for(model).items():
        if counts[place]:
            ladder = {int(units): seconds for units, seconds in rows.tolist()}
            total += ladder[counts[place]]
    return total


REACHED = {"parameters": 0.3, "flops": 0.3, "weight_bytes": 0.3, "kv_cache_bytes": 0.25}


@pytest.mark.parametrize("allocator", ["joint", "uniform_widths"])
@pytest.mark.parametrize("resource", REACHED)
def test_the_ratio_is_met_when_the_pruned_modules_are_recounted(
    model, calibration, resource, allocator
):
    ratio = REACHED[resource]
    found = planned(model, calibration, resource, ratio, allocator=allocator)
    pruned = tiny_model(kv_heads=model.config.num_key_value_heads, layers=4)
    before = naive_amount(pruned, resource)
    apply_plan(pruned, found.plan, found.compensation)
    achieved = 1 - naive_amount(pruned, resource) / before
    assert achieved == pytest.approx(ratio, abs=0.005)
    assert found.plan.provenance["achieved_ratio"] == pytest.approx(achieved, abs=1e-12)
    facts = found.plan.provenance["budget"]
    assert facts["resource"] == resource
    assert facts["dense"] == before
    assert facts["removed"] == before - naive_amount(pruned, resource)
    parameters = tiny_model(kv_heads=model.config.num_key_value_heads, layers=4)
    left = recount(pruned)["decoder"]
    assert facts["removed_parameters"] == recount(parameters)["decoder"] - left
    counts = counts_of(found.plan)
    if allocator == "uniform_widths":
        for kind in ("attention", "mlp"):
            assert len({n for (_, k), n in counts.items() if k == kind and n}) == 1
    if resource == "kv_cache_bytes":  # nothing is cut that frees nothing
        gone = {layer for layer in range(4) if not counts[layer, "attention"]}
        assert all(n == 48 or layer in gone for (layer, kind), n in counts.items() if kind == "mlp")


@pytest.mark.parametrize("allocator", ["joint", "uniform_widths"])
def test_a_ratio_of_latency_is_met_by_the_table(model, calibration, allocator):
    options = {"allocator": allocator, "channel_multiple": 4}
    plan = planned(model, calibration, "latency", 0.3, **options).plan
    dense = table_amount(model, all_kept(spec_for(model)))
    achieved = 1 - table_amount(model, counts_of(plan)) / dense
    assert achieved == pytest.approx(0.3, abs=0.005)
    assert plan.provenance["achieved_ratio"] == pytest.approx(achieved, abs=1e-6)
    # attention is slow here, and 16 channels are what one step is worth
    assert sum(n for (_, kind), n in counts_of(plan).items() if kind == "attention") < 16


def test_budgets_lead_to_different_plans(model, calibration):
    plans = [
        planned(model, calibration, resource, 0.25, channel_multiple=1).plan
        for resource in ("parameters", "flops", "kv_cache_bytes", "latency")
    ]
    assert len({plan.digest for plan in plans}) == 4
    same = planned(model, calibration, "weight_bytes", 0.25, channel_multiple=1).plan
    assert same.digest == plans[0].digest  # one dtype throughout: the same question


def damage_of(model, calibration):
    found = make_plan(model, calibration, request("parameters", 0.3, compensation="none"))
    return {place: curve.tolist() for place, curve in found.damage.items()}


@pytest.mark.parametrize("resource", RESOURCES)
def test_the_search_is_exact_under_every_budget(resource):
    """Against every combination of kept counts, with the sizes that the budget says."""
    model, options = tiny_model(layers=2), {"channel_multiple": 8, "compensation": "none"}
    found = calibrate(model, uneven_rows(), request("parameters", **options), progress=False)
    found = replace(found, latency=table_for(model), latency_conditions=CONDITIONS)
    whole, places, reached = all_kept(spec_for(model)), places_of(model), 0
    table = damage_of(model, found)
    for ratio in (0.25, 0.3, 0.4, 0.5, 0.55):
        config = request(resource, ratio, search_tolerance=0.005, **options)
        budget = plain_budget(spec_for(model), config, cost_of(model, config, found.latency))
        best = None
        for counts in itertools.product(*(budget.allowed[place] for place in places)):
            chosen = dict(zip(places, counts, strict=True))
            if any(n for (_, kind), n in chosen.items() if kind == "attention"):
                cost = sum(table[p][whole[p] - n] for p, n in chosen.items())
                if budget.met_by(chosen) and (best is None or cost < best):
                    best = cost
        if best is None:
            with pytest.raises(BudgetError, match="cannot be reached"):
                make_plan(model, found, config)
            continue
        trace = make_plan(model, found, config).plan.provenance["method"]
        assert trace["predicted_damage"] == pytest.approx(best, rel=1e-9)
        assert trace["searches"][0]["optimal"]
        reached += 1
    assert reached >= 2


def test_protected_layers_stay_under_every_budget(model, calibration):
    for resource in RESOURCES:
        ratio = 0.25 if resource != "latency" else 0.2
        plan = planned(model, calibration, resource, ratio, protected_layers=(0, 3)).plan
        whole = all_kept(spec_for(model))
        for place, count in counts_of(plan).items():
            assert count == whole[place] or place[0] in (1, 2)


# ------------------------------------------------------------------------------ planned anew


def test_budgets_in_every_resource_from_one_saved_calibration_cost_no_forward(
    model, calibration, tmp_path
):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    again = Calibration.load(path)
    assert again.latency_conditions == CONDITIONS
    assert again.describe()["latency_table"] == CONDITIONS
    assert again.latency.keys() == calibration.latency.keys()
    for place, rows in calibration.latency.items():
        assert torch.equal(again.latency[place], rows)
    with counted_forwards(model) as forwards, unchanged(model):
        digests = {r: planned(model, again, r, 0.25).plan.digest for r in RESOURCES}
    assert forwards == []
    assert digests == {r: planned(model, calibration, r, 0.25).plan.digest for r in RESOURCES}


def test_a_sweep_over_ratios_of_another_resource(model, calibration):
    points = sweep(model, calibration, [0.1, 0.25, 0.5], budget="kv_cache_bytes")
    assert [point.achieved for point in points[1:]] == [0.25, 0.5]
    assert {point.budget for point in points} == {"kv_cache_bytes"}
    assert trade_off(points).axes[0].get_xlabel() == "KV-cache bytes per token removed"
    assert points[0].plan is None
    assert "0.1 of the KV-cache bytes per token cannot be reached" in points[0].note


def fake_measurement(monkeypatch):
    calls = []

    def measure(model, *, prompt_tokens, new_tokens, batch_size):
        calls.append((prompt_tokens, new_tokens, batch_size))
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}
        return SubBlockLatency(seconds=table_for(model), conditions=CONDITIONS | sizes)

    monkeypatch.setattr("lit_prune.latency_table.measure_sub_blocks", measure)
    return calls


def run(model, resource, ratio=0.25, **options):
    return prune(
        model, batches_of(tiny_rows(30), 6), pruning_ratio=ratio, budget=resource, progress=False,
        **options,
    )  # fmt: skip


def test_latency_is_measured_once_with_the_requests_workload(monkeypatch):
    calls, model = fake_measurement(monkeypatch), tiny_model()
    sizes = {"latency_prompt_tokens": 8, "latency_new_tokens": 2, "latency_batch_size": 3}
    result = run(model, "latency", dry_run=True, **sizes)
    assert calls == [(8, 2, 3)]
    more = {"progress": False, "dry_run": True, "calibration": result.calibration}
    again = prune(model, pruning_ratio=0.4, budget="latency", **sizes, **more)
    assert len(calls) == 1
    assert again.report.achieved_ratio == pytest.approx(0.4, abs=0.005)
    with pytest.raises(CalibrationError, match="measured with prompt_tokens 8, the request has 9"):
        prune(model, pruning_ratio=0.4, budget="latency", **more,
              **sizes | {"latency_prompt_tokens": 9})  # fmt: skip


def test_an_unreachable_latency_is_refused_before_statistics_are_taken(monkeypatch):
    fake_measurement(monkeypatch)
    monkeypatch.setattr(measuring, "replay", lambda *_args, **_options: pytest.fail("replayed"))
    model = tiny_model()
    with (
        unchanged(model),
        counted_forwards(model) as forwards,
        pytest.raises(BudgetError, match=r"0\.97 of the decoder latency .* lie in \[0, 0\."),
    ):
        run(model, "latency", 0.97, latency_prompt_tokens=8)
    assert forwards == []


def test_really_measured_latency_plans_and_is_reported_beside_the_measured_model():
    model = tiny_model()
    # block by block: reachable whatever the machine is like
    result = run(
        model, "latency", 0.25, granularities=("block",), latency_prompt_tokens=8,
        latency_new_tokens=2,
    )  # fmt: skip
    report = result.report
    assert report.budget == "latency"
    assert report.achieved_ratio == result.plan.provenance["achieved_ratio"]
    assert report.achieved_ratio == pytest.approx(0.25, abs=0.005)
    assert len(model.model.layers) == 3
    predicted, measured = report.row("predicted_decoder_seconds"), report.row("whole_seconds")
    assert predicted.ratio == pytest.approx(1 - report.achieved_ratio)
    prefill, decode = report.row("prefill_seconds"), report.row("decode_seconds_per_token")
    assert measured.before == pytest.approx(prefill.before + 2 * decode.before)
    assert measured.after == pytest.approx(prefill.after + 2 * decode.after)
    text = str(report)
    for words in (
        "of the decoder latency predicted from the measured table (asked 25.00%)",
        "prompt and new tokens, predicted",
        "prompt and new tokens, measured",
        "8 prompt + 2 new tokens, median of 7 after 2 warm-up runs; what it predicts",
    ):
        assert words in text


def test_a_table_of_another_device_is_used_and_said(model, calibration):
    there = CONDITIONS | {"device": "cuda:0 (a GPU)", "dtype": "bfloat16"}
    elsewhere = replace(calibration, latency_conditions=there)
    plan = planned(model, elsewhere, "latency").plan
    notes = " ".join(plan.provenance["budget"]["notes"])
    assert "of another device (cuda:0 (a GPU)) than the model's now (cpu" in notes
    assert "of another dtype (bfloat16)" in notes
    here = planned(model, calibration, "latency").plan
    assert "another" not in " ".join(here.provenance["budget"]["notes"])
    assert here.digest == plan.digest


def test_a_table_of_a_busy_machine_is_used_and_said(model, calibration):
    for waited, said in ((0.4, True), (0.01, False), (None, False)):
        there = replace(calibration, latency_conditions=CONDITIONS | {"waited": waited})
        notes = " ".join(planned(model, there, "latency").plan.provenance["budget"]["notes"])
        assert ("held for 40% of the time" in notes) == said


# --------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("resource", REACHED)
def test_the_report_names_the_quantity_and_the_parameters_too(resource):
    model = tiny_model(kv_heads=4)
    before = footprint_of(model, context_length=CONTEXT)
    result = run(model, resource, REACHED[resource], latency_new_tokens=1)
    after, report = footprint_of(model, context_length=CONTEXT), result.report
    removed = 1 - after.decoder_parameters / before.decoder_parameters
    text = str(report)
    assert f"% of the {RESOURCES[resource]} (asked {REACHED[resource]:.2%})" in text
    assert report.achieved_ratio == pytest.approx(REACHED[resource], abs=0.005)
    if resource == "parameters":
        assert report.parameter_ratio is None
        assert report.achieved_ratio == pytest.approx(removed)
    else:
        assert report.parameter_ratio == pytest.approx(removed)
        assert f", {removed:.2%} of the decoder parameters, " in text
    assert PruningReport.from_json(report.to_json()).headline() == report.headline()


def test_a_report_of_an_unknown_quantity_is_refused():
    model = tiny_model()
    raw = json.loads(run(model, "flops", dry_run=True, latency_prompt_tokens=0).report.to_json())
    with pytest.raises(ArtifactError, match="not a lit_prune report"):
        PruningReport.from_json(json.dumps(raw | {"budget": "sparsity"}))


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "conditional"])
def test_other_presets_refuse_other_budgets_by_name(name):
    with pytest.raises(ConfigError, match=f"preset '{name}' does not read budget, got 'flops'"):
        EntropyPruningCallback(pruning_ratio=0.3, preset=name, budget="flops")
    EntropyPruningCallback(pruning_ratio=0.3, preset=name, budget="parameters")


def test_an_unknown_budget_is_refused():
    with pytest.raises(ConfigError, match=r"budget must be one of .*'latency'.*, got 'memory'"):
        PruningConfig(pruning_ratio=0.3, budget="memory")


@pytest.mark.parametrize("resource", ["flops", "kv_cache_bytes", "weight_bytes"])
@pytest.mark.parametrize("allocator", ["joint", "uniform_widths"])
def test_what_cannot_be_reached_is_refused_before_any_forward(resource, allocator):
    model = tiny_model(kv_heads=4)
    options = {"allocator": allocator, "granularities": ("kv_group",)}
    with (
        unchanged(model),
        counted_forwards(model) as forwards,
        pytest.raises(BudgetError, match=f"0.72 of the {RESOURCES[resource]} cannot be .* nearest"),
    ):
        run(model, resource, 0.72, **options)
    assert forwards == []


def test_a_calibration_without_a_table_is_refused(model, calibration):
    bare = replace(calibration, latency=None, latency_conditions={})
    with pytest.raises(CalibrationError, match="calibration has no latency, which preset"):
        planned(model, bare, "latency")


def test_nothing_to_remove_is_a_plan_under_every_budget(model, calibration):
    for resource in RESOURCES:
        plan = planned(model, calibration, resource, 0.0).plan
        assert counts_of(plan) == all_kept(spec_for(model))
        assert plan.provenance["achieved_ratio"] == 0

"""Compensation by least squares, against a regression on raw activations."""

import copy

import pytest
import torch

from lit_prune.calibration import replay
from lit_prune.config import PruningConfig
from lit_prune.decoder import quiet, spec_for
from lit_prune.errors import PlanMismatchError, ScoreError
from lit_prune.measuring import calibrate
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.pruner import prune
from lit_prune.surgery import (
    Compensation,
    apply_plan,
    least_squares_compensation,
    masked,
    mean_compensation,
)
from tests.models import batches_of, tiny_model, tiny_rows
from tests.naive import captured, output_of, uneven_rows
from tests.state import unchanged

IDS = torch.stack(tiny_rows(3))
# Sub-blocks that are cut in part; layer 1 attention goes whole, layer 2 stays.
PARTIAL = [(0, "attention"), (0, "mlp"), (1, "mlp")]


@pytest.fixture(scope="module")
def made():
    """A model whose MLP channels say much of each other, a plan, text and its statistics."""
    model = tiny_model("llama", layers=3, mlp_bias=True, attention_bias=True)
    with torch.no_grad():
        for block in model.model.layers:  # channels 24 … 47 are nearly 0 … 23
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[24:] = linear.weight[:24] + 0.05 * linear.weight[24:]
                linear.bias[24:] = linear.bias[:24]
    everything = tuple(range(48))
    layers = (
        LayerPlan(0, (1,), tuple(range(24))),
        LayerPlan(1, (), tuple(range(5, 30))),
        LayerPlan(2, (0, 1), everything),
    )
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    rows = uneven_rows(60)
    config = PruningConfig(pruning_ratio=0.3, preset="wanda_ls")
    return model, plan, rows, calibrate(model, rows, config, progress=False)


def kept_columns(plan, place):
    layer = plan.layers[place[0]]
    if place[1] == "mlp":
        return list(layer.channels)
    return [c for group in layer.kv_groups for c in range(group * 16, group * 16 + 16)]


def compensate(made, *, held_out=True, **options):
    model, plan, _, calibration = made
    other = calibration.held_out if held_out else None
    return least_squares_compensation(
        model, plan, calibration.units, calibration.covariances, other, **options
    )


def test_everything_kept_is_the_identity(made):
    model, _, _, calibration = made
    plan = PruningPlan.keep_all(spec_for(model))
    found = least_squares_compensation(
        model, plan, calibration.units, calibration.covariances, calibration.held_out
    )
    assert found.constants == {}
    assert found.weights == {}
    assert found.notes == ()


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_against_a_regression_on_activations(made, damping):
    """Ridge regression of what the cut columns write on the kept inputs, all centred."""
    model, plan, rows, _ = made
    found = compensate(made, held_out=False, damping=damping)
    assert set(found.weights) == set(PARTIAL)
    seen = captured(model, rows)["writes"]
    for place in PARTIAL:
        x, weight = seen[place], output_of(model, *place).weight.detach().double()
        kept = kept_columns(plan, place)
        cut = sorted(set(range(weight.shape[1])) - set(kept))
        mean = x.mean(0)
        centred = (x - mean) / len(x) ** 0.5
        noise = damping * float(x.var(0, correction=0).mean())
        # extra rows of sqrt(noise) * identity make it a ridge
        inputs = torch.cat([centred[:, kept], noise**0.5 * torch.eye(len(kept)).double()])
        wanted = torch.cat([centred[:, cut] @ weight[:, cut].T, torch.zeros(len(kept), 32)])
        update = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution.T
        new = weight[:, kept] + update
        torch.testing.assert_close(found.weights[place].double(), new, rtol=1e-3, atol=1e-3)
        constant = weight @ mean - found.weights[place].double() @ mean[kept]
        torch.testing.assert_close(found.constants[place], constant, rtol=1e-4, atol=1e-4)


def test_held_out_moments_are_about_the_means_of_the_calibrate_side(made):
    """A constant that is wrong on other text counts as error there, too."""
    model, _, rows, calibration = made
    other = captured(model, rows, "choose")["writes"]
    for place, moments in calibration.held_out.items():
        off = other[place] - calibration.units[place][0]
        torch.testing.assert_close(moments, off.T @ off / len(off), rtol=1e-4, atol=1e-6)
        assert bool((other[place].mean(0) - calibration.units[place][0]).abs().max() > 1e-3)


def test_huge_damping_leaves_the_mean(made):
    model, plan, _, calibration = made
    found = compensate(made, held_out=False, damping=1e12)
    wanted = mean_compensation(model, plan, calibration.units).constants
    assert set(found.constants) == set(wanted)
    for place, constant in wanted.items():
        torch.testing.assert_close(found.constants[place], constant, rtol=1e-5, atol=1e-6)
    for place in PARTIAL:
        weight = output_of(model, *place).weight.detach()[:, kept_columns(plan, place)]
        torch.testing.assert_close(found.weights[place], weight, rtol=1e-6, atol=1e-7)


def test_a_whole_sub_block_leaves_its_mean_or_nothing(made):
    model, plan, _, calibration = made
    wanted = mean_compensation(model, plan, calibration.units).constants[1, "attention"]
    assert torch.equal(compensate(made).constants[1, "attention"], wanted)
    dropped = compensate(made, removed_mean="drop")
    assert (1, "attention") not in dropped.constants
    assert set(dropped.weights) == set(PARTIAL)


def output_errors(model, plan, rows, compensation, side):
    """Mean squared error of what each sub-block writes, its kept inputs as they were."""
    seen, errors = captured(model, rows, side)["writes"], {}
    for place in PARTIAL:
        weight = output_of(model, *place).weight.detach().double()
        kept = kept_columns(plan, place)
        new = compensation.weights.get(place, weight[:, kept]).double()
        got = seen[place][:, kept] @ new.T + compensation.constants[place]
        errors[place] = float((seen[place] @ weight.T - got).square().sum(1).mean())
    return errors


def test_less_error_than_the_mean_on_text_that_it_has_not_seen(made):
    model, plan, rows, calibration = made
    mean = mean_compensation(model, plan, calibration.units)
    for side in ("choose", "score"):
        alone = output_errors(model, plan, rows, mean, side)
        found = output_errors(model, plan, rows, compensate(made), side)
        assert all(found[place] < alone[place] for place in PARTIAL)
        # nearly all that a cut channel wrote is told by its twin
        assert found[0, "mlp"] < 0.1 * alone[0, "mlp"]


def test_damping_is_chosen_on_held_out_text(made):
    """Never worse there than any damping that was tried."""
    model, plan, rows, _ = made
    chosen = output_errors(model, plan, rows, compensate(made, damping=0.03), "choose")
    tried = [
        output_errors(model, plan, rows, compensate(made, held_out=False, damping=d), "choose")
        for d in (0.0003, 0.003, 0.03, 0.3, 3.0)
    ]
    for place in PARTIAL:
        best = min(errors[place] for errors in tried)
        assert chosen[place] == pytest.approx(best, rel=1e-3)
    assert any(tried[2][place] > 1.001 * chosen[place] for place in PARTIAL)


def test_where_it_does_not_help_the_mean_stays_and_the_report_says_so(made):
    """Held-out text whose inputs do not depend on each other: nothing can be told of the cut."""
    model, plan, _, calibration = made
    alone = {place: c.diagonal().diag() for place, c in calibration.covariances.items()}
    found = least_squares_compensation(
        model, plan, calibration.units, calibration.covariances, alone
    )
    wanted = mean_compensation(model, plan, calibration.units)
    assert found.weights == {}
    assert all(torch.equal(found.constants[p], wanted.constants[p]) for p in wanted.constants)
    (note,) = found.notes
    assert note.startswith("3 sub-blocks keep the mean alone")
    assert note.endswith("layer 0 attention, layer 0 mlp, layer 1 mlp")


def test_a_covariance_that_cannot_be_inverted_is_named(made):
    model, plan, _, calibration = made
    broken = {**calibration.covariances, (0, "mlp"): -calibration.covariances[0, "mlp"]}
    found = least_squares_compensation(model, plan, calibration.units, broken, calibration.held_out)
    assert set(found.weights) == set(PARTIAL) - {(0, "mlp")}
    assert any("cannot be inverted" in note and "layer 0 mlp" in note for note in found.notes)
    mean = mean_compensation(model, plan, calibration.units).constants[0, "mlp"]
    assert torch.equal(found.constants[0, "mlp"], mean)


def logits(model, plan=None, compensation=None):
    if plan is None:
        with quiet(model):
            return model(input_ids=IDS).logits
    with quiet(model), unchanged(model), masked(model, plan, compensation):
        return model(input_ids=IDS).logits


def test_pruned_computes_what_masked_does_and_both_what_the_weights_say(made):
    model, plan, _, _ = made
    compensation = compensate(made)
    wanted = logits(model, plan, compensation)
    pruned, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(pruned, plan, compensation)  # compares by itself, too
    torch.testing.assert_close(logits(pruned), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for place in PARTIAL:
            linear, kept = output_of(by_hand, *place), kept_columns(plan, place)
            linear.weight.zero_()
            linear.weight[:, kept] = compensation.weights[place]
            linear.bias += compensation.constants[place]
        whole = output_of(by_hand, 1, "attention")
        whole.weight.zero_()
        whole.bias.copy_(compensation.constants[1, "attention"])
    torch.testing.assert_close(logits(by_hand), wanted, rtol=1e-4, atol=1e-4)
    alone = logits(model, plan, mean_compensation(model, plan, made[3].units))
    assert not torch.allclose(alone, wanted, atol=1e-2)  # the weights matter


def test_round_trip_through_a_file(made, tmp_path):
    model, plan, _, _ = made
    compensation = compensate(made)
    path = tmp_path / "compensation.safetensors"
    compensation.save(path)
    again = Compensation.load(path)
    for group in ("constants", "weights"):
        before, after = getattr(compensation, group), getattr(again, group)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[place], after[place]) for place in before)
        assert all(before[place].dtype == after[place].dtype for place in before)
    again.check(model, plan)
    assert torch.equal(logits(model, plan, again), logits(model, plan, compensation))


def test_other_weights_and_other_plans_are_refused(made):
    model, plan, _, _ = made
    compensation, other = compensate(made), copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with unchanged(other), pytest.raises(PlanMismatchError, match="made for other weights"):
        apply_plan(other, plan, compensation)
    fewer = PruningPlan(plan.model_fingerprint, (LayerPlan(0, (0,), (1,)), *plan.layers[1:]))
    with unchanged(model), pytest.raises(PlanMismatchError, match="was made for plan"):
        apply_plan(model, fewer, compensation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_any_precision(dtype):
    model = tiny_model(layers=3, kv_heads=4).to(dtype)
    result = prune(
        model,
        batches_of(tiny_rows(30), 6),
        pruning_ratio=0.3,
        preset="flap_ls",
        latency_prompt_tokens=0,
        progress=False,
    )
    assert result.compensation.weights
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(logits(model)).all()
    plan = result.plan
    for place, weight in result.compensation.weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(output_of(model, *place).weight, weight.to(dtype))
        assert len(kept_of(plan, place)) < (4 if place[1] == "attention" else 48)


def kept_of(plan, place):
    layer = plan.layers[place[0]]
    return layer.kv_groups if place[1] == "attention" else layer.channels


def test_the_mean_output_of_the_calibration_text_is_kept(made):
    """With constants fitted to the new weights, a cut leaves the sub-block's mean alone."""
    model, plan, rows, calibration = made
    compensation, place = compensate(made), (0, "mlp")
    seen = []
    only = (plan.layers[0], *(LayerPlan(i, (0, 1), tuple(range(48))) for i in (1, 2)))
    here = Compensation({place: compensation.constants[place]}, "", "", {
        place: compensation.weights[place]
    })  # fmt: skip
    one = PruningPlan(plan.model_fingerprint, (LayerPlan(0, (0, 1), only[0].channels), *only[1:]))
    with masked(model, one, here):
        down = output_of(model, *place)
        handle = down.register_forward_hook(lambda _m, _a, out: seen.append(out.double()))
        for row in rows.side("calibrate"):
            model(input_ids=row.ids[None])
        handle.remove()
    got = torch.cat([x[0] for x in seen]).mean(0).detach()
    weight = output_of(model, *place).weight.detach().double()
    wanted = weight @ calibration.units[place][0] + output_of(model, *place).bias.detach().double()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert replay(model, rows).covariances == {}  # only where asked for


def test_f23_fewer_tokens_than_inputs_damped_and_the_condition_is_reported(made):
    """A covariance of rank 7 for 48 channels: solved with damping from the data, and said so."""
    model, plan, rows, calibration = made
    few = {place: x[:8] for place, x in captured(model, rows)["writes"].items()}
    covariances = {place: x.T.cov(correction=0).reshape(x.shape[1], -1) for place, x in few.items()}
    assert int(torch.linalg.matrix_rank(covariances[0, "mlp"])) < 48
    found = least_squares_compensation(
        model, plan, calibration.units, covariances, calibration.held_out
    )
    for place in PARTIAL:
        facts = found.facts[f"layer {place[0]} {place[1]}"]
        if place in found.weights:
            assert torch.isfinite(found.weights[place]).all()
            damping = facts["damping"]
            noisy = covariances[place] + damping * covariances[place].diagonal().mean() * torch.eye(
                len(covariances[place])
            )
            exact = float(torch.linalg.cond(noisy))
            assert exact <= facts["condition_number_at_most"] < 1e9
        else:  # no damping was better than the mean on held-out text: reported, never silent
            assert facts["damping"] is None
            assert any(f"layer {place[0]} {place[1]}" in note for note in found.notes)


def test_f23_what_cannot_be_inverted_leaves_the_mean_and_says_so(made, monkeypatch):
    model, plan, _, calibration = made

    def refuse(*_args):
        raise ScoreError("not positive definite")

    monkeypatch.setattr("lit_prune.surgery.least_squares.conditional_mean", refuse)
    found = compensate(made)
    mean = mean_compensation(model, plan, calibration.units)
    assert found.weights == {}
    for place, constant in mean.constants.items():  # the mean, not nothing
        assert torch.equal(found.constants[place], constant)
    assert any("cannot be inverted" in note for note in found.notes)
    assert {facts["damping"] for facts in found.facts.values()} == {None}


def test_f23_the_report_names_the_sub_blocks_and_the_condition():
    model = tiny_model(layers=3)
    with torch.no_grad():  # channels that are copies: the covariance is singular
        for block in model.model.layers:
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[24:] = linear.weight[:24]
    result = prune(
        model, batches_of(tiny_rows(30), 6), pruning_ratio=0.2, latency_prompt_tokens=0,
        progress=False,
    )  # fmt: skip
    facts = result.plan.provenance["compensation"]["sub_blocks"]
    assert facts
    for chosen in facts.values():
        damping, condition = chosen["damping"], chosen["condition_number_at_most"]
        assert (damping is None) == (condition is None)
        assert condition is None or 1 <= condition < float("inf")
    assert all(torch.isfinite(p).all() for p in model.parameters())

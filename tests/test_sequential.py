"""Compensation behind the pruned prefix, against whole forwards of the masked model."""

import copy
import errno
import itertools
import shutil
import tempfile

import pytest
import torch

from lit_prune.calibration import Row, RowSet
from lit_prune.calibration import shelf as shelf_module
from lit_prune.calibration import streams as streams_module
from lit_prune.calibration.shelf import shelves
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import CalibrationError
from lit_prune.measuring import calibrate
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.planning import compensated, make_plan
from lit_prune.pruner import prune
from lit_prune.sequential import sequential_compensation
from lit_prune.surgery import apply_plan, masked, mean_compensation
from tests.models import CONFIGS, batches_of, tiny_model, tiny_rows
from tests.naive import captured, output_of, uneven_rows
from tests.state import counted_forwards, unchanged

ROWS = uneven_rows(60)
ALL = tuple(range(48))
LAYERS = (
    LayerPlan(0, (0, 1), tuple(range(24))),
    LayerPlan(1, (), tuple(range(5, 30))),
    LayerPlan(2, (1,), ALL),  # the MLP of this layer and the attention of layer 0 lose nothing
)


def model_and_plan(family="llama", **options):
    model = tiny_model(family, layers=3, **options)
    return model, PruningPlan(spec_for(model).fingerprint, LAYERS)


def streams(model, side, plan=None, compensation=None):
    """The residual stream that leaves each layer, and what enters each output projection."""
    if plan is None:
        return captured(model, ROWS, side)
    with masked(model, plan, compensation):
        return captured(model, ROWS, side)


@pytest.mark.parametrize("family", [*CONFIGS, "cohere"])
def test_each_layer_lies_nearer_to_the_dense_stream_than_with_the_mean_alone(family):
    model, plan = model_and_plan(family)
    config = PruningConfig(pruning_ratio=0.3, preset="flap")
    units = calibrate(model, ROWS, config, progress=False).units
    mean = mean_compensation(model, plan, units)
    with unchanged(model):
        found = sequential_compensation(model, plan, ROWS)
    for side in ("calibrate", "choose"):
        dense = streams(model, side)["leaves"]
        errors = [
            {
                layer: float((h - dense[layer]).square().sum(1).mean())
                for layer, h in streams(model, side, plan, compensation)["leaves"].items()
            }
            for compensation in (mean, found)
        ]
        assert all(errors[1][layer] < errors[0][layer] for layer in (0, 1, 2))


def test_where_a_layer_adds_to_what_its_mlp_returns_in_place():
    new = {"parallel_attn": True, "new_decoder_architecture": True, "kv_heads": 2}
    model, plan = model_and_plan("falcon", **new)
    config = PruningConfig(pruning_ratio=0.3, preset="flap")
    units = calibrate(model, ROWS, config, progress=False).units
    made = mean_compensation(model, plan, units), sequential_compensation(model, plan, ROWS)
    ids = torch.stack(tiny_rows(8, 24, seed=9))
    with torch.no_grad():
        dense = model(ids).logits
        errors = []
        for compensation in made:
            with masked(model, plan, compensation):
                errors.append(float((model(ids).logits - dense).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_against_a_regression_on_what_the_pruned_model_really_gets():
    """The last cut MLP, solved from raw activations with the damping that was chosen."""
    model, plan = model_and_plan(mlp_bias=True, attention_bias=True)
    found = sequential_compensation(model, plan, ROWS)
    place, kept = (1, "mlp"), list(range(5, 30))
    dense = streams(model, "calibrate")
    # in front of that MLP everything is pruned: its own inputs do not depend on its own cut
    pruned = streams(model, "calibrate", plan, found)
    before = pruned["leaves"][0] + found.constants[1, "attention"]  # its attention is gone
    linear = output_of(model, *place)
    x, t = pruned["writes"][place][:, kept], dense["leaves"][1] - before - linear.bias.double()
    weight, damping = (
        linear.weight.detach().double()[:, kept],
        found.facts["layer 1 mlp"]["damping"],
    )
    x0, t0 = x - x.mean(0), t - t.mean(0)
    noise = damping * float(x.var(0, correction=0).mean())
    inputs = torch.cat([x0 / len(x) ** 0.5, noise**0.5 * torch.eye(len(kept)).double()])
    missing = torch.cat([(t0 - x0 @ weight.T) / len(x) ** 0.5, torch.zeros(len(kept), 32)])
    new = weight + torch.linalg.lstsq(inputs, missing).solution.T
    torch.testing.assert_close(found.weights[place].double(), new.detach(), rtol=1e-3, atol=1e-4)
    # with its constant, the mean of the stream is the dense one
    after = pruned["leaves"][1].mean(0)
    torch.testing.assert_close(after, dense["leaves"][1].mean(0), rtol=1e-4, atol=1e-4)


def test_where_both_are_added_together_the_mlp_makes_up_for_the_attention():
    """Solved from raw activations: its target holds what the attention no longer writes."""
    model, plan = model_and_plan("cohere")
    found = sequential_compensation(model, plan, ROWS)
    dense, pruned = streams(model, "calibrate"), streams(model, "calibrate", plan, found)
    kept = list(range(5, 30))
    before = pruned["leaves"][0] + found.constants[1, "attention"]
    x, t = pruned["writes"][1, "mlp"][:, kept], dense["leaves"][1] - before
    weight = output_of(model, 1, "mlp").weight.detach().double()[:, kept]
    x0, t0 = x - x.mean(0), t - t.mean(0)
    noise = found.facts["layer 1 mlp"]["damping"] * float(x.var(0, correction=0).mean())
    inputs = torch.cat([x0 / len(x) ** 0.5, noise**0.5 * torch.eye(len(kept)).double()])
    missing = torch.cat([(t0 - x0 @ weight.T) / len(x) ** 0.5, torch.zeros(len(kept), 32)])
    new = weight + torch.linalg.lstsq(inputs, missing).solution.T
    torch.testing.assert_close(found.weights[1, "mlp"].double(), new, rtol=1e-3, atol=1e-4)


def test_what_loses_nothing_gets_no_constant_and_what_lies_before_the_first_cut_stays():
    model, plan = model_and_plan()
    found = sequential_compensation(model, plan, ROWS)
    assert set(found.constants) == {(0, "mlp"), (1, "attention"), (1, "mlp"), (2, "attention")}
    assert (0, "attention") not in found.weights
    assert (2, "mlp") in found.weights  # it corrects what was lost before
    assert found.weights[2, "mlp"].shape == (32, 48)


def test_protected_layers_keep_their_weights():
    model, plan = model_and_plan()
    found = sequential_compensation(model, plan, ROWS, protected_layers=(2,))
    assert {layer for layer, _ in found.weights} == {0, 1}
    assert {layer for layer, _ in found.constants} == {0, 1}


def test_nothing_cut_nothing_changed():
    model, _ = model_and_plan()
    found = sequential_compensation(model, PruningPlan.keep_all(spec_for(model)), ROWS)
    assert found.weights == {}
    assert found.constants == {}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_surgery_makes_the_model_that_was_masked(family, tie):
    model, plan = model_and_plan(family, tie=tie)
    found = sequential_compensation(model, plan, ROWS)
    ids = torch.stack(tiny_rows(3))
    with torch.no_grad(), masked(model, plan, found):
        wanted = model(input_ids=ids).logits
    dense_parameters = sum(p.numel() for p in model.parameters())
    apply_plan(model, plan, found)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-3)
    assert sum(p.numel() for p in model.parameters()) < dense_parameters


def test_no_forward_before_the_plan_that_stays():
    model = tiny_model(layers=4)
    config = PruningConfig(pruning_ratio=0.3, channel_multiple=4)
    calibration = calibrate(model, ROWS, config, progress=False)
    with counted_forwards(model) as forwards:
        planned = make_plan(model, calibration, config)
        assert forwards == []
        done = compensated(model, planned, calibration, config)
        assert forwards
    assert done.plan == planned.plan  # what stays; how it is compensated stands beside
    assert done.plan.provenance["compensation"]["sub_blocks"] == done.compensation.facts
    assert done.compensation.facts != planned.compensation.facts
    other = PruningConfig(pruning_ratio=0.3, channel_multiple=4, compensation="mean")
    assert compensated(model, planned, calibration, other) is planned


def test_the_same_text_in_another_order_gives_the_same_weights():
    model, plan = model_and_plan()
    one = sequential_compensation(model, plan, ROWS)
    rows = type(ROWS).of(reversed(ROWS.rows))
    other = sequential_compensation(copy.deepcopy(model), plan, rows)
    for place, weight in one.weights.items():
        assert torch.equal(weight, other.weights[place])


@pytest.mark.parametrize("preset", ["flap", "paper", "sleb"])
def test_any_preset_can_ask_for_it(preset):
    model = tiny_model(layers=4)
    result = prune(
        model,
        batches_of(tiny_rows(30), 6),
        pruning_ratio=0.25,
        preset=preset,
        compensation="sequential",
        latency_prompt_tokens=0,
        progress=False,
    )
    assert result.plan.provenance["compensation"]["sub_blocks"]
    assert abs(result.report.achieved_ratio - 0.25) <= 0.005


def test_f16_activations_that_are_not_finite_are_named_and_nothing_is_changed():
    model, plan = model_and_plan()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    with unchanged(model), pytest.raises(CalibrationError, match=r"layer [01] .*not finite"):
        sequential_compensation(model, plan, ROWS)


@pytest.fixture
def in_files(monkeypatch, tmp_path):
    """Hidden states lie in files, however few they are; returns where."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(
        streams_module, "shelves", lambda expected, _memory, device: shelves(expected, 0, device)
    )
    return tmp_path


def test_hidden_states_in_files_change_nothing_and_leave_nothing(in_files, monkeypatch):
    model, plan = model_and_plan()
    found = sequential_compensation(model, plan, ROWS)
    assert list(in_files.iterdir()) == []
    monkeypatch.undo()
    wanted = sequential_compensation(model, plan, ROWS)
    assert found.facts == wanted.facts
    for place, weight in wanted.weights.items():
        assert torch.equal(found.weights[place], weight)


def test_more_hidden_states_than_weights_go_to_files(monkeypatch, tmp_path):
    model, plan = model_and_plan(vocab_size=64)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokens = sum(ROWS.num_tokens(side) for side in ("calibrate", "choose"))
    repeats = 1 + weights // (3 * tokens * 32 * 4)
    generator = torch.Generator().manual_seed(5)
    more = RowSet.of(
        Row.of(torch.randint(3, 64, (len(row.ids),), generator=generator))
        for row in ROWS.rows * (1 + repeats)
    )
    made = []
    filed = shelf_module.FiledTensors
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(
        shelf_module, "FiledTensors", lambda *args: made.append(args[0]) or filed(*args)
    )
    sequential_compensation(model, plan, more)
    assert made
    assert all(tmp_path in folder.parents for folder in made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [3, 15])
def test_a_full_disk_is_said_and_nothing_is_left(in_files, monkeypatch, write):
    model, plan = model_and_plan()
    count, save = itertools.count(1), shelf_module.save_file

    def save_until_full(tensors, path):
        if next(count) == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(shelf_module, "save_file", save_until_full)
    with unchanged(model), pytest.raises(CalibrationError, match=r"No space left.*TMPDIR"):
        sequential_compensation(model, plan, ROWS)
    assert list(in_files.iterdir()) == []


def test_without_room_hidden_states_stay_in_memory(in_files, monkeypatch, caplog):
    model, plan = model_and_plan()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    sequential_compensation(model, plan, ROWS)
    assert "stay in memory" in caplog.text
    assert "TMPDIR" in caplog.text


def test_f17_out_of_memory_in_the_fit_says_what_to_lower(monkeypatch):
    model = tiny_model(layers=4)
    config = PruningConfig(pruning_ratio=0.3, channel_multiple=4)
    calibration = calibrate(model, ROWS, config, progress=False)
    planned = make_plan(model, calibration, config)

    def exhausted(*_):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(streams_module.TwoStreams, "enters", exhausted)
    message = r"out of memory in the fit .*3 GiB.*replay_batch_tokens \(now 8192\)"
    with unchanged(model), pytest.raises(CalibrationError, match=message):
        compensated(model, planned, calibration, config)


def test_f17_out_of_memory_in_any_pass_says_what_to_lower(monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    model = tiny_model()
    monkeypatch.setattr("lit_prune.measuring.measure_sensitivities", exhausted)
    with unchanged(model), pytest.raises(CalibrationError, match="out of memory in the calibr"):
        calibrate(model, ROWS, PruningConfig(pruning_ratio=0.3), progress=False)

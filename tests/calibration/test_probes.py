"""What experts add to the stream, against experts run one by one by this file."""

import pytest
import torch

from lit_prune.calibration import Observer, Row, RowSet, replay, replay_within
from lit_prune.calibration import probes as probes_module
from lit_prune.config import PruningConfig
from lit_prune.decoder import DecoderParts, spec_for
from lit_prune.errors import CalibrationError
from lit_prune.measuring import calibrate
from tests.models import MIXTURES, batches_of, tiny_mixture, tiny_rows
from tests.state import unchanged


def routed_layer(model):
    parts = DecoderParts(model)
    return next(layer for layer in range(4) if parts.routed(layer) is not None)


@torch.no_grad()
def written_by_hand(model, rows, layer):
    """What each expert adds for every token of the rows, ``[tokens, experts, hidden]``, float64."""
    routed, calls = DecoderParts(model).routed(layer), []
    handle = routed.bank.register_forward_pre_hook(lambda _bank, args: calls.append(args))
    found = []
    for row in rows:
        calls.clear()
        model(input_ids=row.unsqueeze(0))
        hidden, chosen, weights = calls[0]
        made = torch.zeros(len(hidden), routed.num_experts, hidden.shape[-1], dtype=torch.float64)
        for token, expert in torch.cartesian_prod(
            torch.arange(len(hidden)), torch.arange(routed.num_experts)
        ):
            for slot in (chosen[token] == expert).nonzero().flatten():
                one = chosen[token : token + 1, slot : slot + 1]
                gate = weights[token : token + 1, slot : slot + 1]
                alone = type(routed.bank).forward(
                    routed.bank, hidden[token : token + 1], one, torch.ones_like(gate)
                )
                made[token, expert] += (alone * gate)[0].double()
        found.append(made)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("family", MIXTURES)
def test_moments_and_inner_products_are_those_of_experts_run_one_by_one(family, monkeypatch):
    model = tiny_mixture(family)
    monkeypatch.setattr(probes_module, "_MOST_ELEMENTS", 320)  # in many chunks
    rows, layer = tiny_rows(6, 12, uneven=True), routed_layer(model)
    whole = RowSet.of(Row.of(row) for row in rows)
    with unchanged(model):
        found = replay_within(model, whole, covariance_bytes=10**9, max_tokens=30)
    mine = [row.ids for row in whole.side("calibrate")]
    written = written_by_hand(model, mine, layer)
    mean, variance = found.units[layer, "mlp"]
    flat = written.flatten(1)
    torch.testing.assert_close(mean, flat.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(variance, flat.var(0, correction=0), rtol=1e-5, atol=1e-7)
    gram = torch.einsum("teh,tfh->ef", written, written) / len(written)
    torch.testing.assert_close(found.covariances[layer, "mlp"], gram, rtol=1e-5, atol=1e-7)


def test_an_observer_sees_in_the_validation_loop_what_a_replay_sees():
    model, rows = tiny_mixture("qwen3_moe"), tiny_rows(12, 16, uneven=True)
    observer = Observer(model, max_tokens=10**6)
    observer.open()
    with torch.no_grad():
        for batch in batches_of(rows, side="left"):
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            model(**batch, position_ids=positions, use_cache=False)
    observer.close()
    wanted = replay(model, RowSet.of(Row.of(row) for row in rows)).units
    assert wanted.keys() == observer.unit_moments().keys()
    for place, (mean, variance) in observer.unit_moments().items():
        torch.testing.assert_close(mean, wanted[place][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(variance, wanted[place][1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_predicted_damage_is_the_error_that_is_measured_when_experts_vanish():
    """Exact on the calibration text, for every point of the curve: experts' outputs set to zero."""
    model, rows = tiny_mixture("mixtral"), tiny_rows(24, 16)
    config = PruningConfig(pruning_ratio=0.3, min_calibration_tokens=1)
    whole = RowSet.of(Row.of(row) for row in rows)
    found = calibrate(model, whole, config, progress=False)
    curve, outputs = found.curves[0, "mlp"], []
    assert sorted(curve[1:, 0].tolist()) == list(range(6))
    layer = model.model.layers[0]
    layer.mlp.register_forward_hook(lambda _mlp, _args, output: outputs.append(output[0].double()))
    mine = [row.ids.unsqueeze(0) for row in whole.side("calibrate")]
    for ids in mine:
        model(input_ids=ids)
    dense = torch.cat(outputs)
    for count in range(1, 7):
        layer.mlp.experts.down_proj[int(curve[count, 0])] = 0
        outputs.clear()
        for ids in mine:
            model(input_ids=ids)
        error = (torch.cat(outputs) - dense).square().sum(-1).mean()
        assert float(curve[count, 1]) == pytest.approx(float(error), rel=1e-5)
        assert float(curve[count, 2]) == float(curve[count, 1])  # nothing is compensated


def test_experts_that_overflow_are_named():
    model = tiny_mixture("mixtral")
    model.model.layers[2].mlp.experts.down_proj.data[:] = 3e38
    rows = RowSet.of(Row.of(row) for row in tiny_rows(8, 12))
    with unchanged(model), pytest.raises(CalibrationError, match=r"layers\.[23]\S+ are not finite"):
        replay(model, rows)
    assert spec_for(model).blocks[2].mlp.unit == "expert"

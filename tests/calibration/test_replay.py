"""Transfer entropy and unit moments against full forwards that this file computes by itself."""

import math

import numpy as np
import pytest
import torch

from lit_prune.calibration import (
    ChannelMoments,
    Row,
    RowSet,
    Unit,
    bypass_units,
    covariance_groups,
    replay,
    replay_within,
)
from lit_prune.decoder import DecoderParts
from lit_prune.errors import CalibrationError
from lit_prune.importance import state_entropy, transfer_entropy
from tests.models import CONFIGS, tiny_model, tiny_rows
from tests.naive import captured
from tests.state import unchanged


class Zero(torch.nn.Module):
    def __init__(self, returns_weights):
        super().__init__()
        self.returns_weights = returns_weights

    def forward(self, hidden_states, *_args, **_kwargs):
        zero = torch.zeros_like(hidden_states)
        return (zero, None) if self.returns_weights else zero


class Passing(torch.nn.Module):
    attention_type = "full_attention"

    def forward(self, hidden_states, *_args, **_kwargs):
        return hidden_states


def with_unit_gone(model, unit):
    """Put a stand-in into the module tree itself: nothing of the package's bypass is used."""
    layers = model.model.layers
    if unit is None:
        return lambda: None
    if unit.kind == "block":
        owner, name, new = layers, str(unit.layer), Passing()
        new.attention_type = getattr(layers[unit.layer], "attention_type", "full_attention")
    else:
        name = "self_attn" if unit.kind == "attention" else "mlp"
        owner, new = layers[unit.layer], Zero(unit.kind == "attention")
    old = getattr(owner, name)
    setattr(owner, name, new)
    return lambda: setattr(owner, name, old)


@torch.no_grad()
def reference(model, rows, unit=None, *, normed=True):
    """Every row alone, unpadded, through the whole model; float64 over all real tokens."""
    undo, states = with_unit_gone(model, unit), []
    before_norm = []
    handle = model.model.norm.register_forward_pre_hook(
        lambda _m, args: before_norm.append(args[0])
    )
    try:
        for row in rows.side("calibrate"):
            normal = model.model(input_ids=row.ids[None], use_cache=False).last_hidden_state
            states.append((normal if normed else before_norm[-1])[0].double())
    finally:
        handle.remove()
        undo()
    return torch.cat(states)


def naive_entropy(states):
    return sum(
        math.log(std + 1e-6) + 0.5 * math.log(2 * math.pi * math.e)
        for std in states.std(0, correction=0).tolist()
    )


def uneven_rows(count=20, **options):
    return RowSet.of(Row.of(ids) for ids in tiny_rows(count, uneven=True, **options))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_transfer_entropy_equals_the_difference_of_two_full_forwards(family, kv_heads):
    options = {"sliding_window": 8} if family == "mistral" else {}
    if family == "qwen2":
        options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model, rows = tiny_model(family, kv_heads=kv_heads, layers=3, **options), uneven_rows()
    units = bypass_units(DecoderParts(model))
    assert [(u.layer, u.kind) for u in units] == [
        (layer, kind) for layer in range(3) for kind in ("block", "attention", "mlp")
    ]
    with unchanged(model):
        found = replay(model, rows, units, max_tokens=100)  # padded batches of several rows
    full, largest = naive_entropy(reference(model, rows)), 0
    for unit in units:
        wanted = abs(full - naive_entropy(reference(model, rows, unit)))
        entropy = transfer_entropy(state_entropy(found.full), state_entropy(found.bypassed[unit]))
        # float32 sums in other batches; the entropies themselves are some tens of nats
        assert entropy.item() == pytest.approx(wanted, abs=1e-4), unit
        largest = max(largest, wanted)
    assert largest > 0.1


def test_transfer_target_before_the_norm():
    model, rows = tiny_model(layers=2), uneven_rows()
    unit = Unit(1, "mlp")
    found = replay(model, rows, [unit], target="before_norm")
    for states, variance in (
        (reference(model, rows, normed=False), found.full),
        (reference(model, rows, unit, normed=False), found.bypassed[unit]),
    ):
        torch.testing.assert_close(variance, states.var(0, correction=0), rtol=1e-4, atol=0)


def test_joint_covariance_of_the_final_state():
    model, rows = tiny_model(layers=2), uneven_rows()
    unit = Unit(0, "attention")
    found = replay(model, rows, [unit], joint=True)
    wanted = torch.cov(reference(model, rows, unit).T, correction=0)
    scale = wanted.abs().max()
    torch.testing.assert_close(found.bypassed[unit], wanted, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_unit_moments_equal_those_of_unpadded_rows(family):
    model, rows = tiny_model(family, layers=2), uneven_rows()
    seen = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda _m, args, key=(layer, kind): seen.setdefault(key, []).append(args[0][0].double())
        )
        for layer, block in enumerate(model.model.layers)
        for kind, linear in (("attention", block.self_attn.o_proj), ("mlp", block.mlp.down_proj))
    ]
    reference(model, rows)
    for handle in handles:
        handle.remove()
    found = replay(model, rows, max_tokens=64)
    assert found.full is None
    assert found.bypassed == {}
    for place, states in seen.items():
        states = torch.cat(states)
        mean, variance = found.units[place]
        assert torch.allclose(mean, states.mean(0), atol=1e-5)
        torch.testing.assert_close(variance, states.var(0, correction=0), rtol=1e-4, atol=1e-9)


def test_f21_replay_is_bit_identical_in_any_order_and_for_any_number_of_threads():
    model, ids = tiny_model(layers=2), tiny_rows(20, uneven=True)
    units = bypass_units(DecoderParts(model))
    threads = torch.get_num_threads()

    def run(rows):
        found = replay(model, RowSet.of(map(Row.of, rows)), units)
        moments = [x for pair in found.units.values() for x in pair]
        return torch.cat([*moments, found.full, *found.bypassed.values()])

    wanted = run(ids)
    assert torch.equal(run(ids[::-1]), wanted)
    assert torch.equal(run(ids + ids[:9]), wanted)
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(run(ids), wanted, rtol=1e-6, atol=1e-9)
    finally:
        torch.set_num_threads(threads)


def test_f14_replay_restores_mode_cache_random_state_and_grad():
    model, rows = tiny_model(layers=2, attention_dropout=0.5), uneven_rows()
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    units = bypass_units(DecoderParts(model))
    with unchanged(model):
        once = replay(model, rows, units)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), unchanged(model):
        again = replay(model, rows, units)
    assert torch.equal(once.full, again.full)  # no dropout, no autocast


@pytest.mark.parametrize("at", ["probe", "bypass"])
def test_f14_f18_ctrl_c_in_a_replay_leaves_no_trace(at, monkeypatch):
    model, rows = tiny_model(layers=2), uneven_rows()
    model.train()
    calls = []

    def interrupted(self, x):
        calls.append(1)
        if len(calls) == (2 if at == "probe" else 7):
            raise KeyboardInterrupt
        return measure(self, x)

    measure = ChannelMoments.measure
    monkeypatch.setattr(ChannelMoments, "measure", interrupted)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        replay(model, rows, bypass_units(DecoderParts(model)))


def test_f14_an_error_inside_a_bypassed_forward_leaves_no_trace():
    model, rows, calls = tiny_model(layers=3), uneven_rows(), []

    def boom(x):
        calls.append(1)
        if len(calls) == 3:  # in the forward without layer 0's attention
            raise RuntimeError("boom")
        return torch.nn.functional.silu(x)

    last = model.model.layers[2].mlp.act_fn
    with unchanged(model):
        last.forward = boom
        with pytest.raises(RuntimeError, match="boom"):
            replay(model, rows, bypass_units(DecoderParts(model)))
        del last.forward


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_f16_a_non_finite_activation_names_module_batch_and_position(value):
    model, rows = tiny_model(layers=3), uneven_rows()

    def poison(_module, _args, output):
        output = output.clone()
        output[1, 4, 5] = value
        return output

    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(poison)
    message = r"layers\.1\.mlp\.down_proj are not finite: 1 of \d+ .* batch 0, first at \(1, 4, 5\)"
    with pytest.raises(CalibrationError, match=message):
        replay(model, rows)
    handle.remove()


def test_f16_a_bypass_that_overflows_is_said_by_name():
    model, rows = tiny_model(layers=2), uneven_rows()
    calls = []

    def overflow(_module, _args, output):
        calls.append(1)
        return output * math.inf if len(calls) > 1 else output  # only without layer 0

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(overflow)
    with pytest.raises(CalibrationError, match=r"without layer 0.* not finite.*replayed batch 0"):
        replay(model, rows, [Unit(0, "block")])
    handle.remove()


def test_f17_out_of_memory_says_what_to_lower(monkeypatch):
    model, rows = tiny_model(layers=2), uneven_rows()

    def exhausted(*_):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr("lit_prune.calibration.probes.block_moments", exhausted)
    message = r"out of memory in replayed batch 0 .*3 GiB.*replay_batch_tokens \(now 77\)"
    with unchanged(model), pytest.raises(CalibrationError, match=message) as caught:
        replay(model, rows, max_tokens=77)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("covariance_bytes", [1, 8 * 48**2, 8 * (48**2 + 32**2), 2**40])
def test_covariances_in_several_passes_are_those_of_one(covariance_bytes):
    model, rows = tiny_model(layers=3), RowSet.of(map(Row.of, tiny_rows(24, uneven=True)))
    parts = DecoderParts(model)
    groups = covariance_groups(parts, covariance_bytes)
    places = [(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]
    assert [place for group in groups for place in group] == places
    assert all(len(g) == 1 or sum(g.values()) <= covariance_bytes for g in groups)
    assert len(groups) == {1: 6, 8 * 48**2: 6, 8 * (48**2 + 32**2): 3, 2**40: 1}[covariance_bytes]
    units = bypass_units(parts)[:2]
    with unchanged(model):
        found = replay_within(model, rows, units, covariance_bytes=covariance_bytes)
    whole = replay(model, rows, units, covariances=places)
    assert list(found.covariances) == list(whole.covariances) == places
    for place, covariance in whole.covariances.items():
        assert torch.equal(found.covariances[place], covariance)
    for unit in units:
        assert torch.equal(found.bypassed[unit], whole.bypassed[unit])


def test_a_covariance_against_numpy():
    model, rows = tiny_model(layers=2), RowSet.of(map(Row.of, tiny_rows(24, uneven=True)))
    found = replay_within(model, rows, covariance_bytes=2**30)
    seen = captured(model, rows)["writes"]
    for place, covariance in found.covariances.items():
        wanted = np.cov(seen[place].numpy().T, bias=True)
        np.testing.assert_allclose(covariance.numpy(), wanted, rtol=1e-4, atol=1e-6)

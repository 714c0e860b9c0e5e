"""Footprint against counts by hand, PyTorch's own FLOP counter, and PyTorch's own allocator."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_prune.decoder import ConstantOutput, spec_for
from lit_prune.errors import ConfigError, UnsupportedModelError
from lit_prune.metrics import Footprint, footprint_of, measure_peak
from tests.models import CONFIGS, tiny_model

# tiny_model: hidden 32, 4 query heads of 8, 48 channels, vocabulary 64
HIDDEN, HEADS, HEAD_DIM, CHANNELS, VOCAB = 32, 4, 8, 48, 64


def by_hand(family, *, layers, kv_heads, tie):
    """(decoder parameters, all parameters) from the shapes on paper."""
    kv = kv_heads * HEAD_DIM
    linear = HIDDEN * (HIDDEN + 2 * kv) + HIDDEN * HIDDEN + 3 * HIDDEN * CHANNELS
    layer = linear + 2 * HIDDEN
    layer += {"qwen2": HIDDEN + 2 * kv, "qwen3": 2 * HEAD_DIM}.get(family, 0)
    return layers * layer, layers * layer + HIDDEN + HIDDEN * VOCAB * (1 if tie else 2), linear


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie", [True, False])
def test_counts_equal_those_by_hand(family, kv_heads, tie):
    model = tiny_model(family, kv_heads=kv_heads, layers=3, tie=tie)
    cost = footprint_of(model, context_length=16)
    decoder, total, linear = by_hand(family, layers=3, kv_heads=kv_heads, tie=tie)
    assert cost.decoder_parameters == decoder == spec_for(model).decoder_parameters
    assert cost.total_parameters == total
    assert cost.weight_bytes == 4 * total
    assert cost.flops_per_token == 3 * (2 * linear + 4 * HEADS * HEAD_DIM * 16)
    assert cost.head_flops_per_token == 2 * HIDDEN * VOCAB
    assert cost.kv_cache_bytes_per_token == 3 * 2 * kv_heads * HEAD_DIM * 4
    assert cost.peak_forward_bytes is None


def test_half_precision_halves_bytes_and_nothing_else():
    full, half = footprint_of(tiny_model()), footprint_of(tiny_model().to(torch.bfloat16))
    assert half.kv_cache_bytes_per_token * 2 == full.kv_cache_bytes_per_token
    assert half.weight_bytes * 2 == full.weight_bytes
    assert half.flops_per_token == full.flops_per_token


def shrink(model):
    """Layer 0 without attention, 1 without MLP but a bias, 2 narrow with biases; 3 as it was."""
    layers = model.model.layers
    layers[0].self_attn = ConstantOutput(None, returns_weights=True)
    layers[1].mlp = ConstantOutput(nn.Parameter(torch.ones(HIDDEN)), returns_weights=False)
    attention, mlp = layers[2].self_attn, layers[2].mlp
    for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        setattr(attention, name, nn.Linear(HIDDEN, width, bias=False))
    attention.o_proj = nn.Linear(16, HIDDEN, bias=True)
    mlp.gate_proj, mlp.up_proj = (nn.Linear(HIDDEN, 40, bias=False) for _ in range(2))
    mlp.down_proj = nn.Linear(40, HIDDEN, bias=True)
    return model


def eager(model):
    model.set_attn_implementation("eager")
    return model


def test_uneven_layers_without_attention_or_mlp_and_with_biases():
    model = shrink(tiny_model(layers=4))
    cost = footprint_of(model, context_length=10)
    attention, mlp = 2 * HIDDEN * 32 + 2 * HIDDEN * 16, 3 * HIDDEN * CHANNELS
    narrow = 2 * HIDDEN * 16 + 2 * HIDDEN * 8 + 3 * HIDDEN * 40
    linear = mlp + attention + narrow + attention + mlp
    assert cost.decoder_parameters == linear + 8 * HIDDEN + HIDDEN + 2 * HIDDEN
    assert cost.flops_per_token == 2 * linear + 4 * 10 * (32 + 16 + 32)
    assert cost.kv_cache_bytes_per_token == 4 * 2 * (16 + 8 + 16)


@pytest.mark.parametrize("change", [lambda m: m, shrink])
@pytest.mark.parametrize("tie", [True, False])
def test_flops_equal_pytorchs_own_counter(change, tie):
    tokens = 24
    model = eager(change(tiny_model(tie=tie)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    cost = footprint_of(model, context_length=tokens)
    per_token = cost.flops_per_token + cost.head_flops_per_token
    assert per_token * tokens == counter.get_total_flops()


def test_kv_bytes_equal_a_real_cache():
    model = tiny_model("qwen3", kv_heads=1, layers=3).to(torch.bfloat16)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(2, 9, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert footprint_of(model).kv_cache_bytes_per_token == held / (2 * 9)


def test_a_sliding_window_bounds_the_keys():
    wide = footprint_of(tiny_model("mistral", sliding_window=None), context_length=100)
    slid = footprint_of(tiny_model("mistral", sliding_window=20), context_length=100)
    assert wide.flops_per_token - slid.flops_per_token == 4 * 4 * HEADS * HEAD_DIM * 80
    # Qwen says it per layer: two full layers, then two that slide
    mixed = tiny_model("qwen2", sliding_window=20, use_sliding_window=True, max_window_layers=2)
    plain = tiny_model("qwen2")
    difference = (
        footprint_of(plain, context_length=100).flops_per_token
        - footprint_of(mixed, context_length=100).flops_per_token
    )
    assert difference == 2 * 4 * HEADS * HEAD_DIM * 80


def test_a_slice_that_keeps_its_storage_shows_in_the_bytes():
    model = tiny_model()
    before = footprint_of(model)
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach()[:, :8])
    after = footprint_of(model)
    assert after.total_parameters < before.total_parameters
    assert after.weight_bytes == before.weight_bytes


def test_weights_on_meta_are_counted_too():
    model = tiny_model()
    assert footprint_of(tiny_model().to("meta")) == footprint_of(model)


def test_impossible_requests_are_refused():
    with pytest.raises(ConfigError, match="context_length must be at least 1"):
        footprint_of(tiny_model(), context_length=0)
    with pytest.raises(UnsupportedModelError, match="does not know"):
        footprint_of(nn.Linear(2, 2))


def test_peak_is_repeatable_and_grows_with_the_tokens():
    model = tiny_model(vocab_size=500)
    ids = torch.ones(2, 40, dtype=torch.long)
    peak = measure_peak(model, ids)
    assert peak == measure_peak(model, ids)
    assert peak.num_bytes >= 2 * 40 * 500 * 4  # the logits
    assert (peak.batch_size, peak.prompt_tokens) == (2, 40)
    assert measure_peak(model, ids[:, :20]).num_bytes < peak.num_bytes


@pytest.mark.filterwarnings("ignore")
def test_peak_on_cpu_equals_the_allocators_own_events():
    model, ids = tiny_model(vocab_size=500), torch.ones(2, 40, dtype=torch.long)
    activity = torch.profiler.ProfilerActivity.CPU
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[activity], profile_memory=True) as seen,
    ):
        model(input_ids=ids, use_cache=False)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # kernels may hold scratch space that no operator returns
    assert measure_peak(model, ids).num_bytes == pytest.approx(peak, rel=0.05)


def test_metric_logs_the_same_numbers_and_merges_by_maximum():
    model = tiny_model()
    ids = torch.ones(1, 8, dtype=torch.long)
    metric, other = Footprint(context_length=8), Footprint(context_length=8)
    metric.update(tiny_model(layers=5), peak_ids=ids)
    metric.update(model)  # replaces
    other.update(model)
    metric.to(torch.bfloat16).merge_state(other)
    cost = footprint_of(model, context_length=8)
    values = metric.compute()
    assert "peak_forward_bytes" not in values
    assert {name: int(v) for name, v in values.items()} == {n: getattr(cost, n) for n in values}
    metric.update(model, peak_ids=ids)
    assert metric.compute()["peak_forward_bytes"] == measure_peak(model, ids).num_bytes
    assert metric.state_dict() == {}


@pytest.mark.gpu
def test_peak_on_a_gpu_is_the_allocators():
    model = tiny_model(vocab_size=500).cuda()
    peak = measure_peak(model, torch.ones(2, 40, dtype=torch.long))
    assert peak.method == "cuda allocator"
    assert peak.num_bytes >= 2 * 40 * 500 * 4

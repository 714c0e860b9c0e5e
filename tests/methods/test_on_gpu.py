"""Every preset, end to end, on a CUDA device: nothing is left on the other side."""

import copy

import pytest
import torch

from lit_prune import prune, save_pruned
from lit_prune.methods import PRESETS
from tests.models import MIXTURES, padded_batch, tiny_model, tiny_rows


def batches():
    rows = tiny_rows(32, 24)
    return [padded_batch(rows[start : start + 4]) for start in range(0, 32, 4)]


def ratio_of(preset):
    return 0.25 if not {"kv_group", "channel"} & set(PRESETS[preset].granularities) else 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_prunes_a_model_where_it_is(preset, tmp_path):
    model = tiny_model(layers=8 if ratio_of(preset) == 0.25 else 4).cuda()
    options = {"preset": preset, "latency_prompt_tokens": 16, "latency_new_tokens": 2}
    report = prune(model, batches(), pruning_ratio=ratio_of(preset), **options).report
    assert abs(report.achieved_ratio - ratio_of(preset)) <= 0.005
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.int64).cuda()).logits).all()
    save_pruned(model, tmp_path / "pruned")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "allocator"),
    [
        ("llama", "joint"),
        ("llama", "uniform_widths"),
        *(
            (family, "joint")
            for family in ("phi3", "gpt2", "gpt_neox", "bloom", "cohere", "gemma2")
        ),
    ],
)
def test_in_float64_a_gpu_makes_the_plan_that_a_cpu_makes(family, allocator):
    dense = tiny_model(family).double()
    options = {"pruning_ratio": 0.3, "allocator": allocator, "latency_prompt_tokens": 0}
    here = prune(copy.deepcopy(dense), batches(), **options)
    there = prune(dense.cuda(), batches(), **options)
    assert there.plan.layers == here.plan.layers
    for place, weight in here.compensation.weights.items():
        torch.testing.assert_close(there.compensation.weights[place], weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_loses_experts_where_it_is(family, dtype, tmp_path):
    """Its experts computed as on a user's GPU: not one after the other."""
    sixteens = {"intermediate_size": 32, "moe_intermediate_size": 32}  # the kernel's alignment
    model = tiny_model(family, **{k: v for k, v in sixteens.items() if k in MIXTURES[family]})
    model.set_experts_implementation("grouped_mm")
    model = model.to("cuda", dtype)
    options = {"latency_prompt_tokens": 16, "latency_new_tokens": 2, "add_biases": False}
    ratio = 0.286 if family == "olmoe" else 0.3  # of whole experts, few ratios are near
    report = prune(model, batches(), pruning_ratio=ratio, **options).report
    assert abs(report.achieved_ratio - ratio) <= 0.005
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.int64).cuda()).logits).all()
    save_pruned(model, tmp_path / "pruned")

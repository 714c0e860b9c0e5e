"""Where a model is to be deployed is asked for up front: degrees of parallelism, no biases."""

import math

import pytest
import torch

from lit_prune.allocation import make_budget
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import ConfigError
from lit_prune.measuring import calibrate
from lit_prune.methods import PRESETS, preset
from lit_prune.planning import make_plan
from lit_prune.pruner import prune
from lit_prune.saving import save_pruned
from lit_prune.sequential import sequential_compensation
from lit_prune.surgery import masked
from tests.models import CONFIGS, batches_of, tiny_model, tiny_rows
from tests.naive import uneven_rows

ROWS = uneven_rows(24)
HALVES = [name for name, method in PRESETS.items() if "kv_group" in method.granularities]


def kept_counts(model, plan):
    for block, layer in zip(spec_for(model).blocks, plan.layers, strict=True):
        yield block.attention.queries_per_group, len(layer.kv_groups), len(layer.channels)


@pytest.mark.parametrize("name", HALVES)
def test_every_layer_can_be_spread_over_two_devices(name):
    model = tiny_model(kv_heads=4, intermediate_size=96)
    config = PruningConfig(pruning_ratio=0.3, preset=name, tensor_parallel=2)
    config = preset(name).resolve(config)
    calibration = calibrate(model, ROWS, config, progress=False)
    plan = make_plan(model, calibration, config).plan
    assert plan.provenance["achieved_ratio"] == pytest.approx(0.3, abs=0.005)
    for queries, groups, channels in kept_counts(model, plan):
        assert (groups * queries) % 2 == groups % 2 == channels % 2 == 0
    cut = [g < 4 or c < 96 for _, g, c in kept_counts(model, plan)]
    assert any(cut)


def test_kv_heads_may_be_copied_but_query_heads_not():
    """Of two KV groups with two queries each, one would leave two queries for four devices."""
    model = tiny_model(kv_heads=2, intermediate_size=96)
    budget = make_budget(spec_for(model), PruningConfig(pruning_ratio=0.3, tensor_parallel=4))
    assert budget.allowed[0, "attention"] == (0, 2)
    assert budget.channel_multiple % 4 == 0
    budget = make_budget(spec_for(model), PruningConfig(pruning_ratio=0.3, tensor_parallel=2))
    assert budget.allowed[0, "attention"] == (0, 1, 2)


def test_nearest_count_against_all_counts():
    model = tiny_model(kv_heads=4, intermediate_size=60)
    config = PruningConfig(pruning_ratio=0.3, channel_multiple=7)
    budget = make_budget(spec_for(model), config)
    for wanted in (x / 3 for x in range(200)):
        gaps = {c: abs(3 * c - 3 * wanted) for c in (*range(7, 60, 7), 60)}
        best = max(c for c, gap in gaps.items() if math.isclose(gap, min(gaps.values())))
        assert budget.nearest((0, "mlp"), wanted) == best


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": 8}, "does not divide the 2 KV groups of layer 0 attention"),
        ({"tensor_parallel": 5}, "does not divide the 2 KV groups"),
        ({"tensor_parallel": 0}, "tensor_parallel must be an integer of at least 1"),
        ({"tensor_parallel": 4, "channel_multiple": 6}, "no multiple of tensor_parallel 4"),
        ({"add_biases": False, "preset": "flap"}, "compensation 'mean' is a bias"),
        ({"add_biases": "no"}, "add_biases must be true or false"),
    ],
)
def test_what_cannot_be_is_refused_before_any_forward(options, words):
    model = tiny_model()
    with pytest.raises(ConfigError, match=words):
        prune(model, batches_of(tiny_rows(8), 4), pruning_ratio=0.3, progress=False, **options)


def biases(model):
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


@pytest.mark.parametrize("family", CONFIGS)
def test_without_biases_the_own_class_holds_it(family, tmp_path):
    model = tiny_model(family)
    before = biases(model)
    result = prune(
        model, batches_of(tiny_rows(24), 4), pruning_ratio=0.3, add_biases=False,
        allocator="uniform_widths", latency_prompt_tokens=0, progress=False,
    )  # fmt: skip
    assert biases(model) <= before
    assert result.compensation.constants == {}
    assert result.compensation.weights
    assert abs(result.report.achieved_ratio - 0.3) <= 0.005
    path = save_pruned(model, tmp_path / "saved", format="stock", verify=False)
    assert f'"model_type": "{family}"' in (path / "config.json").read_text()


def test_weights_alone_are_nearer_to_the_dense_model_than_nothing():
    model = tiny_model()
    config = PruningConfig(pruning_ratio=0.3, add_biases=False, granularities=("channel",))
    config = preset("conditional").resolve(config)
    plan = make_plan(model, calibrate(model, ROWS, config, progress=False), config).plan
    fitted = sequential_compensation(model, plan, ROWS, add_biases=False)
    assert fitted.constants == {}
    ids = torch.stack(tiny_rows(8, seed=9))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        errors = []
        for compensation in (None, fitted):
            with masked(model, plan, compensation):
                errors.append(float((model(input_ids=ids).logits - dense).square().mean()))
    assert errors[1] < errors[0]

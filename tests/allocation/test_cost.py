"""What counts cost, against a recount of really pruned models."""

import random

import numpy as np
import pytest
import torch

from lit_prune.allocation import Cost, cost_of, latency_cost, make_budget, parameter_cost
from lit_prune.config import RESOURCES, PruningConfig
from lit_prune.decoder import all_kept, spec_for
from lit_prune.errors import BudgetError, CalibrationError, ConfigError
from lit_prune.metrics import footprint_of
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import apply_plan
from tests.allocation.specs import attention, decoder, mlp
from tests.models import tiny_model

COUNTED = {
    "parameters": "decoder_parameters",
    "flops": "flops_per_token",
    "kv_cache_bytes": "kv_cache_bytes_per_token",
    "weight_bytes": "decoder_weight_bytes",
}
# The prompt of the request; the tiny models know 128 positions and 16 of them are for new tokens.
CONTEXT = 112


def request(resource, ratio=0.3, **options):
    return PruningConfig(pruning_ratio=ratio, budget=resource, **options)


def recount(model, resource):
    return getattr(footprint_of(model, context_length=CONTEXT), COUNTED[resource])


def random_plan(rng, model):
    """Some units of every layer but the first; whole sub-blocks and a whole block go, too."""
    spec, layers, counts = spec_for(model), [], {}
    for block in spec.blocks:
        kept = []
        for part in block.sub_blocks:
            count = rng.randint(0, part.num_units) if block.index else part.num_units
            counts[block.index, part.kind] = count
            kept.append(tuple(sorted(rng.sample(range(part.num_units), count))))
        layers.append(LayerPlan(block.index, *kept))
    return counts, PruningPlan(spec.fingerprint, tuple(layers))


MODELS = [
    *(("llama", heads, {}) for heads in (1, 2, 4)),
    ("qwen2", 2, {}),
    ("qwen3", 2, {}),
    ("mistral", 2, {"sliding_window": 20}),
    ("phi", 2, {}),  # a norm that both halves of a layer read
    ("qwen2", 2, {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 2}),
]


@pytest.mark.parametrize("resource", COUNTED)
@pytest.mark.parametrize(("family", "kv_heads", "options"), MODELS)
def test_costs_equal_a_recount_of_the_pruned_modules(family, kv_heads, options, resource):
    rng = random.Random(f"{family} {kv_heads} {resource}")
    model = tiny_model(family, kv_heads=kv_heads, **options)
    cost = cost_of(model, request(resource))
    assert cost.resource == resource
    assert cost.total == recount(model, resource) == cost.of(all_kept(spec_for(model)))
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family, kv_heads=kv_heads, **options).to(dtype)
        cost = cost_of(model, request(resource))
        counts, plan = random_plan(rng, model)
        apply_plan(model, plan, verify=False)
        assert cost.of(counts) == recount(model, resource)


@pytest.mark.parametrize("resource", COUNTED)
def test_a_model_that_was_pruned_before_is_counted_as_it_is(resource):
    model = tiny_model()
    _, plan = random_plan(random.Random(1), model)
    apply_plan(model, plan)
    cost = cost_of(model, request(resource))
    assert cost.total == recount(model, resource)
    counts, plan = random_plan(random.Random(2), model)
    apply_plan(model, plan)
    assert cost.of(counts) == recount(model, resource)


def test_norms_in_another_dtype_have_their_own_bytes():
    model = tiny_model().to(torch.bfloat16)
    for block in model.model.layers:
        block.input_layernorm.float()
    cost = cost_of(model, request("weight_bytes"))
    assert cost.total == recount(model, "weight_bytes")
    assert cost.bias == 32 * 2


def test_a_constant_of_an_earlier_pruning_is_not_to_be_had():
    model = tiny_model(layers=2)
    model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(32))
    spec = spec_for(model)
    cost = parameter_cost(spec)
    assert cost.total == spec.decoder_parameters
    whole = all_kept(spec)
    assert cost.of(whole | {(1, "mlp"): 0}) == spec.decoder_parameters - (3 * 32 * 48 + 32 + 32)
    assert cost.of(whole, new_biases=3) == cost.total + 3 * 32


def test_flops_are_counted_for_the_prompt_that_the_report_states():
    model = tiny_model()
    for tokens, context in ((16, 16), (500, 112), (0, 112)):
        cost = cost_of(model, request("flops", latency_prompt_tokens=tokens))
        assert cost.total == footprint_of(model, context_length=context).flops_per_token


@pytest.mark.parametrize("resource", RESOURCES)
def test_costs_never_fall_when_units_are_added(resource):
    model = tiny_model()
    table = {place: [(1, 2e-6), (n, 3e-6)] for place, n in all_kept(spec_for(model)).items()}
    cost = cost_of(model, request(resource), table)
    for costs in cost.kept.values():
        assert costs[0] == 0
        assert list(costs) == sorted(costs)


# -------------------------------------------------------------------------------------- latency

SPEC = decoder((attention(4), mlp(8)), (attention(4), mlp(8)))


def table_of(**changed):
    same = {"attention": [(1, 2e-6), (4, 5e-6)], "mlp": [(2, 1e-6), (4, 2e-6), (8, 8e-6)]}
    return {(layer, kind): (same | changed)[kind] for layer in range(2) for kind in same}


def test_measured_times_are_interpolated_in_nanoseconds():
    cost = latency_cost(SPEC, table_of())
    assert cost.kept[0, "attention"] == cost.kept[1, "attention"] == (0, 2000, 3000, 4000, 5000)
    assert cost.kept[1, "mlp"] == (0, 1000, 1000, 1500, 2000, 3500, 5000, 6500, 8000)
    assert (cost.total, cost.notes, cost.bias) == (26_000, (), 0)


def test_noise_that_lets_times_fall_is_evened_out_and_said():
    noisy = [(1, 1e-6), (2, 4e-6), (4, 2e-6), (6, 3e-6), (8, 5e-6)]
    cost = latency_cost(SPEC, table_of(mlp=noisy))
    # pool adjacent violators: 4, 2, 3 become their mean
    assert cost.kept[0, "mlp"] == (0, 1000, 3000, 3000, 3000, 3000, 3000, 4000, 5000)
    (note,) = cost.notes
    assert "2 sub-blocks fell where units were added, by up to 50 %" in note
    assert "isotonic" in note


@pytest.mark.parametrize(
    "ladder",
    [
        [],
        [1.0, 2.0],
        [(1, 2, 3)],
        [(1, 0.0), (4, 1e-6)],
        [(1, float("nan")), (4, 1e-6)],
        [(4, 1e-6), (1, 2e-6)],
        [(1, 1e-6), (1, 2e-6)],
    ],
)
def test_f38_a_table_that_is_none_is_refused_by_name(ladder):
    table = table_of()
    table[1, "mlp"] = np.array(ladder)
    with pytest.raises(CalibrationError, match="latency table of layer 1 mlp is"):
        latency_cost(SPEC, table)
    del table[1, "mlp"]
    with pytest.raises(CalibrationError, match="latency table of layer 1 mlp is"):
        latency_cost(SPEC, table)


def test_latency_without_a_table_is_refused():
    with pytest.raises(CalibrationError, match="no latency table, which budget='latency' needs"):
        cost_of(tiny_model(), request("latency"))
    with pytest.raises(ConfigError, match="budget 'latency' needs a prompt to measure, got"):
        request("latency", latency_prompt_tokens=0)


# ------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("resource", RESOURCES)
def test_an_unreachable_ratio_names_quantity_and_nearest(resource):
    model = tiny_model(kv_heads=4)
    table = {place: [(1, 1e-6), (n, 2e-6)] for place, n in all_kept(spec_for(model)).items()}
    config = request(resource, 0.37, granularities=("block",), compensation="none")
    with pytest.raises(BudgetError) as error:
        make_budget(spec_for(model), config, cost_of(model, config, table))
    for words in (f"0.37 of the {RESOURCES[resource]} cannot be", "nearest are 0.2", "and 0.5"):
        assert words in str(error.value)


def test_what_the_granularities_do_not_touch_cannot_be_budgeted():
    model = tiny_model()
    config = request("kv_cache_bytes", granularities=("channel",))
    with pytest.raises(BudgetError, match=r"KV-cache bytes per token .* lie in \[0, 0\.0000\]"):
        make_budget(spec_for(model), config, cost_of(model, config))
    spec = decoder((None, mlp(8)))
    nothing = Cost(resource="kv_cache_bytes", kept={(0, "mlp"): (0,) * 9})
    with pytest.raises(BudgetError, match="the model has no KV-cache bytes per token"):
        make_budget(spec, request("kv_cache_bytes"), nothing)


def test_a_cost_of_another_resource_is_refused():
    with pytest.raises(ConfigError, match="budget is 'flops', the cost is of 'parameters'"):
        make_budget(SPEC, request("flops"))


def test_the_multiple_follows_the_step_of_the_resource():
    model = tiny_model(layers=8, intermediate_size=512, kv_heads=2)
    spec = spec_for(model)

    def multiple(resource):
        config = request(resource, 0.25)
        table = {place: [(1, 1e-9), (n, 5e-6)] for place, n in all_kept(spec).items()}
        return make_budget(spec, config, cost_of(model, config, table)).channel_multiple

    # 8 layers of about 60,000: 0.5 % are 25 channels
    assert multiple("parameters") == multiple("weight_bytes") == multiple("flops") == 16
    assert multiple("kv_cache_bytes") == 64  # channels cost nothing
    assert multiple("latency") == 32  # half of the time is the attentions'

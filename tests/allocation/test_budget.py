import pytest

from lit_prune.allocation import exact, make_budget
from lit_prune.allocation.exact import ReachableTotals
from lit_prune.config import RATIO_TOLERANCE, PruningConfig
from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError, ConfigError
from tests.allocation.specs import (
    attention,
    decoder,
    mlp,
    naive_counts,
    plain_budget,
    small_case,
)

SPEC = decoder(*[(attention(), mlp())] * 3)


@pytest.mark.parametrize("seed", range(80))
def test_f02_a_ratio_is_refused_exactly_when_no_combination_meets_it(seed):
    budget = small_case(seed)
    spec, config = budget.spec, budget.config
    dense = all_kept(spec)
    every = [
        counts
        for counts in naive_counts(spec, config, budget.channel_multiple)
        if budget.removed(counts) > 0
    ]
    possible = any(budget.met_by(counts) for counts in every)
    most = max([0, *(budget.removed(counts) for counts in every)]) / spec.decoder_parameters
    if possible:
        found = make_budget(spec, config)
        assert found.allowed == budget.allowed
        return
    with pytest.raises(BudgetError, match="cannot be reached within") as error:
        make_budget(spec, config)
    assert f"lie in [0, {most:.4f}]" in str(error.value)
    deviations = sorted(abs(budget.deficit(c)) for c in every if c != dense)
    if deviations:
        named = str(error.value).split("the nearest are ")[1].split(". Allow")[0].split(" and ")
        nearest = min(abs(float(x) - config.pruning_ratio) for x in named)
        assert nearest == pytest.approx(deviations[0] / spec.decoder_parameters, abs=6e-5)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("seed", range(80, 120))
def test_every_reachable_total_is_reached_by_its_counts(seed, parallel):
    budget = small_case(seed, parallel=parallel)
    totals = ReachableTotals(budget)
    wanted = {
        budget.removed(c) for c in naive_counts(budget.spec, budget.config, budget.channel_multiple)
    }
    wanted = {total for total in wanted if total > 0}
    for total in wanted:
        assert totals.nearest(total) == (total, total)
        assert budget.removed(totals.counts(total, all_kept(budget.spec))) == total
    for target in range(1, budget.spec.decoder_parameters, 97):
        below, above = totals.nearest(target)
        assert below == max((t for t in wanted if t <= target), default=None)
        assert above == min((t for t in wanted if t >= target), default=None)


def test_large_models_are_rounded_but_met(monkeypatch):
    monkeypatch.setattr(exact, "_MOST_BIT_OPERATIONS", 0)
    spec = decoder(*[(attention(8, unit=30_011), mlp(64, unit=12_007))] * 6, hidden=64)
    for kinds in (("sub_block", "kv_group"), ("kv_group", "channel"), ("channel",)):
        budget = plain_budget(
            spec, PruningConfig(pruning_ratio=0.3, granularities=kinds, channel_multiple=4)
        )
        totals = ReachableTotals(budget)
        assert totals._unit == spec.decoder_parameters // 20_000
        below, above = totals.nearest(budget.target)
        counts = totals.counts(above or below, all_kept(spec))
        assert budget.met_by(counts)
        assert abs(budget.removed(counts) - (above or below)) < 0.001 * spec.decoder_parameters


def test_wishes_are_kept_where_the_total_allows():
    budget = plain_budget(SPEC, PruningConfig(pruning_ratio=0.3, channel_multiple=1))
    wished = all_kept(SPEC) | {(2, "mlp"): 3, (1, "attention"): 1}
    totals = ReachableTotals(budget)
    found = totals.counts(budget.removed(wished), wished)
    assert budget.removed(found) == budget.removed(wished)
    assert found[2, "mlp"] == 3


def test_f02_the_binding_constraints_are_named():
    with pytest.raises(BudgetError) as error:
        make_budget(
            SPEC,
            PruningConfig(
                pruning_ratio=0.9,
                granularities=["channel"],
                channel_multiple=4,
                protected_layers=[1],
            ),
        )
    for words in (
        "pruning_ratio 0.9",
        "granularities ['channel']",
        "channel_multiple 4",
        "min_kv_groups 1",
        "1 protected layer",
        "the reachable ratios lie in [0, ",
        "the nearest are ",
    ):
        assert words in str(error.value)


def test_f02_rounding_to_nothing_is_refused_and_zero_is_a_legal_no_op():
    with pytest.raises(BudgetError, match="cannot be reached"):
        make_budget(SPEC, PruningConfig(pruning_ratio=0.004, granularities=["block"]))
    assert make_budget(SPEC, PruningConfig(pruning_ratio=0)).target == 0
    assert make_budget(SPEC, PruningConfig(pruning_ratio=0, protected_layers=[0, 1, 2])).target == 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [-1],
            r"protected_layers has -1, the model's layers are 0 … 2; for the last layer write 2",
        ),
        ([0, 99], r"protected_layers has 99, the model's layers are 0 … 2\."),
        ([0, 1, 2], r"protects all 3 layers: nothing could be removed"),
    ],
)
def test_f04_layers_that_do_not_exist_or_leave_nothing(layers, message):
    with pytest.raises(ConfigError, match=message):
        make_budget(SPEC, PruningConfig(pruning_ratio=0.3, protected_layers=layers))


def test_f05_the_price_of_the_biases_is_counted():
    budget = plain_budget(SPEC, PruningConfig(pruning_ratio=0.3, channel_multiple=1))
    counts = all_kept(SPEC) | {(1, "mlp"): 4}
    assert budget.removed(counts) == 4 * 48 - 16  # one new bias of 16
    counts[2, "attention"] = 0  # its mean goes into the bias that is there already
    assert budget.removed(counts) == 4 * 48 - 16 + 2 * 120 + 16
    counts = all_kept(SPEC) | {(0, "attention"): 0}  # nothing before it: a shell keeps the constant
    assert budget.removed(counts) == 2 * 120 + 16 - 16
    with_bias = decoder((attention(bias=True), mlp(bias=True)))
    budget = plain_budget(with_bias, PruningConfig(pruning_ratio=0.3, channel_multiple=1))
    assert budget.removed(all_kept(with_bias) | {(0, "mlp"): 4}) == 4 * 48


def test_the_multiple_is_hardware_friendly_where_the_model_allows():
    real = decoder(*[(attention(32, unit=2**21), mlp(11008, unit=12288))] * 32, hidden=4096)
    assert make_budget(real, PruningConfig(pruning_ratio=0.3)).channel_multiple == 64
    # an equal share everywhere moves all layers at once: a coarser step
    uniform = PruningConfig(pruning_ratio=0.3, allocator="uniform")
    assert make_budget(real, uniform).channel_multiple == 64
    small = decoder(*[(attention(4, unit=4096), mlp(688, unit=768))] * 10, hidden=256)
    assert make_budget(small, PruningConfig(pruning_ratio=0.3)).channel_multiple < 64
    assert (
        make_budget(small, PruningConfig(pruning_ratio=0.3, channel_multiple=8)).channel_multiple
        == 8
    )


def test_the_tolerance_is_half_a_percentage_point():
    assert RATIO_TOLERANCE == 0.005

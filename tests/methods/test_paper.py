"""The preset's stages, and that every switch of the method changes a plan or cannot."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_prune.allocation import Ranking, make_budget
from lit_prune.calibration import Row, RowSet, Unit, replay
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import BudgetError, CalibrationError, ConfigError
from lit_prune.measuring import calibrate
from lit_prune.methods import Case, Scores, llm_pruner, preset
from lit_prune.methods.paper import distribute
from lit_prune.methods.paper_scores import paper_scores
from lit_prune.planning import make_plan
from tests.allocation.specs import random_decoder, random_request
from tests.models import tiny_model, tiny_rows
from tests.naive import captured, deleted


@pytest.fixture(scope="module")
def model():
    """Blocks of unequal weight in the residual stream, so that the method has something to see."""
    model = tiny_model(layers=6, kv_heads=4, intermediate_size=96)
    scales = (1.0, 0.6, 0.3, 0.15, 0.4, 0.8)
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, scales, strict=True):
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


@pytest.fixture(scope="module")
def rows():
    return RowSet.of(map(Row.of, tiny_rows(40, uneven=True)))


@pytest.fixture(scope="module")
def calibration(model, rows):
    """Covariances and gradients: every estimator and score can be asked of this calibration."""
    config = PruningConfig(
        preset="paper", pruning_ratio=0.3, estimator="logdet", unit_score="gradient"
    )
    return calibrate(model, rows, config, progress=False)


@pytest.fixture(scope="module")
def plan(model, calibration):
    """A plan for a ratio and options; made once."""
    made = {}

    def plan_of(ratio=0.3, calibration=calibration, **options):
        key = (ratio, id(calibration), str(options))
        if key not in made:
            config = PruningConfig(preset="paper", pruning_ratio=ratio, **options)
            made[key] = make_plan(model, calibration, config).plan
        return made[key]

    return plan_of


def test_the_trace_tells_every_stage(plan):
    trace = plan().provenance["method"]
    assert trace["num_clusters"] == 3
    assert len(trace["block_ratios"]) == 6
    assert 0 < trace["removed_by_clusters"] < 0.3
    assert trace["remaining_ratio"] == pytest.approx(0.3 - trace["removed_by_clusters"])
    (search,) = trace["searches"]
    assert search["optimal"]
    assert search["cost"] > 0
    assert search["chosen"]


def test_lower_transfer_entropy_means_a_larger_ratio(model, calibration):
    planned = make_plan(model, calibration, PruningConfig(preset="paper", pruning_ratio=0.3))
    ratios = planned.plan.provenance["method"]["block_ratios"]
    entropies = [planned.scores.transfer[Unit(layer, "block")] for layer in range(6)]
    assert np.argsort(ratios).tolist() == np.argsort(entropies)[::-1].tolist()


def test_a_block_never_loses_more_units_to_clusters_than_its_ratio(model, calibration):
    config = PruningConfig(
        preset="paper", pruning_ratio=0.3, channel_multiple=1, search_tolerance=1e9
    )
    budget = make_budget(spec_for(model), config)
    for layer, block in enumerate(make_plan(model, calibration, config).plan.layers):
        assert len(block.channels) <= 96
        assert layer < len(budget.spec.blocks)
    free = make_plan(model, calibration, replace(config, cap_clusters=False))
    capped = make_plan(model, calibration, config)
    removed = [p.plan.provenance["method"]["removed_by_clusters"] for p in (capped, free)]
    assert removed[0] < removed[1]


def case_of(model, calibration, config):
    config = preset(config.preset).resolve(config)
    budget = make_budget(spec_for(model), config)
    return Case(model=model, calibration=calibration, budget=budget, judge=None, diverges=None)


COARSE = {"granularities": ("block", "sub_block", "kv_group")}
WIDTH = {"granularities": ("kv_group", "channel")}
# The switch, and what else is asked of both plans.
SWITCHES = [
    ({"allocator": "greedy"}, COARSE),
    ({"allocator": "uniform"}, {}),
    ({"estimator": "std_sum"}, {}),
    ({"estimator": "logdet"}, {}),
    ({"entropy_floor": 0.5}, {}),
    ({"ratio_map": "inverse"}, {}),
    ({"ratio_map": "rank"}, {}),
    ({"ratio_map": "zscore"}, {}),
    ({"ratio_temperature": 0.3}, {}),
    ({"ratio_strength": 0.95}, {"ratio_map": "rank"}),
    ({"ratio_strength": 0.95}, {"ratio_map": "zscore"}),
    ({"num_clusters": 6}, {}),
    ({"num_clusters": 2}, {}),
    ({"clustering": "mean_threshold"}, {"cap_clusters": False}),
    ({"unit_score": "activation"}, {}),
    ({"unit_score": "gradient"}, {}),
    ({"sensitivity": "frobenius"}, {}),
    ({"cap_clusters": False}, {}),
    ({"stage_order": "coarse_first"}, {"ratio_temperature": 0.3}),
    ({"exact_hit": "cluster"}, WIDTH),
    ({"search_tolerance": 0.2}, {}),
    ({"min_kv_groups": 3}, COARSE),
    ({"channel_multiple": 16}, {}),
    ({"protected_layers": (3,)}, {}),
    ({"granularities": ("channel",)}, {}),
    ({"granularities": ("block", "channel")}, {}),
    (WIDTH, {}),
    ({"compensation": "none"}, {}),
]


@pytest.mark.parametrize(("switch", "besides"), SWITCHES, ids=[str(s) for s, _ in SWITCHES])
def test_every_switch_changes_the_plan(plan, switch, besides):
    """A switch that never changes anything should not exist."""
    changed = False
    for ratio in (0.3, 0.5, 0.2, 0.15):
        if changed:
            break
        try:
            base, other = plan(ratio, **besides), plan(ratio, **besides, **switch)
        except BudgetError:  # the coarse ones do not reach every ratio
            continue
        assert other.provenance["achieved_ratio"] == pytest.approx(ratio, abs=0.005)
        changed = other.digest != base.digest
    assert changed


def test_what_cannot_change_the_plan_is_equal(plan):
    """Exact clusters are those of K-means on these entropies."""
    assert plan(clustering="exact").digest == plan().digest
    assert plan(seed=5).digest == plan().digest
    assert plan(node_limit=10**7).digest == plan().digest
    assert plan(removed_mean="drop").provenance["config"]["removed_mean"] == "drop"
    for key in ("latency_new_tokens", "replay_batch_tokens"):
        assert plan(**{key: 7}).digest == plan().digest


def test_kv_group_score_sum_or_mean_ranks_alike_but_scales(model, calibration):
    scores = [
        make_plan(
            model, calibration, PruningConfig(preset="paper", pruning_ratio=0.3, kv_group_score=how)
        ).scores
        for how in ("sum", "mean")
    ]
    for layer in range(6):
        total, mean = (s.units[layer, "attention"] for s in scores)
        assert torch.allclose(total, mean * 8)


def test_exact_clusters_and_kmeans_differ_only_where_kmeans_misses_the_optimum():
    from lit_prune.allocation import cluster_ladder

    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 60))
    for row in values:
        ladders = [cluster_ladder(row, 4, method=m) for m in ("kmeans", "exact")]

        def cost(ladder, row=row):
            return sum(((row[list(c)] - row[list(c)].mean()) ** 2).sum() for c in ladder)

        assert cost(ladders[1]) <= cost(ladders[0]) + 1e-9


def test_transfer_target_changes_the_entropies(model, rows):
    found = [
        calibrate(
            model,
            rows,
            PruningConfig(preset="paper", pruning_ratio=0.3, transfer_target=target),
            progress=False,
        )
        for target in ("after_norm", "before_norm")
    ]
    assert found[0].target != found[1].target
    assert not torch.allclose(found[0].full, found[1].full, rtol=0.01)


def test_changed_transfer_entropy_changes_the_plan(plan, calibration):
    """The same units under another block's transfer entropy: other blocks go."""
    order = [3, 4, 5, 0, 1, 2]
    permuted = {
        unit: calibration.bypassed[Unit(order[unit.layer], unit.kind)]
        for unit in calibration.bypassed
    }
    other = plan(calibration=replace(calibration, bypassed=permuted))
    assert other.digest != plan().digest
    first, second = (p.provenance["method"]["searches"][0]["chosen"] for p in (plan(), other))
    assert first != second


def test_a_block_that_is_scaled_to_nothing_goes_first(rows):
    model = tiny_model(layers=6, kv_heads=4, intermediate_size=96)
    dead = 4
    with torch.no_grad():
        model.model.layers[dead].self_attn.o_proj.weight.mul_(1e-4)
        model.model.layers[dead].mlp.down_proj.weight.mul_(1e-4)
    config = PruningConfig(preset="paper", pruning_ratio=0.3)
    planned = make_plan(model, calibrate(model, rows, config, progress=False), config)
    assert min(planned.scores.transfer, key=planned.scores.transfer.get).layer == dead
    chosen = planned.plan.provenance["method"]["searches"][0]["chosen"]
    assert chosen
    assert all(name.startswith(f"layer {dead}") for name in chosen)


def test_between_k_3_and_k_6_the_better_on_choose_text(model, calibration, plan):
    trace = plan(0.4).provenance["method"]
    nll = trace["mean_nll_on_choose_text_by_num_clusters"]
    drafts = {k: plan(0.4, num_clusters=int(k)) for k in nll}
    assert set(nll) == {"3", "6"}
    assert drafts["3"].digest != drafts["6"].digest
    best = min(nll, key=nll.get)
    assert trace["num_clusters"] == int(best)
    assert plan(0.4).digest == drafts[best].digest
    for ratio, clusters in ((0.35, 3), (0.45, 6), (0.2, 3), (0.6, 6)):
        assert plan(ratio).provenance["method"]["num_clusters"] == clusters


def test_the_judge_is_asked_about_both_and_believed(model, calibration):
    config = PruningConfig(preset="paper", pruning_ratio=0.4)
    budget = make_budget(spec_for(model), config)
    planned = make_plan(model, calibration, config)
    ranking = Ranking(
        {k: v.numpy() for k, v in planned.scores.units.items()},
        {(i, p.kind): p.unit_width for i, p in budget.spec.sub_blocks},
    )
    for answers, clusters in (((1.0, 2.0), 3), ((2.0, 1.0), 6), ((1.0, 1.0), 3)):
        answer, asked = iter(answers), []

        def judge(kept, answer=answer, asked=asked):
            asked.append({place: len(units) for place, units in kept.items()})
            return next(answer)

        decision = distribute(budget, planned.scores, ranking, judge)
        assert decision.trace["num_clusters"] == clusters
        assert decision.counts == asked[0 if clusters == 3 else 1]


def test_uniform_needs_no_transfer_entropy_and_cuts_every_layer_alike(model, rows):
    config = PruningConfig(preset="paper", pruning_ratio=0.3, allocator="uniform")
    calibration = calibrate(model, rows, config, progress=False)
    assert calibration.bypassed is None
    layers = make_plan(model, calibration, config).plan.layers
    assert len({len(layer.channels) for layer in layers}) == 1
    assert len({len(layer.kv_groups) for layer in layers}) == 1


def test_activation_magnitude_is_the_root_mean_square_of_what_passed(model, rows, calibration):
    config = PruningConfig(preset="paper", pruning_ratio=0.3, unit_score="activation")
    found = paper_scores(case_of(model, calibration, config)).units
    for place, x in captured(model, rows)["writes"].items():
        wanted = x.square().mean(0).sqrt().log().reshape(len(found[place]), -1).sum(1)
        torch.testing.assert_close(found[place], wanted, rtol=0, atol=1e-4)


def test_gradient_magnitude_ranks_as_the_taylor_scores_do(model, calibration):
    for reduction in ("sum", "mean"):
        config = PruningConfig(
            preset="paper", pruning_ratio=0.3, unit_score="gradient", kv_group_score=reduction
        )
        case = case_of(model, calibration, config)
        found = paper_scores(case).units
        raw = llm_pruner.score(case)
        for place, scores in found.items():
            assert scores.argsort().tolist() == raw[place].argsort().tolist()
        # ratios between units become differences, for each column that a unit owns
        width = case.spec.blocks[0].attention.unit_width
        attention = found[0, "attention"] / (width if reduction == "sum" else 1)
        ratio = raw[0, "attention"][0] / width / raw[0, "mlp"][0]
        assert attention[0] - found[0, "mlp"][0] == pytest.approx(float(ratio.log()), abs=1e-4)


def test_frobenius_is_what_the_final_state_changes_by(model, rows, calibration):
    config = PruningConfig(preset="paper", pruning_ratio=0.3, sensitivity="frobenius")
    found = paper_scores(case_of(model, calibration, config)).transfer
    assert found.keys() == calibration.bypassed.keys()

    @torch.no_grad()
    def states():
        runs = [model.model(row.ids[None], use_cache=False)[0][0] for row in rows.side("calibrate")]
        return torch.cat(runs).double()

    whole = states()
    for unit in (Unit(1, "attention"), Unit(3, "mlp"), Unit(2, "block")):
        kinds = ("attention", "mlp") if unit.kind == "block" else (unit.kind,)
        with deleted(model, *((unit.layer, kind) for kind in kinds)):
            change = (states() - whole).square().sum(1).mean().sqrt()
        assert found[unit] == pytest.approx(float(change), rel=1e-4)


def test_the_choices_of_the_rebuttal_are_recorded(plan):
    options = {"unit_score": "activation", "sensitivity": "frobenius"}
    made = plan(clustering="mean_threshold", **options)
    assert made.provenance["config"].items() >= options.items()
    assert made.provenance["config"]["clustering"] == "mean_threshold"
    assert made.provenance["method"].items() >= options.items()
    own = {"unit_score": "entropy", "sensitivity": "transfer_entropy"}
    assert plan().provenance["method"].items() >= own.items()


def test_a_threshold_at_the_mean_removes_what_lies_below_it(model, calibration):
    config = PruningConfig(
        preset="paper", pruning_ratio=0.4, clustering="mean_threshold", cap_clusters=False,
        channel_multiple=1,
    )  # fmt: skip
    planned = make_plan(model, calibration, config)
    below = 0
    for (_, kind), entropy in planned.scores.units.items():
        part = planned.budget.spec.blocks[0].mlp if kind == "mlp" else None
        part = part or planned.budget.spec.blocks[0].attention
        cut = int((entropy < entropy.mean()).sum())
        below += cut * part.unit_parameters
    removed = planned.plan.provenance["method"]["removed_by_clusters"]
    # biases that stand in for the cut units count against it
    assert removed == pytest.approx(below / planned.budget.spec.decoder_parameters, abs=0.02)


def test_units_that_are_all_alike_lose_none_to_clusters():
    spec = random_decoder(random.Random(1), most_layers=4, channels=(24,))
    for clustering in ("exact", "mean_threshold"):
        config = PruningConfig(
            preset="paper", pruning_ratio=0.3, cap_clusters=False, clustering=clustering,
            channel_multiple=1,
        )  # fmt: skip
        budget = make_budget(spec, preset("paper").resolve(config))
        alike = {(i, p.kind): torch.ones(p.num_units).double() for i, p in spec.sub_blocks}
        kinds = ("block", "attention", "mlp")
        transfer = {Unit(b.index, kind): 1.0 for b in spec.blocks for kind in kinds}
        ranking = Ranking({k: v.numpy() for k, v in alike.items()}, dict.fromkeys(alike, 1))
        decision = distribute(budget, Scores(alike, transfer), ranking, lambda _kept: 0.0)
        assert decision.trace["removed_by_clusters"] == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "paper",
            {"unit_score": "random"},
            r"'paper' knows unit_score \['entropy', 'act.*'random'",
        ),
        ("paper", {"sensitivity": "kl"}, r"'paper' knows sensitivity \['transfer_entropy', .*'kl'"),
        ("conditional", {"unit_score": "gradient"}, "'conditional' knows unit_score .*'gradient'"),
        ("flap", {"unit_score": "entropy"}, "preset 'flap' does not read unit_score"),
        ("flap", {"sensitivity": "kl"}, "preset 'flap' does not read sensitivity"),
    ],
)
def test_what_another_preset_knows_is_refused(name, options, message):
    config = PruningConfig(preset=name, pruning_ratio=0.3, **options)
    with pytest.raises(ConfigError, match=message):
        preset(name).resolve(config)


def test_a_calibration_without_the_changes_is_refused(model, calibration):
    config = PruningConfig(preset="paper", pruning_ratio=0.3, sensitivity="frobenius")
    with pytest.raises(CalibrationError, match="calibration has no changes, which preset 'paper'"):
        make_plan(model, replace(calibration, changes=None), config)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="preset 'papper' is not known; did you mean 'paper'"):
        preset("papper")


def decide_with_random_scores(spec, config, seed):
    rng = random.Random(seed)
    budget = make_budget(spec, config)
    generator = np.random.default_rng(seed)
    units = {
        (i, p.kind): torch.from_numpy(generator.normal(size=p.num_units))
        for i, p in spec.sub_blocks
    }
    transfer = {}
    for block in spec.blocks:
        for kind in ("block", *(part.kind for part in block.sub_blocks)):
            transfer[Unit(block.index, kind)] = rng.random()
    ranking = Ranking(
        {k: v.numpy() for k, v in units.items()},
        {(i, p.kind): p.unit_width for i, p in spec.sub_blocks},
    )
    return budget, distribute(budget, Scores(units, transfer), ranking, lambda _kept: rng.random())


METHOD = {
    "allocator": ("depth_first", "greedy", "uniform"),
    "ratio_map": ("softmax", "inverse", "rank", "zscore"),
    "num_clusters": (None, 2, 6),
    "cap_clusters": (True, False),
    "stage_order": ("fine_first", "coarse_first"),
    "exact_hit": ("units", "cluster"),
    "ratio_temperature": (0.1, 1.0),
}


GRID = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 3000)]


@pytest.mark.parametrize("seed", [*range(100), *GRID])
def test_f02_f05_the_ratio_is_met_or_refused_before_any_score(seed):
    """`make_budget` sees no score: what it lets through, every method must meet."""
    rng = random.Random(seed)
    parallel = seed % 4 == 3
    spec = random_decoder(rng, most_layers=6, channels=(1, 7, 24, 48, 100), parallel=parallel)
    options = {name: rng.choice(values) for name, values in METHOD.items()}
    config = random_request(rng, spec, clustering="exact", **options)
    try:
        make_budget(spec, config)
    except BudgetError:
        return
    budget, decision = decide_with_random_scores(spec, config, seed)
    assert budget.met_by(decision.counts)
    assert all(decision.counts[place] in allowed for place, allowed in budget.allowed.items())
    assert any(count for (_, kind), count in decision.counts.items() if kind == "attention")


def test_f24_the_node_limit_is_recorded():
    spec = spec_for(tiny_model(layers=12, kv_heads=4))
    cut = 0
    for seed in range(10):
        traces = []
        for node_limit in (1, 10**6):
            config = PruningConfig(
                preset="paper", pruning_ratio=0.5, node_limit=node_limit, **COARSE
            )
            _, decision = decide_with_random_scores(spec, config, seed)
            traces.append(decision.trace["searches"])
        assert all(search["optimal"] for search in traces[1])
        for search in traces[0]:
            assert search["bound"] <= search["cost"]
            cut += not search["optimal"]
    assert cut


def test_f19_one_unit_layers_and_equal_scores():
    rng = random.Random(1)
    spec = random_decoder(rng, most_layers=4, channels=(1,))
    for seed in range(10):
        try:
            budget, decision = decide_with_random_scores(
                spec, PruningConfig(preset="paper", pruning_ratio=0.4), seed
            )
        except BudgetError:
            continue
        assert budget.met_by(decision.counts)


def test_replayed_scores_are_finite_for_dead_channels(rows):
    model = tiny_model(layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5:9] = 0
        model.model.layers[2].self_attn.v_proj.weight[:8] = 0
    config = PruningConfig(preset="paper", pruning_ratio=0.2, channel_multiple=1, **WIDTH)
    calibration = calibrate(model, rows, config, progress=False)
    planned = make_plan(model, calibration, config)
    assert all(torch.isfinite(scores).all() for scores in planned.scores.units.values())
    assert set(range(5, 9)).isdisjoint(planned.plan.layers[1].channels)
    assert replay(model, rows).units[1, "mlp"][1][5] == 0

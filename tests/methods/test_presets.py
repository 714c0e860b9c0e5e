"""What every preset owes, and what each of them removes, distributes and compensates by default."""

import inspect
from typing import get_args, get_type_hints

import pytest

from lit_prune import EntropyPruningCallback
from lit_prune.allocation import make_budget
from lit_prune.calibration import Calibration
from lit_prune.config import Granularity, PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import BudgetError, CalibrationError, ConfigError
from lit_prune.measuring import calibrate
from lit_prune.methods import PRESETS, preset
from lit_prune.methods.decision import METHOD_OPTIONS
from lit_prune.planning import make_plan
from lit_prune.pruner import prune
from tests.lightning.modules import LM, loader, pruner, trainer
from tests.models import batches_of, tiny_model, tiny_rows
from tests.naive import uneven_rows
from tests.state import counted_forwards, recount, unchanged

ROWS = tiny_rows(24, 16, seed=4, uneven=True)
EVERYTHING = ("block", "sub_block", "kv_group", "channel", "expert")
UNITS = ("kv_group", "channel")
WITH_EXPERTS = (*UNITS, "expert")
# As the papers have it: allocator, compensation, what may leave.
PUBLISHED = {
    "paper": ("depth_first", "mean", EVERYTHING),
    "conditional": ("joint", "sequential", EVERYTHING),
    "flap": ("global", "mean", WITH_EXPERTS),
    "flap_ls": ("global", "least_squares", WITH_EXPERTS),
    "wanda": ("uniform", "none", UNITS),
    "wanda_ls": ("uniform", "least_squares", UNITS),
    "owl": ("global", "none", UNITS),
    "llm_pruner": ("uniform", "none", UNITS),
    "two_ssp": ("greedy", "none", ("sub_block", "channel")),
    "sleb": ("greedy", "none", ("block",)),
    "blockpruner": ("greedy", "none", ("sub_block",)),
    "shortgpt": ("greedy", "none", ("block",)),
    "layerdrop": ("greedy", "none", ("block",)),
    "dsa": ("global", "none", UNITS),
    "osscar": ("uniform", "least_squares", UNITS),
    "slimgpt": ("global", "least_squares", UNITS),
    "saap": ("global", "none", UNITS),
    "multipruner": ("greedy", "none", ("sub_block", "kv_group", "channel")),
    "magnitude": ("uniform", "none", WITH_EXPERTS),
    "random": ("uniform", "none", WITH_EXPERTS),
}
ALLOCATORS = {
    name
    for literal in get_args(get_type_hints(PruningConfig)["allocator"])
    for name in get_args(literal)
}
OPTIONS = {"latency_prompt_tokens": 0, "channel_multiple": 1}
# One of four blocks: what removes whole blocks can meet it too.
RATIO, LAYERS, CHANNELS = 0.25, 4, 96


def dense(kv_heads=2):
    return tiny_model(layers=LAYERS, kv_heads=kv_heads, intermediate_size=CHANNELS)


# Digests that a test has made; another one need not make them again.
PLANS = {}


def plan_of(name):
    """Digest of the plan that `prune` makes."""
    if name not in PLANS:
        PLANS[name] = run(dense(), name, dry_run=True).plan.digest
    return PLANS[name]


def whole(layer):
    return (len(layer.kv_groups), len(layer.channels)) == (2, CHANNELS)


def run(model, name, ratio=RATIO, rows=ROWS, **options):
    batches = batches_of(rows, 7)
    return prune(
        model, batches, pruning_ratio=ratio, preset=name, progress=False, **OPTIONS, **options
    )


def planned(name, ratio=RATIO, *, kv_heads=2, **options):
    """A plan alone: nothing is measured for a report."""
    model = dense(kv_heads)
    config = PruningConfig(pruning_ratio=ratio, preset=name, channel_multiple=1, **options)
    config = preset(name).resolve(config)
    calibration = calibrate(model, uneven_rows(16), config, progress=False)
    return make_plan(model, calibration, config).plan


def test_every_preset_is_listed_here():
    assert set(PRESETS) == set(PUBLISHED)
    assert all(method.name == name for name, method in PRESETS.items())
    assert len({method.source for method in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ratio_is_met(name):
    model = dense(kv_heads=4)
    before = recount(model)["decoder"]
    result = run(model, name)
    achieved = 1 - recount(model)["decoder"] / before
    assert abs(achieved - RATIO) <= 0.005
    assert result.report.achieved_ratio == pytest.approx(achieved)
    assert result.plan.provenance["achieved_ratio"] == pytest.approx(achieved)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ratio_is_met_with_one_kv_head(name):
    """Attentions have nothing to lose but themselves."""
    plan = planned(name, kv_heads=1)
    weights = {"attention": 32 * 32 * 2 + 32 * 8 * 2 + 32, "mlp": 96 * CHANNELS + 32}
    gone = sum(weights["attention"] for layer in plan.layers if not layer.kv_groups)
    gone += sum(96 * (CHANNELS - len(layer.channels)) for layer in plan.layers)
    gone += sum(32 for layer in plan.layers if not layer.channels)
    constants = 0.003 if PUBLISHED[name][1] != "none" else 1e-9  # biases that compensation adds
    assert gone / (LAYERS * sum(weights.values())) == pytest.approx(
        plan.provenance["achieved_ratio"], abs=LAYERS * constants
    )
    assert plan.provenance["achieved_ratio"] == pytest.approx(RATIO, abs=0.005)


def check_record(name, result):
    """The plan says how it was made: the request as the preset resolves it."""
    allocator, compensation, granularities = PUBLISHED[name]
    provenance = result.plan.provenance
    config = provenance["config"]
    assert config["preset"] == name
    assert config["allocator"] == allocator
    assert config["compensation"] == compensation
    assert tuple(config["granularities"]) == granularities
    assert provenance["source"] == PRESETS[name].source
    assert result.report.config == config
    assert (result.compensation is None) == (compensation == "none")
    if compensation == "mean":
        assert not result.compensation.weights
        assert result.compensation.constants


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dry_run_changes_nothing_and_plans_the_same_again(name):
    """Deterministic: in another order, padded otherwise, on a twin of the model."""
    model = dense()
    with unchanged(model):
        result = run(model, name, dry_run=True)
    PLANS[name] = result.plan.digest
    assert result.report.dry_run
    check_record(name, result)
    again = prune(
        dense(),
        batches_of(ROWS[::-1], 4, side="left", extra=3),
        pruning_ratio=RATIO,
        preset=name,
        progress=False,
        dry_run=True,
        **OPTIONS,
    )
    assert again.plan.digest == result.plan.digest


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_runs_in_a_trainer(name, tmp_path):
    """Registry, `prune` and callback give the same plan."""
    callback = pruner(RATIO, preset=name, when="validate", channel_multiple=1)
    module = LM(dense())
    before = recount(module.lm)["decoder"]
    trainer(tmp_path, callback).validate(module, loader(ROWS), verbose=False)
    assert abs(1 - recount(module.lm)["decoder"] / before - RATIO) <= 0.005
    assert callback.report_.preset == name
    assert callback.report_.config["compensation"] == PUBLISHED[name][1]
    assert not any(p.is_inference() for p in module.parameters())
    assert callback.plan_.digest == plan_of(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_to_remove_removes_nothing(name):
    assert all(whole(layer) for layer in planned(name, 0.0).layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_protected_layer_stays_whole(name):
    plan = planned(name, protected_layers=(2,))
    assert whole(plan.layers[2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_cannot_be_reached_is_refused_before_any_forward(name):
    """Each by a ratio beyond what its granularities can do; what can be reached is named."""
    model = dense()
    with (
        unchanged(model),
        counted_forwards(model) as forwards,
        pytest.raises(BudgetError, match=r"cannot be reached .* reachable ratios lie in \[0, 0\."),
    ):
        run(model, name, ratio=0.995)
    assert forwards == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_allocator_that_a_preset_does_not_know_is_refused_by_name(name):
    known = PRESETS[name].allocators
    assert set(known) <= ALLOCATORS
    for allocator in ALLOCATORS - set(known):
        message = rf"preset '{name}' knows the allocators \['{known[0]}'.*got '{allocator}'"
        with pytest.raises(ConfigError, match=message):
            prune(None, pruning_ratio=RATIO, preset=name, allocator=allocator)
        with pytest.raises(ConfigError, match=message):
            EntropyPruningCallback(pruning_ratio=RATIO, preset=name, allocator=allocator)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if len(PRESETS[n].allocators) > 1])
def test_every_allocator_that_a_preset_knows_meets_the_ratio(name):
    digests = set()
    for allocator in PRESETS[name].allocators:
        plan = planned(name, allocator=allocator)
        assert abs(plan.provenance["achieved_ratio"] - RATIO) <= 0.005
        assert plan.provenance["config"]["allocator"] == allocator
        digests.add(plan.digest)
    assert len(digests) > 1


@pytest.mark.parametrize("name", [n for n, (*_, g) in PUBLISHED.items() if g != EVERYTHING])
def test_granularities_that_a_preset_cannot_remove_are_refused(name):
    removes = PUBLISHED[name][2]
    others = tuple(g for g in get_args(Granularity) if g not in removes)
    with pytest.raises(ConfigError, match=rf"preset '{name}' removes \['{removes[0]}'.*only.*noth"):
        run(dense(), name, granularities=others)
    with pytest.raises(ConfigError, match="nothing could be removed"):
        EntropyPruningCallback(pruning_ratio=RATIO, preset=name, granularities=others)
    # what it can do of a request is done
    for part in ((*others, *removes), (*others, removes[-1])):
        config = PruningConfig(pruning_ratio=RATIO, preset=name, granularities=part)
        assert set(preset(name).resolve(config).granularities) == set(part) - set(others)


# A value other than the default, of options that only some presets read.
OTHERWISE = {
    "estimator": "std_sum",
    "num_clusters": 4,
    "ratio_temperature": 0.5,
    "ratio_strength": 0.7,
    "stage_order": "coarse_first",
    "search_tolerance": 0.002,
    "sensitivity": "frobenius",
    "damping": 0.1,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_option_that_a_preset_does_not_read_is_refused(name):
    """Its user would believe that it has an effect."""
    read = set(PRESETS[name].options)
    if PUBLISHED[name][1] == "least_squares":
        read.add("damping")
    for option, value in OTHERWISE.items():
        config = PruningConfig(pruning_ratio=RATIO, preset=name, **{option: value})
        if option in read:
            assert getattr(preset(name).resolve(config), option) == value
            continue
        with pytest.raises(ConfigError, match=rf"preset '{name}' does not read {option}, got"):
            preset(name).resolve(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_code_of_a_preset_reads_it_declares(name):
    method = PRESETS[name]
    text = inspect.getsource(inspect.getmodule(method.decide))
    read = {option for option in METHOD_OPTIONS if f"config.{option}" in text}
    unless = {"damping"} if method.compensation == "least_squares" else set()
    assert read - unless <= set(method.options)


def test_a_narrower_request_is_obeyed():
    plan = planned("flap", granularities=("channel",))
    assert all(len(layer.kv_groups) == 2 for layer in plan.layers)
    assert {len(layer.channels) for layer in plan.layers} != {CHANNELS}


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("wandda", "wanda"), ("short_gpt", "shortgpt"), ("twossp", "two_ssp")]
)
def test_an_unknown_preset_names_the_nearest_and_all(wrong, nearest):
    message = rf"preset '{wrong}' is not known; did you mean '{nearest}'.*known are \['blockpruner'"
    with pytest.raises(ConfigError, match=message):
        preset(wrong)
    with pytest.raises(ConfigError, match=message):
        EntropyPruningCallback(pruning_ratio=RATIO, preset=wrong)
    with pytest.raises(ConfigError, match=message):
        run(dense(), wrong)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("wanda_ls", "covariances"),
        ("conditional", "curves and no sensitivities"),
        ("owl", "similarities"),
        ("llm_pruner", "taylor"),
        ("shortgpt", "similarities"),
    ],
)
def test_a_calibration_for_another_preset_is_refused_by_what_it_lacks(name, lacking):
    model, rows = dense(), uneven_rows()
    config = preset("wanda").resolve(PruningConfig(pruning_ratio=RATIO, preset="wanda"))
    calibration = calibrate(model, rows, config, progress=False)
    wanted = PruningConfig(pruning_ratio=RATIO, preset=name)
    with pytest.raises(
        CalibrationError, match=rf"no (covariances and no )?{lacking}, which preset"
    ):
        make_plan(model, calibration, wanted)


@pytest.mark.parametrize("name", ["flap_ls", "owl", "llm_pruner", "shortgpt"])
def test_a_saved_calibration_plans_the_same_without_a_forward(name, tmp_path):
    model = dense()
    config = preset(name).resolve(PruningConfig(pruning_ratio=RATIO, preset=name))
    calibration = calibrate(model, uneven_rows(), config, progress=False)
    calibration.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors")
    first = make_plan(model, calibration, config).plan
    with counted_forwards(model) as forwards, unchanged(model):
        second = make_plan(model, again, config).plan
    assert forwards == []
    assert second.digest == first.digest


def test_budgets_of_presets_see_only_what_they_may_remove():
    """A preset that keeps blocks whole is not promised a ratio that needs single channels."""
    spec = spec_for(dense())
    for name, ratio in (("sleb", 0.3), ("blockpruner", 0.01)):
        config = preset(name).resolve(PruningConfig(pruning_ratio=ratio, preset=name))
        with pytest.raises(BudgetError, match="the nearest are"):
            make_budget(spec, config)

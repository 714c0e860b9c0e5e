"""The pipeline without a Trainer: what is asked is met or refused, and failures leave no trace."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from lit_prune import pruner
from lit_prune.allocation import make_budget
from lit_prune.calibration import Calibration
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import (
    ArtifactError,
    BudgetError,
    CalibrationError,
    ConfigError,
    PlanMismatchError,
    ScoreError,
    SurgeryError,
    UnsupportedModelError,
)
from lit_prune.pruner import prune
from lit_prune.surgery import StagedEdits, apply_plan, masked, slicing
from tests.models import CONFIGS, batches_of, padded_batch, tiny_model, tiny_rows
from tests.state import counted_forwards, recount, unchanged

ROWS = tiny_rows(30, 20)
FAST = {"latency_prompt_tokens": 0, "progress": False}


def run(model, ratio=0.3, rows=ROWS, **options):
    return prune(model, batches_of(rows, 6), pruning_ratio=ratio, **{**FAST, **options})


def check_result(model, result, ratio, before, wanted):
    """Ratio, recount, and logits against the masked dense model."""
    report, now = result.report, recount(model)
    assert abs(report.achieved_ratio - ratio) <= 0.005
    assert report.achieved_ratio == (before["decoder"] - now["decoder"]) / before["decoder"]
    assert report.total_ratio == pytest.approx(1 - now["total"] / before["total"])
    for key, name in (
        ("decoder_parameters", "decoder"),
        ("total_parameters", "total"),
        ("kv_cache_bytes_per_token", "kv_bytes"),
    ):
        assert (report.row(key).before, report.row(key).after) == (before[name], now[name])
    flops = report.row("flops_per_token")
    context = int(flops.note.split()[1])
    assert flops.before == before["linear_flops"] + attention_flops(before, context)
    assert flops.after == now["linear_flops"] + attention_flops(now, context)
    with torch.no_grad():
        got = model(**padded_batch(ROWS[:3])).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def attention_flops(counted, context):
    """Two products over the context for each query column; no window is shorter than the text."""
    return sum(4 * columns * context for columns in counted["query_columns"])


def masked_logits(model, result):
    with torch.no_grad(), masked(model, result.plan, result.compensation):
        return model(**padded_batch(ROWS[:3])).logits


def check(family, kv_heads, ratio, **options):
    """Prune; what is refused is refused before any forward, what is not is met."""
    shape = {"layers": 4} | {k: options.pop(k) for k in list(options) if k in SHAPE}
    model, twin = (tiny_model(family, kv_heads=kv_heads, **shape) for _ in range(2))
    before = recount(model)
    config = PruningConfig(pruning_ratio=ratio, **options)
    try:
        make_budget(spec_for(model), config)
    except BudgetError:
        with (
            unchanged(model),
            counted_forwards(model) as forwards,
            pytest.raises(BudgetError, match=r"the reachable ratios lie in \[0, "),
        ):
            run(model, ratio, **options)
        assert forwards == []
        return None
    result = run(model, ratio, **options)
    check_result(model, result, ratio, before, masked_logits(twin, result))
    return result


SHAPE = (
    "layers", "tie", "attention_bias", "mlp_bias", "use_sliding_window", "sliding_window",
    "max_window_layers", "intermediate_size", "hidden_size", "head_dim",
)  # fmt: skip
GRID = list(itertools.product(CONFIGS, (1, 2, 4), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)))
SOME = random.Random(0).sample(GRID, 14)


@pytest.mark.parametrize(
    ("family", "kv_heads", "ratio"),
    [
        pytest.param(*case, marks=() if case in SOME else pytest.mark.slow, id=f"{case}")
        for case in GRID
    ],
)
def test_f05_the_ratio_is_met_and_the_report_is_a_recount(family, kv_heads, ratio):
    assert check(family, kv_heads, ratio, intermediate_size=96) is not None


ODD = [
    {"layers": 1},
    {"layers": 2, "tie": True},
    {"hidden_size": 40, "intermediate_size": 61, "head_dim": 6},
    {"attention_bias": True, "mlp_bias": True, "removed_mean": "drop"},
    {"compensation": "none"},
    {"protected_layers": (0, 3)},
    {"min_kv_groups": 2},
    {"channel_multiple": 8},
    {"granularities": ("block",)},
    {"granularities": ("sub_block",)},
    {"granularities": ("kv_group",)},
    {"granularities": ("channel",)},
    {"granularities": ("block", "kv_group")},
    {"granularities": ("sub_block", "channel")},
    {"allocator": "uniform_widths"},
    {"preset": "paper", "clustering": "exact"},
    {"preset": "paper", "clustering": "exact", "granularities": ("sub_block", "channel")},
    {"preset": "paper", "clustering": "exact", "granularities": ("block", "kv_group")},
    {"preset": "paper", "allocator": "uniform"},
    {
        "preset": "paper",
        "allocator": "greedy",
        "clustering": "exact",
        "stage_order": "coarse_first",
        "exact_hit": "cluster",
    },
    {"preset": "paper", "clustering": "exact", "estimator": "logdet"},
]


@pytest.mark.parametrize("ratio", [0.3, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", ODD, ids=str)
def test_f02_odd_models_and_requests_are_met_or_refused_before_any_forward(options, ratio):
    check("llama", 2, ratio, **options)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_windows_by_layer(family):
    options = {"use_sliding_window": True, "sliding_window": 120, "max_window_layers": 2}
    assert check(family, 2, 0.3, **options, granularities=("sub_block", "channel")) is not None


def test_f02_the_refusal_costs_no_forward_and_names_the_range():
    model = tiny_model()
    with (
        unchanged(model),
        counted_forwards(model) as forwards,
        pytest.raises(BudgetError, match=r"ratio 0.95 of .* cannot be reached .*lie in \[0, 0\."),
    ):
        run(model, 0.95, granularities=("channel",), protected_layers=(0,))
    assert forwards == []


def test_f02_ratio_zero_changes_nothing():
    model = tiny_model()
    parameters = list(model.parameters())
    result = run(model, 0.0)
    assert result.report.achieved_ratio == 0
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert result.report.row("perplexity").ratio == 1


def test_dry_run_reports_what_would_happen():
    model, twin = tiny_model(), tiny_model()
    with unchanged(model):
        planned = run(model, dry_run=True)
    assert planned.report.dry_run
    assert planned.report.row("decoder_parameters").after is None
    done = run(twin)
    assert planned.plan == done.plan
    assert planned.report.achieved_ratio == pytest.approx(done.report.achieved_ratio)
    assert twin.pruning_record.plan == done.plan
    assert twin.pruning_record.report == done.report


@pytest.mark.parametrize("preset", ["conditional", "paper"])
def test_a_measured_dry_run_tells_the_cost_and_changes_nothing(preset):
    model, twin = tiny_model(layers=4), tiny_model(layers=4)
    parameters = list(model.parameters())
    with unchanged(model):
        tried = run(model, dry_run="measured", preset=preset)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not hasattr(model, "pruning_record")
    done = run(twin, preset=preset)
    assert (tried.report.dry_run, done.report.dry_run) == (True, False)
    assert "would remove" in tried.report.headline()
    # peak memory depends on what the allocator holds
    numbers = {row.key: row.after for row in tried.report.rows if row.key != "peak_forward_bytes"}
    assert numbers == {row.key: row.after for row in done.report.rows if row.key in numbers}
    assert None not in numbers.values()
    # what was tried can be had
    apply_plan(model, tried.plan, tried.compensation)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dry_run_is_true_false_or_measured():
    with pytest.raises(ConfigError, match=r"dry_run must be one of .*'measured'.*got 'mesured'"):
        run(tiny_model(), dry_run="mesured")


# ---- law 5 ----


def test_law_5_order_batches_padding_repeats_and_threads_do_not_change_the_plan():
    rows = tiny_rows(24, 24, uneven=True)
    model = tiny_model(layers=4)
    calls = {
        "once": batches_of(rows, 4),
        "twice": batches_of(rows, 4),
        "reversed": batches_of(rows[::-1], 4),
        "one by one": [{"input_ids": row[None]} for row in rows],
        "padded left": batches_of(rows, 7, side="left", extra=5),
        "repeated": batches_of([*rows, *rows[:13]], 9),
        "generator": (batch for batch in batches_of(rows, 4)),
        "int32": [{k: v.int() for k, v in batch.items()} for batch in batches_of(rows, 4)],
    }
    digests = {
        name: prune(model, batches, pruning_ratio=0.4, dry_run=True, **FAST).plan.digest
        for name, batches in calls.items()
    }
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        result = prune(model, batches_of(rows, 4), pruning_ratio=0.4, dry_run=True, **FAST)
    finally:
        torch.set_num_threads(threads)
    digests["two threads"] = result.plan.digest
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = prune(model, batches_of(rows, 4), pruning_ratio=0.4, dry_run=True, **FAST)
    digests["train mode under autocast"] = result.plan.digest
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("preset", ["conditional", "paper"])
def test_a_saved_calibration_plans_alike_without_a_forward(tmp_path, preset):
    model = tiny_model(layers=5)
    wanted = run(model, dry_run=True, preset=preset)
    wanted.calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    with counted_forwards(model) as forwards:
        for ratio, digest in ((0.3, wanted.plan.digest), (0.5, None)):
            config = PruningConfig(pruning_ratio=ratio, preset=preset)
            planned = pruner.make_plan(model, loaded, config)
            assert digest in (None, planned.plan.digest)
        assert forwards == []
    result = prune(model, calibration=loaded, pruning_ratio=0.3, preset=preset, **FAST)
    assert result.plan == wanted.plan


def test_a_calibration_for_another_request_or_model_is_refused():
    model = tiny_model()
    paper = {**FAST, "preset": "paper"}
    calibration = run(model, dry_run=True, preset="paper", allocator="uniform").calibration
    with pytest.raises(CalibrationError, match=r"no transfer entropy of layer 0 .*for another"):
        prune(model, calibration=calibration, pruning_ratio=0.3, **paper)
    with pytest.raises(CalibrationError, match=r"no covariances and no curves .*'conditional'"):
        prune(model, calibration=calibration, pruning_ratio=0.3, **FAST)
    whole = run(model, dry_run=True, preset="paper").calibration
    with unchanged(model):
        for options in ({"transfer_target": "before_norm"}, {"estimator": "logdet"}):
            with pytest.raises(CalibrationError, match="measured for transfer_target 'after_no"):
                prune(model, calibration=whole, pruning_ratio=0.3, **paper, **options)
    other = tiny_model(intermediate_size=40)
    with pytest.raises(PlanMismatchError, match="calibration was made for a model with fingerprin"):
        prune(other, calibration=whole, pruning_ratio=0.3, **paper)


def test_f25_a_calibration_of_other_weights_is_refused():
    model, paper = tiny_model(), {**FAST, "preset": "paper", "allocator": "uniform"}
    calibration = run(model, dry_run=True, **paper).calibration
    for other in (tiny_model(seed=77), tiny_model().bfloat16()):
        with (
            unchanged(other),
            counted_forwards(other) as forwards,
            pytest.raises(PlanMismatchError, match=r"calibrated on other weights .* Calibrate aga"),
        ):
            prune(other, calibration=calibration, pruning_ratio=0.3, **paper)
        assert forwards == []
    unnamed = replace(calibration, weights_digest=None)
    report = prune(tiny_model(), calibration=unnamed, pruning_ratio=0.3, **paper).report
    assert any("does not say on which weights" in note for note in report.notes())
    report = prune(model, calibration=calibration, pruning_ratio=0.3, **paper).report
    assert not any("weights" in note for note in report.notes())


# ---- life after pruning ----


def test_f10_prune_again():
    model = tiny_model("qwen3", layers=6, kv_heads=4, intermediate_size=96)
    first = recount(model)["decoder"]
    for ratio in (0.3, 0.2, 0.3):
        before = recount(model)["decoder"]
        result = run(model, ratio)
        assert abs(1 - recount(model)["decoder"] / before - ratio) <= 0.005
        assert result.report.achieved_ratio == (before - recount(model)["decoder"]) / before
    assert recount(model)["decoder"] < 0.45 * first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f29_half_precision_models_prune_and_train(dtype):
    model = tiny_model(layers=4).to(dtype)
    frozen = model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    model.train()
    result = run(model, 0.2, protected_layers=(0,))
    assert math.isfinite(result.report.row("perplexity").after)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.training
    assert [p is frozen for p in model.parameters() if not p.requires_grad] == [True]
    batch = padded_batch(ROWS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_latency_and_peak_memory_are_measured_where_asked():
    model = tiny_model()
    result = run(
        model,
        latency_prompt_tokens=16,
        latency_new_tokens=3,
        latency_batch_size=2,
        latency_further_batch_sizes=(2, 3),
    )
    keys = {row.key for row in result.report.rows}
    assert {"prefill_seconds", "decode_seconds_per_token", "peak_forward_bytes"} <= keys
    assert "decode_tokens_per_second_batch_3" in keys
    assert "decode_tokens_per_second_batch_2" not in keys  # the request's own, measured once
    words = " ".join(result.report.notes())
    assert "batch 2, 3, 16 prompt + 3 new tokens" in words
    assert "batch 3, decode: " in words
    times = result.report.conditions["latency"]
    assert [entry["after"]["batch_size"] for entry in times] == [2, 3]
    assert all({"prefill", "decode", "larger_batch"} == set(entry["reasons"]) for entry in times)
    assert "prefill_seconds" not in {row.key for row in run(model, 0.1).report.rows}


# ---- text that cannot be used ----


class Loader(list):
    pass


BAD_TEXT = [
    ([], "0 real tokens in 0 samples to calibrate on"),
    (Loader(), "0 real tokens in 0 samples to calibrate on"),
    (batches_of(tiny_rows(2, 8)), r"16 real tokens in \d samples .*at least 128"),
    ([(torch.ones(2, 3).long(),)], r"batch 0 is a tuple of \[\[2, 3\]\]; expected a mapping"),
    ([{"labels": torch.ones(2, 3)}], r"batch 0: no input_ids among the arguments \['labels'\]"),
    ([{"input_ids": torch.ones(2, 3)}], "batch 0: input_ids has shape .* dtype torch.float32"),
    ([{"input_ids": torch.full((2, 3), 64)}], "batch 0: token ids run from 64 to 64.* has 64"),
    ([{"input_ids": torch.full((1, 200), 5)}], "200 tokens a sample.*max_position_embeddings is"),
    ([{"input_ids": torch.zeros(4, 64).long()}], "are the pad token .*no attention_mask says so"),
    (None, "give a dataloader to calibrate on"),
    (
        [
            {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
            for batch in batches_of(ROWS)
        ],
        r"0 of the \d+ real tokens in \d+ samples on the score side .* labels that score some",
    ),
]


@pytest.mark.parametrize(("batches", "message"), BAD_TEXT, ids=[m[:40] for _, m in BAD_TEXT])
def test_f11_f12_f13_unusable_text_is_refused_before_any_forward(batches, message):
    model = tiny_model(layers=2)
    with (
        unchanged(model),
        counted_forwards(model) as forwards,
        pytest.raises(CalibrationError, match=message),
    ):
        prune(model, batches, pruning_ratio=0.3, **FAST)
    assert forwards == []


def test_f13_pad_as_end_of_text_is_said_in_the_report():
    model = tiny_model(layers=3, pad_token_id=2, eos_token_id=2)
    batches = [{"input_ids": padded_batch(ROWS, pad=2, extra=4)["input_ids"]}]
    report = prune(model, batches, pruning_ratio=0.3, **FAST).report
    assert any("every token was taken for real text" in note for note in report.notes())
    assert any("only" in note and "tokens to calibrate on" in note for note in report.notes())


def test_the_loaders_own_error_passes_through():
    def broken():
        yield padded_batch(ROWS)
        raise OSError("disk gone")

    model = tiny_model(layers=2)
    with unchanged(model), pytest.raises(OSError, match="disk gone"):
        prune(model, broken(), pruning_ratio=0.3, **FAST)


@pytest.mark.parametrize("rows", [2, 3])
def test_text_too_short_to_split_is_used_whole_and_said(rows):
    model = tiny_model(layers=3)
    result = run(model, rows=tiny_rows(rows, 100))
    assert any("perplexity after pruning is optimistic" in note for note in result.report.notes())


def test_samples_of_one_token_do_not_break_the_perplexity():
    model = tiny_model(layers=3)
    singles = [torch.tensor([token]) for token in range(3, 60)]
    result = run(model, rows=[*ROWS, *singles])
    assert math.isfinite(result.report.row("perplexity").after)


# ---- requests and models that cannot be meant ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 1.5}, "must be a number in .*got 1.5.*fraction"),
        ({"pruning_ratio": math.nan}, "must be a number in .*got nan"),
        ({"pruning_ratio": True}, "must be a number in .*got True"),
        ({"pruning_ration": 0.3}, "unknown option 'pruning_ration'; did you mean 'pruning_ratio'"),
        ({}, "pruning_ratio is missing"),
        ({"pruning_ratio": 0.3, "preset": "papre"}, "'papre' is not known; did you mean 'paper'"),
        ({"pruning_ratio": 0.3, "protected_layers": [-1]}, "protected_layers has -1.*0 … 3"),
        ({"pruning_ratio": 0.3, "protected_layers": range(4)}, "protects all 4 layers: nothing"),
    ],
)
def test_f01_f03_f04_requests_that_cannot_be_meant(options, message):
    model = tiny_model()
    with (
        unchanged(model),
        counted_forwards(model) as forwards,
        pytest.raises(ConfigError, match=message),
    ):
        prune(model, batches_of(ROWS), **options)
    assert forwards == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_f16_weights_that_are_not_finite_are_refused_before_any_forward(value):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = value
    message = r"layers\.2\.mlp\.up_proj\.weight has 1 of 1536 values that are NaN"
    with (
        unchanged(model),
        counted_forwards(model) as forwards,
        pytest.raises(UnsupportedModelError, match=message),
    ):
        run(model)
    assert forwards == []


def test_f16_an_activation_that_overflows_is_named():
    model = tiny_model().half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(20_000)
        model.model.layers[1].mlp.gate_proj.weight.mul_(100)
    with (
        unchanged(model),
        pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj are not .*bfloat16"),
    ):
        run(model)


def test_f08_meta_weights_are_refused():
    with torch.device("meta"):
        model = tiny_model_on_meta()
    with pytest.raises(UnsupportedModelError, match="is on the meta device: load the weights"):
        run(model)


def tiny_model_on_meta():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=8,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# ---- failures in the middle ----

MOMENTS = ["calibrate", "make_plan", "measure", "apply", "measure again", "make_report"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("moment", MOMENTS)
def test_f18_f26_a_failure_at_any_stage_leaves_the_model_bit_identical(moment, error, monkeypatch):
    model = tiny_model("qwen2", layers=4)
    model.train()
    model.config.use_cache = True
    calls = []

    def failing(name, at=1):
        plain = getattr(pruner, name)

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise error("stop")
            return plain(*args, **kwargs)

        monkeypatch.setattr(pruner, name, call)

    if moment == "apply":
        monkeypatch.setattr(StagedEdits, "commit", lambda _self: (_ for _ in ()).throw(error()))
    else:
        failing(moment.split()[0], at=2 if moment == "measure again" else 1)
    with unchanged(model), pytest.raises(error):
        run(model)
    assert not hasattr(model, "pruning_record")


def test_f30_a_wrong_result_is_rolled_back(monkeypatch):
    model = tiny_model()
    plain = slicing.kept_lines
    monkeypatch.setattr(slicing, "kept_lines", lambda *args: plain(*args) * 0)
    with unchanged(model), pytest.raises(SurgeryError, match="does not compute what the plan says"):
        run(model)


def test_f25_the_plan_does_not_fit_the_pruned_model():
    model = tiny_model()
    result = run(model)
    with unchanged(model), pytest.raises(PlanMismatchError, match="or already pruned"):
        apply_plan(model, result.plan)
    result.plan.validate(spec_for(tiny_model()))


def test_f24_the_node_limit_appears_in_the_report():
    said = 0
    for seed in range(4):
        model = tiny_model(layers=8, kv_heads=4, seed=seed)
        options = {"granularities": ("block", "sub_block", "kv_group"), "node_limit": 1}
        options["preset"] = "paper" if seed % 2 else "conditional"
        report = run(model, 0.3, dry_run=True, **options).report
        limited = [s for s in report.search["searches"] if not s["optimal"]]
        notes = [note for note in report.warnings if "stopped at its node limit" in note]
        assert bool(limited) == bool(notes)
        said += len(notes)
    assert said


def test_f14_mode_cache_random_state_and_user_hooks_survive():
    model, seen = tiny_model(attention_dropout=0.3), []
    model.train()
    model.model.layers[3].eval()
    model.config.use_cache = True
    model.register_forward_hook(lambda *_: seen.append(1))
    state = torch.random.get_rng_state()
    with torch.enable_grad():
        run(model, 0.2, granularities=("channel",))
        assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config.use_cache
    assert [layer.training for layer in model.model.layers] == [True] * 3 + [False]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1
    assert seen


def test_few_tokens_and_the_channel_multiple_are_said():
    notes = " ".join(run(tiny_model()).report.notes())
    assert "tokens to calibrate on: entropies are noisy" in notes
    assert "kept channels are multiples of" in notes


def test_f11_few_scored_tokens_are_said():
    result = run(tiny_model(), dry_run=True, preset="paper", allocator="uniform")
    scored = result.report.conditions["words"][0]
    count = result.calibration.rows.num_scored("score")
    assert 0 < count < 256
    assert f"{count} tokens" in scored
    assert any(f"only {count} tokens are scored" in note for note in result.report.notes())


# ---- a covariance of less text than channels ----


def test_f23_too_little_damping_names_the_option_and_the_place():
    model = tiny_model(intermediate_size=300, layers=2)
    options = {"pruning_ratio": 0.3, "damping": 1e-20, **FAST}
    with (
        unchanged(model),
        pytest.raises(ScoreError, match=r"mlp\.down_proj, with damping=1e-20: .*Raise damping"),
    ):
        prune(model, batches_of(tiny_rows(12, 16), 6), **options)


def test_f23_least_squares_falls_back_to_the_mean_and_says_so():
    model = tiny_model(intermediate_size=300, layers=2)
    options = {"pruning_ratio": 0.3, "damping": 1e-22, "preset": "flap_ls", **FAST}
    result = prune(model, batches_of(tiny_rows(12, 16), 6), **options)
    notes = " ".join(result.report.notes())
    assert "cannot be inverted at some damping" in notes
    with torch.no_grad():
        assert torch.isfinite(model(**padded_batch(ROWS[:3])).logits).all()


# ---- what is kept before anything is cut ----


def test_f39_what_was_decided_is_handed_over_before_anything_is_cut():
    model = tiny_model()
    config = PruningConfig(
        pruning_ratio=0.3, preset="paper", allocator="uniform", latency_prompt_tokens=0
    )
    calibration = run(model, dry_run=True, preset="paper", allocator="uniform").calibration

    def full(planned):
        assert planned.compensation.plan_digest == planned.plan.digest
        raise ArtifactError("disk full")

    with unchanged(model), pytest.raises(ArtifactError, match="disk full"):
        pruner.carry_out(model, calibration, config, keep=full, progress=False)

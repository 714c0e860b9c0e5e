"""Classifiers on a supported decoder: pruned by what they say, measured by their own metric."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from lit_prune import load_pruned, prune, save_pruned
from lit_prune.decoder import logits_of, spec_for
from lit_prune.errors import CalibrationError, FormatError, UnsupportedModelError
from lit_prune.surgery import masked
from lit_prune.views.tensorboard import report_scalars
from tests.models import batches_of, labelled, tiny_classifier, tiny_rows
from tests.state import unchanged

AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
ROWS = tiny_rows(40, 16, uneven=True)
FAST = {"progress": False, "channel_multiple": 4}


def run(model, task, *, labels=True, ratio=0.3, **options):
    batches = batches_of(ROWS, 8)
    options = {"latency_prompt_tokens": 0, **FAST, **options}
    batches = labelled(task, batches) if labels else batches
    return prune(model, batches, pruning_ratio=ratio, **options)


def said(model):
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits.flatten() for row in ROWS[:3]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "starcoder2"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_prune_measures_accuracy_and_cross_entropy(task, family):
    model, dense = (tiny_classifier(task, family) for _ in range(2))
    result = run(model, task)
    report = result.report
    assert abs(report.achieved_ratio - 0.3) <= 0.005
    with masked(dense, result.plan, result.compensation), torch.no_grad():
        ids = torch.stack([row[:8] for row in ROWS[:3]])
        wanted, got = logits_of(dense, input_ids=ids), logits_of(model, input_ids=ids)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        # transformers' own forward, at the end of each text
        torch.testing.assert_close(said(model), said(dense), rtol=1e-4, atol=1e-4)
    counts = report.conditions["classification"]
    rows = result.calibration.rows.side("score")
    assert counts["num_labels"] == sum(row.num_scored for row in rows) > 0
    right = [
        (logits_of(model, input_ids=row.ids[None])[0].argmax(-1) == row.labels)[row.labels >= 0]
        for row in rows
    ]
    assert report.row("accuracy").after == pytest.approx(float(torch.cat(right).double().mean()))
    assert report.row("mean_nll").before > 0
    assert report.row("head_flops_per_token").before == 2 * 3 * 32
    with pytest.raises(KeyError):
        report.row("perplexity")
    scalars = report_scalars(report)
    assert {"quality/accuracy/before", "quality/mean_nll/after"} <= scalars.keys()


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("conditional", {"sensitivity": "nll", "verify_rounds": 1}),
        ("llm_pruner", {}),
        ("sleb", {"granularities": ("block",), "ratio": 0.25}),
        ("multipruner", {}),
        ("paper", {}),
    ],
)
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_methods_that_go_by_a_loss_take_that_of_the_labels(task, preset, options):
    report = run(tiny_classifier(task), task, preset=preset, **options).report
    assert report.row("accuracy").after is not None


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_text_without_labels_prunes_and_says_what_is_missing(task):
    model = tiny_classifier(task)
    report = run(model, task, labels=False).report
    assert not {"accuracy", "mean_nll", "perplexity"} & {row.key for row in report.rows}
    assert any("no sample to score has a label" in note for note in report.notes())
    for preset, options, message in (
        ("llm_pruner", {}, "no sample with a label to take gradients on"),
        ("sleb", {"granularities": ("block",), "ratio": 0.25}, "no label in .* rows"),
        ("conditional", {"sensitivity": "nll"}, "no sample on the calibrate side has a label"),
    ):
        fresh = tiny_classifier(task)
        with unchanged(fresh), pytest.raises(CalibrationError, match=message):
            run(fresh, task, labels=False, preset=preset, **options)


def test_latency_is_of_one_forward():
    report = run(tiny_classifier("sequence"), "sequence", latency_prompt_tokens=8).report
    keys = {row.key for row in report.rows}
    assert "prefill_seconds" in keys
    assert not {key for key in keys if key.startswith("decode_")} - {"decoder_parameters"}
    assert any("a classifier decodes nothing" in note for note in report.notes())


@pytest.mark.parametrize("format_", ["stock", "heterogeneous", "padded"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_saved_classifier_is_one_when_loaded(task, format_, tmp_path):
    model = tiny_classifier(task)
    options = {"granularities": ("channel",)}
    if format_ == "stock":
        options = {"allocator": "uniform_widths", "ratio": 0.25}
    run(model, task, channel_multiple=1, **options)
    path = save_pruned(model, tmp_path / "saved", format=format_, verify=False)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"][0].endswith(type(model).__name__.removeprefix("Llama"))
    loaded, plain = load_pruned(path), AUTO[task].from_pretrained(path).eval()
    assert type(loaded).__name__ == type(plain).__name__ == config["architectures"][0]
    assert loaded.config.id2label == model.config.id2label
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if format_ == "padded" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(said(loaded), said(model), **tolerance)
    torch.testing.assert_close(said(plain), said(model), **tolerance)
    card = (path / "README.md").read_text()
    kind = "text" if task == "sequence" else "token"
    assert f"pipeline_tag: {kind}-classification" in card
    assert f"AutoModelFor{task.capitalize()}Classification.from_pretrained" in card
    assert "Perplexity" not in card


@pytest.mark.slow
def test_a_saved_classifier_is_checked_in_a_fresh_process(tmp_path):
    model = tiny_classifier("sequence", pad_token_id=None)  # which takes one text at a time
    run(model, "sequence")
    path = save_pruned(model, tmp_path / "saved")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["verified"]
    assert manifest["architecture"]["format"] == "heterogeneous"
    assert manifest["verification"].count("logits equal bit for bit") == 2


def test_what_holds_no_classifier_says_so(tmp_path):
    model = tiny_classifier("sequence", "mistral")
    run(model, "sequence")
    for format_, words in (
        ("gguf", "llama.cpp writes text"),
        ("padded", "MistralForSequenceClassification has no bias on"),
    ):
        with pytest.raises(FormatError, match=rf"{words}.*These can: heterogeneous"):
            save_pruned(model, tmp_path / format_, format=format_)


@pytest.mark.parametrize("change", [{"classes": 1}, {"problem_type": "multi_label_classification"}])
def test_a_head_that_chooses_no_class_is_refused(change):
    with pytest.raises(UnsupportedModelError, match="choose one class of several"):
        spec_for(tiny_classifier("sequence", **change))

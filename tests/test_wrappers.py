"""Multimodal models: the language model inside is pruned, the whole one goes on with images."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lit_prune import apply_plan, load_pruned, prune, save_pruned
from lit_prune.allocation import aimed
from lit_prune.calibration import Observer
from lit_prune.config import PruningConfig
from lit_prune.decoder import find_causal_lm, spec_for, text_view, whole_of
from lit_prune.errors import ArtifactError, CalibrationError, FormatError, UnsupportedModelError
from lit_prune.surgery import masked
from tests.models import batches_of, tiny_rows
from tests.saving.cases import forge
from tests.wrappers import IMAGE, WRAPPERS, tiny_wrapper, with_image

ROWS = tiny_rows(30, 16, vocab=60, uneven=True)
FAST = {"latency_prompt_tokens": 0, "progress": False, "channel_multiple": 4}


def run(model, batches=None, ratio=0.3, **options):
    batches = batches_of(ROWS, 6) if batches is None else batches
    return prune(model, batches, pruning_ratio=ratio, **{**FAST, **options})


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_view_computes_what_the_whole_does_of_text(name):
    model = tiny_wrapper(name)
    view = find_causal_lm(model)
    assert view is text_view(model) is text_view(view)
    assert whole_of(view) is model
    batch = batches_of(ROWS, 6, side="left")[0]
    assert torch.equal(logits(view, batch), logits(model, batch))
    assert spec_for(view).total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", WRAPPERS)
def test_pruned_it_answers_prompts_with_images(name):
    model, batch = tiny_wrapper(name), with_image(name)
    dense = copy.deepcopy(model)
    result = run(model)
    report = result.report
    assert abs(report.achieved_ratio - 0.3) <= 0.005
    everything = [sum(p.numel() for p in one.parameters()) for one in (dense, model)]
    assert any("the model is multimodal" in note for note in report.notes())
    row = report.row("total_parameters")
    assert [row.before, row.after] == everything
    with masked(text_view(dense), result.plan, result.compensation):
        wanted = logits(dense, batch)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-4, atol=1e-4)
    words = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    words["suppress_tokens"] = [IMAGE]  # it has no image for more of them
    written = [model.generate(**batch, **words, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)
    assert model.pruning_record.plan == text_view(model).pruning_record.plan == result.plan
    again = apply_plan(dense, result.plan, result.compensation)
    assert again is dense
    assert torch.equal(logits(dense, batch), logits(model, batch))


@pytest.mark.parametrize("name", WRAPPERS)
def test_saved_it_is_the_whole_in_plain_transformers(name, tmp_path):
    model, batch = tiny_wrapper(name), with_image(name)
    units = ("kv_group", "channel")
    options = {"allocator": "uniform_widths", "add_biases": False, "channel_multiple": 1}
    run(model, ratio=0.4, granularities=units, **options)
    path = save_pruned(model, tmp_path / "saved", verify=False)
    plain = AutoModelForImageTextToText.from_pretrained(path).eval()
    loaded = load_pruned(path)
    assert type(loaded) is type(plain) is type(model)
    for other in (plain, loaded):
        assert torch.equal(logits(other, batch), logits(model, batch))
        assert other.config.text_config.intermediate_size < 48
    assert loaded.pruning_record.plan == model.pruning_record.plan
    card = (path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card


@pytest.mark.slow
def test_a_saved_whole_is_checked_in_a_fresh_process(tmp_path):
    model = tiny_wrapper("llava")
    path = save_pruned(model, tmp_path / "saved")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["verified"]
    assert manifest["verification"].count("logits equal bit for bit") == 2
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["auto_map"] = {"AutoModel": "evil.Evil"}
    (path / "config.json").write_text(json.dumps(config))
    forge(path)
    with pytest.raises(ArtifactError, match="sets auto_map"):
        load_pruned(path)


def test_layers_that_differ_have_no_format_and_the_way_is_named(tmp_path):
    model = tiny_wrapper("llava")
    run(model)
    for format_, words in (
        ("auto", "layer . has .*allocator='uniform_widths'"),
        ("heterogeneous", "it is multimodal.*These can: stock, where layers are alike"),
        ("gguf", "it is multimodal"),
    ):
        with pytest.raises(FormatError, match=words):
            save_pruned(model, tmp_path / format_, format=format_)


def test_samples_with_images_are_left_out_and_counted():
    model = tiny_wrapper("llava")
    mixed = with_image("llava", rows=3)
    mixed["input_ids"][1] = ROWS[0][:12].repeat(2)[:12]  # the second row is text
    mixed["pixel_values"] = mixed["pixel_values"][[0, 2]]
    batches = [mixed, *batches_of(ROWS, 6)]
    result = run(model, batches, dry_run=True)
    assert any(note.startswith("2 samples with an image") for note in result.report.notes())
    kept = {row.digest for row in result.calibration.rows.rows}
    assert len(kept) == len(ROWS) + 1
    assert all(IMAGE not in row.ids for row in result.calibration.rows.rows)
    observer = Observer(text_view(model), max_tokens=10**6)
    observer.open()
    with torch.no_grad():
        for batch in batches:  # by position, as its own forward orders them
            model(batch["input_ids"], batch.get("pixel_values"), batch["attention_mask"])
    observer.close()
    assert set(observer.rows) == kept
    assert observer.notes == ["2 samples with an image were left out: statistics are of samples "
                              "of text alone"]  # fmt: skip
    for place, (mean, _) in observer.unit_moments().items():
        torch.testing.assert_close(mean, result.calibration.units[place][0], rtol=1e-5, atol=1e-6)


def test_images_alone_calibrate_nothing():
    with pytest.raises(CalibrationError, match=r"every sample had an image.*prune"):
        run(tiny_wrapper("llava"), [with_image("llava")])


def test_what_the_view_would_not_compute_is_refused():
    model = tiny_wrapper("gemma3", final_logit_softcapping=30.0)
    with pytest.raises(UnsupportedModelError, match=r"final_logit_softcapping is 30\.0"):
        find_causal_lm(model)
    model = tiny_wrapper("llava")
    model.config.text_config = copy.deepcopy(model.config.text_config)
    with pytest.raises(UnsupportedModelError, match="another config object"):
        run(model)


def test_a_target_in_bytes_counts_the_whole():
    whole = tiny_wrapper("llava")
    view = text_view(whole)
    size = sum(p.nbytes for p in whole.parameters())
    decoder = sum(p.nbytes for p in view.model.layers.parameters())
    aim = aimed(view, PruningConfig(target_bytes=size - decoder // 4))
    assert aim.ratio == pytest.approx(0.25 + aim.ratio_tolerance, abs=1e-6)

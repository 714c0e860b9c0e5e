import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_prune.calibration import Calibration, Row, RowSet
from lit_prune.errors import ArtifactError, PlanMismatchError
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.surgery import Compensation
from tests.models import tiny_rows
from tests.saving.cases import listing, logits, pruned


def tiny_tokenizer(template="{{ messages }}"):
    vocabulary = {"[UNK]": 0, "hello": 1, "world": 2}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    tokenizer.chat_template = template
    return tokenizer


def code_of(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("kind", "chosen", "ways"),
    [("uniform", "auto", 2), ("uneven", "auto", 3), ("uneven", "padded", 2)],
)
def test_the_lines_of_the_card_load_the_model(kind, chosen, ways, tmp_path, monkeypatch):
    model = pruned(kind=kind)
    path = save_pruned(
        model, tmp_path / "it's mine", format=chosen, tokenizer=tiny_tokenizer(), verify=False
    )
    blocks = code_of((path / "README.md").read_text())
    assert len(blocks) == ways
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names = {}
        exec(block, names)
        torch.testing.assert_close(logits(names["model"]), logits(model), rtol=0, atol=1e-4)
        if block == blocks[0]:
            assert names["tokenizer"]("hello world").input_ids == [1, 2]


def test_the_card_states_the_format_and_its_cost(tmp_path):
    model = pruned("mistral", "uniform_mean")
    text = (save_pruned(model, tmp_path / "a", verify=False) / "README.md").read_text()
    assert "Format `stock` (auto took stock: GraniteForCausalLM of plain transformers" in text
    assert "Re-labelled from mistral to granite" in text
    path = save_pruned(pruned(), tmp_path / "b", format="padded", verify=False)
    text = (path / "README.md").read_text()
    assert "Padding with zeros costs: parameters 25,408 → 35,104 (+38.16%), FLOPs per token" in text
    assert "as large and as slow as its widest layer" in text
    text = (save_pruned(pruned(), tmp_path / "c", verify=False) / "README.md").read_text()
    assert "auto took heterogeneous: layer 1 has num_key_value_heads 2" in text
    assert "format='padded'" in text


def test_the_card_says_what_was_done(tmp_path):
    model = pruned()
    model.config.name_or_path = "somebody/base-model"
    text = (save_pruned(model, tmp_path / "saved", verify=False) / "README.md").read_text()
    for words in (
        "base_model: somebody/base-model",
        "of the decoder parameters (asked 50.00%)",
        "removed 49.90%",
        model.pruning_record.plan.digest[:12],
        "| Parameters | 200 | 100 | 0.500 | half |",
        "data_digest abc123",
        "calibrate 64",
        "a warning",
        "seed 7",
        "transformers 5.",
        "it was not loaded and compared",
    ):
        assert words in text, words


def test_the_card_names_no_path_of_this_machine_and_no_markup(tmp_path):
    model = pruned()
    model.config.name_or_path = "/home/alice/secret/`<b>model"
    text = (save_pruned(model, tmp_path / "saved", verify=False) / "README.md").read_text()
    assert "alice" not in text
    assert "<b>" not in text
    assert "/home/alice" not in (tmp_path / "saved/config.json").read_text()


@pytest.mark.parametrize("template", ["{{ messages }}", {"default": "a", "tool_use": "b"}])
def test_f40_tokenizer_comes_back_with_its_chat_templates(template, tmp_path):
    tokenizer = tiny_tokenizer(template)
    path = save_pruned(pruned(), tmp_path / "saved", tokenizer=tokenizer, verify=False)
    again = AutoTokenizer.from_pretrained(path)
    assert again("hello world").input_ids == tokenizer("hello world").input_ids
    assert again.chat_template == template
    load_pruned(path)


def test_f37_tokenizer_that_brings_code_is_refused(tmp_path):
    class Coded:
        def save_pretrained(self, folder, **_options):
            (folder / "tokenization_evil.py").write_text("")

    with pytest.raises(ArtifactError, match=r"tokenization_evil\.py"):
        save_pruned(pruned(), tmp_path / "saved", tokenizer=Coded(), verify=False)
    assert listing(tmp_path) == []


def test_calibration_and_compensation_lie_beside_only_where_given(tmp_path):
    model = pruned()
    plan = model.pruning_record.plan
    rows = RowSet.of(Row.of(row) for row in tiny_rows(4))
    calibration = Calibration(plan.model_fingerprint, rows, {})
    compensation = Compensation({(0, "mlp"): torch.zeros(32).double()}, plan.digest, "w")
    path = save_pruned(
        model, tmp_path / "saved", calibration=calibration, compensation=compensation, verify=False
    )
    load_pruned(path)
    assert Calibration.load(path / "calibration.safetensors").data_digest == calibration.data_digest
    assert Compensation.load(path / "compensation.safetensors").plan_digest == plan.digest
    for stranger in (
        {"calibration": Calibration("other", rows, {})},
        {"compensation": Compensation({}, "other", "w")},
    ):
        with pytest.raises(PlanMismatchError, match=f"{next(iter(stranger))} belongs to other"):
            save_pruned(model, tmp_path / "second", **stranger, verify=False)

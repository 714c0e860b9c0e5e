"""The ready modules train, distil, take adapters, and prune with the callback as it is."""

import copy

import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

from lit_prune import EntropyPruningCallback
from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.finetune import CausalLMModule, TextDataModule
from tests.models import tiny_model
from tests.recipes.conftest import SHIPPED

CONTEXT = 32


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture
def data(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(120)))
    return TextDataModule(str(file), tokenizer, context_length=CONTEXT, batch_size=8)


def model_for(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), layers=2, intermediate_size=32)


def trainer(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[*callbacks], enable_checkpointing=False,
        default_root_dir=folder, **quiet, **options,
    )  # fmt: skip


def test_it_learns_and_is_pruned_by_the_callback(data, tokenizer, tmp_path):
    module = CausalLMModule(model_for(tokenizer), learning_rate=1e-2)
    pruner = EntropyPruningCallback(
        pruning_ratio=0.3, preset="flap", latency_prompt_tokens=0, max_calibration_tokens=2048
    )
    run = trainer(tmp_path, pruner)
    (before,) = run.validate(module, data, verbose=False)
    run.fit(module, data)
    assert run.callback_metrics["validation/loss"] < before["validation/loss"] - 0.2
    assert pruner.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


def test_adapters_alone_are_trained_and_merged(data, tokenizer, tmp_path):
    model = model_for(tokenizer)
    before = copy.deepcopy(model.state_dict())
    module = CausalLMModule(model, learning_rate=1e-2, lora_rank=2)
    assert all("lora" in name for name, p in module.named_parameters() if p.requires_grad)
    trainer(tmp_path).fit(module, data)
    after = module.model.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all("_proj" in name for name in changed)
    pruner = EntropyPruningCallback(
        pruning_ratio=0.3, when="validate", preset="flap", latency_prompt_tokens=0,
        max_calibration_tokens=2048,
    )  # fmt: skip
    trainer(tmp_path, pruner).validate(module, data, verbose=False)
    assert pruner.report_.achieved_ratio == pytest.approx(0.3, abs=0.005)


def test_a_student_comes_nearer_to_its_teacher(data, tokenizer, tmp_path):
    teacher, student = model_for(tokenizer), model_for(tokenizer)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module = CausalLMModule(student, learning_rate=3e-3, teacher=teacher, distillation=1.0)
    assert not any("teacher" in name for name in module.state_dict())
    data.setup()
    batch = next(iter(data.val_dataloader()))

    def distance():
        with torch.no_grad():
            return float(module._divergence(student(input_ids=batch["input_ids"]).logits, batch))

    before = distance()
    trainer(tmp_path).fit(module, data)
    assert 0 < distance() < before


def test_validation_text_is_held_out(data, tokenizer, tmp_path):
    data.setup()
    train, validation = (data.windows[name] for name in ("train", "validation"))
    assert validation
    assert {tuple(w.ids) for w in train}.isdisjoint({tuple(w.ids) for w in validation})
    short = tmp_path / "short.txt"
    short.write_text("x = 1")
    with pytest.raises(CalibrationError, match="nothing is left to validate on"):
        TextDataModule(str(short), tokenizer).setup()


def test_numbers_that_cannot_be_meant_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="distillation"):
        CausalLMModule(model_for(tokenizer), distillation=2)
    with pytest.raises(ConfigError, match="batch_size"):
        TextDataModule("x", tokenizer, batch_size=0)
    with pytest.raises(ConfigError, match="validation_fraction"):
        TextDataModule("x", tokenizer, validation_fraction=1)

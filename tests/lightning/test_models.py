"""Whatever LightningModule the language model sits in, and however it computes."""

import lightning as L
import pytest
import torch
from torch import nn

from lit_prune.calibration import Row
from lit_prune.calibration.split import side_of
from lit_prune.errors import BudgetError, ConfigError, UnsupportedModelError
from tests.lightning.modules import (
    LM,
    ROWS,
    TRAIN,
    decoder_parameters,
    fit,
    hooks,
    loader,
    pruner,
    state_digest,
    trainer,
)
from tests.models import tiny_model


class Later(LM):
    """Makes its language model where sharded strategies want it made."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.lm, self.lr, self.losses, self.validations = None, 1e-2, [], 0

    def configure_model(self):
        if self.lm is None:
            self.lm = tiny_model().train()


class Two(LM):
    def __init__(self):
        super().__init__()
        self.teacher = tiny_model(seed=7).train()


class Deep(LM):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"inside": nn.Sequential(self.lm)})


@pytest.mark.event(
    "Runs",
    "the model is made in `configure_model`",
    "checked when the run starts, pruned at its end",
)
def test_model_of_configure_model(tmp_path):
    callback, module = pruner(), Later()
    fit(tmp_path, module, callback)
    assert abs(callback.report_.achieved_ratio - 0.3) <= 0.005
    assert module.lm.pruning_record.plan is callback.plan_


def test_model_of_configure_model_by_validate(tmp_path):
    callback = pruner(when="validate")
    trainer(tmp_path, callback).validate(Later(), loader(), verbose=False)
    assert abs(callback.report_.achieved_ratio - 0.3) <= 0.005


def test_model_of_configure_model_is_checked_before_training(tmp_path):
    module = Later()
    with pytest.raises(BudgetError, match="cannot be reached"):
        fit(tmp_path, module, pruner(0.9, granularities=["kv_group"]))
    assert module.losses == []


def test_model_is_found_wherever_it_lies(tmp_path):
    callback, module = pruner(), Deep()
    fit(tmp_path, module, callback)
    assert module.parts["inside"][0].pruning_record.plan is callback.plan_


def test_two_models_need_a_name(tmp_path):
    module = Two()
    with pytest.raises(ConfigError, match=r"holds 2 .*'lm', 'teacher'.*language_model="):
        fit(tmp_path, module, pruner())
    assert module.losses == []
    callback, size = pruner(language_model="lm"), decoder_parameters(module.teacher)
    fit(tmp_path, module, callback)
    assert decoder_parameters(module.lm) < decoder_parameters(module.teacher) == size


def test_module_without_a_language_model_is_refused(tmp_path):
    class Plain(LM):
        def __init__(self):
            super().__init__()
            self.lm = nn.Linear(1, 1)

    with pytest.raises(UnsupportedModelError, match="holds no Hugging Face causal language model"):
        fit(tmp_path, Plain(), pruner())
    with pytest.raises(ConfigError, match="has no such sub-module"):
        fit(tmp_path, LM(), pruner(language_model="model"))


@pytest.mark.event(
    "Numbers", "`torch.compile`d model", "refused by name: prune first, compile the result"
)
@pytest.mark.parametrize("where", ["around", "in place", "a layer", "the module"])
def test_f15_compiled_model_is_refused_by_name(tmp_path, where):
    module = LM()
    before, run = state_digest(module), module
    if where == "around":
        module.lm = torch.compile(module.lm)
    elif where == "in place":
        module.lm.compile()
    elif where == "a layer":
        module.lm.model.layers[1].compile()
    else:
        run = torch.compile(module)
    with pytest.raises(UnsupportedModelError, match="compiled, and hooks see nothing inside"):
        fit(tmp_path, run, pruner())
    assert module.losses == []
    assert hooks(getattr(module.lm, "_orig_mod", module.lm)) == 0
    if where != "around":
        assert state_digest(module) == before


def test_ratio_that_cannot_be_reached_is_refused_in_setup(tmp_path):
    module = LM()
    before = state_digest(module)
    with pytest.raises(BudgetError, match="cannot be reached"):
        fit(tmp_path, module, pruner(0.9, granularities=["kv_group"]))
    assert state_digest(module) == before
    assert module.losses == []


def test_f16_non_finite_weights_are_refused_in_setup(tmp_path):
    module = LM()
    with torch.no_grad():
        module.lm.model.layers[2].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"layers.2.mlp.up_proj.weight has 1 of"):
        fit(tmp_path, module, pruner())
    assert module.losses == []


@pytest.mark.event("Numbers", "gradient checkpointing", "works")
def test_gradient_checkpointing(tmp_path):
    callback, module = pruner(), LM()
    module.lm.gradient_checkpointing_enable()
    fit(tmp_path, module, callback, max_epochs=2)
    assert abs(callback.report_.achieved_ratio - 0.3) <= 0.005
    assert all(layer.gradient_checkpointing for layer in module.lm.model.layers)
    before = len(module.losses)
    fit(tmp_path, module, callback)
    assert len(module.losses) == before + 1


@pytest.mark.event(
    "Numbers", "precision `bf16-true`, `bf16-mixed`, `64-true`", "prunes; dtypes stay"
)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision(tmp_path, precision):
    callback, module = pruner(), LM()
    dense = decoder_parameters(module.lm)
    fit(tmp_path, module, callback, precision=precision, max_epochs=2)
    assert abs(1 - decoder_parameters(module.lm) / dense - 0.3) <= 0.005
    want = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in module.parameters()} == {want}
    assert {mean.dtype for mean, _ in callback.calibration_.units.values()} == {torch.float64}
    fit(tmp_path, module, callback, precision=precision)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true", "64-true"])
def test_f22_moments_in_the_loop_are_exact_in_every_precision(tmp_path, precision):
    """Neither the default dtype nor the autocast of the precision plugin reaches the statistics."""
    inputs = []

    class Keeping(LM):
        def on_validation_start(self):
            keep = lambda _module, args: inputs.append(args[0].double().flatten(0, 1))  # noqa: E731
            self.handle = self.lm.model.layers[1].mlp.down_proj.register_forward_pre_hook(keep)

        def on_validation_end(self):
            self.handle.remove()

    callback = pruner()
    one = trainer(tmp_path, callback, precision=precision)
    one.validate(Keeping(tiny_model().eval()), loader(ROWS, 1), verbose=False)
    assert callback.calibration_.source == "validation loop"
    sides = [side_of(Row.of(row).digest) == "calibrate" for row in ROWS]
    wanted = torch.cat([x for x, side in zip(inputs, sides, strict=True) if side])
    mean, variance = callback.calibration_.units[1, "mlp"]
    torch.testing.assert_close(mean, wanted.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, wanted.var(0, correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.event("Numbers", "quantised weights", "refused by name in `setup`")
def test_quantised_weights_are_refused_by_name_in_setup(tmp_path):
    module = LM()
    up = module.lm.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight has dtype torch.int8"):
        fit(tmp_path, module, pruner())


@pytest.mark.gpu
@pytest.mark.event("Numbers", "precision `16-mixed`, on a GPU", "prunes; weights stay float32")
def test_mixed_float16_on_a_gpu(tmp_path):
    callback, module = pruner(), LM()
    fit(tmp_path, module, callback, accelerator="gpu", devices=1, precision="16-mixed")
    assert abs(callback.report_.achieved_ratio - 0.3) <= 0.005
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.event("Numbers", "frozen parameters", "stay frozen")
def test_frozen_parameters_stay_frozen(tmp_path):
    module = LM()
    module.lm.model.layers[0].requires_grad_(requires_grad=False)
    fit(tmp_path, module, pruner())
    frozen = [name for name, p in module.lm.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(".layers.0." in name for name in frozen)


@pytest.mark.event("Neighbours", "manual optimization", "works")
def test_manual_optimization(tmp_path):
    class Manual(LM):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callback, module = pruner(), Manual()
    fit(tmp_path, module, callback, train=loader(TRAIN, 4))
    assert abs(callback.report_.achieved_ratio - 0.3) <= 0.005


@pytest.mark.event("Numbers", "a GPU", "calibrates, prunes and measures there")
@pytest.mark.gpu
def test_fit_on_a_gpu_prunes_and_measures_there(tmp_path):
    """Lightning has moved the module to the CPU when the fit ends; it is left there."""
    callback, module = pruner(latency_prompt_tokens=16), LM()
    fit(tmp_path, module, callback, accelerator="gpu", devices=1)
    assert callback.report_.row("prefill_seconds").after > 0
    assert "cuda" in callback.report_.to_json()
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    fit(tmp_path, module, callback, accelerator="gpu", devices=1)
    assert module.losses[-1] < module.losses[0]

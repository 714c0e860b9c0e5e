"""Checkpoints of pruned models, loaded where the dense one is built."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune import follow_checkpoints
from lit_prune.decoder import spec_for
from lit_prune.errors import PlanMismatchError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import apply_plan, take_structure
from tests.lightning.modules import LM, ROWS, TRAIN, loader, pruner, trainer
from tests.models import tiny_model
from tests.saving.cases import FAMILIES, KINDS, logits, pruned
from tests.state import unchanged


class Following(LM):
    """A user's module: it builds the dense model, and follows what is loaded."""

    def __init__(self, lm=None, **options):
        super().__init__(lm, **options)
        follow_checkpoints(self)


def fit(tmp_path, module, *callbacks, ckpt_path=None, **options):
    one = trainer(tmp_path, *callbacks, **{"max_epochs": 1, **options})
    one.fit(module, loader(TRAIN), loader(ROWS), ckpt_path=ckpt_path)
    return one


@pytest.fixture
def recovered(tmp_path):
    """A pruned module after a recovery fit, the callback; a whole checkpoint, and weights only."""
    callback, module = pruner(), LM()
    fit(tmp_path, module, callback)
    one = fit(tmp_path, module, callback)
    one.save_checkpoint(tmp_path / "whole.ckpt")
    one.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    return module, callback


@pytest.mark.event(
    "Checkpoints",
    "`Module.load_from_checkpoint`, whole or weights only, after `follow_checkpoints(self)`",
    "the pruned model",
)
@pytest.mark.parametrize("name", ["whole", "weights"])
def test_f32_load_from_checkpoint_gives_the_pruned_model(name, recovered, tmp_path):
    module, _ = recovered
    loaded = Following.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
    shapes = {n: p.shape for n, p in loaded.named_parameters()}
    assert shapes == {n: p.shape for n, p in module.named_parameters()}
    assert torch.equal(logits(loaded.lm), logits(module.lm.eval()))
    assert loaded.lm.generate(torch.tensor([[5, 6]]), max_new_tokens=4).shape == (1, 6)


def test_f32_load_from_checkpoint_in_a_fresh_process(recovered, tmp_path):
    module, _ = recovered
    torch.save(logits(module.lm.eval()), tmp_path / "wanted.pt")
    script = (
        "import sys, torch\n"
        "from tests.lightning.test_pruned_checkpoints import Following, logits\n"
        "folder = sys.argv[1]\n"
        "found = Following.load_from_checkpoint(folder + '/whole.ckpt', weights_only=True)\n"
        "wanted = torch.load(folder + '/wanted.pt', weights_only=True)\n"
        "torch.set_num_threads(1)\n"
        "assert torch.equal(logits(found.lm.eval()), wanted)\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.event(
    "Checkpoints",
    "a pruned checkpoint into a dense module, with the callback",
    "takes the pruned structure",
)
def test_f32_the_recovery_resumes_in_a_dense_module_with_the_callback(recovered, tmp_path):
    """No call in the module: the callback follows for it, and does not prune again."""
    module, callback = recovered
    fresh, dense = pruner(), LM()
    fit(tmp_path, dense, fresh, ckpt_path=tmp_path / "whole.ckpt", max_epochs=3)
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    assert not hasattr(fresh, "plan_")
    assert fresh.state_dict() == callback.state_dict()
    assert dense.lm.pruning_record.plan == callback.plan_
    assert len(dense.losses) > 0
    assert not dense._load_state_dict_pre_hooks


@pytest.mark.event(
    "Checkpoints",
    "the same without the callback, after `follow_checkpoints(self)`",
    "takes the pruned structure",
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_f32_the_recovery_resumes_in_a_following_module_without_the_callback(recovered, tmp_path):
    module, _ = recovered
    dense = Following()
    one = fit(tmp_path, dense, ckpt_path=tmp_path / "whole.ckpt", max_epochs=3)
    optimized = {id(p) for group in one.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in dense.parameters()}
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }


@pytest.mark.event(
    "Checkpoints",
    "`validate`, `test` with `ckpt_path` of a pruned checkpoint",
    "run the pruned model",
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_f32_validate_and_test_of_a_pruned_checkpoint(recovered, tmp_path):
    dense = Following()
    one = trainer(tmp_path)
    one.validate(dense, loader(), ckpt_path=tmp_path / "whole.ckpt", verbose=False)
    assert torch.equal(logits(dense.lm.eval()), logits(recovered[0].lm.eval()))


def test_a_dense_checkpoint_into_a_dense_module_changes_no_structure(tmp_path):
    module = Following()
    before = {n: p.shape for n, p in module.named_parameters()}
    module.load_state_dict(LM(tiny_model(seed=3)).state_dict())
    assert {n: p.shape for n, p in module.named_parameters()} == before


@pytest.mark.event(
    "Checkpoints",
    "a dense checkpoint into a pruned module",
    "`PlanMismatchError` that says what to do",
)
def test_f32_a_dense_checkpoint_into_a_pruned_module_says_what_to_do(recovered):
    module, _ = recovered
    follow_checkpoints(module)
    with (
        unchanged(module.lm),
        pytest.raises(
            PlanMismatchError, match=r"they hold 4 layers, this model has \d|units there, \d+ here"
        ),
    ):
        module.load_state_dict(LM().state_dict())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_f32_the_best_checkpoint_of_the_run_is_dense_and_says_so(stage, tmp_path):
    """Lightning would say "size mismatch" for every parameter."""

    class Tested(LM):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

    callback, module = pruner(), Tested()
    save = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    one = fit(tmp_path, module, callback, save, enable_checkpointing=True)
    with unchanged(module.lm), pytest.raises(PlanMismatchError, match="Build the module with the"):
        getattr(one, stage)(module, loader(), ckpt_path="best", verbose=False)
    # and the dense model is where it was
    dense = Tested.load_from_checkpoint(save.best_model_path, weights_only=True)
    assert dense.lm.model.layers[0].mlp.up_proj.out_features == 48


@pytest.mark.event(
    "Checkpoints", "weights of another model", "`PlanMismatchError` that says what differs"
)
def test_weights_of_another_model_say_what_differs():
    module = Following()
    for other, words in (
        (tiny_model(layers=6), "they hold 6 layers, this model has 4"),
        (tiny_model(intermediate_size=64), "has 64 units there, 48 here"),
        (tiny_model(vocab_size=80), r"(embed_tokens|lm_head).weight differs"),
    ):
        with unchanged(module.lm), pytest.raises(PlanMismatchError, match=words):
            module.load_state_dict(LM(other).state_dict())


@pytest.mark.event(
    "Checkpoints",
    "the checkpoint of another plan into a dense module",
    "takes that plan's structure",
)
def test_f32_another_plan_is_taken_as_it_is(recovered, tmp_path):
    """A module that was pruned in one way loads what was pruned further."""
    model = tiny_model()
    layers = (LayerPlan(0, (0, 1), tuple(range(40))), *(LayerPlan(i, (0,), ()) for i in (1, 2, 3)))
    apply_plan(model, PruningPlan(spec_for(model).fingerprint, layers))
    dense = tiny_model()
    first = (LayerPlan(0, (0, 1), tuple(range(44))), *(LayerPlan(i, (0, 1), ()) for i in (1, 2, 3)))
    apply_plan(dense, PruningPlan(spec_for(dense).fingerprint, first))
    module = Following(dense)
    module.load_state_dict(LM(model).state_dict())
    assert torch.equal(logits(module.lm.eval()), logits(model.eval()))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_that_a_pruned_model_can_have(family, kind, tie):
    model, dense = pruned(family, kind, tie=tie), tiny_model(family, tie=tie)
    state = model.state_dict()
    changed = take_structure(dense, {name: tuple(x.shape) for name, x in state.items()})
    assert changed == (kind != "dense")
    dense.load_state_dict(state)
    assert torch.equal(logits(dense), logits(model))
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(dense.generate(ids, **options), model.generate(ids, **options))

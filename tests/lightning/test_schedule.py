"""Pruning in stages, one after each epoch, while the training goes on."""

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_prune import PruningPlan, apply_plan, load_pruned
from lit_prune.decoder import spec_for
from lit_prune.errors import BudgetError, ConfigError, UnsupportedModelError
from lit_prune.methods import sizes_of
from lit_prune.saving.page import html_of_directory
from tests.lightning.modules import (
    LM,
    TRAIN,
    decoder_parameters,
    fit,
    hooks,
    loader,
    pruner,
    said,
    state_digest,
    trainer,
)
from tests.models import tiny_model
from tests.saving.cases import logits
from tests.state import unchanged

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`"
)

RATIOS = [0.1, 0.25, 0.4]


def stages(ratios=RATIOS, **options):
    return pruner(list(ratios), when="epoch_end", **{"channel_multiple": None, **options})


class Scheduled(LM):
    """A module with a weight decay split and a schedule; it can be told to learn nothing."""

    def __init__(self, lm=None, *, lr=1e-2):
        super().__init__(tiny_model(intermediate_size=96) if lm is None else lm, lr=lr)

    def configure_optimizers(self):
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]


class Sizes(L.Callback):
    """What the optimizer steps on, at each epoch's first step and when the epoch ends."""

    def __init__(self):
        self.first, self.last, self.rates, self.untrained = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.first.append(decoder_parameters(pl_module.lm))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            held = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
            assert {id(p) for p in held} == {id(p) for p in pl_module.parameters()}
            assert pl_module.lm.training

    def on_train_epoch_end(self, trainer, pl_module):
        self.last.append(decoder_parameters(pl_module.lm))
        self.untrained += [
            name for name, p in pl_module.named_parameters() if torch.equal(p, self.weights[name])
        ]


def run(folder, module, callback, *callbacks, epochs=5, ckpt_path=None, **options):
    one = trainer(folder, callback, *callbacks, max_epochs=epochs, **options)
    one.fit(module, loader(TRAIN, 4), loader(), ckpt_path=ckpt_path)
    return one


def check(callback, module, dense, ratios=RATIOS):
    """Every stage met its ratio; the plan on the model is the composition."""
    record = module.lm.pruning_record
    assert callback.report_ is callback.reports_[-1]
    assert callback.report_.requested_ratio == ratios[-1]
    left = decoder_parameters(module.lm)
    assert abs(1 - left / dense - ratios[-1]) <= 0.005
    assert callback.report_.achieved_ratio == pytest.approx(1 - left / dense)
    assert record.plan == callback.plan_
    assert callback.report_.plan_digest == callback.plan_.digest
    found = record.plan.provenance["schedule"]
    assert found["ratios"] == ratios
    assert found["decoder_parameters"] == dense
    assert len(found["stages"]) == len(ratios)
    again = tiny_model(intermediate_size=96)
    apply_plan(again, record.plan)  # of the dense model
    sizes = {n: p.shape for n, p in module.lm.named_parameters() if not n.endswith("bias")}
    assert sizes == {n: p.shape for n, p in again.named_parameters()}


@pytest.mark.event(
    "Schedules",
    '`when="epoch_end"`, a ratio for each epoch',
    "pruned between epochs; optimizer and schedule go on",
)
def test_stages_follow_the_epochs_and_the_training_goes_on(tmp_path):
    module, callback, sizes = Scheduled(), stages(), Sizes()
    dense = decoder_parameters(module.lm)
    one = run(tmp_path, module, callback, sizes)
    assert [1 - x / dense for x in sizes.first] == pytest.approx([0, *RATIOS, 0.4], abs=0.005)
    assert sizes.first == sizes.last  # not at the end of an epoch: its checkpoints come before
    assert sizes.untrained == []
    assert sizes.rates == pytest.approx([1e-2 * 0.9**n for n in range(5)])
    assert [x.requested_ratio for x in callback.reports_] == RATIOS
    for report, ratio in zip(callback.reports_, RATIOS, strict=True):
        assert abs(report.achieved_ratio - ratio) <= 0.005
    assert "stage 2 of 3: " in callback.reports_[1].warnings[0]
    assert "of the dense model's (asked 25.00%)" in callback.reports_[1].warnings[0]
    check(callback, module, dense)
    assert sum(module.losses[-2:]) < sum(module.losses[:2])
    assert hooks(module) == 0
    assert module.validations == 5 * 5 + 2  # an epoch each, and the sanity check
    # states as of an optimizer that is built anew and stepped
    steps = {float(state["step"]) for state in one.optimizers[0].state.values()}
    assert max(steps) == 10


def test_the_last_stage_may_be_when_the_fit_ends(tmp_path):
    module, callback = Scheduled(), stages()
    dense = decoder_parameters(module.lm)
    save = ModelCheckpoint(tmp_path / "files")
    run(tmp_path, module, callback, save, epochs=3, enable_checkpointing=True)
    check(callback, module, dense)
    assert (tmp_path / "files" / "pruned.ckpt").exists()
    fresh, again = stages(), Scheduled()
    run(tmp_path, again, fresh, epochs=5, ckpt_path=tmp_path / "files" / "pruned.ckpt")
    assert decoder_parameters(again.lm) == decoder_parameters(module.lm)
    assert not fresh.reports_
    assert len(again.losses) == 2 * 2


@pytest.mark.event("Schedules", "checkpoints of an epoch", "hold what was validated")
def test_checkpoints_of_an_epoch_hold_what_was_validated(tmp_path):
    module, callback = Scheduled(), stages()
    save = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{epoch}")
    dense = decoder_parameters(module.lm)
    run(tmp_path, module, callback, save, epochs=4, enable_checkpointing=True)
    for epoch, ratio in enumerate([0, *RATIOS]):
        saved = torch.load(tmp_path / "files" / f"epoch={epoch}.ckpt", weights_only=True)
        left = sum(x.numel() for name, x in saved["state_dict"].items() if ".layers." in name)
        assert 1 - left / dense == pytest.approx(ratio, abs=0.005)
        plan = saved["callbacks"]["EntropyPruningCallback"]["plan"]
        assert bool(plan) == (epoch > 0)
        if plan:
            assert PruningPlan.from_json(plan).provenance["schedule"]["ratios"] == RATIOS[:epoch]


def resume_in_the_middle(folder):
    """Resume after the second epoch: one stage is done, two follow."""
    module, callback, sizes = Scheduled(), stages(), Sizes()
    dense = decoder_parameters(module.lm)
    run(folder, module, callback, sizes, ckpt_path=Path(folder) / "files" / "epoch=1.ckpt")
    assert [1 - x / dense for x in sizes.first] == pytest.approx([0.25, 0.4, 0.4], abs=0.005)
    assert sizes.untrained == []
    assert sizes.rates == pytest.approx([1e-2 * 0.9**n for n in range(2, 5)])
    assert [x.requested_ratio for x in callback.reports_] == RATIOS[1:]
    check(callback, module, dense)
    return module


@pytest.fixture
def halfway(tmp_path):
    save = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{epoch}")
    run(tmp_path, Scheduled(), stages(), save, epochs=3, enable_checkpointing=True)
    return tmp_path


@pytest.mark.event("Schedules", "resumed in the middle", "goes on with the next stage")
def test_a_resume_goes_on_with_the_next_stage(halfway):
    resume_in_the_middle(halfway)


@pytest.mark.event(
    "Schedules", "resumed in the middle, in a new process", "goes on with the next stage"
)
def test_a_resume_in_a_fresh_process_goes_on_with_the_next_stage(halfway):
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.lightning.test_schedule import resume_in_the_middle\n"
        "resume_in_the_middle(sys.argv[1])\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(halfway)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_resume_in_the_same_callback(halfway):
    """Another module, and a callback that has pruned before."""
    callback, first = stages(), Scheduled()
    run(halfway / "first", first, callback)
    module = Scheduled()
    dense = decoder_parameters(module.lm)
    run(halfway, module, callback, ckpt_path=halfway / "files" / "epoch=1.ckpt")
    check(callback, module, dense)
    assert [x.requested_ratio for x in callback.reports_] == RATIOS[1:]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resume_in_the_middle_of_an_epoch_does_no_stage_twice(tmp_path):
    save = ModelCheckpoint(tmp_path / "files", every_n_train_steps=3, save_top_k=-1)
    run(tmp_path, Scheduled(), stages(), save, epochs=3, enable_checkpointing=True)
    module, callback = Scheduled(), stages()
    dense = decoder_parameters(module.lm)
    run(tmp_path, module, callback, ckpt_path=tmp_path / "files" / "epoch=1-step=3.ckpt")
    assert [x.requested_ratio for x in callback.reports_] == RATIOS[1:]
    check(callback, module, dense)


def test_epochs_without_validation_are_validated_first(tmp_path):
    module, callback = Scheduled(), stages()
    dense = decoder_parameters(module.lm)
    run(tmp_path, module, callback, check_val_every_n_epoch=10, num_sanity_val_steps=0)
    assert module.validations == 3 * 5
    check(callback, module, dense)
    assert sum(module.losses[-2:]) < sum(module.losses[:2])


SLOWLY = [pytest.param(o, marks=pytest.mark.slow) for o in ({"compensation": "none"}, {})]


@pytest.mark.parametrize("options", [{"allocator": "uniform_widths"}, *SLOWLY])
def test_whole_layers_leave_in_several_stages(tmp_path, options):
    """Blocks and sub-blocks only: the stack is renumbered, constants stand in."""
    ratios = [0.2, 0.45, 0.7]
    options = {"granularities": ["block", "sub_block", "channel"], **options}
    module, callback = Scheduled(tiny_model(layers=6)), stages(ratios, **options)
    dense = decoder_parameters(module.lm)
    run(tmp_path, module, callback)
    for report, ratio in zip(callback.reports_, ratios, strict=True):
        assert abs(report.achieved_ratio - ratio) <= 0.005
    assert abs(1 - decoder_parameters(module.lm) / dense - 0.7) <= 0.005
    kept = callback.plan_.stack(len(module.lm.model.layers))
    for layer, index in zip(spec_for(module.lm).blocks, kept, strict=True):
        plan = callback.plan_.layers[index]
        assert (layer.mlp.num_units if layer.mlp else 0) == len(plan.channels)
        assert (layer.attention.num_units if layer.attention else 0) == len(plan.kv_groups)
    assert sum(module.losses[-2:]) < sum(module.losses[:2])


def test_protected_layers_keep_their_number_in_the_dense_model(tmp_path):
    options = {"granularities": ["block", "channel"], "protected_layers": [4, 5]}
    module, callback = Scheduled(tiny_model(layers=6)), stages([0.25, 0.5], **options)
    run(tmp_path, module, callback)
    for layer in callback.plan_.layers[4:]:
        assert len(layer.channels) == 48
    assert len(module.lm.model.layers) < 6


def test_files_of_each_stage(tmp_path):
    module, callback = Scheduled(), stages()
    run(tmp_path, module, callback)
    folder = tmp_path / "pruning"
    names = {"calibration.safetensors", "compensation.safetensors", "plan.json", "report.json"}
    names.add("report.html")
    for number in range(3):
        assert {path.name for path in (folder / f"epoch-{number}").iterdir()} == names
    whole = PruningPlan.load(folder / "plan.json")
    assert whole == callback.plan_
    first, *others = [PruningPlan.load(folder / f"epoch-{n}" / "plan.json") for n in range(3)]
    for other in others:
        first = other.after(first)
    assert first == whole
    assert json.loads((folder / "report.json").read_text())["requested_ratio"] == 0.4
    # the whole of it, in terms of the dense model
    assert whole.provenance["sizes"] == sizes_of(spec_for(Scheduled().lm))
    assert "prices" not in whole.provenance
    assert "of 384 MLP channels" in html_of_directory(folder)


@pytest.mark.slow
def test_a_model_that_stages_have_pruned_is_saved_and_loaded(tmp_path):
    module, callback = Scheduled(), stages()
    run(tmp_path, module, callback)
    folder = callback.save_pruned(tmp_path / "saved")
    loaded = load_pruned(folder)
    assert torch.equal(logits(loaded.eval()), logits(module.lm.eval()))
    assert loaded.pruning_record.plan == callback.plan_


def test_a_second_fit_recovers_and_another_module_starts_anew(tmp_path):
    module, callback = Scheduled(), stages()
    run(tmp_path, module, callback)
    size = decoder_parameters(module.lm)
    with said() as text:
        fit(tmp_path, module, callback, max_epochs=4)
    assert "stages [0.1, 0.25, 0.4] are behind this model" in text.getvalue()
    assert decoder_parameters(module.lm) == size
    assert len(callback.reports_) == 3
    other = Scheduled()
    dense = decoder_parameters(other.lm)
    run(tmp_path, other, callback)
    check(callback, other, dense)
    assert len(callback.reports_) == 3


def test_other_ratios_start_from_what_is_there(tmp_path):
    module = Scheduled()
    run(tmp_path, module, stages())
    size, callback = decoder_parameters(module.lm), stages([0.1, 0.2])
    run(tmp_path, module, callback)
    assert abs(1 - decoder_parameters(module.lm) / size - 0.2) <= 0.005


@pytest.mark.event(
    "Schedules", "the run ends early", "the report says which stages were not reached"
)
def test_a_run_that_ends_early_says_which_stages_it_did_not_reach(tmp_path):
    module, callback = Scheduled(), stages()
    stop = EarlyStopping("val_loss", mode="max", patience=1)  # it gets better: stop soon
    run(tmp_path, module, callback, stop)
    assert [x.requested_ratio for x in callback.reports_] == RATIOS[:2]
    assert "the run ended before the stages [0.4]" in callback.report_.warnings


@pytest.mark.parametrize(
    ("ratio", "when", "more", "match"),
    [
        ([0.1, 0.2], "fit_end", {}, "only it does"),
        (0.2, "epoch_end", {}, "by a list of ratios"),
        ([], "epoch_end", {}, "must be cumulative"),
        ([0.2, 0.1], "epoch_end", {}, "must be cumulative"),
        ([0.2, 0.205], "epoch_end", {}, "at least 0.01 above the one before"),
        ([0.0, 0.2], "epoch_end", {}, "must be cumulative"),
        ([0.2, 1.2], "epoch_end", {}, "pruning_ratio must be a number in"),
        (["0.2"], "epoch_end", {}, "pruning_ratio must be a number in"),
        ([0.2], "epoch", {}, "when must be 'fit_end', 'validate' or 'epoch_end'"),
        ([0.2], "epoch_end", {"dry_run": True}, "dry_run changes nothing"),
        ([0.2], "epoch_end", {"weights": "best"}, "weights 'best' are those of a fit when it ends"),
        ([0.2], "epoch_end", {"budget": "flops"}, "counts decoder parameters, got budget='flops'"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_construction(ratio, when, more, match):
    with pytest.raises(ConfigError, match=match):
        pruner(ratio, when=when, **more)


def test_the_smallest_step_is_taken_as_it_is_written():
    assert stages([0.1, 0.11]).config.pruning_ratio == 0.11  # a difference of 0.00999…


@pytest.mark.event(
    "Schedules", "fewer epochs than stages, or averaging", "refused by name in `setup`"
)
def test_what_cannot_work_is_refused_before_the_run(tmp_path):
    module = Scheduled()
    cases = [
        ({"epochs": 2}, [], ConfigError, "has 3 stages, one after each epoch, and max_epochs is 2"),
        ({}, [EMAWeightAveraging(decay=0.5)], UnsupportedModelError, "EMAWeightAveraging averages"),
        ({}, [StochasticWeightAveraging(1e-2)], UnsupportedModelError, "averages weights over"),
    ]
    for options, callbacks, error, match in cases:
        with unchanged(module.lm), pytest.raises(error, match=match):
            run(tmp_path, module, stages(), *callbacks, **options)
    with unchanged(module.lm), pytest.raises(BudgetError, match=r"pruning_ratio 0\.99"):
        run(tmp_path, module, stages([0.1, 0.99]))
    assert module.losses == []


@pytest.mark.event("Schedules", "a stage fails", "what the stage before has left")
def test_a_stage_that_fails_leaves_what_the_one_before_has_left(tmp_path, monkeypatch):
    import lit_prune.pruner as pipeline

    measure, calls, digests = pipeline.measure, [], []

    def failing(model, *args):
        calls.append(1)
        if len(calls) == 3:  # before the second stage
            digests.append(state_digest(model))
        if len(calls) == 4:
            raise RuntimeError("no memory to measure again")
        return measure(model, *args)

    monkeypatch.setattr(pipeline, "measure", failing)
    module, callback = Scheduled(), stages()
    one = trainer(tmp_path, callback, max_epochs=5)
    with pytest.raises(RuntimeError, match="no memory"):
        one.fit(module, loader(TRAIN, 4), loader())
    assert state_digest(module.lm) == digests[0]
    assert module.lm.pruning_record.plan == callback.plan_
    assert callback.report_.requested_ratio == 0.1
    held = {id(p) for g in one.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert hooks(module) == 0


def test_a_rehearsal_changes_nothing(tmp_path):
    module, callback = Scheduled(), stages()
    fit(tmp_path, module, callback, fast_dev_run=True)
    assert decoder_parameters(module.lm) == decoder_parameters(Scheduled().lm)
    assert not hasattr(module.lm, "pruning_record")


@pytest.mark.slow
def test_every_stage_is_logged(tmp_path):
    class Kept(CSVLogger):
        def __init__(self, folder):
            super().__init__(folder)
            self.seen = []

        def log_metrics(self, metrics, step=None):
            self.seen += [(step, name) for name in metrics if name.startswith("prune/")]
            super().log_metrics(metrics, step)

    logger, callback = Kept(tmp_path), stages()
    run(tmp_path, Scheduled(), callback, logger=[logger, TensorBoardLogger(tmp_path)])
    assert len({step for step, _ in logger.seen}) >= 3


def test_manual_optimization_goes_on(tmp_path):
    class Manual(Scheduled):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()

    module, callback, sizes = Manual(), stages(), Sizes()
    dense = decoder_parameters(module.lm)
    run(tmp_path, module, callback, sizes)
    check(callback, module, dense)
    assert sizes.untrained == []
    assert sum(module.losses[-2:]) < sum(module.losses[:2])

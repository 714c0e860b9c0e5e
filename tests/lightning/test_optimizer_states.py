"""Optimizers after a pruning: what stays keeps its moments, its group and its schedule."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

import lit_prune.pruner
from lit_prune.decoder import spec_for
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.running import carried_over
from lit_prune.surgery import StagedEdits, applied, mean_compensation
from tests.lightning.modules import (
    LM,
    TRAIN,
    decoder_parameters,
    fit,
    loader,
    pruner,
    stop_at_call,
    trainer,
)
from tests.models import tiny_model


class Optimized(LM):
    """A module with the optimizer that a test asks for, and a schedule."""

    def __init__(self, make=None, lm=None):
        super().__init__(lm)
        self.make = make or (lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2))

    def configure_optimizers(self):
        optimizer = self.make(self)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}


def split(module):
    """Weight decay for matrices alone, as most people write it."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-2},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


MAKERS = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9),
    "adamw": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2),
    "amsgrad": lambda module: torch.optim.AdamW(
        module.parameters(), lr=1e-2, amsgrad=True, foreach=False
    ),
    "fused": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True),
    "split": split,
    "named": lambda module: torch.optim.AdamW(module.named_parameters(), lr=1e-2),
}


class Before(L.Callback):
    """The optimizer's states by name, as the training leaves them."""

    def on_train_end(self, trainer, pl_module):
        states = trainer.optimizers[0].state
        self.states = {
            name: {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in states[p].items()
            }
            for name, p in pl_module.named_parameters()
        }


def rows(units, width):
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).reshape(-1)


def expected(name, value, plan):
    """What of a dense state belongs to the pruned parameter: written down naively."""
    if value.ndim == 0 or ".layers." not in name:
        return value
    parts = name.split(".")
    layer = plan.layers[int(parts[parts.index("layers") + 1])]
    what = parts[-2]
    groups = layer.kv_groups
    cut = {
        "q_proj": (0, rows(groups, 16)),
        "k_proj": (0, rows(groups, 8)),
        "v_proj": (0, rows(groups, 8)),
        "o_proj": (1, rows(groups, 16)),
        "gate_proj": (0, torch.tensor(layer.channels)),
        "up_proj": (0, torch.tensor(layer.channels)),
        "down_proj": (1, torch.tensor(layer.channels)),
    }
    if what not in cut:
        return value
    dim, index = cut[what]
    if value.ndim == 1 and dim == 1:  # an output bias
        return value
    return value.index_select(dim, index.long())


def dense_names(plan):
    """Name in the pruned module -> name in the dense one: removed layers renumber the stack."""
    stay = [x.index for x in plan.layers if x.kv_groups or x.channels]
    return lambda name: (
        name
        if ".layers." not in name
        else (
            name.split(".layers.")[0]
            + f".layers.{stay[int(name.split('.layers.')[1].split('.')[0])]}."
            + name.split(".layers.")[1].split(".", 1)[1]
        )
    )


def check_moments(module, states, before, plan):
    """Every state is its part of the dense one; return how many new biases have none."""
    dense, fresh = dense_names(plan), 0
    for name, parameter in module.named_parameters():
        if dense(name) not in before:
            assert name.endswith("bias")
            assert parameter not in states
            fresh += 1
            continue
        old, new = before[dense(name)], states[parameter]
        assert new.keys() == old.keys()
        for key, value in old.items():
            wanted = expected(dense(name), value, plan)
            assert torch.equal(new[key].cpu(), wanted), (name, key)
    assert len(states) == len(list(module.parameters())) - fresh
    return fresh


@pytest.mark.event(
    "Checkpoints",
    "optimizers after the pruning",
    "keep groups, options and the moments of what stays",
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("make", MAKERS)
def test_moments_are_slices_of_those_before(tmp_path, make, family):
    callback, before = pruner(0.35), Before()
    module = Optimized(MAKERS[make], tiny_model(family, layers=3))
    one = fit(tmp_path, module, callback, before, train=loader(TRAIN, 4), max_epochs=2)
    optimizer = one.optimizers[0]
    assert check_moments(module, optimizer.state, before.states, callback.plan_) > 0
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}
    # as an optimizer that is built anew: checkpoints know parameters by their place
    anew = module.make(module)
    for group, wanted in zip(optimizer.param_groups, anew.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted["params"]]
        assert len(group.get("param_names", held)) in (len(group["params"]), len(held))
    assert [g["lr"] for g in optimizer.param_groups] == [
        g["lr"] / 4 for g in anew.param_groups
    ]  # two epochs of the schedule
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.train().training_step(next(iter(loader(TRAIN))), 0).backward()
    optimizer.step()
    one.lr_scheduler_configs[0].scheduler.step()
    same = [name for name, p in module.named_parameters() if torch.equal(p, weights[name])]
    assert same == []
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


class Marking(L.Callback):
    """Makes the first moment of every parameter equal to it: both are cut alike, or it shows."""

    def on_train_end(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            trainer.optimizers[0].state[parameter]["exp_avg"].copy_(parameter.detach())


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_moments_of_fused_and_transposed_weights_are_cut_as_they_are(tmp_path, family):
    module = Optimized(lm=tiny_model(family, layers=3))
    dense = {name: p.shape for name, p in module.named_parameters()}
    callback = pruner(0.35, compensation="none", granularities=("kv_group", "channel"))
    one = fit(tmp_path, module, callback, Marking(), train=loader(TRAIN, 4))
    states, cut = one.optimizers[0].state, 0
    for name, parameter in module.named_parameters():
        assert torch.equal(states[parameter]["exp_avg"], parameter), name
        cut += parameter.shape != dense[name]
    assert cut >= 4  # of attention and MLP, in and out
    module.train().training_step(next(iter(loader(TRAIN))), 0).backward()
    one.optimizers[0].step()


def test_every_kind_of_removal_has_its_place_in_the_groups(tmp_path):
    """A layer, an attention and an MLP that go whole; the first attention leaves its constant."""
    module = Optimized(split, tiny_model(layers=5))
    callback, before = pruner(0.6, channel_multiple=8), Before()
    one = fit(tmp_path, module, callback, before)
    assert any(not x.kv_groups or not x.channels for x in callback.plan_.layers)
    check_moments(module, one.optimizers[0].state, before.states, callback.plan_)
    for group, wanted in zip(
        one.optimizers[0].param_groups, split(module).param_groups, strict=True
    ):
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted["params"]]


LAYERS = {
    "first attention": [((), 24), ((0, 1), 48), ((0,), 48), ((0, 1), 0)],
    "first layer": [((), 0), ((), 48), ((0,), 24), ((0, 1), 48)],
    "first layers": [((), 0), ((), 0), ((0,), 24), ((0, 1), 48)],
    "first MLP": [((0,), 0), ((), 0), ((0, 1), 48), ((0,), 0)],
}


@pytest.mark.parametrize("make", ["adamw", "split", "named"])
@pytest.mark.parametrize("case", LAYERS)
def test_constants_have_their_place_in_the_groups(case, make):
    """Also where nothing is left before them, and when a second pruning adds to them."""
    module = Optimized(MAKERS[make])
    optimizer = module.make(module)

    def step():
        optimizer.zero_grad()
        module.training_step(next(iter(loader(TRAIN))), 0).backward()
        optimizer.step()

    step()
    for layers in (LAYERS[case], None):
        spec = spec_for(module.lm)
        kept = [
            LayerPlan(index, groups, tuple(range(channels)))
            for index, (groups, channels) in enumerate(layers or [])
        ] or [  # the second: half of every MLP that is there
            LayerPlan(
                block.index,
                tuple(range(block.attention.num_units if block.attention else 0)),
                tuple(range(0, block.mlp.num_units, 2)) if block.mlp else (),
            )
            for block in spec.blocks
        ]
        plan = PruningPlan(spec.fingerprint, tuple(kept))
        units = {
            (i, p.kind): (torch.ones(p.num_units * p.unit_width).double(), None)
            for i, p in spec.sub_blocks
        }
        compensation = mean_compensation(module.lm, plan, units)
        with (
            applied(module.lm, plan, compensation) as replaced,
            carried_over([optimizer], module.lm, replaced) as words,
        ):
            assert words == ()
        anew = module.make(module)
        for group, wanted in zip(optimizer.param_groups, anew.param_groups, strict=True):
            assert [id(p) for p in group["params"]] == [id(p) for p in wanted["params"]]
            if make == "named":
                assert len(group["param_names"]) == len(wanted["param_names"])
                assert all(
                    name.rsplit(".", 2)[1:] == other.rsplit(".", 2)[1:]
                    for name, other in zip(group["param_names"], wanted["param_names"], strict=True)
                )
        new = [p for p in module.parameters() if p not in optimizer.state]
        assert all(p.shape == (32,) for p in new)
        anew.load_state_dict(optimizer.state_dict())
        step()
        assert all(p in optimizer.state for p in module.parameters())


def test_frozen_parameters_stay_out(tmp_path):
    class Partly(LM):
        def configure_optimizers(self):
            for parameter in self.lm.model.layers[:2].parameters():
                parameter.requires_grad_(requires_grad=False)
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-2)

    module = Partly()
    one = fit(tmp_path, module, pruner())
    held = {id(p) for group in one.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert 0 < len(held) < len(list(module.parameters()))


def test_states_of_other_shapes_start_anew_and_the_report_says_so(tmp_path):
    module = Optimized(lambda module: torch.optim.Adafactor(module.parameters(), lr=1e-2))
    callback = pruner()
    one = fit(tmp_path, module, callback)
    said = [text for text in callback.report_.warnings if "Adafactor" in text]
    assert len(said) == 1
    assert "start anew" in said[0]
    states = one.optimizers[0].state
    assert module.lm.lm_head.weight in states  # it was not cut
    module.train().training_step(next(iter(loader(TRAIN))), 0).backward()
    one.optimizers[0].step()
    assert all(p in states for p in module.parameters())


def test_a_pruning_that_fails_leaves_the_optimizer_as_it_was(tmp_path, monkeypatch):
    error = RuntimeError("no memory to measure again")
    stop_at_call(monkeypatch, lit_prune.pruner, "measure", 2, error)
    module, before = Optimized(split), Before()
    one = trainer(tmp_path, pruner(), before)
    with pytest.raises(RuntimeError, match="no memory"):
        one.fit(module, loader(TRAIN), loader())
    optimizer = one.optimizers[0]
    states = {name: optimizer.state[p] for name, p in module.named_parameters()}
    for name, state in states.items():
        assert all(torch.equal(state[key], before.states[name][key]) for key in state)
    for group, wanted in zip(optimizer.param_groups, split(module).param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted["params"]]


def test_nothing_is_assigned_where_preparing_fails():
    linear = torch.nn.Linear(4, 3)
    first, second = (torch.optim.SGD(linear.parameters(), lr=0.1) for _ in range(2))
    before, edits = list(linear.parameters()), StagedEdits()
    edits.parameter(linear, "weight", linear.weight[:, :2], kept=(1, torch.tensor([0, 99])))
    second.state[linear.weight]["momentum_buffer"] = torch.ones(3, 4)
    edits.commit()
    record = edits.record(before, linear.parameters())
    with (
        pytest.raises(RuntimeError, match="bounds"),
        carried_over([first, second], linear, record),
    ):
        pytest.fail("prepared")
    for optimizer in (first, second):
        assert optimizer.param_groups[0]["params"][0] is before[0]
    assert second.state[before[0]]["momentum_buffer"].shape == (3, 4)


def resumed(folder, **options):
    """Resume ``after.ckpt`` in a module that builds the dense model, and check what goes on."""

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.optimizer = trainer.optimizers[0]
            self.states = {
                name: {key: value.clone() for key, value in self.optimizer.state[p].items()}
                for name, p in pl_module.named_parameters()
                if p in self.optimizer.state
            }
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    module, fresh, start = Optimized(split), pruner(), Start()
    one = trainer(folder, fresh, start, max_epochs=8, **options)
    one.fit(module, loader(TRAIN, 4), loader(), ckpt_path=Path(folder) / "after.ckpt")
    wanted = torch.load(Path(folder) / "states.pt", weights_only=True)
    assert start.states.keys() == wanted.keys()
    for name, state in wanted.items():
        assert state.keys() == start.states[name].keys()
        assert all(torch.equal(value, start.states[name][key]) for key, value in state.items())
    same = [n for n, p in module.named_parameters() if torch.equal(p, start.weights[n])]
    assert same == []
    assert not hasattr(fresh, "plan_")  # it is not pruned again
    digest = (Path(folder) / "digest.txt").read_text()
    assert module.lm.pruning_record.plan.digest == digest
    assert PruningPlan.from_json(fresh.state_dict()["plan"]).digest == digest
    assert len(module.losses) == 2 * (8 - 3)
    assert sum(module.losses[-2:]) < sum(module.losses[:2])
    return module


@pytest.fixture
def saved(tmp_path):
    """A run whose state is saved right after the pruning; its module."""
    module, callback = Optimized(split), pruner()
    one = fit(tmp_path, module, callback, train=loader(TRAIN, 4), max_epochs=3)
    one.save_checkpoint(tmp_path / "after.ckpt")
    states = one.optimizers[0].state
    named = {name: states[p] for name, p in module.named_parameters() if p in states}
    torch.save(named, tmp_path / "states.pt")
    (tmp_path / "digest.txt").write_text(callback.plan_.digest)
    return module


@pytest.mark.event(
    "Checkpoints", "`trainer.save_checkpoint` right after the pruning", "resumes with its moments"
)
def test_f31_a_checkpoint_right_after_pruning_resumes_with_its_moments(saved, tmp_path):
    module = resumed(tmp_path)
    assert decoder_parameters(module.lm) == decoder_parameters(saved.lm)


def test_f31_a_checkpoint_right_after_pruning_resumes_in_a_fresh_process(saved, tmp_path):
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.lightning.test_optimizer_states import resumed\n"
        "resumed(sys.argv[1])\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]

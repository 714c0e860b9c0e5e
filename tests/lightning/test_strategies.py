"""Where parameters cannot be replaced in place, the callback says so before anything runs."""

import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_prune.errors import UnsupportedModelError
from lit_prune.ranks import ALONE
from lit_prune.running import refuse_no_best
from lit_prune.running.sharded import whole_copy
from tests.lightning.modules import LM, hooks, pruner, state_digest, trainer
from tests.models import tiny_model


def setup(folder, strategy, stage="fit", **options):
    """Call `setup` as a Trainer on ``strategy`` would; no process is started."""
    callback, module = pruner(**options), LM()
    one = trainer(folder, callback)
    one._accelerator_connector.strategy = strategy
    before = state_digest(module)
    try:
        callback.setup(one, module, stage)
    finally:
        assert state_digest(module) == before
        assert hooks(module) == 0


@pytest.mark.event(
    "Several processes", "`ddp_fork`, `ddp_spawn`, `ddp_notebook`", "refused by name in `setup`"
)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_f33_forked_and_spawned_launchers_are_refused(tmp_path, method):
    strategy = trainer(tmp_path, strategy=f"ddp_{method}", devices=2).strategy
    with pytest.raises(UnsupportedModelError, match=f"start method '{method}'.*strategy='ddp'"):
        setup(tmp_path, strategy)


def test_f33_several_processes_without_ddp_are_refused(tmp_path):
    strategy = type("ElsewhereStrategy", (SingleDeviceStrategy,), {})("cpu")
    strategy.world_size = 2
    with pytest.raises(UnsupportedModelError, match=r"ElsewhereStrategy on 2 .*known are DDP"):
        setup(tmp_path, strategy)


class Gathered:
    """What `deepspeed.zero.GatheredParameters` does, which cannot be installed here: a stand-in."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        for parameter in self.parameters:
            parameter.data = parameter.ds_whole

    def __exit__(self, *_):
        for parameter in self.parameters:
            parameter.data = torch.empty(0)


def test_f33_a_copy_of_what_deepspeed_has_spread_is_whole(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.zero", SimpleNamespace(GatheredParameters=Gathered))
    model = tiny_model()
    before = state_digest(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_whole = number, parameter.data
        parameter.data = torch.empty(0)
    assert state_digest(whole_copy(model, ALONE)) == before
    assert {parameter.numel() for parameter in model.parameters()} == {0}


def test_f33_the_best_of_sharded_weights_are_refused_by_name(tmp_path):
    one = trainer(tmp_path)
    one._accelerator_connector.strategy = type("FSDPStrategy", (SingleDeviceStrategy,), {})("cpu")
    with pytest.raises(UnsupportedModelError, match=r"weights='best' .* not gathered"):
        refuse_no_best(one)


def test_f33_stage_that_does_not_concern_it_is_not_refused(tmp_path):
    strategy = SimpleNamespace(launcher=SimpleNamespace(_start_method="fork"), world_size=2)
    setup(tmp_path, strategy, "test")
    setup(tmp_path, strategy, "fit", when="validate")

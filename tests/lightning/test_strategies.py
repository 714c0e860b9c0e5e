"""Where parameters cannot be replaced in place, the callback says so before anything runs."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_prune.errors import UnsupportedModelError
from tests.lightning.modules import LM, hooks, pruner, state_digest, trainer


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


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_f33_forked_and_spawned_launchers_are_refused(tmp_path, method):
    strategy = trainer(tmp_path, strategy=f"ddp_{method}", devices=2).strategy
    with pytest.raises(UnsupportedModelError, match=f"start method '{method}'.*strategy='ddp'"):
        setup(tmp_path, strategy)


def test_f33_several_processes_without_ddp_are_refused(tmp_path):
    strategy = type("ElsewhereStrategy", (SingleDeviceStrategy,), {})("cpu")
    strategy.world_size = 2
    with pytest.raises(UnsupportedModelError, match=r"ElsewhereStrategy on 2 .* strategy='ddp'"):
        setup(tmp_path, strategy)


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_f33_sharded_parameters_are_refused(tmp_path, name):
    strategy = type(name, (SingleDeviceStrategy,), {})("cpu")
    with pytest.raises(UnsupportedModelError, match=f"{name} shards .* lit_prune.prune"):
        setup(tmp_path, strategy)


def test_f33_stage_that_does_not_concern_it_is_not_refused(tmp_path):
    strategy = SimpleNamespace(launcher=SimpleNamespace(_start_method="fork"), world_size=2)
    setup(tmp_path, strategy, "test")
    setup(tmp_path, strategy, "fit", when="validate")

"""Mixtures of experts under the Trainer: optimizer states and checkpoints follow packed weights."""

from tests.lightning.modules import LM, TRAIN, loader, pruner, trainer
from tests.models import tiny_mixture

# 3 and then 7 of the 24 experts; the whole decoder has 59,392 parameters, one of them 1,952.
STAGES = {
    "ratio": [3 * 1952 / 59392, 7 * 1952 / 59392],
    "when": "epoch_end",
    "preset": "flap",
    "granularities": ["expert"],
    "compensation": "none",
}


def test_stages_of_experts_and_a_checkpoint_between(tmp_path):
    module, one = LM(tiny_mixture("mixtral")), trainer(tmp_path, pruner(**STAGES), max_epochs=3)
    one.fit(module, loader(TRAIN), loader())
    kept = [layer.mlp.gate.weight.shape[0] for layer in module.lm.model.layers]
    assert sum(kept) == 24 - 7
    assert min(kept) >= 2
    states = one.optimizers[0].state
    parameters = dict(module.named_parameters())
    assert {id(p) for p in states} == {id(p) for p in parameters.values()}
    assert all(state["exp_avg"].shape == p.shape for p, state in states.items())
    one.save_checkpoint(tmp_path / "whole.ckpt")
    dense, again = LM(tiny_mixture("mixtral")), trainer(tmp_path, pruner(**STAGES), max_epochs=4)
    again.fit(dense, loader(TRAIN), loader(), ckpt_path=tmp_path / "whole.ckpt", weights_only=True)
    shapes = {name: p.shape for name, p in parameters.items()}
    assert {name: p.shape for name, p in dense.named_parameters()} == shapes
    assert len(dense.losses) == 1

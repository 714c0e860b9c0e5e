import pytest
import torch

from lit_prune.calibration import RecordedRun, Unit, bypass_units
from lit_prune.calibration.bypass import silenced
from lit_prune.decoder import ConstantOutput, DecoderParts, quiet, spec_for
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import apply_plan
from tests.models import padded_batch, tiny_model, tiny_rows
from tests.state import counted_forwards, num_hooks


def record(model, **options):
    parts = DecoderParts(model)
    return parts, RecordedRun(parts, padded_batch(tiny_rows(3, uneven=True), **options))


def test_a_bypass_runs_only_the_layers_behind_it():
    model = tiny_model(layers=4)
    with quiet(model):
        _, run = record(model)
        ran = []
        handles = [
            layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
            for index, layer in enumerate(model.model.layers)
        ]
        with counted_forwards(model) as whole:
            run.without(Unit(2, "block"))
            assert ran == [3]
            run.without(Unit(1, "mlp"))
            assert ran == [3, 1, 2, 3]
            run.without(Unit(3, "block"))
            assert ran == [3, 1, 2, 3]
        assert whole == []
        for handle in handles:
            handle.remove()


def test_bypassing_the_last_block_gives_its_input():
    model = tiny_model(layers=2)
    with quiet(model):
        batch = padded_batch(tiny_rows(3))
        run = RecordedRun(DecoderParts(model), batch)
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    assert torch.equal(run.without(Unit(1, "block")), hidden)


def test_runs_do_not_disturb_one_another():
    model = tiny_model(layers=3)
    with quiet(model):
        _, run = record(model)
        once = run.without(Unit(0, "attention"))
        for unit in bypass_units(DecoderParts(model)):
            run.without(unit)
        assert torch.equal(run.without(Unit(0, "attention")), once)
    assert num_hooks(model) == 0


def test_an_error_in_a_silenced_forward_brings_the_module_back():
    model = tiny_model(layers=1)
    module = model.model.layers[0].mlp

    def interrupted():
        with silenced(module, ConstantOutput(None, returns_weights=False)):
            assert not module(torch.ones(1, 2, 32)).any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert num_hooks(model) == 0
    assert module(torch.ones(1, 2, 32)).any()


def test_silencing_keeps_a_forward_that_was_patched_by_somebody_else():
    module = tiny_model(layers=1).model.layers[0].mlp
    patched = module.forward = lambda hidden_states: hidden_states * 2
    with silenced(module, ConstantOutput(None, returns_weights=False)):
        assert not module(torch.ones(2)).any()
    assert vars(module).get("forward") is patched


def test_of_a_pruned_model_only_what_is_left_can_be_bypassed():
    model = tiny_model(layers=3)
    everything = tuple(range(48))
    layers = (LayerPlan(0, (), everything), LayerPlan(1, (0,), ()), LayerPlan(2, (), ()))
    apply_plan(model, PruningPlan(spec_for(model).fingerprint, layers))
    units = bypass_units(DecoderParts(model))
    assert [str(u) for u in units] == ["layer 0", "layer 0 mlp", "layer 1", "layer 1 attention"]
    with quiet(model):
        _, run = record(model)
        for layer in (0, 1):  # the only sub-block of a block is the block
            halves = Unit(layer, "mlp" if layer == 0 else "attention")
            assert torch.allclose(run.without(Unit(layer, "block")), run.without(halves))

import pytest
import torch

from lit_prune.calibration import Row, RowSet, replay
from lit_prune.decoder import quiet, spec_for
from lit_prune.errors import PlanMismatchError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import masked, mean_compensation
from tests.models import tiny_model, tiny_rows
from tests.state import unchanged

IDS = torch.stack(tiny_rows(3))


def plan_of(model, *layers):
    return PruningPlan(
        spec_for(model).fingerprint,
        tuple(LayerPlan(i, tuple(g), tuple(c)) for i, (g, c) in enumerate(layers)),
    )


def test_masking_equals_zeroed_weights():
    model = tiny_model("qwen2", layers=2)
    plan = plan_of(model, ((1,), range(0, 48, 3)), ((), range(48)))
    with unchanged(model), quiet(model), masked(model, plan):
        wanted = model(input_ids=IDS).logits
    with torch.no_grad():
        first, last = model.model.layers
        first.self_attn.o_proj.weight[:, :16] = 0
        first.mlp.down_proj.weight[:, [c for c in range(48) if c % 3]] = 0
        last.self_attn.o_proj.weight.zero_()
        got = model(input_ids=IDS).logits
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_whole_sub_block_is_replaced_by_its_mean_output():
    model = tiny_model(layers=2, attention_bias=True)
    rows = RowSet.of(map(Row.of, tiny_rows(12)))
    plan = plan_of(model, ((0, 1), range(48)), ((), range(48)))
    means = []
    o_proj = model.model.layers[1].self_attn.o_proj
    handle = o_proj.register_forward_hook(lambda _m, _a, out: means.append(out.double()))
    units = replay(model, rows).units
    handle.remove()
    compensation = mean_compensation(model, plan, units)
    wanted = torch.cat([x.reshape(-1, 32) for x in means]).mean(0)
    assert torch.allclose(compensation.constants[1, "attention"], wanted, atol=1e-5)
    seen = []
    handle = o_proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with quiet(model), masked(model, plan, compensation):
        # hooks run in order: the mask's own comes after this one
        model(input_ids=IDS)
    handle.remove()
    assert len(seen) == 1


def test_the_mean_output_of_the_calibration_text_is_kept_exactly():
    """E[W x] = W_kept E[x_kept] + b, so with the bias a cut leaves the sub-block's mean alone."""
    model = tiny_model(layers=1)
    rows = RowSet.of(map(Row.of, tiny_rows(30)))
    plan = plan_of(model, ((0, 1), range(0, 48, 2)))
    compensation = mean_compensation(model, plan, replay(model, rows).units)
    down = model.model.layers[0].mlp.down_proj

    def mean_output(compensation, plan):
        seen = []
        with masked(model, plan, compensation):
            handle = down.register_forward_hook(lambda _m, _a, out: seen.append(out.double()))
            replay(model, rows)
            handle.remove()
        return torch.cat([x.reshape(-1, 32) for x in seen]).mean(0)

    dense = mean_output(None, PruningPlan.keep_all(spec_for(model)))
    assert torch.allclose(mean_output(compensation, plan), dense, atol=1e-5)
    assert not torch.allclose(mean_output(None, plan), dense, atol=1e-3)


def test_a_plan_for_another_model_is_refused():
    model = tiny_model(layers=1)
    plan = plan_of(tiny_model(layers=1, intermediate_size=40), ((0,), range(8)))
    with unchanged(model), pytest.raises(PlanMismatchError, match="plan was made for a model with"):
        masked(model, plan).__enter__()


def test_the_hooks_leave_with_an_error():
    model = tiny_model(layers=2)
    plan = plan_of(model, ((1,), range(8)), ((), ()))

    def interrupted():
        with masked(model, plan):
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        interrupted()

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.calibration import Row, RowSet, replay
from lit_prune.decoder import spec_for
from lit_prune.errors import ArtifactError, PlanMismatchError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import Compensation, apply_plan, mean_compensation, weights_digest
from tests.models import tiny_model, tiny_rows
from tests.state import unchanged


@pytest.fixture(scope="module")
def made():
    model = tiny_model(layers=3, mlp_bias=True)
    everything = tuple(range(48))
    layers = (
        LayerPlan(0, (1,), everything),
        LayerPlan(1, (), tuple(range(10))),
        LayerPlan(2, (0, 1), ()),
    )
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    units = replay(model, RowSet.of(map(Row.of, tiny_rows(12)))).units
    return model, plan, units


def test_constants_are_the_mean_outputs_of_what_was_cut(made):
    model, plan, units = made
    found = mean_compensation(model, plan, units).constants
    assert set(found) == {(0, "attention"), (1, "attention"), (1, "mlp"), (2, "mlp")}
    layers = model.model.layers
    wanted = {
        (0, "attention"): layers[0].self_attn.o_proj.weight[:, :16].double()
        @ units[0, "attention"][0][:16],
        (1, "attention"): layers[1].self_attn.o_proj.weight.double() @ units[1, "attention"][0],
        (1, "mlp"): layers[1].mlp.down_proj.weight[:, 10:].double() @ units[1, "mlp"][0][10:],
        (2, "mlp"): layers[2].mlp.down_proj.weight.double() @ units[2, "mlp"][0]
        + layers[2].mlp.down_proj.bias.double(),
    }
    for place, constant in wanted.items():
        assert found[place].dtype == torch.float64
        torch.testing.assert_close(found[place], constant.detach(), rtol=1e-12, atol=1e-12)


def test_dropping_the_mean_of_whole_sub_blocks(made):
    model, plan, units = made
    found = mean_compensation(model, plan, units, removed_mean="drop").constants
    assert set(found) == {(0, "attention"), (1, "mlp")}


def test_round_trip(made, tmp_path):
    compensation = mean_compensation(*made)
    path = tmp_path / "compensation.safetensors"
    compensation.save(path)
    again = Compensation.load(path)
    assert again.plan_digest == made[1].digest
    assert again.weights_digest == weights_digest(made[0])
    assert set(again.constants) == set(compensation.constants)
    for place, constant in compensation.constants.items():
        assert torch.equal(again.constants[place], constant)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again.check(made[0], made[1])


def test_the_weights_digest_sees_one_bit_name_shape_and_dtype():
    model = tiny_model(layers=1)
    before = weights_digest(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nextafter(model.lm_head.weight[0, 0], torch.tensor(9.0))
    assert weights_digest(model) != before
    assert weights_digest(tiny_model(layers=1)) == before
    assert weights_digest(tiny_model(layers=1).bfloat16()) != before


def header(**changes):
    return {"lit_prune": json.dumps({"plan_digest": "a", "weights_digest": "b"} | changes)}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"0.mlp": torch.ones(2)}, None),
        ({"0.mlp": torch.ones(2)}, {"lit_prune": "{"}),
        ({"0.mlp": torch.ones(2)}, {"lit_prune": "[]"}),
        ({"0.mlp": torch.ones(2)}, {"lit_prune": "{}"}),
        ({"nonsense": torch.ones(2)}, header()),
        ({"x.mlp": torch.ones(2)}, header()),
        ({"0.head": torch.ones(2)}, header()),
        ({"0.mlp": torch.ones(2)}, header(plan_digest=3)),
    ],
)
def test_f38_a_file_that_is_something_else_is_refused(tensors, metadata, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtifactError, match="is not a compensation of lit_prune"):
        Compensation.load(path)


def test_a_missing_or_torn_file_is_refused(tmp_path):
    for content in (None, b"", b"\x80\x04pickle"):
        path = tmp_path / "x.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ArtifactError, match="is not a compensation of lit_prune"):
            Compensation.load(path)


def test_a_compensation_that_was_altered_does_not_fit(made):
    model, plan, units = made
    compensation = mean_compensation(model, plan, units)
    other = Compensation(compensation.constants, "0" * 64, compensation.weights_digest)
    with pytest.raises(PlanMismatchError, match="was made for plan 000000000000"):
        other.check(model, plan)


@pytest.mark.parametrize(
    ("group", "place", "shape", "words"),
    [
        ("constants", (0, "attention"), (3,), r"constants of shape \[3\] for layer 0 attention"),
        ("weights", (2, "mlp"), (8, 8), "layer 2 mlp; expected none"),  # which goes whole
        ("inner", (0, "mlp"), (1, 8), r"inner of shape \[1, 8\] for layer 0 mlp; expected \["),
        ("input_maps", (9, "mlp"), (8, 8), "layer 9 mlp; expected none"),
    ],
)
def test_tensors_of_another_shape_are_refused_by_name(made, group, place, shape, words):
    model, plan, units = made
    compensation = mean_compensation(model, plan, units)
    getattr(compensation, group)[place] = torch.zeros(shape)
    with unchanged(model), pytest.raises(PlanMismatchError, match=words):
        apply_plan(model, plan, compensation)


@pytest.mark.parametrize("head_map", [torch.eye(8), torch.zeros(32)], ids=["small", "vector"])
def test_a_head_map_of_another_shape_is_refused_by_name(made, head_map):
    model, plan, units = made
    compensation = replace(mean_compensation(model, plan, units), head_map=head_map)
    with unchanged(model), pytest.raises(PlanMismatchError, match=r"head_map of shape .*expected"):
        apply_plan(model, plan, compensation)

"""A pruned model made again from the base model and two files."""

import pytest
import torch

from lit_prune import apply_plan, prune
from lit_prune.calibration import Row, RowSet, replay
from lit_prune.decoder import spec_for
from lit_prune.errors import ArtifactError, PlanMismatchError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.saving.weights import digest_of
from lit_prune.surgery import mean_compensation
from tests.models import batches_of, tiny_model, tiny_rows


@pytest.fixture
def shared(tmp_path):
    """``plan.json`` and ``compensation.safetensors``, and the model that they lead to."""
    model = tiny_model()
    layers = (
        LayerPlan(0, (), ()),
        LayerPlan(1, (1,), tuple(range(30))),
        LayerPlan(2, (), (1, 5)),
        LayerPlan(3, (0, 1), tuple(range(48))),
    )
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    rows = RowSet.of(Row.of(row) for row in tiny_rows(8))
    compensation = mean_compensation(model, plan, replay(model, rows).units)
    apply_plan(model, plan, compensation)
    (tmp_path / "plan.json").write_text(plan.to_json())
    compensation.save(tmp_path / "compensation.safetensors")
    return tmp_path / "plan.json", tmp_path / "compensation.safetensors", model


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_base_model_and_two_files_make_the_pruned_model(kind, shared):
    plan, compensation, pruned = shared
    model = tiny_model()
    apply_plan(model, kind(plan), kind(compensation))
    assert digest_of(model) == digest_of(pruned)


def test_the_base_model_may_be_a_path_too(shared, tmp_path):
    plan, compensation, pruned = shared
    tiny_model().save_pretrained(tmp_path / "base")
    model = apply_plan(tmp_path / "base", plan, compensation)
    assert digest_of(model) == digest_of(pruned)


def test_plan_and_compensation_of_a_result_make_it_again(tmp_path):
    model = tiny_model()
    result = prune(model, batches_of(tiny_rows(24, 24)), pruning_ratio=0.3, preset="flap")
    (tmp_path / "plan.json").write_text(result.plan.to_json())
    again = tiny_model()
    apply_plan(again, tmp_path / "plan.json")
    assert {n: p.shape for n, p in again.named_parameters() if "bias" not in n} == {
        n: p.shape for n, p in model.named_parameters() if "bias" not in n
    }


def test_f25_compensation_for_other_weights_is_refused_and_changes_nothing(shared):
    plan, compensation, _ = shared
    other = tiny_model(seed=1)
    before = digest_of(other)
    with pytest.raises(PlanMismatchError, match="other weights of this architecture"):
        apply_plan(other, plan, compensation)
    assert digest_of(other) == before


def test_f38_files_that_are_something_else_are_typed_errors(shared, tmp_path):
    plan, _, _ = shared
    model = tiny_model()
    before = digest_of(model)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="cannot be read"):
        apply_plan(model, tmp_path / "nothing.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        apply_plan(model, tmp_path)
    with pytest.raises(ArtifactError, match="not UTF-8"):
        apply_plan(model, tmp_path / "bytes")
    with pytest.raises(PlanMismatchError, match="not valid JSON"):
        apply_plan(model, _written(tmp_path / "x", "{"))
    with pytest.raises(ArtifactError, match="not a compensation"):
        apply_plan(model, plan, plan)
    assert digest_of(model) == before
    assert torch.isfinite(next(model.parameters())).all()


def _written(path, text):
    path.write_text(text)
    return path

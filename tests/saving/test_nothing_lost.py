"""F40: what travels beside the weights comes back."""

import pytest

from lit_prune.errors import FormatError, PlanMismatchError
from lit_prune.plan import PruningPlan
from lit_prune.saving import load_pruned, save_pruned
from tests.saving.cases import listing, pruned, report_for


def test_f40_plan_report_and_generation_config_come_back(tmp_path):
    model = pruned(kind="leading_mean")
    model.generation_config.max_new_tokens = 17
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    loaded = load_pruned(save_pruned(model, tmp_path / "saved", verify=False))
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert loaded.pruning_record.plan == model.pruning_record.plan
    assert loaded.pruning_record.plan.provenance == {"seed": 7}
    assert loaded.pruning_record.report == model.pruning_record.report


def test_f40_model_without_a_plan_may_be_saved(tmp_path):
    loaded = load_pruned(save_pruned(pruned(kind="dense"), tmp_path / "saved", verify=False))
    assert loaded.pruning_record is None


def test_f40_arguments_override_what_travels_on_the_model(tmp_path):
    model = pruned()
    other = PruningPlan("another", model.pruning_record.plan.layers)
    path = save_pruned(
        model, tmp_path / "saved", plan=other, report=report_for(other), verify=False
    )
    assert load_pruned(path).pruning_record.plan == other
    path = save_pruned(model, tmp_path / "bare", plan=other, verify=False)
    assert load_pruned(path).pruning_record.report is None
    with pytest.raises(PlanMismatchError, match="report belongs to"):
        save_pruned(model, tmp_path / "third", report=report_for(other), verify=False)
    assert listing(tmp_path) == ["bare", "saved"]


def test_f40_a_module_replaced_by_hand_is_not_saved_as_if_it_were_stock(tmp_path):
    model = pruned(kind="dense")
    model.model.layers[1].self_attn.scaling = 0.5
    with pytest.raises(FormatError, match="scaling of layer 1"):
        save_pruned(model, tmp_path / "saved", verify=False)
    assert listing(tmp_path) == []

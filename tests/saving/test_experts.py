"""Pruned mixtures in stock directories; what no stock class can hold is refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_prune.decoder import spec_for
from lit_prune.errors import FormatError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.surgery import apply_plan
from tests.models import MIXTURES, tiny_mixture, tiny_rows
from tests.state import state_digest

IDS = torch.stack(tiny_rows(3, 16))


def cut(model, keep):
    """Apply a plan that says for each layer which KV groups and experts (or channels) stay."""
    spec = spec_for(model)
    layers = tuple(
        LayerPlan(whole.index, *keep(block, whole.kv_groups, whole.channels))
        for block, whole in zip(spec.blocks, PruningPlan.keep_all(spec).layers, strict=True)
    )
    return apply_plan(model, PruningPlan(spec.fingerprint, layers))


def same(path, model):
    for loaded in (load_pruned(path), AutoModelForCausalLM.from_pretrained(path, dtype="auto")):
        loaded.set_experts_implementation("eager")
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_that_are_alike_go_into_the_stock_class(family, tmp_path):
    model = tiny_mixture(family)

    def keep(block, groups, units):
        if block.index == 0:
            return (), ()
        return groups, units[2:] if block.mlp.unit == "expert" else units[:40]

    cut(model, keep)
    before = state_digest(model)
    save_pruned(model, tmp_path / "saved", format="stock", verify=False)
    assert state_digest(model) == before
    same(tmp_path / "saved", model)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert ("one tensor for each expert" in card) == (family != "gpt_oss")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_what_went_whole_is_put_back_as_zeros(family, tmp_path):
    """Attention, and a mixture whose router may choose what it likes."""
    model = tiny_mixture(family)

    def keep(block, groups, units):
        experts = block.mlp.unit == "expert"
        return (
            () if block.index == 2 else groups,
            () if block.index == 1 else units[:3] if experts else units[:20],
        )

    cut(model, keep)
    with pytest.raises(FormatError, match="layer 1 has no MLP"):
        save_pruned(model, tmp_path / "saved", format="stock", verify=False)
    path = save_pruned(model, tmp_path / "saved", format="padded", verify=False)
    for loaded in (load_pruned(path), AutoModelForCausalLM.from_pretrained(path, dtype="auto")):
        loaded.set_experts_implementation("eager")
        with torch.no_grad():
            got, wanted = (x(input_ids=IDS).logits for x in (loaded, model))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_layers_with_different_numbers_of_experts_are_refused_with_what_to_do(tmp_path):
    model = tiny_mixture("mixtral")
    cut(model, lambda block, groups, units: (groups, units[block.index :]))
    for name, reason in {
        "stock": "layer 1 has num_experts 5 and layer 0 has 6",
        "heterogeneous": "no model file for mixtral",
        "padded": "an expert of zeros would be chosen .*allocator='uniform_widths'",
        "auto": "layer 1 has num_experts 5.*no model file for mixtral",
    }.items():
        with pytest.raises(FormatError, match=reason):
            save_pruned(model, tmp_path / "saved", format=name, verify=False)
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_fresh_process_agrees(tmp_path):
    model = cut(tiny_mixture("qwen3_moe"), lambda _block, groups, units: (groups, units[1:]))
    model.set_experts_implementation("grouped_mm")
    save_pruned(model, tmp_path / "saved", format="stock")

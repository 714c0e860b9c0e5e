"""Pruned mixtures in stock directories; what no stock class can hold is refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_prune.decoder import DecoderParts, spec_for
from lit_prune.errors import ArtifactError, FormatError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.saving.files import read_json
from lit_prune.surgery import apply_plan
from tests.models import MIXTURES, tiny_mixture, tiny_rows
from tests.saving.cases import alter, forge
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


def uneven(family):
    """Every layer another number of experts, one without MLP, one without attention."""
    model = tiny_mixture(family)
    refused = dict(spec_for(model).refused)

    def keep(block, groups, units):
        index = block.index
        fewer = groups if "kv_group" in refused or index else groups[:1]
        return () if index == 2 else fewer, () if index == 1 else units[index:]

    return cut(model, keep)


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_that_differ_go_into_a_class_of_their_own(family, tmp_path):
    model = uneven(family)
    path = save_pruned(model, tmp_path / "saved", verify=False)
    assert read_json(path / "config.json")["model_type"] == f"pruned_{family}"
    same(path, model)
    loaded = load_pruned(path)
    assert spec_for(loaded) == spec_for(model)
    ids = IDS.clone()
    loaded(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in loaded.parameters())
    loaded.set_experts_implementation("batched_mm")
    parts = DecoderParts(loaded)
    for layer in range(4):
        if (routed := parts.routed(layer)) is not None:
            assert routed.bank.config._experts_implementation == "batched_mm"


def test_a_loaded_mixture_is_pruned_again_and_saved_again(tmp_path):
    first = load_pruned(save_pruned(uneven("qwen3_moe"), tmp_path / "a", verify=False))
    first.set_experts_implementation("eager")
    cut(first, lambda _block, groups, units: (groups, units[1:] if len(units) > 2 else units))
    for name in ("b", "c"):
        if name == "b":
            save_pruned(first, tmp_path / name, format="heterogeneous", verify=False)
        else:
            first.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        again.set_experts_implementation("eager")
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).logits, first(input_ids=IDS).logits)


def test_what_a_stock_class_cannot_hold_says_what_to_do(tmp_path):
    model = tiny_mixture("mixtral")
    cut(model, lambda block, groups, units: (groups, units[block.index :]))
    for name, reason in {
        "stock": "layer 1 has num_experts 5 and layer 0 has 6.*heterogeneous",
        "padded": "an expert of zeros would be chosen .*allocator='uniform_widths'",
    }.items():
        with pytest.raises(FormatError, match=reason):
            save_pruned(model, tmp_path / "saved", format=name, verify=False)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_experts": 1}, "num_experts is 1, each token is routed to 2"),
        ({"intermediate_size": 4}, "contradicts its skip"),
        ({"num_experts": "3"}, "must be a positive 32-bit integer"),
        ({"num_experts": 5}, "config.json asks for"),
    ],
)
def test_a_config_that_contradicts_the_experts_is_refused(change, reason, tmp_path):
    path = save_pruned(uneven("mixtral"), tmp_path / "saved", verify=False)
    alter(path / "config.json", lambda config: config["per_layer_config"]["3"].update(change))
    forge(path)
    with pytest.raises(ArtifactError, match=reason):
        load_pruned(path)


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("kind", ["stock", "heterogeneous"])
def test_a_fresh_process_agrees(family, kind, tmp_path):
    """Without this package, too: the check trusts the model file that lies beside the weights."""
    model = uneven(family) if kind == "heterogeneous" else tiny_mixture(family)
    model.set_experts_implementation("grouped_mm")
    save_pruned(model, tmp_path / "saved", format=kind)

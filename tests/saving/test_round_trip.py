import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_prune.decoder import spec_for
from lit_prune.errors import ConfigError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.record import PruningRecord
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.saving.weights import digest_of, tensors_of
from lit_prune.surgery import apply_plan
from tests.models import padded_batch, tiny_model, tiny_rows
from tests.saving.cases import ALIKE, FAMILIES, KINDS, listing, logits, pruned

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy")
# What a heterogeneous config says otherwise.
OTHERS = (
    "architectures",
    "dtype",
    "_name_or_path",
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
PRODUCT = list(itertools.product(FAMILIES, KINDS))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Every case once: tied and untied, half and full precision in turn, in every pair."""
    root, models = tmp_path_factory.mktemp("zoo"), {}
    for number, (family, kind) in enumerate(PRODUCT):
        model = pruned(family, kind, tie=number % 2 == 0, seed=number)
        models[family, kind] = model.to(torch.bfloat16) if number % 3 == 0 else model
        before = digest_of(model)
        save_pruned(model, root / f"{family}-{kind}", format="heterogeneous", verify=False)
        assert digest_of(model) == before
    return root, models


@pytest.mark.parametrize(("family", "kind"), PRODUCT)
def test_loaded_model_equals_the_saved_one(family, kind, zoo):
    path, model = zoo[0] / f"{family}-{kind}", zoo[1][family, kind]
    loaded = load_pruned(path)
    assert torch.equal(logits(loaded), logits(model))
    assert digest_of(loaded) == digest_of(model)
    assert not [name for name in listing(path) if name.endswith(PICKLES)]
    for key, value in model.config.to_dict().items():
        if key not in OTHERS:
            assert loaded.config.to_dict()[key] == value, key
    assert json.loads((path / "config.json").read_text())["model_type"] == f"pruned_{family}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["no_first_attention_mean", "no_mlp"])
def test_loaded_model_generates_with_and_without_cache(family, kind, tmp_path):
    loaded = load_pruned(save_pruned(pruned(family, kind), tmp_path / "saved", verify=False))
    batch = padded_batch(tiny_rows(3, 12, uneven=True), side="left")
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    cached = loaded.generate(**batch, **options, use_cache=True)
    assert torch.equal(cached, loaded.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["dense", "uniform", "shorter"])
def test_plain_transformers_loads_what_the_own_class_can_express(family, kind, tmp_path):
    model = pruned(family, kind, tie=family == "qwen2")
    path = save_pruned(model, tmp_path / "saved", verify=False)
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert plain.config.model_type == family
    assert torch.equal(logits(plain), logits(model))
    assert digest_of(plain) == digest_of(load_pruned(path)) == digest_of(model)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers_keep_their_windows_and_cache_slots(family, tmp_path):
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = pruned(family, "no_first_attention", **sliding)
    loaded = load_pruned(save_pruned(model, tmp_path / "saved", verify=False))
    assert torch.equal(logits(loaded), logits(model))
    windows = [
        (layer.self_attn.sliding_window, layer.self_attn.layer_idx)
        for layer in loaded.model.layers[1:]
    ]
    assert windows == [(8, 0), (8, 1), (8, 2)]


@pytest.mark.parametrize("rope", ["dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_frequencies_survive(rope, dtype, tmp_path):
    extra = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope != "dynamic":
        extra["original_max_position_embeddings"] = 64
    if rope == "llama3":
        extra |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = pruned("llama", "uneven", rope_parameters=extra).to(dtype)
    ids = torch.randint(64, (1, 200))
    with torch.no_grad():
        model(input_ids=ids)  # longer than max_position_embeddings: dynamic frequencies move
    loaded = load_pruned(save_pruned(model, tmp_path / "saved", verify=False))
    with torch.no_grad():
        assert torch.equal(
            loaded(input_ids=ids[:, :20]).logits, model(input_ids=ids[:, :20]).logits
        )
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert ("buffers.safetensors" in listing(tmp_path / "saved")) == (dtype == torch.bfloat16)


def test_f09_ties_are_stored_once_and_tied_again(tmp_path):
    model = pruned(tie=True)
    path = save_pruned(model, tmp_path / "saved", verify=False)
    loaded = load_pruned(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tensors_of(loaded)[1] == {"lm_head.weight": "model.embed_tokens.weight"}
    parameters = sum(p.numel() for p in model.parameters())
    assert (path / "model.safetensors").stat().st_size < parameters * 4 + 10_000


@pytest.mark.parametrize("said", [True, False])
def test_f09_the_weights_decide_about_ties_not_the_config(said, tmp_path):
    model = tiny_model(tie=said)
    if said:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
    path = save_pruned(model, tmp_path / "saved", verify=False)
    for loaded in (load_pruned(path), AutoModelForCausalLM.from_pretrained(path)):
        assert torch.equal(logits(loaded), logits(model))
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (not said)


def test_f10_loaded_model_can_be_pruned_and_saved_again(tmp_path):
    loaded = load_pruned(save_pruned(pruned(kind="no_mlp"), tmp_path / "first", verify=False))
    spec = spec_for(loaded)
    layers = tuple(
        LayerPlan(
            b.index,
            tuple(range(b.attention.num_units))[:1] if b.attention else (),
            tuple(range(b.mlp.num_units))[:2] if b.mlp else (),
        )
        for b in spec.blocks
    )
    plan = PruningPlan(spec.fingerprint, layers)
    apply_plan(loaded, plan)
    loaded.pruning_record = PruningRecord(plan)
    again = load_pruned(save_pruned(loaded, tmp_path / "second", verify=False))
    assert torch.equal(logits(again), logits(loaded))
    assert again.pruning_record == PruningRecord(plan)


@pytest.mark.parametrize("inside", [False, True])
def test_loaded_model_trains_even_when_loaded_in_inference_mode(inside, tmp_path):
    path = save_pruned(pruned(kind="leading_mean", tie=True), tmp_path / "saved", verify=False)
    with torch.inference_mode(inside):
        loaded = load_pruned(path)
    assert not loaded.training
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    ids = torch.arange(3, 19).unsqueeze(0)
    loaded.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_saving_and_loading_leave_no_trace(tmp_path):
    model = pruned().train()
    before, state, threads = digest_of(model), torch.get_rng_state(), torch.get_num_threads()
    config = model.config.to_dict()
    load_pruned(save_pruned(model, tmp_path / "saved", verify=False))
    assert digest_of(model) == before
    assert model.training
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("kind", ["uneven", "uniform"])
def test_large_weights_are_sharded_with_an_index(kind, tmp_path):
    model = pruned(kind=kind)
    path = save_pruned(model, tmp_path / "saved", verify=False, max_shard_bytes=20_000)
    shards = [name for name in listing(path) if name.startswith("model-")]
    assert len(shards) > 2
    assert all((path / name).stat().st_size < 30_000 for name in shards)
    assert torch.equal(logits(load_pruned(path)), logits(model))
    if kind in ALIKE:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        save_pruned(model, tmp_path / "other", max_shard_bytes=0)


def test_f40_mixed_dtypes_survive(tmp_path):
    model = pruned(kind="uniform")
    model.model.norm.double()
    loaded = load_pruned(save_pruned(model, tmp_path / "saved", verify=False))
    assert digest_of(loaded) == digest_of(model)


def test_dtype_is_kept_or_converted(tmp_path):
    path = save_pruned(pruned(tie=True).to(torch.bfloat16), tmp_path / "saved", verify=False)
    assert load_pruned(path).dtype == load_pruned(path).config.dtype == torch.bfloat16
    wide = load_pruned(path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert wide.config.dtype == torch.float32
    assert wide.lm_head.weight is wide.model.embed_tokens.weight
    with pytest.raises(ConfigError, match="dtype"):
        load_pruned(path, dtype=torch.int8)


def test_file_may_be_replaced_while_the_loaded_model_lives(tmp_path):
    path = save_pruned(pruned(), tmp_path / "saved", verify=False)
    loaded = load_pruned(path)
    wanted = logits(loaded)
    with (path / "model.safetensors").open("r+b") as file:
        file.write(bytes(50_000))
    assert torch.equal(logits(loaded), wanted)


@pytest.mark.gpu
def test_gpu_model_is_saved_and_loaded_on_either_device(tmp_path):
    model = pruned(kind="leading_mean", tie=True).to("cuda")
    path = save_pruned(model, tmp_path / "saved")
    assert digest_of(load_pruned(path)) == digest_of(model)
    loaded = load_pruned(path, device="cuda")
    ids = torch.arange(3, 19, device="cuda").unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)

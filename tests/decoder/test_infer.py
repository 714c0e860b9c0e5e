"""What `infer_family` finds is what the registry says, or a refusal; and it passes the contract."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune.decoder import FAMILIES, Family, infer_family, register_family, spec_for
from lit_prune.decoder.infer.outside import watch
from lit_prune.errors import UnsupportedModelError
from lit_prune.testing import check_family
from tests.models import MIXTURES, tiny_model
from tests.state import unchanged
from tests.test_testing import ANOTHER, ODD

# Where one KV group does not say how groups are told apart.
TWO = {"kv_heads": 2}
# Conditions on the config, and what saved models can hold: no model shows them.
NOT_OF_MODELS = {"model_type", "refuses_config", "needs_config", "when", "keeps_biases"}
# No number of this model says it, or nothing that its code does depends on it.
NOT_SHOWN = {
    "bloom": {"refuses", "head_counts"},  # ALiBi: refused, in other words
    "gpt2": {"head_counts"},
}


def quietly(model):
    return infer_family(model, tell=lambda text: None)


def cases():
    for family, options in [*ODD.items(), *ANOTHER]:
        yield family, {**options, **(TWO if options.get("kv_heads") == 1 else {})}


@pytest.mark.parametrize(("family", "options"), list(cases()))
def test_what_is_found_is_what_the_registry_says(registry, family, options):
    model = tiny_model(family, **{"layers": 2, **two_layers(options)})
    known, spec = FAMILIES[family].under(model.config), spec_for(model)
    with unchanged(model):
        found = quietly(model)
    for field in Family.__dataclass_fields__.keys() - NOT_OF_MODELS:
        if field not in NOT_SHOWN.get(family, ()):
            assert getattr(found, field) == getattr(known, field), field
    registry[family] = found
    again = spec_for(model)
    assert again.blocks == spec.blocks
    assert {name for name, _ in again.refused} == {name for name, _ in spec.refused}
    assert (again.parallel, again.removed_constants) == (spec.parallel, spec.removed_constants)


def two_layers(options):
    """Lists with an entry for each layer, for two."""
    lists = ("layer_types", "no_rope_layers")
    return {key: value[:2] if key in lists else value for key, value in options.items()}


def test_every_dense_family_is_looked_at():
    assert {family for family, _ in cases()} | set(MIXTURES) == set(FAMILIES)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_is_refused_by_what_is_left(family):
    model = tiny_model(family, layers=2)
    with unchanged(model), pytest.raises(UnsupportedModelError, match="No family is inferred") as e:
        quietly(model)
    assert "expert" in str(e.value)


REFUSED = [
    ("llama", {"kv_heads": 1}, "one KV group.*two or more"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "hold different numbers.*attn.scaling"),
    ("gpt2", {"add_cross_attention": True}, "does not run crossattention"),
    ("opt", {"do_layer_norm_before": False}, "something else than one norm"),
    ("opt", {"word_embed_proj_dim": 16}, "something else than one norm"),
    (
        "falcon",
        {"parallel_attn": True, "multi_query": False, "kv_heads": 4},
        "does not run with a constant",
    ),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "neither its own input, nor"),
    ("gemma", {"use_bidirectional_attention": True}, "looks ahead"),
]


@pytest.mark.parametrize(("family", "options", "reason"), REFUSED)
def test_what_is_not_explained_is_refused(family, options, reason):
    model = tiny_model(family, **{"layers": 2, **options})
    with unchanged(model), pytest.raises(UnsupportedModelError, match=reason):
        quietly(model)


# ---- a class of one's own, whose names say nothing ----


class OddConfig(LlamaConfig):
    model_type = "odd_inferred"


class OddFeed(nn.Module):
    """Silu of the second matrix times the first: the order says nothing about the gate."""

    def __init__(self, config):
        super().__init__()
        self.a = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.b = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c(self.a(x) * nn.functional.silu(self.b(x)))


class OddMix(nn.Module):
    """Attention of one fused projection, KV group after KV group, that counts its own heads."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.size = layer_idx, config.head_dim
        self.many, self.few = config.num_attention_heads, config.num_key_value_heads
        self.z = nn.Linear(config.hidden_size, (self.many + 2 * self.few) * self.size)
        self.y = nn.Linear(self.many * self.size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **_others):
        batch, tokens, _ = hidden_states.shape
        share = self.many // self.few
        z = self.z(hidden_states).view(batch, tokens, self.few, share + 2, self.size)
        q = z[..., :share, :].flatten(2, 3).transpose(1, 2)
        k, v = (z[..., share + i, :].transpose(1, 2) for i in (0, 1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = (each.repeat_interleave(share, 1) for each in (k, v))
        causal = attention_mask is None and tokens > 1
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=causal
        )
        return self.y(out.transpose(1, 2).flatten(2)), None


class OddLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.feed, self.mix = OddFeed(config), OddMix(config, layer_idx)
        self.two, self.one = (nn.LayerNorm(config.hidden_size) for _ in "ab")
        self.gain = 1.0

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **_others):
        mixed, _ = self.mix(
            self.one(hidden_states), attention_mask=attention_mask, past_key_values=past_key_values
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.gain * self.feed(self.two(hidden_states))


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        count = config.num_hidden_layers
        self.model.layers = nn.ModuleList(OddLayer(config, index) for index in range(count))
        self.post_init()


def odd_model(change=None):
    tiny = tiny_model("llama", layers=3).config.to_dict()
    torch.manual_seed(0)
    config = OddConfig(**{**tiny, "model_type": "odd_inferred", "initializer_range": 0.3})
    model = OddForCausalLM(config).eval()
    for layer in model.model.layers:
        if change is not None:
            change(layer)
    return model


@pytest.mark.slow  # the doctest does the same with a simpler class
def test_a_class_with_names_of_its_own_is_inferred_and_passes_the_contract(registry, capsys):
    model = odd_model()
    with unchanged(model):
        family = infer_family(model)
    text = capsys.readouterr().out
    assert family.model_type == "odd_inferred"
    assert (family.attention, family.attention_norm) == ("mix", "one")
    assert (family.mlp, family.mlp_norm) == ("feed", "two")
    assert (family.gate, family.up, family.mlp_output) == ("feed.b", "feed.a", "feed.c")
    assert (family.query, family.attention_output, family.interleaved) == ("mix.z", "mix.y", True)
    assert (family.head_dim, family.queries_per_group) == ("size", None)
    assert family.head_counts == {"many": "queries", "few": "groups"}
    for line in (
        "odd_inferred: found in OddForCausalLM",
        "Each of the 3 layers, run with random weights, returns its input, what the attention",
        "model.layers                       3 × OddLayer",
        "feed.b                             Linear [48, 32]",
        "mix.z                              Linear [64, 32]",
        "register_family(family) and check_family",
    ):
        assert line in text
    assert "odd_inferred" not in FAMILIES
    register_family(family)
    found = check_family(model)
    assert found.granularities == ("block", "sub_block", "kv_group", "channel")
    assert found.constants


class Behind(nn.Module):
    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args):
        return self.change(self.inner(*args))


def scaled(layer):
    layer.gain = 0.5  # of the MLP only


def extra(layer):
    layer.odd = nn.Parameter(torch.ones(32))


def normed(layer):
    """A norm over channels: one channel's value depends on the others'."""
    layer.feed.c = nn.Sequential(nn.LayerNorm(48), layer.feed.c)


def softmaxed(layer):
    layer.feed.a = Behind(layer.feed.a, lambda x: x.softmax(-1))


class Doubled(OddFeed):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(OddMix):
    def forward(self, *args, **others):
        super().forward(*args, **others)
        return super().forward(*args, **others)


def doubled(layer):
    layer.feed.__class__ = Doubled


def twice(layer):
    layer.mix.__class__ = Twice


def put_there(layer):
    layer.feed.forward = layer.feed.forward


def kept_apart(layer):
    layer.mix.layer_idx = None


CHANGES = [
    (scaled, "returns something else than its input and what mix and feed write"),
    (extra, r"holds the parameter odd \[32\], which is no part of"),
    (normed, r"feed"),
    (softmaxed, "channels depend on each other"),
    (doubled, "has in feed more behind feed.c"),
    (twice, "runs mix.z twice"),
    (put_there, "has at feed a forward that was put there"),
    (kept_apart, "has no number 'layer_idx' in mix"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_layer_that_does_something_else_is_refused(change, reason):
    model = odd_model(change)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=reason):
        quietly(model)


def test_one_layer_that_is_made_otherwise_is_refused():
    model = odd_model()
    layer = model.model.layers[2]
    layer.one, layer.two = nn.LayerNorm(32), nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers\.2"):
        quietly(model)


def test_no_list_of_layers_is_refused_by_what_there_is():
    model = odd_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match=r"5 modules.*model.layers: 3 × OddLayer"):
        quietly(model)


def test_a_forward_that_fails_leaves_no_hook():
    model = odd_model()

    def fails(*_args, **_kwargs):
        raise RuntimeError("out of paper")

    model.model.norm.forward = fails
    with unchanged(model), pytest.raises(RuntimeError, match="out of paper"):
        watch(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_and_the_mode_of_the_model_do_not_matter(dtype):
    model = odd_model()
    wanted = quietly(model)
    coarse = model.to(dtype).train()
    with unchanged(coarse):
        assert quietly(coarse) == wanted
    assert all(module.training for module in coarse.modules())


def test_weights_that_say_nothing_do_not_matter():
    model = odd_model()
    wanted = quietly(model)
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    with unchanged(model):
        assert quietly(model) == wanted

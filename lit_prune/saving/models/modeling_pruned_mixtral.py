"""Mixtral whose decoder layers differ from each other, as lit_prune leaves them.

Self-contained: it needs torch and transformers, nothing else, and travels beside the weights for
``trust_remote_code=True``. What each layer holds stands in ``config.json`` under
``per_layer_config``, in the schema of transformers: ``num_attention_heads``,
``num_key_value_heads``, ``num_experts`` (of a layer with a plain MLP ``intermediate_size``) and
``skip`` (``attention``, ``mlp``). Two keys are our own: ``biases``, the projections that have one,
and ``constants``, the skipped sub-blocks that a constant stands in for. Weights that do not belong
to the config are an error: nothing is dropped, nothing is made up.
"""

# mypy: ignore-errors
# ruff: noqa: ANN401, RUF012

import copy
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
)

_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@strict
class PrunedMixtralConfig(MixtralConfig):
    """A Mixtral config with ``per_layer_config``; the widths beside it are 0 and mean nothing."""

    model_type = "pruned_mixtral"

    biases: list[str] | None = None
    constants: list[str] | None = None

    def validate_architecture(self) -> None:
        """Accept any head count: ``head_dim`` is explicit, and no layer needs a divisor."""


class ConstantOutput(nn.Module):
    """In place of a skipped attention or MLP: a constant, or zero, for the residual stream."""

    stands_for_removed = True

    def __init__(self, hidden_size: int | None, *, returns_weights: bool) -> None:
        super().__init__()
        bias = None if hidden_size is None else nn.Parameter(torch.zeros(hidden_size))
        self.register_parameter("bias", bias)
        self.returns_weights = returns_weights

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """Return the constant, whatever comes in; attention returns its weights too."""
        output = hidden_states.new_zeros(()) if self.bias is None else self.bias
        return (output, None) if self.returns_weights else output


class PrunedMixtralDecoderLayer(MixtralDecoderLayer):
    """A stock layer in the sizes of its own, with what it skips taken out."""

    def __init__(self, config: Any, layer_idx: int, cache_slot: int | None) -> None:
        sizes = copy.copy(config.per_layer_config[layer_idx])
        skip = getattr(sizes, "skip", None) or ()
        if "attention" in skip:
            sizes.num_attention_heads = sizes.num_key_value_heads = 1  # built, then taken out
        if "mlp" in skip:
            sizes.num_experts = 1
        # whether a layer has experts is said by their number alone
        sizes.mlp_only_layers, sizes.decoder_sparse_step = [], 1
        super().__init__(sizes, layer_idx)
        mixture = hasattr(self.mlp, "experts")
        for part, projections in _PROJECTIONS.items():
            if sizes.biases is not None and not (mixture and part == "mlp"):
                self._give_biases(getattr(self, part), projections, sizes.biases)
        self.mlp.config = self.self_attn.config = config  # where set_attn_implementation writes
        if mixture:
            self.mlp.experts.config = config  # and set_experts_implementation
        self.self_attn.layer_idx = cache_slot
        if "attention" in skip:
            held = config.hidden_size if "attention" in (sizes.constants or ()) else None
            self.self_attn = ConstantOutput(held, returns_weights=True)
            self.input_layernorm = nn.Identity()
        if "mlp" in skip:
            held = config.hidden_size if "mlp" in (sizes.constants or ()) else None
            # where the router is called so, its scores are returned too
            self.mlp = ConstantOutput(held, returns_weights=hasattr(self.mlp, "router"))
            self.post_attention_layernorm = nn.Identity()

    @staticmethod
    def _give_biases(part: Any, projections: tuple[str, ...], wanted: Any) -> None:
        for name in projections:
            old = getattr(part, name)
            if (old.bias is not None) != (name in wanted):
                new = nn.Linear(old.in_features, old.out_features, bias=name in wanted)
                setattr(part, name, new)


class PrunedMixtralModel(MixtralModel):
    """The stock decoder with layers of different sizes."""

    config_class = PrunedMixtralConfig
    config: PrunedMixtralConfig
    _no_split_modules = ["PrunedMixtralDecoderLayer"]

    def __init__(self, config: PrunedMixtralConfig) -> None:
        slots = cache_slots(config)
        # everything but the layers; some rotary types read head counts, so an attending layer's
        sizes = copy.copy(config.per_layer_config[min(slots)])
        sizes.num_hidden_layers = 0
        super().__init__(sizes)
        config._attn_implementation = sizes._attn_implementation  # chosen by the line before
        config._experts_implementation = sizes._experts_implementation
        self.config = config
        self.layers = nn.ModuleList(
            PrunedMixtralDecoderLayer(config, index, slots.get(index))
            for index in range(config.num_hidden_layers)
        )
        self.post_init()


class _Strict:
    """Loading that refuses what transformers would only warn of."""

    config_class = PrunedMixtralConfig
    config: PrunedMixtralConfig
    _no_split_modules = ["PrunedMixtralDecoderLayer"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as every model does, but refuse what transformers would only warn of.

        Raises:
            ValueError: If a tensor is missing, not expected, or of another shape.
        """
        asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
        if wrong:
            raise ValueError(
                f"these weights do not belong to this config: {wrong}. Save the model again; do "
                "not mix the config.json of one model with the weights of another."
            )
        return (model, info) if asked else model


class PrunedMixtralForCausalLM(_Strict, MixtralForCausalLM):
    """The stock language model around `PrunedMixtralModel`."""

    def __init__(self, config: PrunedMixtralConfig) -> None:
        MixtralPreTrainedModel.__init__(self, config)
        self.model = PrunedMixtralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # of the load-balancing loss, which wants one number for all layers
        mixtures = [
            layer.mlp.experts for layer in self.model.layers if hasattr(layer.mlp, "experts")
        ]
        self.num_experts = max((mixture.num_experts for mixture in mixtures), default=0)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """Let a static cache size its slots as they are used: a slot need not be its layer's."""


class PrunedMixtralForSequenceClassification(
    _Strict, GenericForSequenceClassification, MixtralPreTrainedModel
):
    """The stock classifier of texts around `PrunedMixtralModel`."""

    def __init__(self, config: PrunedMixtralConfig) -> None:
        MixtralPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PrunedMixtralModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class PrunedMixtralForTokenClassification(
    _Strict, GenericForTokenClassification, MixtralPreTrainedModel
):
    """The stock classifier of tokens around `PrunedMixtralModel`."""

    def __init__(self, config: PrunedMixtralConfig) -> None:
        MixtralPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PrunedMixtralModel(config)
        names = ("classifier_dropout", "hidden_dropout")
        found = (getattr(config, name, None) for name in names)
        self.dropout = nn.Dropout(next((rate for rate in found if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)
        self.post_init()


def cache_slots(config: Any) -> dict[int, int]:
    """Give every attention a slot of the KV cache: of each attention type, the first ones.

    A cache reads its length from its first slot: that one must be in use, whichever layer lost its
    attention.
    """
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    free = {kind: [i for i in range(count) if types[i] == kind] for kind in set(types)}
    skips = [getattr(config.per_layer_config[i], "skip", None) or () for i in range(count)]
    attends = [i for i in range(count) if "attention" not in skips[i]]
    return {index: free[types[index]].pop(0) for index in attends}


# `save_pretrained` writes `auto_map` and this file again
for _class, _auto in (
    (PrunedMixtralConfig, "AutoConfig"),
    (PrunedMixtralForCausalLM, "AutoModelForCausalLM"),
    (PrunedMixtralForSequenceClassification, "AutoModelForSequenceClassification"),
    (PrunedMixtralForTokenClassification, "AutoModelForTokenClassification"),
):
    _class.register_for_auto_class(_auto)

__all__ = [
    "PrunedMixtralConfig",
    "PrunedMixtralForCausalLM",
    "PrunedMixtralForSequenceClassification",
    "PrunedMixtralForTokenClassification",
    "PrunedMixtralModel",
]

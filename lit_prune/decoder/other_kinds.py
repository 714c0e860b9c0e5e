"""Models that are no causal decoder of attention and MLP: known, and refused with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_prune.decoder.wrapper import WRAPPERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ENCODER_DECODER = (
    "it is an encoder–decoder: its decoder also reads the states of an encoder, by cross-attention "
    "that lit_prune neither observes nor slices"
)
_STATE_SPACE = (
    "it is a state-space (recurrent) model: a state takes the place of keys and values, so there "
    "are no KV groups to remove"
)
_HYBRID = (
    "it is a hybrid: some of its layers are state-space (recurrent) or convolutional ones, not "
    "attention, which lit_prune cannot slice"
)
_PREFIX = (
    "it is multimodal, and the tokens of its prompt see each other both ways: lit_prune calibrates "
    "on causal streams"
)
_MULTIMODAL = (
    "it is multimodal, and lit_prune finds the language model inside …ForConditionalGeneration of "
    f"{', '.join(WRAPPERS)} only"
)
_ENCODER = (
    "it is an encoder: each token sees those after it, and lit_prune calibrates on causal streams"
)
# Model types of each kind. Encoder–decoders say so in their config; named are those whose decoder
# has a class of its own.
_KINDS = {
    _ENCODER_DECODER: (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
        "pegasus", "plbart", "prophetnet", "trocr", "whisper",
    ),
    _STATE_SPACE: ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    _HYBRID: (
        "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
        "lfm2_moe", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
        "qwen3_next", "recurrent_gemma", "zamba", "zamba2",
    ),
    _PREFIX: ("paligemma",),
    _ENCODER: (
        "albert", "bert", "big_bird", "camembert", "canine", "convbert", "data2vec-text", "deberta",
        "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "flaubert", "fnet", "funnel",
        "ibert", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra",
        "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer", "squeezebert",
        "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
    ),
}  # fmt: skip
_REASONS = {name: reason for reason, names in _KINDS.items() for name in names}


def other_kind(config: PreTrainedConfig | None) -> str | None:
    """Return why models with this config cannot be pruned, a clause; None for any other model.

    Example:
        >>> from transformers import MambaConfig
        >>> other_kind(MambaConfig())[:40]
        'it is a state-space (recurrent) model: a'
    """
    if getattr(config, "is_encoder_decoder", False):
        return _ENCODER_DECODER
    reason = _REASONS.get(str(getattr(config, "model_type", None)))
    text: Any = getattr(config, "get_text_config", lambda: config)
    return reason or (_MULTIMODAL if text() is not config else None)

"""Which architecture of llama.cpp can hold a decoder, read from its sources.

Layers that are alike go into the architecture of their own family. ``llama`` takes every bias and
any number of heads, so it also holds a Mistral, and a Qwen2 that has biases which its own lacks, or
fewer heads. Layers that differ go into ``deci`` (Llama's graph with the sizes read for every block)
or, where queries and keys are normed, into ``openelm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.decoder.layout import AttentionLayout, MlpLayout
from lit_prune.errors import FormatError
from lit_prune.saving.body import Body, Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gguf"
_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_EVERY = _QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}
_SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A graph of llama.cpp.

    Attributes:
        name: ``general.architecture``.
        per_block: Whether every block has sizes of its own.
        biases: Projections that may have one.
        needs: Projections that must have one.
        square: Whether all query heads together are as wide as the hidden state.
        permuted: Rotary pairs are neighbours, not halves: rows of queries and keys are reordered.
        fused: Queries, keys and values are one tensor.
        tied: Whether it always reads the output from the embeddings.
        scales: Whether it has Granite's multipliers.
    """

    name: str
    per_block: bool = False
    biases: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    square: bool = False
    permuted: bool = False
    fused: bool = False
    tied: bool = False
    scales: bool = False


_LLAMA = Architecture(name="llama", biases=_EVERY, permuted=True)
_DECI = Architecture(name="deci", per_block=True, biases=_EVERY, permuted=True)
# By family, those for layers that are alike first.
CHOICES: dict[str, tuple[Architecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (Architecture(name="qwen2", biases=_QKV, needs=_QKV, square=True), _LLAMA, _DECI),
    "qwen3": (
        Architecture(name="qwen3"),
        Architecture(name="openelm", per_block=True, fused=True, tied=True),
    ),
    "granite": (
        Architecture(
            name="granite", biases=frozenset({"o_proj", "down_proj"}), permuted=True, scales=True
        ),
    ),
}


def architecture_for(model: PreTrainedModel, body: Body) -> Architecture:
    """Return the first architecture that holds the decoder.

    Raises:
        FormatError: If none can; says what blocks each.
    """
    if (family := body.family.model_type) not in CHOICES:
        raise _refused(f"which graph of llama.cpp computes {family} was not looked at")
    _refuse_other_mathematics(model, body)
    refusals = []
    for choice in CHOICES[family]:
        reason = _blocked(choice, body)
        if reason is None:
            return choice
        refusals.append(reason)
    raise FormatError(NAME, "; ".join(refusals))


def _blocked(choice: Architecture, body: Body) -> str | None:
    if not choice.per_block and (found := _not_alike(body)):
        return f"{found}, architecture {choice.name} has one size for all layers"
    widths = Widths.of(body)
    queries = widths.kv_groups * widths.queries_per_group * body.head_dim
    if choice.square and queries != body.hidden_size:
        return (
            f"its query heads are {queries} wide together, architecture {choice.name} wants "
            f"{body.hidden_size}"
        )
    for index, layer in body.layers.items():
        names = frozenset(layer.biases)
        if extra := sorted(names - choice.biases):
            return (
                f"layer {index} has a bias on {', '.join(extra)}, architecture {choice.name} "
                "reads none there"
            )
        if isinstance(layer.attention, AttentionLayout) and (lacks := choice.needs - names):
            return (
                f"layer {index} has no bias on {', '.join(sorted(lacks))}, architecture "
                f"{choice.name} wants one"
            )
    if choice.tied and not body.ties:
        return f"its head is not tied to the embeddings, architecture {choice.name} ties them"
    return None


def _not_alike(body: Body) -> str | None:
    """Say where the first layer lies that differs from one before it; shells do not count."""
    first: tuple[int, object] | None = None
    for index, layer in body.layers.items():
        if index in body.shells:
            continue
        attention, mlp = layer.attention, layer.mlp
        if not isinstance(attention, AttentionLayout):
            return f"layer {index} has no attention"
        if not isinstance(mlp, MlpLayout):
            return f"layer {index} has no MLP"
        sizes = (attention.kv_groups, attention.queries_per_group, mlp.channels)
        if first is not None and sizes != first[1]:
            return f"layers {first[0]} and {index} differ in width"
        first = first or (index, sizes)
    return None


def _refuse_other_mathematics(model: PreTrainedModel, body: Body) -> None:
    """Refuse what no architecture here computes."""
    config = model.config
    if (act := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise _refused(f"its MLPs use {act!r}, the graphs of llama.cpp use SiLU")
    dims = {
        layer.attention.head_dim
        for layer in body.layers.values()
        if isinstance(layer.attention, AttentionLayout)
    }
    if len(dims) > 1:
        raise _refused(f"heads are {sorted(dims)} wide, llama.cpp has one width for all layers")
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    if window is not None and slides and window < config.max_position_embeddings:
        raise _refused(f"it looks back {window} tokens, the graphs used here look back over all")
    if not CHOICES[body.family.model_type][0].scales:
        odd = [name for name in _SCALES if getattr(config, name, 1) != 1]
        if odd:
            raise _refused(f"its config sets {odd[0]}, which only Granite has")


def _refused(reason: str) -> FormatError:
    return FormatError(NAME, reason)

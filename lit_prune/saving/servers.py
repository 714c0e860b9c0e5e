"""What inference servers make of a stock directory, read from their sources: none was run here.

vLLM loads the stock architectures by classes of its own (``vllm/model_executor/models``, read in
the versions of 2025). They skip a bias that they do not expect without a word, so what they expect
is written down here, and what they would skip is said when a model is saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """What vLLM reads of one architecture.

    Attributes:
        flags: Config fields, and the projections that each gives a bias.
        always: Projections that always have one.
        head_dim: Whether it reads ``head_dim``; else heads are ``hidden_size / heads`` wide.
    """

    flags: dict[str, frozenset[str]] = field(default_factory=dict)
    always: frozenset[str] = frozenset()
    head_dim: bool = True

    def biases(self, config: dict[str, Any]) -> frozenset[str]:
        """Return the projections that it gives a bias."""
        return self.always.union(*(names for flag, names in self.flags.items() if config.get(flag)))


_LLAMA = Reads(flags={"attention_bias": _QKV | {"o_proj"}, "mlp_bias": _MLP})
VLLM = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "granite": _LLAMA,
    "qwen2": Reads(always=_QKV, head_dim=False),
    "qwen3": Reads(flags={"attention_bias": _QKV}),
}


def vllm_notes(config: dict[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Say what vLLM would not make of a directory.

    Args:
        config: Content of ``config.json`` of a stock architecture of a language model.
        names: Stored tensors.

    Example:
        >>> config = {"model_type": "qwen3", "attention_bias": True, "hidden_size": 8,
        ...           "num_attention_heads": 2, "head_dim": 4}
        >>> vllm_notes(config, ["model.layers.0.self_attn.o_proj.bias"])
        ('vLLM reads no bias on o_proj of qwen3 and skips it: there it would compute something
        else. Prune with add_biases=False for vLLM.',)
    """
    reads = VLLM.get(config["model_type"])
    if reads is None:
        return (f"What vLLM makes of {config['model_type']} was not looked at.",)
    stored = {name.split(".")[-2] for name in names if name.endswith("_proj.bias")}
    notes = []
    if skipped := sorted(stored - reads.biases(config)):
        notes.append(
            f"vLLM reads no bias on {', '.join(skipped)} of {config['model_type']} and skips it: "
            "there it would compute something else. Prune with add_biases=False for vLLM."
        )
    even = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    if not reads.head_dim and not even:
        notes.append(
            f"Releases of vLLM that take the width of a head of {config['model_type']} from "
            "hidden_size / num_attention_heads refuse these weights. For them, prune without "
            "granularity kv_group."
        )
    return tuple(notes)

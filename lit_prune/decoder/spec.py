"""A decoder as prunable units: names and integers only, read from the weights.

Nothing here holds a tensor. A spec is what a search needs to know (how many units there are, what
each costs) and what a loader needs to rebuild the shapes of a model that was pruned unevenly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

SubBlockKind = Literal["attention", "mlp"]
KINDS: tuple[SubBlockKind, SubBlockKind] = ("attention", "mlp")
# What leaves one by one, under the name of its granularity.
UnitKind = Literal["kv_group", "channel", "expert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Units:
    """What every sub-block has; its units are its own.

    Attributes:
        name: Path of its module.
        unit_parameters: Parameters that leave with one unit.
        fixed_parameters: Parameters that leave only with the whole sub-block.
    """

    name: str
    unit_parameters: int
    fixed_parameters: int

    @property
    def num_units(self) -> int:
        """How many units there are."""
        raise NotImplementedError

    @property
    def least_units(self) -> int:
        """Fewest units that it can compute with: one."""
        return 1

    @property
    def takes_constant(self) -> bool:
        """Whether its output can be given a bias."""
        return True

    @property
    def num_parameters(self) -> int:
        """All parameters of the sub-block, its norm included."""
        return self.num_units * self.unit_parameters + self.fixed_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec(_Units):
    """One attention sub-block.

    Attributes:
        name: Path of the attention module, ``model.layers.0.self_attn``.
        num_kv_groups: KV groups: one key/value head with the query heads that it serves.
        queries_per_group: Query heads per KV group (1 is multi-head attention).
        head_dim: Width of a head; never pruned, the rotary pairs live inside.
        unit_parameters: Parameters that leave with one KV group.
        fixed_parameters: Parameters that leave only with the whole sub-block (norms, output bias).
        output_bias: Whether the output projection has a bias.
    """

    num_kv_groups: int
    queries_per_group: int
    head_dim: int
    output_bias: bool

    @property
    def kind(self) -> SubBlockKind:
        """``attention``."""
        return "attention"

    @property
    def unit(self) -> UnitKind:
        """``kv_group``."""
        return "kv_group"

    @property
    def num_units(self) -> int:
        """KV groups, the prunable units of attention."""
        return self.num_kv_groups

    @property
    def unit_width(self) -> int:
        """Columns of the output projection that one unit owns."""
        return self.queries_per_group * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpSpec(_Units):
    """One MLP sub-block: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``.

    Attributes:
        name: Path of the MLP module, ``model.layers.0.mlp``.
        num_channels: Intermediate channels.
        unit_parameters: Parameters that leave with one channel.
        fixed_parameters: Parameters that leave only with the whole sub-block (norms, output bias).
        output_bias: Whether the down projection has a bias.
    """

    num_channels: int
    output_bias: bool

    @property
    def kind(self) -> SubBlockKind:
        """``mlp``."""
        return "mlp"

    @property
    def unit(self) -> UnitKind:
        """``channel``."""
        return "channel"

    @property
    def num_units(self) -> int:
        """Intermediate channels, the prunable units of an MLP."""
        return self.num_channels

    @property
    def unit_width(self) -> int:
        """Columns of the down projection that one unit owns: one."""
        return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsSpec(_Units):
    """One mixture of experts, in the place of an MLP; see `lit_prune.decoder.experts`.

    Attributes:
        name: Path of the module, ``model.layers.0.mlp``.
        num_experts: Experts that the router chooses from.
        top_k: How many of them compute each token.
        hidden_size: Width of what an expert writes.
        unit_parameters: Parameters that leave with one expert, its row of the router included.
        fixed_parameters: Parameters that leave only with the whole sub-block (norms, a shared
            expert).
    """

    num_experts: int
    top_k: int
    hidden_size: int

    @property
    def kind(self) -> SubBlockKind:
        """``mlp``, whose place it has."""
        return "mlp"

    @property
    def unit(self) -> UnitKind:
        """``expert``."""
        return "expert"

    @property
    def least_units(self) -> int:
        """Fewest units that it can compute with: those that a token needs."""
        return self.top_k

    @property
    def output_bias(self) -> bool:
        """No: what experts write is added up as it is."""
        return False

    @property
    def takes_constant(self) -> bool:
        """No: there is no place for one behind the experts."""
        return False

    @property
    def num_units(self) -> int:
        """Experts, the prunable units."""
        return self.num_experts

    @property
    def unit_width(self) -> int:
        """Numbers that one unit hands to the sum: all that it writes."""
        return self.hidden_size


SubBlockSpec = AttentionSpec | MlpSpec | ExpertsSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """One decoder layer.

    Attributes:
        index: Position in the stack.
        name: Path of the layer module.
        attention: Its attention, or None where an earlier pruning removed it.
        mlp: Its MLP or mixture of experts, or None where an earlier pruning removed it.
        constant_parameters: Parameters of the constant outputs that stand in for removed
            sub-blocks.
        shared_parameters: Parameters that leave only with both sub-blocks (a norm that both read).
        attention_type: Label of the attention mask, ``full_attention`` or ``sliding_attention``.
    """

    index: int
    name: str
    attention: AttentionSpec | None
    mlp: MlpSpec | ExpertsSpec | None
    constant_parameters: int = 0
    shared_parameters: int = 0
    attention_type: str = "full_attention"

    @property
    def sub_blocks(self) -> tuple[SubBlockSpec, ...]:
        """Attention and MLP (or experts), in the order in which they run, those that exist."""
        return tuple(part for part in (self.attention, self.mlp) if part is not None)

    @property
    def num_parameters(self) -> int:
        """All parameters of the layer."""
        own = sum(part.num_parameters for part in self.sub_blocks)
        return own + self.constant_parameters + self.shared_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """A causal language model as a stack of prunable blocks.

    Attributes:
        model_type: Hugging Face ``config.model_type``.
        hidden_size: Width of the residual stream.
        blocks: The decoder layers, in order.
        total_parameters: Parameters of the whole model, tied weights counted once.
        fingerprint: sha256 over model type and the sorted names and shapes of all parameters.
        refused: Granularities that this family cannot lose exactly, each with the reason.
        parallel: Whether attention and MLP of a layer read the same stream.
        removed_constants: Whether a constant can stand in for a whole removed sub-block; not where
            a norm follows a sub-block, which it would pass, nor behind experts, which have no bias.
        keeps_biases: Whether biases of the output projections can be saved.
    """

    model_type: str
    hidden_size: int
    blocks: tuple[BlockSpec, ...]
    total_parameters: int
    fingerprint: str
    refused: tuple[tuple[str, str], ...] = ()
    removed_constants: bool = True
    parallel: bool = False
    keeps_biases: bool = True

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the decoder layers: what a pruning ratio is a fraction of."""
        return sum(block.num_parameters for block in self.blocks)

    @property
    def has_experts(self) -> bool:
        """Whether a layer is a mixture of experts."""
        return any(part.unit == "expert" for _, part in self.sub_blocks)

    @property
    def why_no_constants(self) -> str:
        """Why `removed_constants` is false, where it is."""
        if self.has_experts:
            return "experts have no bias, which would hold that of the sub-block behind them"
        return "a norm follows every sub-block, which it would pass"

    @property
    def sub_blocks(self) -> tuple[tuple[int, SubBlockSpec], ...]:
        """Every sub-block with the index of its layer, in the order in which they run."""
        return tuple((block.index, part) for block in self.blocks for part in block.sub_blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able primitives; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DecoderSpec:
        """Rebuild a spec from `to_dict`'s primitives."""
        blocks = tuple(
            BlockSpec(
                **{
                    **block,
                    "attention": AttentionSpec(**block["attention"])
                    if block["attention"]
                    else None,
                    "mlp": _mlp_from(block["mlp"]) if block["mlp"] else None,
                }
            )
            for block in raw["blocks"]
        )
        refused = tuple((kind, reason) for kind, reason in raw.get("refused", ()))
        return cls(**{**raw, "blocks": blocks, "refused": refused})


def _mlp_from(raw: Mapping[str, Any]) -> MlpSpec | ExpertsSpec:
    return ExpertsSpec(**raw) if "num_experts" in raw else MlpSpec(**raw)

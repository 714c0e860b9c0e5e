"""Mixtures of experts: where a family keeps them, and the modules of one layer.

A router scores all experts for every token, the ``top_k`` best compute it, and what they make is
added up with the router's weights. The unit that can be pruned is a whole expert, together with its
row of the router. transformers 5 packs the experts of a layer into parameters whose first dimension
counts experts, and so do those of the router: an expert leaves by one slice of each.

What a smaller router computes is exactly what the dense one would if the cut experts' logits were
minus infinity: softmax and top-k see the kept logits alone, in whatever order a family applies
them. Tokens that would have gone to a cut expert go to the next best one. At least ``top_k``
experts stay, or the whole sub-block goes: a router of fewer could not choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Paths of a mixture of experts, relative to one decoder layer.

    The router takes hidden states and returns a tuple of three: logits, weights and indices of the
    chosen experts, ``[tokens, top_k]`` the last two. The bank takes hidden states, indices and
    weights. Every parameter of the two has one entry for each expert along its first dimension.

    Attributes:
        router: Module that chooses.
        bank: Module that holds the experts. A layer without it has the plain MLP of the family.
        others: Modules of the sub-block that every token uses (a shared expert, its gate).
        returns_scores: Whether the sub-block returns ``(output, scores)``, as attention does.
        count: Field of the config, and attribute of the model, router and bank, that says how many
            experts there are.
        plain_layers: Field of the config that lists the layers with a plain MLP.
        sparse_step: Field of the config that says that only every n-th layer has experts.
        stored_apart: Whether published checkpoints hold every expert in tensors of its own, which
            transformers packs when it loads them. Other readers want them so.
    """

    router: str = "mlp.gate"
    bank: str = "mlp.experts"
    others: tuple[str, ...] = ()
    returns_scores: bool = False
    count: str = "num_experts"
    plain_layers: str | None = None
    sparse_step: str | None = None
    stored_apart: bool = True


@dataclass(frozen=True, slots=True)
class Routed:
    """The experts of one layer.

    Attributes:
        router: Chooses ``top_k`` of them for each token.
        bank: Holds them.
        others: What every token uses besides.
    """

    router: nn.Module
    bank: nn.Module
    others: tuple[nn.Module, ...]

    @property
    def num_experts(self) -> int:
        """How many there are, as the router's weight says."""
        return self.router.get_parameter("weight").shape[0]

    @property
    def top_k(self) -> int:
        """How many compute each token."""
        return int(self.router.top_k)  # type: ignore[arg-type] # a plain number of transformers

    @property
    def owned(self) -> tuple[tuple[nn.Module, str, nn.Parameter], ...]:
        """Every parameter that experts own, one entry each along its first dimension."""
        return tuple(
            (module, name, parameter)
            for module in (self.router, self.bank)
            for name, parameter in module.named_parameters()
        )

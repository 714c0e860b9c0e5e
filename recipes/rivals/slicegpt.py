"""Rival ``slicegpt``: the residual stream turned to its principal components, the last ones cut.

Deviations:
- The ratio is the fraction of decoder parameters that is really gone, the adapters on the residual
  connections counted; the paper's "slicing" is the fraction of principal components, about a third
  more. Hence the width is not rounded to a multiple of 8.
- Every layer is cut to the same width, the output of the last one not at all (the default of its
  code).
- Embeddings and head get narrower, too, or are turned; they do not count in the ratio.

References:
    Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR
    2024, arXiv 2401.15024: sections 3.2 to 3.4; principal components of the signal behind the cut
    prefix as in its code.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.config import RATIO_TOLERANCE
from lit_prune.errors import BudgetError
from rivals.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet


class Rms(nn.Module):
    """RMSNorm without weights, over a stream of which ``size`` components once were."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().square().sum(-1, keepdim=True) / self.size
        return (x.float() * torch.rsqrt(square + self.eps)).to(x.dtype)


class SlicedLayer(nn.Module):
    """A decoder layer whose stream changes its basis at both residual connections."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = Rms(size, layer.input_layernorm.variance_epsilon)
        self.post_attention_layernorm = Rms(size, layer.post_attention_layernorm.variance_epsilon)
        self.attention_adapter = self.mlp_adapter = nn.Identity()

    def attention(self, states: Tensor, keywords: dict[str, Any]) -> Tensor:
        return self.self_attn(hidden_states=self.input_layernorm(states), **keywords)[0]

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        states = self.attention_adapter(hidden_states) + self.attention(hidden_states, keywords)
        return self.mlp_adapter(states) + self.mlp(self.post_attention_layernorm(states))


def pruned(
    model: PreTrainedModel, rows: RowSet, ratio: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a copy with this fraction of the decoder parameters fewer.

    Raises:
        BudgetError: If no width comes near enough.
    """
    size = model.config.hidden_size
    removed = {width: _removed(model, width) for width in range(1, size + 1)}
    width = min(removed, key=lambda w: abs(removed[w] - ratio))
    if abs(removed[width] - ratio) > RATIO_TOLERANCE:
        raise BudgetError(
            f"slicegpt cannot remove {ratio:.2%} of the decoder parameters: the nearest width, "
            f"{width} of {size}, removes {removed[width]:.2%}."
        )
    notes = f"{width} of {size} principal components"
    return sliced(model, rows, width), {"achieved": removed[width], "notes": notes}


@torch.no_grad()
def sliced(model: PreTrainedModel, rows: RowSet, width: int) -> PreTrainedModel:
    """Return a copy whose stream has ``width`` components between all layers."""
    model = copy.deepcopy(model).eval()
    decoder, size = model.model, model.config.hidden_size
    _fold_norms(model)
    stream = Stream(model, rows)
    basis = _principal(stream, stream.states)[:, :width]
    _set(decoder.embed_tokens, decoder.embed_tokens.weight.double() @ basis)
    stream.states = [(states.double() @ basis).to(states.dtype) for states in stream.states]
    for index, old in enumerate(decoder.layers):
        layer = SlicedLayer(old, size)
        decoder.layers[index] = layer
        last = index == len(decoder.layers) - 1
        for linear in (old.self_attn.q_proj, old.self_attn.k_proj, old.self_attn.v_proj):
            _turn_input(linear, basis)

        def attended(states: Tensor, keywords: dict[str, Any], layer=layer, basis=basis) -> Tensor:
            return states @ basis.T.to(states.dtype) + layer.attention(states, keywords)

        middle = _principal(stream, stream.each(attended))[:, :width]
        _turn_output(old.self_attn.o_proj, middle)
        layer.attention_adapter = _adapter(basis, middle, old.self_attn.o_proj.weight)
        for linear in (old.mlp.gate_proj, old.mlp.up_proj):
            _turn_input(linear, middle)

        layer.mlp_adapter = _adapter(middle, None, old.mlp.down_proj.weight)  # back, for now
        full = _principal(stream, stream.each(lambda x, k, layer=layer: layer(x, **k)))
        after = full if last else full[:, :width]
        _turn_output(old.mlp.down_proj, after)
        layer.mlp_adapter = _adapter(middle, after, old.mlp.down_proj.weight)
        stream.through(layer)
        basis = after
    _turn_input(model.lm_head, basis)
    return model


def _removed(model: PreTrainedModel, width: int) -> float:
    """Return the fraction of decoder parameters that a width removes; below 0 near the whole."""
    size, left = model.config.hidden_size, 0
    layers = model.model.layers
    for index, layer in enumerate(layers):
        out = size if index == len(layers) - 1 else width
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            left += linear.weight.shape[0] * width
        left += attention.o_proj.weight.shape[1] * width
        left += 2 * mlp.gate_proj.weight.shape[0] * width + mlp.down_proj.weight.shape[1] * out
        left += width * width + width * out
        # biases in front, and norms inside the attention, stay; those of outputs are turned
        inner = [p for name, p in layer.named_parameters() if name.startswith("self_attn.")]
        left += sum(p.numel() for p in inner if p.ndim == 1)
        left -= 0 if attention.o_proj.bias is None else size - width
        for linear in (mlp.gate_proj, mlp.up_proj):
            left += 0 if linear.bias is None else linear.bias.numel()
        left += 0 if mlp.down_proj.bias is None else out
    return 1 - left / sum(p.numel() for p in layers.parameters())


def _fold_norms(model: PreTrainedModel) -> None:
    """Move the weights of every norm into the linear layers behind it."""
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.clone())  # it may be the embeddings
    model.config.tie_word_embeddings = False
    pairs = [(model.model.norm, (head,))]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        behind = (attention.q_proj, attention.k_proj, attention.v_proj)
        pairs.append((layer.input_layernorm, behind))
        pairs.append((layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
    for norm, linears in pairs:
        for linear in linears:
            _set(linear, linear.weight.double() * norm.weight.double())
        norm.weight.fill_(1.0)
    model.model.norm = Rms(model.config.hidden_size, model.model.norm.variance_epsilon)


def _principal(stream: Stream, states: list[Tensor]) -> Tensor:
    """Return principal components (not centred) as columns, the largest first; float64."""
    return torch.linalg.eigh(stream.second_moment(states))[1].flip(1)


def _adapter(before: Tensor, after: Tensor | None, like: Tensor) -> nn.Linear:
    """Return the change of basis ``beforeᵀ after`` as a linear layer (None: the old basis)."""
    change = before.T if after is None else before.T @ after
    linear = nn.Linear(*change.shape, bias=False, device=like.device, dtype=like.dtype)
    linear.weight.copy_(change.T)
    return linear


def _turn_input(linear: nn.Linear, basis: Tensor) -> None:
    _set(linear, linear.weight.double() @ basis)
    linear.in_features = basis.shape[1]


def _turn_output(linear: nn.Linear, basis: Tensor) -> None:
    if linear.bias is not None:
        linear.bias = nn.Parameter((basis.T @ linear.bias.double()).to(linear.bias.dtype))
    _set(linear, basis.T @ linear.weight.double())
    linear.out_features = basis.shape[1]


def _set(module: nn.Linear | nn.Embedding, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight.to(module.weight.dtype).contiguous())

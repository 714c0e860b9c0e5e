"""Damage of removing experts, from the inner products of what they add to the stream.

With ``c_e(x) = g_e(x) f_e(x)`` the contribution of expert ``e`` (its weight by the router times its
output, zero where it is not chosen) and ``G_ef = E <c_e, c_f>``, a sub-block from which the experts
in ``S`` vanish is wrong by ``E |sum_S c_e|^2 = 1_S^T G 1_S``. That is exact for experts that
vanish. It leaves out what happens next in a pruned model: the tokens of a cut expert go to the next
best one, and the weights of the others may grow. Nor is anything fitted in its place.

References:
    Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", 2025, arXiv
    2510.13999: router-weighted norms of outputs as an expert's saliency. We differ: squared norms
    over all tokens (the diagonal of ``G``), the products between experts count, and experts leave
    one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.errors import ScoreError


def experts_order(gram: Tensor) -> Tensor:
    """Return experts as they leave: each time the one that adds least to the damage.

    Equal ones leave by index.

    Args:
        gram: ``G``, ``[experts, experts]``, finite (squared output units).

    Returns:
        ``[experts]``, int64.

    Raises:
        ScoreError: If ``gram`` is not square, or a value is not finite.

    Example:
        >>> experts_order(torch.tensor([[4.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 2.0]]))
        tensor([1, 2, 0])
    """
    left = _checked(gram)
    gain, order = left.diagonal().clone(), []
    for _ in range(len(left)):
        leaves = int(gain.argmin())
        order.append(leaves)
        gain += 2 * left[leaves]
        gain[order] = torch.inf
    return torch.tensor(order, dtype=torch.int64)


def experts_damage(gram: Tensor, order: Tensor) -> Tensor:
    """Return the mean squared output error after 0, 1, … experts have vanished in an order.

    Args:
        gram: ``G``, ``[experts, experts]``.
        order: Experts as they leave, each once, ``[experts]``.

    Returns:
        ``[experts + 1]``, float64 (squared output units). It may fall where two contributions
        cancel.

    Raises:
        ScoreError: If ``gram`` is not square, or a value is not finite, or ``order`` does not fit.

    Example:
        >>> gram = torch.tensor([[4.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 2.0]])
        >>> experts_damage(gram, torch.tensor([1, 2, 0]))
        tensor([0., 1., 3., 5.], dtype=torch.float64)
    """
    gram = _checked(gram)
    if sorted(order.tolist()) != list(range(len(gram))):
        raise ScoreError(
            f"order has {len(order)} entries, expected each of {len(gram)} experts exactly once."
        )
    ordered = gram[order][:, order]
    # what expert i adds: itself and, twice, its products with those that left before
    gains = ordered.diagonal() + 2 * ordered.tril(-1).sum(1)
    return torch.cat([gains.new_zeros(1), gains.cumsum(0)]).clamp_min(0)


def _checked(gram: Tensor) -> Tensor:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ScoreError(f"gram has shape {list(gram.shape)}; expected [experts, experts].")
    if not bool(torch.isfinite(gram).all()):
        raise ScoreError(
            f"gram has {int((~torch.isfinite(gram)).sum())} of {gram.numel()} values that are NaN "
            "or infinite; expected finite inner products."
        )
    return gram.detach().double().cpu()

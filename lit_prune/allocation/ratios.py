"""How much each block loses: transfer entropies to per-block pruning ratios (paper A, Eq. 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from lit_prune.errors import BudgetError, ConfigError, ScoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

RatioMap = Literal["inverse", "softmax", "rank", "zscore"]

# Shares of the linear maps do not fall below this: a share of zero could never be filled up
# once all the others are full.
_SMALLEST_SHARE = 1e-9
# Below this spread (relative) the differences are rounding, and z-scores would blow them up.
_CONSTANT = 1e-12


def block_ratios(
    transfer_entropy: Sequence[float],
    weights: Sequence[float],
    target: float,
    *,
    ratio_map: RatioMap = "softmax",
    temperature: float = 1.0,
    strength: float = 0.5,
    max_ratio: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Per-block pruning ratios of weighted mean ``target``: less transfer entropy, more pruning.

    ``p_i = min(max_i, c * s_i)``, with ``c`` such that ``sum(w_i * p_i) = target * sum(w_i)``: what
    a full block cannot take flows to the others in proportion to their shares ``s_i``
    (water-filling). The paper publishes only that a lower transfer entropy means a larger ratio;
    its map is not known, so that all of these are RECONSTRUCTED:

    - ``"inverse"``: ``s = 1 / TE``; zeros count as 1e-9 of the largest.
    - ``"softmax"``: ``s = exp(-z / temperature)``, z = standardised TE.
    - ``"rank"``: ``s = 1 + strength * r``, r from +1 (lowest TE) to -1 (highest), ties alike.
    - ``"zscore"``: ``s = 1 - strength * z``; below zero it counts as (almost) nothing.

    Blocks that may not be pruned (``max_ratio`` 0) do not take part in standardising and ranking:
    an outlier that is protected anyway should not level the others. Constant transfer entropy gives
    equal shares.

    Args:
        transfer_entropy: One value for each block, nats, finite; ``"inverse"`` wants them
            non-negative.
        weights: Parameters in each block (or any other non-negative measure that the ratio counts).
            A block without parameters gets ratio 0.
        target: Fraction to remove over all blocks, in [0, 1].
        ratio_map: How transfer entropy becomes a share.
        temperature: For ``"softmax"``; positive. Large: uniform. Small: all on the least important.
        strength: For ``"rank"`` and ``"zscore"``; non-negative, 0 is uniform.
        max_ratio: Largest ratio of each block, in [0, 1]; 0 protects a block. Default: 1
            everywhere.

    Returns:
        Ratios in [0, max_i], float64. The weighted mean is met to 1e-12.

    Raises:
        ConfigError: If an option is out of its range.
        ScoreError: If a transfer entropy is not finite (or negative with ``"inverse"``), or lengths
            differ.
        BudgetError: If the blocks cannot give ``target`` without exceeding ``max_ratio``.

    Example:
        >>> ratios = block_ratios([4.0, 1.0, 2.0], [1, 1, 1], 0.3, ratio_map="inverse")
        >>> [round(p, 3) for p in ratios]
        [0.129, 0.514, 0.257]

    References:
        Yang et al., "Let LLM Tell What to Prune and How Much to Prune", ICML 2025, section 3.1,
        Algorithm 1.
        We differ: the map is ours, and the ratios are clipped by water-filling.
    """
    entropy = np.asarray(transfer_entropy, np.float64)
    weight = np.asarray(weights, np.float64)
    most = np.ones_like(entropy) if max_ratio is None else np.asarray(max_ratio, np.float64)
    _check(entropy, weight, most, ratio_map, target, temperature, strength)

    ratios = np.zeros_like(entropy)
    free = (most > 0) & (weight > 0)
    budget = target * math.fsum(weight)
    room = math.fsum(weight * most)
    if budget > room * (1 + _CONSTANT):
        raise BudgetError(
            f"cannot remove {target:.2%} of the blocks: with the protected layers and largest "
            f"ratios given, at most {room / math.fsum(weight):.2%} can go. Lower the ratio or "
            "protect fewer layers."
        )
    if free.any() and budget > 0:
        log_shares = _log_shares(entropy[free], ratio_map, temperature, strength)
        ratios[free] = _fill(log_shares, weight[free], most[free], budget)
    return tuple(ratios.tolist())


def _check(
    entropy: Vector,
    weight: Vector,
    most: Vector,
    ratio_map: str,
    target: float,
    temperature: float,
    strength: float,
) -> None:
    if ratio_map not in get_args(RatioMap):
        raise ConfigError(f"ratio_map must be one of {get_args(RatioMap)}, got {ratio_map!r}.")
    if not 0 <= target <= 1:  # also false for NaN
        raise ConfigError(f"target must be a fraction in [0, 1], got {target!r}.")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature must be positive and finite, got {temperature!r}.")
    if not 0 <= strength < math.inf:
        raise ConfigError(f"strength must be non-negative and finite, got {strength!r}.")
    if entropy.ndim != 1 or entropy.shape != weight.shape or entropy.shape != most.shape:
        raise ScoreError(
            "one transfer entropy, weight and largest ratio is needed for each block, got shapes "
            f"{entropy.shape}, {weight.shape} and {most.shape}."
        )
    lowest = 0.0 if ratio_map == "inverse" else -math.inf
    for block, value in enumerate(entropy.tolist()):
        if not math.isfinite(value) or value < lowest:
            wanted = "finite and >= 0" if ratio_map == "inverse" else "finite"
            raise ScoreError(
                f"transfer entropy of block {block} is {value}; expected {wanted} (nats)."
            )
    for block, (size, ratio) in enumerate(zip(weight.tolist(), most.tolist(), strict=True)):
        if not 0 <= size < math.inf:
            raise ConfigError(f"weight of block {block} is {size}; expected finite and >= 0.")
        if not 0 <= ratio <= 1:
            raise ConfigError(
                f"max_ratio of block {block} is {ratio}; expected a fraction in [0, 1]."
            )


def _log_shares(entropy: Vector, ratio_map: str, temperature: float, strength: float) -> Vector:
    # Scaling first keeps the squares inside float64 and makes the test for "constant" relative.
    scale = np.abs(entropy).max()
    value = entropy / scale if scale > 0 else entropy
    centred = value - value.mean()
    spread = float(np.sqrt(np.square(centred).mean()))
    if spread <= _CONSTANT:
        return np.zeros_like(value)
    if ratio_map == "inverse":
        shares = 1.0 / np.maximum(value, _SMALLEST_SHARE)
    elif ratio_map == "softmax":
        logits: Vector = -centred / spread / temperature
        return logits
    elif ratio_map == "rank":
        below = (value[None, :] < value[:, None]).sum(1)
        not_above = (value[None, :] <= value[:, None]).sum(1)
        mean_rank = (below + not_above - 1) / 2
        shares = 1.0 + strength * (1.0 - 2.0 * mean_rank / (len(value) - 1))
    else:
        shares = 1.0 - strength * centred / spread
    floored: Vector = np.log(np.maximum(shares, _SMALLEST_SHARE))
    return floored


def _fill(log_shares: Vector, weight: Vector, most: Vector, budget: float) -> Vector:
    ratios = np.zeros_like(log_shares)
    full = np.zeros(len(log_shares), dtype=bool)
    # Each round fills at least one more block or ends; the level only rises: full blocks stay full.
    while not full.all():
        open_ = ~full
        left = budget - math.fsum(weight[full] * most[full])
        # Relative to the largest open share, so that a sharp softmax never sees only underflow.
        shares = np.exp(log_shares[open_] - log_shares[open_].max())
        ratios[open_] = max(left, 0.0) / math.fsum(weight[open_] * shares) * shares
        over = open_ & (ratios >= most)
        ratios[over] = most[over]
        full |= over
        if not over.any():
            break
    return ratios

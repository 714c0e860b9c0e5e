"""Random plans of chosen granularities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.plan import LayerPlan, PruningPlan

if TYPE_CHECKING:
    import random

    from lit_prune.decoder import BlockSpec, DecoderSpec, SubBlockKind


def random_plan(spec: DecoderSpec, rng: random.Random, allowed: set[str]) -> PruningPlan | None:
    """Return a plan that removes units of these granularities, and of no other.

    One attention stays, so that there is a KV cache.

    Args:
        spec: The decoder; one of its blocks has an attention.
        rng: Chooses.
        allowed: Granularities.

    Returns:
        The plan; None where there is nothing of that kind to remove.

    Example:
        >>> import random
        >>> from lit_prune.decoder.spec import AttentionSpec, MlpSpec, BlockSpec, DecoderSpec
        >>> sizes = {"unit_parameters": 6, "fixed_parameters": 2, "output_bias": False}
        >>> mlp = MlpSpec(name="mlp", num_channels=1, **sizes)
        >>> attention = AttentionSpec(name="attention", num_kv_groups=3, queries_per_group=1,
        ...                           head_dim=2, **sizes)
        >>> blocks = (BlockSpec(index=0, name="0", attention=attention, mlp=mlp),)
        >>> spec = DecoderSpec(model_type="t", hidden_size=2, blocks=blocks, total_parameters=60,
        ...                    fingerprint="")
        >>> plan = random_plan(spec, random.Random(0), {"kv_group"})
        >>> len(plan.layers[0].kv_groups) < 3, plan.layers[0].channels
        (True, (0,))
        >>> random_plan(spec, random.Random(0), {"channel"}) is None
        True
    """
    stays = rng.choice([block.index for block in spec.blocks if block.attention])
    others = [block.index for block in spec.blocks if block.index != stays]
    chosen = rng.choice(others) if others else None  # something goes here for certain
    layers = []
    for block in spec.blocks:
        whole = "block" in allowed and block.index == chosen
        half: SubBlockKind | None = None
        if "sub_block" in allowed and (block.index == chosen or rng.random() < 0.5):
            half = _half(block, rng, stays)
        kept: dict[str, tuple[int, ...]] = {"attention": (), "mlp": ()}
        for part in block.sub_blocks:
            units = range(part.num_units)
            if whole or part.kind == half:
                continue
            if part.unit in allowed and part.num_units > part.least_units:
                count = rng.randrange(part.least_units, part.num_units)
                kept[part.kind] = tuple(sorted(rng.sample(units, count)))
            else:
                kept[part.kind] = tuple(units)
        layers.append(LayerPlan(block.index, kept["attention"], kept["mlp"]))
    plan = PruningPlan(spec.fingerprint, tuple(layers))
    return None if plan == PruningPlan.keep_all(spec) else plan


def _half(block: BlockSpec, rng: random.Random, stays: int) -> SubBlockKind | None:
    """Return the sub-block that goes alone; None where only one is there."""
    kinds = [part.kind for part in block.sub_blocks]
    if len(kinds) < 2:
        return None
    return "mlp" if block.index == stays else rng.choice(kinds)

"""What is left when units leave: which blocks stay, and where constants can live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.decoder.spec import SubBlockKind

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lit_prune.decoder.spec import DecoderSpec

SubBlock = tuple[int, SubBlockKind]
# Constants of sub-blocks removed before the first surviving one have no earlier projection to live
# in: the attention slot of layer 0 holds their sum (an exact place: nothing before the first
# survivor reads the residual stream).
LEADING: SubBlock = (0, "attention")


@dataclass(frozen=True, slots=True)
class Remainder:
    """What stays of a decoder.

    Attributes:
        blocks: Indices of the layers that stay, ascending.
        holders: For each output bias that receives constants, the sub-blocks whose constants it
            receives.
        num_parameters: Parameters of the layers that stay, new biases included.
        new_biases: How many biases that is, of ``hidden_size`` each.
    """

    blocks: tuple[int, ...]
    holders: dict[SubBlock, tuple[SubBlock, ...]]
    num_parameters: int
    new_biases: int


def remainder(
    spec: DecoderSpec, counts: Mapping[SubBlock, int], constants: Collection[SubBlock] = ()
) -> Remainder:
    """Say what stays when each sub-block keeps ``counts`` units.

    A removed sub-block's constant output is added to the bias of the surviving sub-block before it:
    nothing between the two reads the residual stream, so this is exact. Where attention and MLP of
    a layer are added to the stream together, that is the other one of its layer, if that stays:
    the two come in either order, and what lies before the layer is read by both.

    Args:
        spec: The decoder.
        counts: Kept units of every existing sub-block, by ``(layer, kind)``; 0 removes it.
        constants: Sub-blocks whose cut units leave a constant behind (compensation).

    Example:
        >>> from lit_prune.decoder.spec import BlockSpec, DecoderSpec, MlpSpec
        >>> sizes = {"unit_parameters": 6, "fixed_parameters": 2, "output_bias": False}
        >>> mlp = MlpSpec(name="mlp", num_channels=4, **sizes)
        >>> blocks = tuple(
        ...     BlockSpec(index=i, name=str(i), attention=None, mlp=mlp) for i in range(2)
        ... )
        >>> spec = DecoderSpec(model_type="t", hidden_size=2, blocks=blocks, total_parameters=60,
        ...                    fingerprint="")
        >>> remainder(spec, {(0, "mlp"): 3, (1, "mlp"): 0}, {(1, "mlp")})
        Remainder(blocks=(0,), holders={(0, 'mlp'): ((1, 'mlp'),)}, num_parameters=22,
                  new_biases=1)
    """
    holders: dict[SubBlock, tuple[SubBlock, ...]] = {}
    holder = LEADING
    for block in spec.blocks:
        places: list[SubBlock] = [(block.index, part.kind) for part in block.sub_blocks]
        if spec.parallel:
            places.sort(key=lambda place: not counts[place])  # what stays comes first
        for place in places:
            if counts[place]:
                holder = place
            if place in constants:
                holders[holder] = (*holders.get(holder, ()), place)
    leading = LEADING in holders and not counts.get(LEADING)
    blocks, total, biases = [], 0, 0
    for block in spec.blocks:
        kept = [part for part in block.sub_blocks if counts[block.index, part.kind]]
        shell = block.constant_parameters or (leading and block.index == LEADING[0])
        if not kept and not shell:
            continue
        blocks.append(block.index)
        total += block.constant_parameters + (block.shared_parameters if kept else 0)
        biases += bool(shell and not block.constant_parameters)
        for part in kept:
            total += counts[block.index, part.kind] * part.unit_parameters + part.fixed_parameters
            if (block.index, part.kind) in holders and not part.output_bias:
                biases += 1
    return Remainder(tuple(blocks), holders, total + biases * spec.hidden_size, biases)


def all_kept(spec: DecoderSpec) -> dict[SubBlock, int]:
    """Return the unit count of every existing sub-block, by ``(layer, kind)``."""
    return {(index, part.kind): part.num_units for index, part in spec.sub_blocks}

"""Compensation: what cut units wrote is put back, on average or as far as the kept ones tell."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_prune.decoder import KINDS, DecoderParts, SubBlock, SubBlockKind, spec_for
from lit_prune.errors import ArtifactError, PlanMismatchError
from lit_prune.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from lit_prune.decoder.projections import Projection
    from lit_prune.plan import PruningPlan

_HEAD = "head_map"  # in a file
# What is there by sub-block, by the name that a file has in front of the place.
_GROUPS = {"": "constants", "weights.": "weights", "input_maps.": "input_maps", "inner.": "inner"}
# Parameters in memory at once, copied from their device; beyond that, memory is the limit.
_HASHED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Compensation:
    """What stands in for cut units; made for one plan on one set of weights.

    Attributes:
        constants: Added to the output of each cut sub-block, by ``(layer, kind)``,
            ``[hidden_size]`` each, float64.
        plan_digest: The plan that it belongs to.
        weights_digest: The weights that it was made for.
        weights: New weights of output projections, where kept columns take over part of what was
            cut, there or before, by ``(layer, kind)``, ``[hidden_size, kept columns]`` each,
            float32.
        input_maps: What the input projections of a sub-block get is mapped by, where what they get
            has changed, by ``(layer, kind)``, ``[hidden_size, hidden_size]`` each, float32: the
            weights become ``W M``.
        inner: New weights of `fitted_inputs` of a sub-block, by ``(layer, kind)``, ``[rows of units
            that stay, hidden_size]`` each, float32, one projection after the other, unit by unit;
            in place of what an input map makes of them.
        head_map: What the head gets is mapped by, ``[hidden_size, hidden_size]``; where its weights
            are those of the embeddings, which stay, a number that the final norm is scaled by,
            ``[]``.
        facts: What the plan records about it, JSON-able.
        notes: What the report says about it, in words.
    """

    constants: dict[SubBlock, Tensor]
    plan_digest: str
    weights_digest: str
    weights: dict[SubBlock, Tensor] = field(default_factory=dict)
    input_maps: dict[SubBlock, Tensor] = field(default_factory=dict)
    inner: dict[SubBlock, Tensor] = field(default_factory=dict)
    head_map: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write ``compensation.safetensors``."""
        from safetensors.torch import save_file

        header = json.dumps(
            {"plan_digest": self.plan_digest, "weights_digest": self.weights_digest}
        )
        with whole_file(path) as beside:
            save_file(self.tensors(), beside, metadata={"lit_prune": header})

    def tensors(self) -> dict[str, Tensor]:
        """Return constants and weights by the names that they have in a file."""
        found: dict[str, Tensor] = {
            f"{group}{layer}.{kind}": x
            for group, field_name in _GROUPS.items()
            for (layer, kind), x in getattr(self, field_name).items()
        }
        if self.head_map is not None:
            found[_HEAD] = self.head_map
        return {name: x.contiguous() for name, x in found.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Compensation:
        """Return this compensation with what `tensors` returned for another.

        Raises:
            KeyError, ValueError: If a name is none of those.
        """
        found: dict[str, dict[SubBlock, Tensor]] = {name: {} for name in _GROUPS.values()}
        for name, tensor in tensors.items():
            if name != _HEAD:
                *group, layer, kind = name.split(".")
                there = found[_GROUPS["".join(f"{part}." for part in group)]]
                there[int(layer), _kind(kind)] = tensor
        by_place: dict[str, Any] = {**found, "head_map": tensors.get(_HEAD)}
        return replace(self, **by_place)

    @classmethod
    def load(cls, path: str | Path) -> Compensation:
        """Read what `save` wrote.

        Raises:
            ArtifactError: If the file is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["lit_prune"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            digests = header["plan_digest"], header["weights_digest"]
            if not all(isinstance(digest, str) for digest in digests):
                raise TypeError(f"digests are {digests}")
            return cls({}, *digests).with_tensors(tensors)
        except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is not a compensation of lit_prune: {error!r}.") from error

    def check(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        """Refuse to be used with another plan, on other weights, or where it would not be exact.

        Raises:
            PlanMismatchError: Says which it is.
        """
        if self.plan_digest != plan.digest:
            raise PlanMismatchError(
                f"compensation was made for plan {self.plan_digest[:12]}…, not for "
                f"{plan.digest[:12]}…."
            )
        if self.weights_digest != weights_digest(model):
            raise PlanMismatchError(
                "compensation was made for other weights of this architecture, or for these in "
                f"another dtype than {model.dtype}: its constants would be wrong. Load the model "
                "in the dtype that the plan was made in, or make it again from a calibration of "
                "this model."
            )
        self._check_shapes(DecoderParts(model), plan)
        spec = spec_for(model)
        gone = [(i, kind) for i, kind in self.constants if not plan.layers[i].kept(kind)]
        if gone and not spec.removed_constants:
            raise PlanMismatchError(
                f"compensation has a constant in place of layer {gone[0][0]} {gone[0][1]}, which "
                f"goes whole: in {spec.model_type} models {spec.why_no_constants}. Make the "
                "compensation with removed_mean='drop'."
            )

    def _check_shapes(self, parts: DecoderParts, plan: PruningPlan) -> None:
        for group in _GROUPS.values():
            for (layer, kind), tensor in getattr(self, group).items():
                shape = None
                if 0 <= layer < len(parts.layers) and parts.exists(layer, kind):
                    kept = plan.layers[layer].kept(kind)
                    shape = _shapes(parts, (layer, kind), kept).get(group)
                if tensor.shape != shape:
                    raise PlanMismatchError(
                        f"compensation has {group} of shape {list(tensor.shape)} for layer "
                        f"{layer} {kind}; expected "
                        f"{'none' if shape is None else list(shape)}. It was written by another "
                        "version of lit_prune, or altered: make it again."
                    )
        hidden, head_map = parts.hidden_size, self.head_map
        if head_map is not None and head_map.shape not in ((), (hidden, hidden)):
            raise PlanMismatchError(
                f"compensation has a head_map of shape {list(head_map.shape)}; expected [] or "
                f"{[hidden, hidden]}. It was written by another version of lit_prune, or altered: "
                "make it again."
            )


def mean_compensation(
    model: PreTrainedModel,
    plan: PruningPlan,
    units: Mapping[SubBlock, tuple[Tensor, Tensor]],
    *,
    removed_mean: Literal["add", "drop"] = "add",
    weights: str | None = None,
) -> Compensation:
    """Return the mean output of everything that ``plan`` cuts: ``W[:, cut] @ E[x_cut]``.

    Of a sub-block that is removed whole this is its mean output, its own bias included.

    Args:
        model: The dense model that the plan was made for.
        plan: What stays.
        units: Mean and variance of the inputs of the output projections (`Calibration.units`).
        removed_mean: ``drop`` leaves nothing in place of whole sub-blocks; nor does ``add`` where a
            norm follows a sub-block (`DecoderSpec.removed_constants`).
        weights: `weights_digest` of the model, where it is known.

    References:
        An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP),
        AAAI 2024: the formula. That Yang et al. (ICML 2025, section 4.4) use exactly it, and that
        it is applied to whole sub-blocks, is our reconstruction.
    """
    spec = spec_for(model)
    plan.validate(spec)
    parts = DecoderParts(model)
    constants: dict[SubBlock, Tensor] = {}
    for index, part in spec.sub_blocks:
        place: SubBlock = (index, part.kind)
        kept = plan.layers[index].kept(part.kind)
        cut = sorted(set(range(part.num_units)) - set(kept))
        whole_stays = removed_mean == "add" and spec.removed_constants
        if not cut or not part.takes_constant or (not kept and not whole_stays):
            continue
        columns = unit_columns(cut, part.unit_width)
        linear = parts.output(index, part.kind)
        mean = units[place][0][columns]
        constant = linear.weight.detach()[:, columns.to(linear.weight.device)].double().cpu() @ mean
        if not kept and linear.bias is not None:
            constant = constant + linear.bias.detach().double().cpu()
        constants[place] = constant
    return Compensation(constants, plan.digest, weights or weights_digest(model))


def _kind(name: str) -> SubBlockKind:
    return KINDS[KINDS.index(name)]  # ValueError where it is none


def _shapes(
    parts: DecoderParts, place: SubBlock, kept: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return what shape tensors of a sub-block have, by attribute of `Compensation`."""
    hidden = parts.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"constants": (hidden,)}
    if kept and parts.routed(*place) is None:
        rows = sum(len(each.lines_of(kept)) for each in fitted_inputs(parts, place))
        shapes["weights"] = (hidden, len(kept) * parts.unit_width(*place))
        shapes["input_maps"] = (hidden, hidden)
        shapes["inner"] = (rows, hidden)
    return shapes


def unit_columns(units: Sequence[int], unit_width: int) -> Tensor:
    """Return the columns that ``units`` own.

    Example:
        >>> unit_columns([0, 2], 2)
        tensor([0, 1, 4, 5])
    """
    first = torch.tensor(units, dtype=torch.int64).unsqueeze(1) * unit_width
    return (first + torch.arange(unit_width)).reshape(-1)


def compensated_inputs(
    parts: DecoderParts, place: SubBlock, kept: Sequence[int], compensation: Compensation | None
) -> dict[nn.Module, Callable[[], Tensor]]:
    """Return what makes the weights of those input projections that change, ``[out, in]``.

    Rows of units that go are what they may be: nobody reads what they make.

    Args:
        parts: The dense model's parts.
        place: Not of experts.
        kept: Units that stay.
        compensation: What it is to do to them.
    """
    input_map = None if compensation is None else compensation.input_maps.get(place)
    inner = None if compensation is None else compensation.inner.get(place)
    news: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    if inner is not None:
        fitted = fitted_inputs(parts, place)
        lines = [each.lines_of(kept) for each in fitted]
        rows = inner.split([len(own) for own in lines])
        for each, own, new in zip(fitted, lines, rows, strict=True):
            news[each.module] = own, new

    def weight(each: Projection) -> Tensor:
        matrix: Tensor = each.matrix.detach()
        if input_map is not None:
            matrix = mapped(matrix, input_map)
        if each.module in news:
            own, new = news[each.module]
            matrix = matrix.index_copy(0, own.to(matrix.device), new.to(matrix))
        return matrix

    return {
        each.module: partial(weight, each)
        for each in parts.input_modules(*place)
        if input_map is not None or each.module in news
    }


def fitted_inputs(parts: DecoderParts, place: SubBlock) -> tuple[Projection, ...]:
    """Return the projections that `Compensation.inner` has new weights of.

    Of an attention its value projection, of an MLP all that reads; of a fused one, its rows.
    """
    if place[1] == "attention":
        return parts.inputs(*place)[-1:]
    return parts.input_modules(*place)


def mapped(weight: Tensor, input_map: Tensor) -> Tensor:
    """Return ``W M``: weights for inputs that ``M`` brings to what they were, ``[out, in]``.

    Example:
        >>> mapped(torch.ones(1, 2), torch.diag(torch.tensor([2.0, 3.0])))
        tensor([[2., 3.]])
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(exact) @ input_map.to(weight.device, exact)).to(weight.dtype)


def weights_digest(model: PreTrainedModel) -> str:
    """Return a hash of every parameter's name, shape and bytes.

    Parameters are hashed side by side: of a large model it takes as long as all else that is done
    on the CPU.
    """
    named = list(model.named_parameters())
    whole = hashlib.blake2b(digest_size=32)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _HASHED_AT_ONCE)) as pool:
        digests = pool.map(_digest, (parameter for _, parameter in named))
        for (name, parameter), digest in zip(named, digests, strict=True):
            whole.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + digest)
    return whole.hexdigest()


def _digest(parameter: Tensor) -> bytes:
    flat = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=32).digest()

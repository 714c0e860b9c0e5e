"""Replaying the kept token ids, once, after the last step: unit moments and every bypass."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_prune.calibration.bypass import RecordedRun, Unit
from lit_prune.calibration.covariance import ChannelCovariance
from lit_prune.calibration.moments import ChannelMoments
from lit_prune.calibration.observer import Probed, describe_non_finite
from lit_prune.calibration.out_of_memory import out_of_memory_in
from lit_prune.calibration.probes import Probe, probe_of
from lit_prune.decoder import DecoderParts, quiet
from lit_prune.errors import CalibrationError
from lit_prune.ranks import ALONE

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import PreTrainedModel

    from lit_prune.calibration.rows import RowSet
    from lit_prune.calibration.split import Side
    from lit_prune.ranks import Ranks

TransferTarget = Literal["after_norm", "before_norm"]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay measured over the calibrate side, float64 on the CPU.

    Of several ranks all have ``units``, and rank 0 has the rest.

    Attributes:
        units: Mean and variance of the input of every output projection, by ``(layer, kind)``,
            ``[width]`` each; of experts, of what each adds, ``[experts * hidden_size]``.
        full: Variance ``[hidden_size]`` (or covariance) of the final hidden state of the whole
            model; None where no bypass was asked for.
        bypassed: The same with each unit bypassed.
        target: Where the final hidden state was read.
        covariances: Covariance of the same inputs, ``[width, width]``; of experts the mean inner
            products of what they add, ``[experts, experts]``; empty where not asked for.
        changes: Mean squared Euclidean norm of the change of the final hidden state when a unit is
            bypassed, a scalar each.
    """

    units: dict[Probed, tuple[Tensor, Tensor]]
    full: Tensor | None
    bypassed: dict[Unit, Tensor]
    target: TransferTarget = "after_norm"
    covariances: dict[Probed, Tensor] = field(default_factory=dict)
    changes: dict[Unit, Tensor] = field(default_factory=dict)


def replay(
    model: PreTrainedModel,
    rows: RowSet,
    bypass: Sequence[Unit] = (),
    *,
    target: TransferTarget = "after_norm",
    joint: bool = False,
    covariances: Collection[Probed] = (),
    side: Side = "calibrate",
    max_tokens: int = 8192,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Replayed:
    """Run one side once, and from each batch's hidden states every bypass.

    The batches are made from the distinct rows in canonical order: the result is bit-identical
    whatever the order, padding or batch size in which the rows arrived. Ranks take turns with the
    batches, and their moments are merged in float64: the same up to the order of the sums.

    Args:
        model: The language model, on the device where it shall run. It is left as it was.
        rows: The calibration text.
        bypass: Units to bypass, one after the other; each costs about half a forward.
        target: Where the final hidden state is read: after the final norm (what feeds the head) or
            before it.
        joint: Keep covariances of the final hidden state instead of variances (``8 * hidden_size **
            2`` bytes for each bypass).
        covariances: Sub-blocks of which the covariance of the output projection's input is kept
            too (``8 * width ** 2`` bytes each).
        side: Which text.
        max_tokens: Tokens of one forward.
        progress: Show a bar (only on a terminal).
        ranks: Who shares the forwards; all have the same model and the same rows.

    Raises:
        CalibrationError: If an activation is not finite, or memory runs out; on all ranks.
    """
    parts = DecoderParts(model)
    device = next(model.parameters()).device
    hidden_size = parts.hidden_size
    states: dict[Unit | None, ChannelMoments | ChannelCovariance] = {
        unit: ChannelCovariance(hidden_size)
        if joint
        else ChannelMoments(hidden_size, str(unit or "the final state"))
        for unit in (None, *bypass)
    }
    moments: dict[Probed, ChannelMoments] = {}
    joints: dict[Probed, ChannelCovariance] = {}
    squares = {unit: torch.zeros((), dtype=torch.float64) for unit in bypass}
    num_batches = rows.num_batches(side, max_tokens)
    bar = tqdm(
        total=len(range(num_batches)[ranks.rank :: ranks.size]) * (1 + len(bypass)),
        desc="Calibrating (replay)",
        unit="forward",
        leave=False,
        disable=None if progress else True,
    )
    with ranks.together(), quiet(model), bar:
        for number, batch in ranks.share(enumerate(rows.batches(side, max_tokens))):
            mask = batch.attention_mask.to(device)
            place = f"replayed batch {number}"
            shape = f"{place} ({list(mask.shape)} rows x tokens)"
            with out_of_memory_in(shape, max_tokens):
                with _UnitProbes(parts, mask, place, covariances) as probes:
                    run = RecordedRun(parts, batch.model_inputs(device))
                bar.update()
                # merged below, after the whole batch, so that a failure adds none of it
                found: dict[Unit | None, Any] = {}
                changed: dict[Unit, Tensor] = {}
                whole = _final(parts, run.output, mask, target) if bypass else run.output
                for unit in states if bypass else ():
                    hidden = run.output if unit is None else run.without(unit)
                    final = whole if unit is None else _final(parts, hidden, mask, target)
                    metric = states[unit]
                    found[unit] = part = metric.measure(final)
                    if not bool(torch.isfinite(part[2]).all()):
                        name = "the final hidden state" + (f" without {unit}" if unit else "")
                        raise CalibrationError(describe_non_finite(hidden, name, place, model))
                    if unit is not None:
                        # one token's norm in float32, tokens in float64
                        change = (final.float() - whole.float()).square().sum(-1)
                        changed[unit] = change.double().sum().cpu()
                        bar.update()
            for probed, part in probes.measured.items():
                if probed not in moments:
                    moments[probed] = ChannelMoments(part[1].numel())
                moments[probed].update(part)
            for probed, joint_part in probes.joints.items():
                if probed not in joints:
                    joints[probed] = ChannelCovariance(len(joint_part[1]))
                joints[probed].update(joint_part)
            for unit, part in found.items():
                states[unit].update(part)
            for unit, square in changed.items():
                squares[unit] += square
    # a rank without a batch has nothing of its own, and takes part in every sum
    probed_places = {place: probe_of(parts, place) for place in parts.places()}
    whole_units = {
        place: (moments.get(place) or ChannelMoments(probe.width)).result(ranks)
        for place, probe in probed_places.items()
    }
    found_states = {
        unit: state
        for unit, metric in (states.items() if bypass else ())
        if (state := _state(metric, ranks)) is not None
    }
    found_joints = {
        place: covariance
        for place, probe in probed_places.items()
        if place in covariances
        and (covariance := joints.pop(place, ChannelCovariance(probe.joint_width)).result(ranks))
        is not None
    }
    changes = ranks.sum(torch.stack(list(squares.values()))) if bypass else ()
    return Replayed(
        whole_units,
        found_states.pop(None, None),
        {unit: state for unit, state in found_states.items() if unit is not None},
        target,
        found_joints,
        {unit: x / rows.num_tokens(side) for unit, x in zip(bypass, changes, strict=True)},
    )


def replay_within(
    model: PreTrainedModel,
    rows: RowSet,
    bypass: Sequence[Unit] = (),
    *,
    covariance_bytes: int,
    **options: Any,
) -> Replayed:
    """Do what `replay` does, with the covariances of all sub-blocks, in as many passes as needed.

    The covariances of a pass lie on the device; those that are done lie on the CPU.

    Args:
        model: The language model.
        rows: The calibration text.
        bypass: Units to bypass, in the first pass.
        covariance_bytes: Bytes of covariances that a pass may accumulate; one sub-block always is.
        **options: As for `replay`.
    """
    first, *others = covariance_groups(DecoderParts(model), covariance_bytes)
    found = replay(model, rows, bypass, covariances=first, **options)
    for group in others:
        more = replay(model, rows, covariances=group, **options)
        found.covariances.update(more.covariances)
    return found


def covariance_groups(parts: DecoderParts, covariance_bytes: int) -> list[dict[Probed, int]]:
    """Split the sub-blocks, in their order, into groups whose covariances fit into so many bytes.

    Returns:
        Bytes by ``(layer, kind)``, for each group; at least one group, no group of several that is
        too large.
    """
    groups: list[dict[Probed, int]] = [{}]
    for place in parts.places():
        size = 8 * probe_of(parts, place).joint_width ** 2
        if groups[-1] and sum(groups[-1].values()) + size > covariance_bytes:
            groups.append({})
        groups[-1][place] = size
    return groups


class _UnitProbes:
    """What is measured of the units, in the one forward inside the ``with``."""

    def __init__(
        self, parts: DecoderParts, mask: Tensor, place: str, covariances: Collection[Probed]
    ) -> None:
        self.measured: dict[Probed, tuple[int, Tensor, Tensor]] = {}
        self.joints: dict[Probed, tuple[Tensor, Tensor, Tensor]] = {}
        self._parts, self._mask, self._place = parts, mask, place
        self._covariances = covariances

    def __enter__(self) -> _UnitProbes:
        probes = {place: probe_of(self._parts, place) for place in self._parts.places()}
        self._handles = [
            probe.module.register_forward_pre_hook(partial(self._probe, place, probe))
            for place, probe in probes.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _probe(
        self, probed: Probed, probe: Probe, _module: nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        joint = probed in self._covariances
        part, square = probe.measure(args, self._mask, near=None, joint=joint)
        if not bool(torch.isfinite(part[2]).all()):
            raise CalibrationError(
                describe_non_finite(args[0], probe.name, self._place, self._parts.model)
            )
        self.measured[probed] = part
        if joint and square is not None:
            self.joints[probed] = square


def _final(parts: DecoderParts, hidden: Tensor, mask: Tensor, target: TransferTarget) -> Tensor:
    return (parts.final_norm(hidden) if target == "after_norm" else hidden)[mask]


def _state(metric: ChannelMoments | ChannelCovariance, ranks: Ranks) -> Tensor | None:
    found = metric.result(ranks)
    return found[1] if isinstance(found, tuple) else found

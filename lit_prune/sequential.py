"""Compensation behind the pruned prefix: what each sub-block's loss did to the stream is put right.

Least squares on the dense model's statistics restores what a projection wrote *there*. In the
pruned model its inputs have changed, and so has the residual stream that it adds to. Here the
sub-blocks are fitted in their order, each on the inputs that it really gets, to the one target
that counts: after it, the pruned model's residual stream shall hold what the dense model's holds.
An error made before is thereby corrected as far as this sub-block can see it. What is left of it is
allowed for where the stream is read (`lit_prune.reading`).

References:
    Behind a pruned prefix: SparseGPT, ZipLM and their heirs. Towards the dense model's output:
    GPTAQ and Qronos, for quantisation. We differ: the target is the residual stream, not the
    projection's own output, and the fit is affine, its damping chosen on held-out text.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm

from lit_prune.calibration import (
    TwoStreams,
    two_streams,
)
from lit_prune.decoder import DecoderParts, SubBlock, is_plain, quiet, spec_for
from lit_prune.inner import can_be_fitted_inside, fit_inner
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.reading import head_map, input_map
from lit_prune.surgery import (
    DAMPING_FACTORS,
    Compensation,
    fallback_notes,
    masked,
    weights_digest,
)
from lit_prune.writing import fit_output, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet, Side
    from lit_prune.decoder import DecoderSpec
    from lit_prune.writing import Written

_SIDES: tuple[Side, Side] = ("calibrate", "choose")
# How often what lies inside and what is written are fitted in turn: in an MLP each helps the other.
_ROUNDS = {"attention": 1, "mlp": 3}


def sequential_compensation(
    model: PreTrainedModel,
    plan: PruningPlan,
    rows: RowSet,
    *,
    damping: float = 0.01,
    removed_mean: Literal["add", "drop"] = "add",
    add_biases: bool = True,
    protected_layers: Sequence[int] = (),
    weights: str | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Compensation:
    """Fit what stays of every sub-block so that the residual stream meets the dense model's.

    With ``x`` what the kept columns of a projection get in the pruned model, ``h`` its residual
    stream there, and ``s`` what the dense model's stream holds after the sub-block: the target is
    ``t = s - h``, the weights are fitted to it (`affine_refit`), and a constant brings the mean
    right. A sub-block that goes whole leaves the mean of its target. One that keeps all its units,
    behind a cut, is fitted without a constant: no parameter is added where nothing is removed.
    Where a family scales what it adds to the stream, so is the target. Where a norm follows a
    sub-block, the target is what the dense model's projection makes, and one that goes whole leaves
    nothing. Where attention and MLP of a layer are added to the stream together, the stream behind
    the layer is the target of both: the attention is fitted beside the whole MLP, then the MLP
    makes up for what the attention could not.

    Before that, behind the first cut, what the sub-block reads is fitted (`input_map`; not of
    experts), and behind the last layer what the head reads (`head_map`). After it, what lies inside
    (`fit_inner`) and the output projection in turn, as often as both together are better.

    Costs as much as some thirty forwards over both sides where every step is taken, one layer at a
    time; memory: ``8 * width * (width + hidden_size)`` bytes for each side, and eight hidden states
    ``[tokens, hidden_size]`` of that text in the dtype of the model, in a temporary directory where
    they would take more than the weights do; on a CPU also what one MLP reads and its slopes,
    ``[tokens, hidden_size + 2 * width]``.

    Args:
        model: The dense model that the plan was made for; it is left as it was.
        plan: What stays.
        rows: The calibration text: fitted on its calibrate side, dampings chosen on its choose
            side.
        damping: Centre of the dampings tried, as a fraction of the mean variance.
        removed_mean: ``drop`` leaves nothing in place of whole sub-blocks.
        add_biases: False fits weights alone, about zero, and leaves nothing in place of whole
            sub-blocks.
        protected_layers: Layers whose weights stay as they are.
        weights: `weights_digest` of the model, where it is known.
        batch_tokens: Tokens of one forward.
        progress: Show a bar (only on a terminal).

    Raises:
        CalibrationError: If an activation is not finite.
    """
    spec, parts = spec_for(model), DecoderParts(model)
    plan.validate(spec)
    constants = removed_mean == "add" and add_biases and spec.removed_constants
    made = Compensation({}, plan.digest, weights or weights_digest(model))
    dampings = [damping * factor for factor in DAMPING_FACTORS]
    refused: list[str] = []
    changed = False
    bar = tqdm(
        total=len(spec.blocks),
        desc="Compensating (layer by layer)",
        unit="layer",
        leave=False,
        disable=None if progress else True,
    )
    # what inference mode makes has no slopes
    with (
        torch.inference_mode(False),
        quiet(model),
        bar,
        two_streams(parts, rows, _SIDES, batch_tokens) as text,
    ):
        for block in spec.blocks:
            for batch in chain(*text.values()):
                batch.lead(parts, block.index)
            for part in block.sub_blocks:
                place: SubBlock = (block.index, part.kind)
                kept = plan.layers[block.index].kept(part.kind)
                cut = len(kept) < part.num_units
                behind, changed = changed, changed or cut
                if (
                    not changed  # both streams are the same so far
                    or block.index in protected_layers
                    or (not kept and not constants)
                    or not part.takes_constant
                ):
                    continue
                fit = partial(
                    fit_output, parts, place, kept, text, dampings, cut=cut, bias=cut and add_biases
                )
                so_far = _until(spec, plan, place)
                with masked(model, so_far, made, spec=spec):
                    for batch in chain(*text.values()):
                        batch.arrive(parts, place)
                    if behind and kept and _reads_plainly(parts, place):
                        _fit_inputs(parts, place, text, dampings, made)
                with masked(model, so_far, made, spec=spec):
                    found = fit()
                refused += found.put(made)
                if kept and can_be_fitted_inside(parts, place):
                    through = partial(masked, model, _through(spec, plan, place), spec=spec)
                    refused += _fit_inner(parts, place, kept, text, made, found, fit, through)
            behind_it = _through(spec, plan, (block.index, "mlp"))
            with masked(model, behind_it, made, spec=spec):
                for batch in chain(*text.values()):
                    batch.follow(parts, block.index)
            bar.update()
        notes = fallback_notes(made.facts, list(dict.fromkeys(refused)))
        head, told = head_map(parts, text, dampings) if changed else (None, {})
    facts = {**made.facts, **({"head": told} if told else {})}
    return replace(made, head_map=head, facts=facts, notes=notes)


def _fit_inputs(
    parts: DecoderParts,
    place: SubBlock,
    text: dict[Side, list[TwoStreams]],
    dampings: Sequence[float],
    made: Compensation,
) -> None:
    """Add the map of what a sub-block reads, where one is better than none."""
    name = f"{name_of(place)} inputs"
    found = input_map(text, lambda batch: batch.reads(parts, place), dampings, name)
    if found.damping is not None:
        made.input_maps[place] = found.weight.float().cpu()
        made.facts[name] = {
            "damping": found.damping,
            "condition_number_at_most": found.condition,
        }


def _fit_inner(
    parts: DecoderParts,
    place: SubBlock,
    kept: Sequence[int],
    text: dict[Side, list[TwoStreams]],
    made: Compensation,
    found: Written,
    fit: Callable[[], Written],
    pruned: Callable[[Compensation], AbstractContextManager[None]],
) -> list[str]:
    """Fit what the units that stay say, and recombine it, as often as both together are better.

    Returns:
        The name of the sub-block if a system was refused.
    """
    refused: list[str] = []
    steps = 0
    for _ in range(_ROUNDS[place[1]]):
        with pruned(made):
            inner = fit_inner(parts, place, kept, made, text)
        if inner is None:
            break
        more = replace(made, inner={**made.inner, place: inner.weight})
        with pruned(more):
            again = fit()
        if not again.error < found.error:
            break
        found, steps = again, steps + inner.steps
        made.inner[place] = inner.weight
        refused += again.put(made)
        made.facts.setdefault(again.name, again.facts)["inner_steps"] = steps
    return refused


def _reads_plainly(parts: DecoderParts, place: SubBlock) -> bool:
    return all(is_plain(each.module) for each in parts.input_modules(*place))


def _until(spec: DecoderSpec, plan: PruningPlan, place: SubBlock) -> PruningPlan:
    """Return the plan that cuts what lies before ``place``, and nothing else."""
    whole = PruningPlan.keep_all(spec)
    layers = tuple(_layers(plan, whole, place))
    return replace(whole, layers=layers)


def _through(spec: DecoderSpec, plan: PruningPlan, place: SubBlock) -> PruningPlan:
    """Return the plan that cuts ``place``, too."""
    layer, kind = place
    return _until(spec, plan, (layer, "mlp") if kind == "attention" else (layer + 1, "attention"))


def _layers(plan: PruningPlan, whole: PruningPlan, place: SubBlock) -> Iterator[LayerPlan]:
    for cut, dense in zip(plan.layers, whole.layers, strict=True):
        if cut.index < place[0]:
            yield cut
        elif cut.index == place[0] and place[1] == "mlp":
            yield LayerPlan(cut.index, cut.kv_groups, dense.channels)
        else:
            yield dense

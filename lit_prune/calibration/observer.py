"""Observing a user's own forwards: token ids, masks, cheap moments; nothing is touched."""

from __future__ import annotations

import inspect
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn

from lit_prune.calibration.calibration import Calibration
from lit_prune.calibration.generating import GenerateWatch
from lit_prune.calibration.images import left_out, text_only
from lit_prune.calibration.inputs import CAPPED, real_tokens
from lit_prune.calibration.labels import DISAGREE
from lit_prune.calibration.moments import ChannelMoments
from lit_prune.calibration.probes import Probe, probe_of
from lit_prune.calibration.rows import Row, RowSet
from lit_prune.calibration.split import side_of
from lit_prune.decoder import DecoderParts, SubBlock, fingerprint, media_tokens, task_of, whole_of
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

# What a language model's forward takes by position, in its order.
_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "labels",
)
P = ParamSpec("P")
Probed = SubBlock  # the sub-block whose units are probed


def _kept(
    hook: Callable[Concatenate[Any, P], None],
) -> Callable[Concatenate[Any, P], None]:
    """Let a hook of an observer that keeps its error raise none."""

    @wraps(hook)
    def act(observer: Observer, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if observer.error is not None:
            return
        try:
            hook(observer, *args, **kwargs)
        except Exception as error:
            if not observer.keeps_error:
                raise
            # its frames hold the activations of the forward
            observer.error, observer._selected = error.with_traceback(None), None

    return act


class Observer:
    """Hooks on one language model that remember what passes through it.

    Token ids, mask and labels are taken from the language model's own forward arguments, so any
    batch type of the user's works. What the model itself generates is passed over: forwards inside
    its ``generate``, and those with a KV cache. Repeated samples count once. Only real tokens of
    samples on the *calibrate* side feed the moments.

    Args:
        model: The language model.
        max_tokens: Observe no new sample once there are this many real tokens.
        keeps_error: Do not raise inside a forward, where other processes may wait for this one:
            keep the error and observe no more.
        probes: Whether moments of the projections are taken; not where modules are sharded, and
            may see parts.

    Attributes:
        rows: Distinct samples seen, in order of arrival.
        moments: Moments of the inputs of every output projection.
        num_batches: Forwards observed.
        notes: What the report should say about the text, each once.
        paused: True to pass over forwards for a while (another validation loader, say).
        error: What was kept instead of raised.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int,
        keeps_error: bool = False,
        probes: bool = True,
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.keeps_error = keeps_error
        self.probes = probes
        self.error: Exception | None = None
        self.rows: dict[str, Row] = {}
        self.moments: dict[Probed, ChannelMoments] = {}
        self.num_batches = 0
        self.num_tokens = 0
        self.num_images = 0  # samples with one, which are passed over
        self.notes: list[str] = []
        self.paused = False
        self._handles: list[RemovableHandle | GenerateWatch] = []
        self._generate: GenerateWatch | None = None
        self._selected: Tensor | None = (
            None  # [batch, tokens], bool, while a forward is being observed
        )
        self._arguments: tuple[str, ...] = _ARGUMENTS
        self._arriving: dict[str, Row] = {}
        self._pending: dict[Probed, tuple[int, Tensor, Tensor]] = {}

    @property
    def is_open(self) -> bool:
        """Whether hooks are attached."""
        return bool(self._handles)

    def open(self) -> None:
        """Attach the hooks. Close or discard the observer before the model is changed."""
        parts, whole = DecoderParts(self.model), whole_of(self.model)
        if whole is not self.model:
            self._arguments = tuple(inspect.signature(whole.forward).parameters)
        try:
            self._handles.append(whole.register_forward_pre_hook(self._before, with_kwargs=True))
            for place in parts.places() if self.probes else ():
                probe = probe_of(parts, place)
                self.moments[place] = ChannelMoments(probe.width, probe.name)
                hook = partial(self._probe, place, probe)
                self._handles.append(probe.module.register_forward_pre_hook(hook))
            self._handles.append(whole.register_forward_hook(self._after))
            self._generate = GenerateWatch(whole)
            self._handles.append(self._generate)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Detach the hooks; what was seen stays. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._selected = None

    def unit_moments(self) -> dict[Probed, tuple[Tensor, Tensor]]:
        """Return mean and variance of every probed input, ``[width]`` each.

        Empty if no token fell on the calibrate side.
        """
        if not all(metric.count for metric in self.moments.values()):
            return {}
        return {probed: metric.result() for probed, metric in self.moments.items()}

    def calibration(self) -> Calibration:
        """Return what was seen, before any replay."""
        rows = RowSet.of(self.rows.values())
        return Calibration(
            fingerprint(self.model), rows, self.unit_moments(), notes=tuple(self.notes)
        )

    @_kept
    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._selected, self._pending, self._arriving = None, {}, {}
        inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
        if self.paused or CAPPED in self.notes:
            return
        if inputs.get("past_key_values") is not None or (self._generate and self._generate.running):
            return
        place = f"forward {self.num_batches}"
        config, caches = self.model.config, inputs.get("use_cache")
        caches = getattr(config, "use_cache", False) if caches is None else caches
        task = task_of(self.model)
        given: Any = inputs.get("input_ids")
        inputs, text = text_only(inputs, media_tokens(self.model))
        if text is not None:
            self._count_images(len(given) - len(text))
        batch = real_tokens(inputs, config, place, caches=bool(caches), task=task)
        self.notes += [note for note in batch.notes if note not in self.notes]
        selected = torch.zeros_like(given, dtype=torch.bool)
        tokens = self.num_tokens
        for number, columns, row in batch.rows():
            i = number if text is None else int(text[number])
            known = self._arriving.get(row.digest) or self.rows.get(row.digest)
            if known is None:
                if tokens >= self.max_tokens:
                    self.notes.append(CAPPED)
                    break
                tokens += len(row.ids)
                selected[i] |= columns & (side_of(row.digest) == "calibrate")
            if row.disagrees(known) and DISAGREE not in self.notes:
                self.notes.append(DISAGREE)
            self._arriving[row.digest] = row.merged(known)
        self._selected = selected

    def _count_images(self, number: int) -> None:
        old = left_out(self.num_images)
        self.num_images += number
        self.notes = [*(note for note in self.notes if note != old), left_out(self.num_images)]

    @_kept
    def _probe(
        self, probed: Probed, probe: Probe, _module: nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        if self._selected is None:
            return
        x = args[0].detach()
        if probed in self._pending or not probe.sees(args, self._selected):
            raise CalibrationError(
                f"{probe.name} saw {2 if probed in self._pending else 1} call(s) of "
                f"{list(x.shape[:-1])} tokens in forward {self.num_batches}, expected 1 of "
                f"{list(self._selected.shape)}. Is its module used twice, or recomputed by "
                "gradient checkpointing in train mode?"
            )
        part, _ = probe.measure(args, self._selected, near=self.moments[probed], joint=False)
        if not bool(torch.isfinite(part[2]).all()):
            raise CalibrationError(
                describe_non_finite(x, probe.name, f"forward {self.num_batches}", self.model)
            )
        self._pending[probed] = part

    @_kept
    def _after(self, _model: nn.Module, _args: object, _output: object) -> None:
        if self._selected is None:
            return
        self._selected = None
        if missing := sorted(set(self.moments) - set(self._pending)):
            raise CalibrationError(
                f"{self.moments[missing[0]].name} saw 0 tokens in forward {self.num_batches}, "
                f"expected {sum(len(r.ids) for r in self._arriving.values())} ({len(missing)} of "
                f"{len(self.moments)} probes silent). A compiled model, a fused kernel or a "
                "bypassed layer hides its modules from hooks: validate the plain model."
            )
        for probed, part in self._pending.items():
            self.moments[probed].update(part)
        self.rows.update(self._arriving)
        self.num_tokens = sum(len(row.ids) for row in self.rows.values())
        self.num_batches += 1


def describe_non_finite(x: Tensor, name: str, place: str, model: nn.Module) -> str:
    """Say where activations ``[..., channels]`` are NaN or infinite, and what to do."""
    bad = ~torch.isfinite(x)
    first = tuple(int(i) for i in bad.nonzero()[0]) if bool(bad.any()) else ()
    broken = next(
        (n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None
    )
    remedy = (
        f"The weight {broken} is itself not finite: load the checkpoint again."
        if broken
        else "float16 overflows above 65504: calibrate in bfloat16 or float32 "
        "(Trainer(precision='bf16-true'))."
    )
    return (
        f"activations at {name} are not finite: {int(bad.sum())} of {x.numel()} values in "
        f"{place}, first at {first}. The batch was not added. {remedy}"
    )

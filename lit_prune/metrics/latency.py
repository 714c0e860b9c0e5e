"""Latency of prefill and decode, with its spread; a speed-up is claimed only outside the spread."""

from __future__ import annotations

import inspect
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.decoder import logits_of, task_of
from lit_prune.errors import ConfigError
from lit_prune.metrics.device import device_words, synchronize
from lit_prune.metrics.exact import ExactMetric
from lit_prune.metrics.waiting import Waiting
from lit_prune.metrics.yardstick import Yardstick

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

# With one repetition the range is zero, and any difference would look like a speed-up.
_LEAST_REPETITIONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyResult:
    """Medians over repetitions on one device; a spread is their interquartile range.

    Attributes:
        device: Device in words, with the GPU's name or the number of CPU threads.
        dtype: Dtype of the weights.
        batch_size: Sequences at a time.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens decoded after it, one forward each; 0 of a classifier.
        warmup: Runs thrown away before.
        repetitions: Runs measured.
        prefill_seconds: Median time of the forward over the prompts, with KV cache; of a classifier
            without.
        prefill_spread: Its interquartile range, seconds.
        decode_seconds_per_token: Median time of one decoding step (all sequences advance by one
            token); None where nothing is decoded.
        decode_spread: Its interquartile range, seconds.
        waited: How long threads of this process waited, while this was measured, for processors
            that other work held, as a share of that time; all threads added up, so it may exceed
            1. None where the system does not say.
        yardstick_seconds: Median time of a fixed piece of work on this device, before and after the
            runs: two latencies can be compared as far as it agrees. None where it was not timed.
    """

    device: str
    dtype: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    warmup: int
    repetitions: int
    prefill_seconds: float
    prefill_spread: float
    decode_seconds_per_token: float | None = None
    decode_spread: float | None = None
    waited: float | None = None
    yardstick_seconds: float | None = None

    @property
    def whole_seconds(self) -> float:
        """Prefill and all decoding steps together."""
        return self.prefill_seconds + self.new_tokens * (self.decode_seconds_per_token or 0.0)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of the whole batch per second."""
        return self.batch_size * self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens of the whole batch per second; None where nothing is decoded."""
        seconds = self.decode_seconds_per_token
        return None if seconds is None else self.batch_size / seconds


class Latency(ExactMetric):
    """Median and spread of repeated time measurements, float64; ranks are pooled.

    Example:
        >>> metric = Latency()
        >>> for seconds in (0.5, 0.25, 4.0):
        ...     metric.update(seconds, seconds / 10)
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'prefill_seconds': 0.5, 'prefill_spread': 1.875, 'decode_seconds_per_token': 0.05,
        'decode_spread': 0.188}
    """

    is_differentiable = False
    higher_is_better = False

    prefill: list[Tensor]
    decode: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("prefill", [], dist_reduce_fx="cat")
        self.add_state("decode", [], dist_reduce_fx="cat")

    def update(self, prefill_seconds: float, decode_seconds_per_token: float | None) -> None:
        """Add one repetition.

        Args:
            prefill_seconds: Time of the forward over the prompts, seconds.
            decode_seconds_per_token: Time of one decoding step, seconds; None without one.
        """
        for state, seconds in (
            (self.prefill, prefill_seconds),
            (self.decode, decode_seconds_per_token),
        ):
            if seconds is None:
                continue
            state.append(torch.tensor([seconds], dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Return medians and interquartile ranges, float64 scalars named as in `LatencyResult`.

        Those of decoding only where it was timed.

        Raises:
            ConfigError: If nothing was measured.
        """
        prefill, prefill_spread = _median_and_spread(self.prefill)
        found = {"prefill_seconds": prefill, "prefill_spread": prefill_spread}
        if len(self.decode):
            decode, decode_spread = _median_and_spread(self.decode)
            found |= {"decode_seconds_per_token": decode, "decode_spread": decode_spread}
        return found


def _median_and_spread(seconds: list[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    if not len(seconds):
        raise ConfigError("no repetition was measured; call update at least once before compute.")
    # torchmetrics leaves a list on one process and one tensor after a merge over ranks
    values = seconds if isinstance(seconds, Tensor) else torch.cat(seconds)
    low, median, high = torch.quantile(values, values.new_tensor([0.25, 0.5, 0.75]))
    return median, high - low


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    prompt_ids: Tensor,
    *,
    new_tokens: int,
    warmup: int = 2,
    repetitions: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyResult:
    """Time prefill and greedy decoding of a causal language model, one forward of a classifier.

    Prefill is one forward over the prompts that fills a KV cache and computes the last logits only
    (where the model accepts ``logits_to_keep``). Decode is ``new_tokens`` forwards of one token
    each from that cache, in a greedy loop of our own: the processors of a generation config would
    be timed too. A classifier decodes nothing: its forward, without a cache, is timed. The device
    is synchronised around both. The model is not changed and runs in the mode it is in (``eval()``
    is the caller's).

    Args:
        model: Hugging Face causal language model, on one device.
        prompt_ids: ``[batch, tokens]``, unpadded; moved to the device of the model.
        new_tokens: Decoding steps per repetition, at least 1; 0 of a classifier.
        warmup: Runs thrown away first.
        repetitions: Runs measured, at least 3.
        clock: Returns seconds; read three times a run.

    Returns:
        Medians and spreads with everything a latency must say.

    Raises:
        ConfigError: If an argument is out of range, the model returns no KV cache, or the clock
            stands still.

    Example:
        >>> import itertools
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     vocab_size=11)).eval()
        >>> ticks = itertools.count()
        >>> result = measure_latency(model, torch.ones(2, 5, dtype=torch.int64), new_tokens=4,
        ...                          clock=lambda: float(next(ticks)))
        >>> result.prefill_seconds, result.decode_seconds_per_token
        (1.0, 0.25)
        >>> result.prefill_tokens_per_second
        10.0
    """
    decodes = task_of(model) == "next_token"
    _check_request(prompt_ids, new_tokens, warmup, repetitions, decodes=decodes)
    parameter = next(model.parameters())
    prompt_ids = prompt_ids.to(parameter.device)
    metric = Latency(sync_on_compute=False)
    yardstick = Yardstick(parameter.device)
    yardstick.run()
    for _ in range(warmup):
        _time_once(model, prompt_ids, new_tokens, clock)
    waiting = Waiting()
    for _ in range(repetitions):
        prefill_seconds, decode_seconds = _time_once(model, prompt_ids, new_tokens, clock)
        metric.update(prefill_seconds, decode_seconds / new_tokens if decodes else None)
    waited = waiting.share()
    yardstick.run()
    return LatencyResult(
        device=device_words(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        batch_size=prompt_ids.shape[0],
        prompt_tokens=prompt_ids.shape[1],
        new_tokens=new_tokens,
        warmup=warmup,
        repetitions=repetitions,
        waited=waited,
        yardstick_seconds=yardstick.seconds(),
        **{name: float(value) for name, value in metric.compute().items()},
    )


def _check_request(
    prompt_ids: Tensor, new_tokens: int, warmup: int, repetitions: int, *, decodes: bool
) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.numel() == 0:
        raise ConfigError(
            f"prompt_ids are {list(prompt_ids.shape)}; expected [batch, tokens], not empty."
        )
    if new_tokens and not decodes:
        raise ConfigError(f"a classifier decodes nothing: new_tokens must be 0, got {new_tokens}.")
    for name, value, least in (
        ("new_tokens", new_tokens, int(decodes)),
        ("warmup", warmup, 0),
        ("repetitions", repetitions, _LEAST_REPETITIONS),
    ):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")


def _time_once(
    model: nn.Module, prompt_ids: Tensor, new_tokens: int, clock: Callable[[], float]
) -> tuple[float, float]:
    if not new_tokens:
        return _time_forward(model, prompt_ids, clock), 0.0
    last_only = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    synchronize(prompt_ids.device)
    started = clock()
    output = model(input_ids=prompt_ids, use_cache=True, **last_only)
    token = output.logits[:, -1:].argmax(-1)
    synchronize(prompt_ids.device)
    prefilled = clock()
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ConfigError(
            f"{type(model).__name__} returned no KV cache, so decoding cannot be timed: call "
            "model.eval(), and model.gradient_checkpointing_disable() where that is on."
        )
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    synchronize(prompt_ids.device)
    finished = clock()
    _refuse_standing_clock(started, prefilled, finished)
    return prefilled - started, finished - prefilled


def _time_forward(model: nn.Module, prompt_ids: Tensor, clock: Callable[[], float]) -> float:
    synchronize(prompt_ids.device)
    started = clock()
    logits_of(model, input_ids=prompt_ids)
    synchronize(prompt_ids.device)
    finished = clock()
    _refuse_standing_clock(started, finished)
    return finished - started


def _refuse_standing_clock(*times: float) -> None:
    if not all(one < other for one, other in itertools.pairwise(times)):
        raise ConfigError(
            f"the clock advanced no time over a forward {times}; expected one that is finer than "
            "that, time.perf_counter for instance."
        )

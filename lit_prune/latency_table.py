"""The latency table of a calibration: measured once, refused where it is of another workload."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lit_prune.decoder import task_of
from lit_prune.errors import CalibrationError
from lit_prune.metrics import BUSY, device_words, measure_sub_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.calibration import Calibration
    from lit_prune.config import PruningConfig


def with_latency_table(
    model: PreTrainedModel, calibration: Calibration, config: PruningConfig
) -> Calibration:
    """Return the calibration with measured times of every sub-block, on the device of the model.

    Args:
        model: The dense model, where it shall run.
        calibration: Of this model.
        config: Prompt, new tokens and batch size.
    """
    workload = _workload(model, config)
    measured = measure_sub_blocks(
        model,
        prompt_tokens=workload["prompt_tokens"],
        new_tokens=workload["new_tokens"],
        batch_size=workload["batch_size"],
    )
    # sub-blocks of one shape share a measurement, which safetensors would not write
    seconds = {place: rows.clone() for place, rows in measured.seconds.items()}
    return replace(calibration, latency=seconds, latency_conditions=measured.conditions)


def latency_to_json(calibration: Calibration) -> str:
    """Return the table as text, to the last bit: other processes are told it."""
    table = [[*place, rows.tolist()] for place, rows in (calibration.latency or {}).items()]
    return json.dumps([table, calibration.latency_conditions])


def latency_from_json(calibration: Calibration, text: str) -> Calibration:
    """Return the calibration with the table that `latency_to_json` wrote."""
    table, conditions = json.loads(text)
    latency = {
        (layer, kind): torch.tensor(rows, dtype=torch.float64) for layer, kind, rows in table
    }
    return replace(calibration, latency=latency, latency_conditions=conditions)


def refuse_other_workload(
    model: PreTrainedModel, calibration: Calibration, config: PruningConfig
) -> None:
    """Refuse a table that was measured for other prompts than the request's.

    Raises:
        CalibrationError: Names the first difference.
    """
    conditions = calibration.latency_conditions
    for name, wanted in _workload(model, config).items():
        if conditions.get(name) != wanted:
            raise CalibrationError(
                f"the calibration's latency table was measured with {name} "
                f"{conditions.get(name)}, the request has {wanted}. Ask for the latency_{name} of "
                "the table, or calibrate again."
            )


def table_words(model: PreTrainedModel, calibration: Calibration) -> tuple[str, ...]:
    """Say where the table was measured, and whether the model is elsewhere now."""
    conditions = calibration.latency_conditions
    parameter = next(model.parameters())
    here = {
        "device": device_words(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    words = [
        "latency table: {device}, {dtype}, batch {batch_size}, {prompt_tokens} prompt + "
        "{new_tokens} new tokens, median of {repetitions} after {warmup} warm-up runs; what it "
        "predicts is the sum over sub-blocks, each alone, without embeddings and "
        "head".format_map(conditions)
    ]
    words += [
        f"the latency table is of another {name} ({conditions[name]}) than the model's now "
        f"({value}): predicted and measured times cannot be compared"
        for name, value in here.items()
        if conditions[name] != value
    ]
    waited = conditions.get("waited") or 0.0
    if waited >= BUSY:
        words.append(
            f"while the latency table was measured, threads waited for processors that other work "
            f"held for {waited:.0%} of the time (all threads together): its times are too long, "
            "and not all by as much. Calibrate again on a machine that does nothing else"
        )
    return tuple(words)


def _workload(model: PreTrainedModel, config: PruningConfig) -> dict[str, int]:
    longest = getattr(model.config, "max_position_embeddings", None)
    return {
        "prompt_tokens": config.prompt_tokens(longest),
        "new_tokens": config.latency_new_tokens if task_of(model) == "next_token" else 0,
        "batch_size": config.latency_batch_size,
    }

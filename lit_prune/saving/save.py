"""Writing a model so that it loads again where it is deployed: whole, checked, or not at all."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.decoder import spec_for, text_view
from lit_prune.errors import ConfigError, PlanMismatchError
from lit_prune.record import PruningRecord
from lit_prune.saving.buffers import buffers_to_save
from lit_prune.saving.card import model_card
from lit_prune.saving.extras import write_generation_config
from lit_prune.saving.formats import prepare
from lit_prune.saving.load import PLAN, REPORT
from lit_prune.saving.manifest import Manifest
from lit_prune.saving.staging import staged
from lit_prune.saving.verify import verify_saved
from lit_prune.saving.weights import BUFFERS, write_tensors
from lit_prune.views.html import REPORT_PAGE, write_html

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lit_prune.calibration import Calibration
    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport
    from lit_prune.surgery import Compensation
    from lit_prune.sweep import SweepPoint

_log = logging.getLogger(__name__)
MAX_SHARD_BYTES = 5_000_000_000
_UNVERIFIED = "not verified: saved with verify=False"


def save_pruned(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    format: str = "auto",  # noqa: A002 - the word that everybody would look for
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: PruningPlan | None = None,
    report: PruningReport | None = None,
    calibration: Calibration | None = None,
    compensation: Compensation | None = None,
    sweep: Sequence[SweepPoint] = (),
    overwrite: bool = False,
    verify: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Save a model, pruned or not, as one directory that `load_pruned` reads back bit for bit.

    Weights go to safetensors (a tied weight once), beside them config, generation config,
    tokenizer, plan, report (``report.json``, and ``report.html`` to look at), a model card, and
    ``MANIFEST.json`` with the hash of every file. The directory appears at once and whole: after a
    crash, a full disk or Ctrl-C the target is as it was.

    ========================  ====================================================================
    format                    who loads it
    ========================  ====================================================================
    ``stock``                 plain transformers, and what reads its models. Layers must be alike
                              (depth is free). Where the own class cannot hold the biases or the
                              head count, the model is re-labelled as Granite, which computes the
                              same.
    ``heterogeneous``         transformers after ``import lit_prune``, or, without this package,
                              with ``trust_remote_code=True``: a self-contained model file lies
                              beside the weights. Every layer in its own size.
    ``padded``                as ``stock``, any plan: what is missing is put back as zeros. Exact,
                              at the cost that the card states.
    ``gguf``                  llama.cpp: one file. Layers that are alike in their own architecture,
                              others in one that has sizes for every block. Needs
                              ``pip install 'lit-prune[gguf]'``; run before it is put in place
                              where llama-cpp-python is installed.
    ``auto``                  the first of ``stock`` and ``heterogeneous`` that can hold it;
                              ``padded`` where the family has no model file for layers that differ
    ========================  ====================================================================

    Args:
        model: A causal language model of a supported family, a classifier on its decoder, or a
            multimodal model around it (``stock`` only). It is not changed.
        directory: Where to; must not exist yet.
        format: One of the above.
        tokenizer: Saved beside it, chat template included.
        plan: What stayed; by default what travels on the model (``model.pruning_record``).
        report: Before and after; by default what travels on the model.
        calibration: Statistics and token ids, only where they shall be published too.
        compensation: Constants that stood in for what was cut.
        sweep: What `lit_prune.sweep` returned, where the trade-off shall be on ``report.html``.
        overwrite: Replace what an earlier `save_pruned` wrote there. Nothing else is ever deleted.
        verify: Load the directory in a fresh process and compare before it takes its place.
        max_shard_bytes: Split larger weights into files of at most this size (not ``gguf``).

    Returns:
        ``directory``.

    Raises:
        ArtifactError: If the target is in the way or cannot be written, or what was written is not
            the model.
        PlanMismatchError: If plan, report, calibration and compensation do not belong together.
        ConfigError: If ``max_shard_bytes`` is not a positive integer, or there is no such format.
        FormatError: If the format cannot hold the model; names what blocks it and what can.
        UnsupportedModelError: If the family is not known, or a weight is not a plain one
            (quantised, adapters …).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, vocab_size=8)
        >>> model = LlamaForCausalLM(config)
        >>> with TemporaryDirectory() as folder:
        ...     path = save_pruned(model, f"{folder}/tiny", verify=False)
        ...     sorted(file.name for file in path.iterdir())
        ['MANIFEST.json', 'README.md', 'config.json', 'generation_config.json', 'model.safetensors']
    """
    if (
        not isinstance(max_shard_bytes, int)
        or isinstance(max_shard_bytes, bool)
        or max_shard_bytes < 1
    ):
        raise ConfigError(
            f"max_shard_bytes must be a positive number of bytes, got {max_shard_bytes!r}."
        )
    directory, model = Path(directory), text_view(model)
    spec = spec_for(model)
    plan, report = _travelling(model, plan, report)
    _refuse_strangers(plan, report, calibration, compensation)
    prepared, why = prepare(model, format, tokenizer)
    name = directory.resolve().name
    ways = prepared.ways(name)
    architecture = {"family": spec.model_type, "why": why, "load": ways, **prepared.describe()}
    buffers = buffers_to_save(model, text_view(prepared.skeleton))
    with staged(directory, overwrite=overwrite, num_bytes=prepared.num_bytes) as folder:
        prepared.write(folder, max_shard_bytes)
        if buffers and prepared.keeps_buffers:
            write_tensors(folder / BUFFERS, buffers)
        write_generation_config(model, folder)
        if plan is not None:
            (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
        if report is not None:
            (folder / REPORT).write_text(report.to_json(), encoding="utf-8")
        if calibration is not None:
            calibration.save(folder / "calibration.safetensors")
        if compensation is not None:
            compensation.save(folder / "compensation.safetensors")
        card = model_card(
            model,
            prepared,
            name=name,
            why=why,
            verify=verify,
            rounded=bool(buffers),
            plan=plan,
            report=report,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if plan is not None and report is not None:
            write_html(report, plan, folder / REPORT_PAGE, name=name, sweep=sweep, load=ways)
        manifest = Manifest.of(
            folder, architecture=architecture, verified=False, verification=_UNVERIFIED
        )
        manifest.write(folder)
        if verify:
            found = verify_saved(model, folder, prepared)
            replace(manifest, verified=found.compared, verification=found.words).write(folder)
    _log.info("Saved %s as %s (%s).", directory, prepared.format, why)
    return directory


def _travelling(
    model: PreTrainedModel, plan: PruningPlan | None, report: PruningReport | None
) -> tuple[PruningPlan | None, PruningReport | None]:
    record = getattr(model, "pruning_record", None)
    if isinstance(record, PruningRecord):
        if report is None and (plan is None or plan == record.plan):
            report = record.report  # the report of another plan stays behind
        plan = record.plan if plan is None else plan
    return plan, report


def _refuse_strangers(
    plan: PruningPlan | None,
    report: PruningReport | None,
    calibration: Calibration | None,
    compensation: Compensation | None,
) -> None:
    if plan is None:
        return
    facts = {
        "report": (report and report.plan_digest, plan.digest),
        "compensation": (compensation and compensation.plan_digest, plan.digest),
        "calibration": (calibration and calibration.model_fingerprint, plan.model_fingerprint),
    }
    for what, (got, expected) in facts.items():
        if got is not None and got != expected:
            raise PlanMismatchError(
                f"{what} belongs to {str(got)[:12]}…, the plan to {expected[:12]}…: they were not "
                f"made together. Pass the {what} of this plan, or none."
            )

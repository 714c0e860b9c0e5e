"""Make the pruned model from a base model and a plan, with no text.

  lit-prune apply --model my-model --plan plan --to pruned

For who shares plans and not weights: a plan with its compensation makes the same pruned model, bit
for bit, of the same base model in the same dtype (by default that of the plan). What `lit-prune
plan` measured goes with it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.cli.console import quiet_down, say
from lit_prune.cli.options import add_model
from lit_prune.cli.saved import add_saved, save, target_of
from lit_prune.errors import ArtifactError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport

name, usage = "apply", "--model MODEL --plan PLAN --to DIRECTORY"
_WHEN_PLANNED = "all of it was measured when the plan was made, by cutting and putting back"


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    add_model(parser)
    parser.add_argument(
        "--plan",
        type=str,
        required=True,
        help="a directory of `lit-prune plan`, or a plan.json with a compensation.safetensors "
        "beside it",
    )
    parser.add_argument(
        "--without_compensation",
        action="store_true",
        help="nothing stands in for what goes: a worse model, of which nothing was measured",
    )
    add_saved(parser)


def run(options: Namespace) -> None:
    """Cut, and save."""
    from lit_prune.cli.loading import load
    from lit_prune.plan import PruningPlan
    from lit_prune.record import PruningRecord
    from lit_prune.surgery import Compensation, apply_plan

    quiet_down()
    target = target_of(options)
    file = Path(options.plan)
    file = file / "plan.json" if file.is_dir() else file
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such file. `lit-prune plan` writes one.")
    plan = PruningPlan.load(file)
    beside = file.with_name("compensation.safetensors")
    wanted = plan.provenance.get("config", {}).get("compensation", "none") != "none"
    bare = options.without_compensation
    if wanted and not bare and not beside.is_file():
        raise ArtifactError(
            f"{beside}: there is no such file, and the plan was made with it; without it the model "
            "is worse than was measured. Put it beside the plan, or say --without_compensation."
        )
    compensation = Compensation.load(beside) if beside.is_file() and not bare else None
    report = None if wanted and bare else _report_beside(file, plan)
    dtype = plan.provenance.get("dtype", "auto") if options.dtype == "auto" else options.dtype
    loaded = load(options.model, dtype=dtype, device=options.device)
    say("cutting")
    model = apply_plan(loaded.model, plan, compensation)
    model.pruning_record = PruningRecord(plan, report)  # type: ignore[assignment] # a plain attribute
    notes = save(options, loaded, compensation=compensation)
    achieved = plan.provenance.get("achieved_ratio")
    cut = "" if achieved is None else f", {achieved:.2%} of the decoder removed"
    print(f"saved: {target} (plan {plan.digest[:12]}{cut})", *notes, sep="\n")


def _report_beside(file: Path, plan: PruningPlan) -> PruningReport | None:
    """Return what `lit-prune plan` measured with this plan, where it did: now it is so."""
    from lit_prune.report import PruningReport

    beside = file.with_name("report.json")
    if not beside.is_file():
        return None
    report = PruningReport.from_json(beside.read_text(encoding="utf-8"))
    if report.plan_digest != plan.digest or all(row.after is None for row in report.rows):
        return None
    return replace(report, dry_run=False, warnings=(*report.warnings, _WHEN_PLANNED))

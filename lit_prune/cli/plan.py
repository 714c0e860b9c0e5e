"""Say what would be cut and what it would cost; the model stays as it is.

  lit-prune plan --model my-model --text my-text.txt --to plan --pruning_ratio 0.3
  lit-prune apply --model my-model --plan plan --to pruned

The model is cut, measured and put back. Writes plan.json (what stays), compensation.safetensors
(what stands in for the rest), report.html and report.json (what it would cost) and
calibration.safetensors (what was measured: hand it to sweep or another plan with --calibration).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.cli.console import quiet_down
from lit_prune.cli.options import (
    add_calibration,
    add_model,
    add_request,
    add_target_directory,
    request_of,
)
from lit_prune.config import PruningConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

name, usage = "plan", "--model MODEL --text TEXT --to DIRECTORY --pruning_ratio RATIO"
FILES = (
    "plan.json",
    "compensation.safetensors",
    "report.json",
    "report.html",
    "calibration.safetensors",
)


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    add_model(parser)
    add_calibration(parser)
    add_target_directory(parser, "plan, compensation, report and calibration")
    add_request(parser)


def run(options: Namespace) -> None:
    """Plan, and write what was planned."""
    from lit_prune.allocation import refuse_impossible
    from lit_prune.cli.loading import calibration_of, load, source_of
    from lit_prune.methods import preset
    from lit_prune.pruner import carry_out
    from lit_prune.saving import refuse_target, staged
    from lit_prune.views.html import page_of

    quiet_down()
    config = PruningConfig.from_options(request_of(options))
    config = preset(config.preset).resolve(config)
    target = Path(options.to)
    refuse_target(target, overwrite=options.overwrite, known=FILES)
    source = source_of(options)
    loaded = load(options.model, dtype=options.dtype, device=options.device)
    refuse_impossible(loaded.model, config)
    calibration = calibration_of(options, loaded, config, source)
    planned, report = carry_out(loaded.model, calibration, config, dry_run="measured")
    with staged(target, overwrite=options.overwrite, num_bytes=0, known=FILES) as folder:
        (folder / "plan.json").write_text(planned.plan.to_json(), encoding="utf-8")
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        page = page_of(report, planned.plan, name=Path(options.model).name)
        (folder / "report.html").write_text(page, encoding="utf-8")
        calibration.save(folder / "calibration.safetensors")
        if planned.compensation is not None:
            planned.compensation.save(folder / "compensation.safetensors")
    print(report)
    again = f"lit-prune apply --model {options.model} --plan {target} --to pruned"
    print(f"\nwritten: {target}\nmake it: {again}")

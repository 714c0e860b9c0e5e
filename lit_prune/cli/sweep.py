"""Many ratios from one calibration: what each would cost, before anything is cut.

  lit-prune sweep --model my-model --text my-text.txt --to sweep --ratios 0.1 0.2 0.3 0.4
  lit-prune sweep --model my-model --calibration plan/calibration.safetensors --to sweep

Prints a table and writes sweep.csv, sweep.json, trade_off.png and calibration.safetensors.
Perplexity is measured on the choose side of the text, by masking the dense model. `lit-prune prune
--sweep sweep` and `lit-prune report --sweep sweep` put the curve on the page of the pruned model.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.cli.console import quiet_down, say, table
from lit_prune.cli.options import (
    add_calibration,
    add_model,
    add_request,
    add_target_directory,
    request_of,
)
from lit_prune.cli.swept import SWEEP
from lit_prune.config import PruningConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lit_prune.sweep import SweepPoint

name, usage = "sweep", "--model MODEL --text TEXT --to DIRECTORY --ratios RATIO ..."
FILES = ("sweep.csv", SWEEP, "trade_off.png", "calibration.safetensors")


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    add_model(parser)
    add_calibration(parser)
    add_target_directory(parser, "table, curve and calibration")
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[0.1, 0.2, 0.3, 0.4, 0.5],
        help="to be tried: 0.1 0.2 0.3",
    )
    add_request(parser, targets=False)


def run(options: Namespace) -> None:
    """Plan every ratio, measure it, write it down."""
    from lit_prune.cli.loading import calibration_of, load, source_of
    from lit_prune.methods import preset
    from lit_prune.saving import refuse_target, staged
    from lit_prune.sweep import sweep
    from lit_prune.views import trade_off

    quiet_down()
    target, request = Path(options.to), request_of(options)
    for ratio in options.ratios:
        PruningConfig(pruning_ratio=ratio)
    config = PruningConfig.from_options({**request, "pruning_ratio": max(options.ratios)})
    config = preset(config.preset).resolve(config)
    refuse_target(target, overwrite=options.overwrite, known=FILES)
    source = source_of(options)
    model = (loaded := load(options.model, dtype=options.dtype, device=options.device)).model
    calibration = calibration_of(options, loaded, config, source)
    say("planning")
    points = sweep(model, calibration, options.ratios, measured=True, progress=True, **request)
    dense = points[0].dense_nll
    assert dense is not None  # noqa: S101 - measured
    rows = [_row(point) for point in points]
    with staged(target, overwrite=options.overwrite, num_bytes=0, known=FILES) as folder:
        with (folder / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        whole = {"model": options.model, "preset": config.preset, "dense_nll": dense}
        whole["points"] = rows
        (folder / SWEEP).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        calibration.save(folder / "calibration.safetensors")
        if any(point.mean_nll is not None for point in points):
            trade_off(points).savefig(folder / "trade_off.png")
    print(_table(rows, math.exp(dense)))
    tokens = calibration.rows.num_tokens("choose")
    print(
        f"note: on the {tokens:,} tokens of the choose side, units masked; `lit-prune prune` "
        "scores on others, and its numbers differ"
    )
    print(f"\nwritten: {target} ({', '.join(FILES)})")


def _row(point: SweepPoint) -> dict[str, Any]:
    perplexity = None if point.mean_nll is None else math.exp(point.mean_nll)
    excess = point.excess_nll
    return {
        "requested": point.requested,
        "achieved": point.achieved,
        "budget": point.budget,
        "predicted_damage": point.predicted_damage,
        "perplexity": perplexity,
        "perplexity_increase": None if excess is None else math.expm1(excess),
        "plan_digest": point.plan and point.plan.digest,
        "note": point.note,
    }


def _table(rows: list[dict[str, Any]], dense: float) -> str:
    cells = [["asked", "removed", "perplexity", "increase"]]
    cells += [["dense", "0.00%", f"{dense:.3f}", ""]]
    notes = []
    for row in rows:
        asked = f"{row['requested']:.2%}"
        if row["achieved"] is None:
            cells.append([asked, "–", "–", "–"])
            notes.append(f"{asked}: {row['note']}")
            continue
        numbers = f"{row['perplexity']:.3f}", f"{row['perplexity_increase']:+.1%}"
        cells.append([asked, f"{row['achieved']:.2%}", *numbers])
    return "\n".join([table(cells), *notes])

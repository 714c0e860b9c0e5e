"""Several methods on one text: what each comes to at the same ratio.

  lit-prune compare --model my-model --text my-text.txt --pruning_ratio 0.3
  lit-prune compare --model my-model --text my-text.txt --presets conditional flap random

Each is calibrated on the same samples and judged on the score side, which none of them has seen, by
masking the dense model. A difference that is small beside the noise of your text means nothing: for
intervals, baselines and controls take recipes/compare.py.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.cli.console import quiet_down, say, table
from lit_prune.cli.options import add_model, add_text
from lit_prune.config import PruningConfig
from lit_prune.errors import BudgetError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from transformers import PreTrainedModel

    from lit_prune.calibration import RowSet

name, usage = "compare", "--model MODEL --text TEXT --pruning_ratio RATIO"
FILES = ("compare.json",)
_USUAL = ["conditional", "paper", "flap", "wanda", "llm_pruner", "shortgpt", "random"]


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    add_model(parser)
    add_text(parser, "to calibrate on, and to score")
    parser.add_argument(
        "--presets",
        type=str,
        nargs="+",
        default=_USUAL,
        help="which; an unknown name is answered with all that there are",
    )
    parser.add_argument("--pruning_ratio", type=float, default=0.3, help="of decoder parameters")
    parser.add_argument("--max_calibration_tokens", type=int, default=65_536, help="at most")
    parser.add_argument("--seed", type=int, default=0, help="of random choices")
    parser.add_argument("--to", type=str | None, default=None, help="directory for compare.json")
    parser.add_argument("--overwrite", action="store_true", help="replace compare.json there")


def run(options: Namespace) -> None:
    """Run each preset, and lay them side by side."""
    from lit_prune.calibration import collect_rows
    from lit_prune.cli.loading import documents_of, load
    from lit_prune.decoder import quiet
    from lit_prune.methods import preset
    from lit_prune.metrics import perplexity_of
    from lit_prune.saving import refuse_target, staged

    quiet_down()
    target = None if options.to is None else Path(options.to)
    if target is not None:
        refuse_target(target, overwrite=options.overwrite, known=FILES)
    common = ("pruning_ratio", "max_calibration_tokens", "seed")
    request = PruningConfig(**{name: options[name] for name in common})
    configs = [preset(each).resolve(replace(request, preset=each)) for each in options.presets]
    documents = documents_of(options)
    model = (loaded := load(options.model, dtype=options.dtype, device=options.device)).model
    rows, _ = collect_rows(
        model, loaded.batches(options, documents), request.max_calibration_tokens
    )
    with quiet(model):
        batches = rows.batches("score", request.replay_batch_tokens)
        dense = perplexity_of(model, batches).perplexity
    found: list[dict[str, Any]] = []
    for config in configs:
        say(f"{config.preset} ({len(found) + 1} of {len(configs)})")
        found.append(_judged(model, rows, config))
    cells = [["preset", "removed", "perplexity", "increase", "seconds"]]
    cells += [["dense", "0.00%", f"{dense:.3f}", "", ""]]
    cells += [
        _cells(row, dense) for row in sorted(found, key=lambda row: row["perplexity"] or 1e99)
    ]
    if target is not None:
        whole = {"model": options.model, "dense_perplexity": dense, "presets": found}
        with staged(target, overwrite=options.overwrite, num_bytes=0, known=FILES) as folder:
            (folder / "compare.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    print(table(cells))
    print("\n".join(f"{row['preset']}: {row['note']}" for row in found if row["note"]))
    print(f"{rows.num_scored('score'):,} tokens scored, neither calibrated on nor chosen by")


def _judged(model: PreTrainedModel, rows: RowSet, config: PruningConfig) -> dict[str, Any]:
    from lit_prune.decoder import quiet
    from lit_prune.measuring import calibrate
    from lit_prune.metrics import perplexity_of
    from lit_prune.planning import compensated, make_plan
    from lit_prune.surgery import masked

    started = time.perf_counter()
    row: dict[str, Any] = {
        "preset": config.preset,
        "achieved": None,
        "perplexity": None,
        "note": "",
    }
    try:
        calibration = calibrate(model, rows, config)
        planned = make_plan(model, calibration, config)
        planned = compensated(model, planned, calibration, config)
    except BudgetError as error:  # depth-only methods reach few ratios
        return {**row, "note": str(error), "seconds": time.perf_counter() - started}
    seconds = time.perf_counter() - started
    with quiet(model), masked(model, planned.plan, planned.compensation):
        perplexity = perplexity_of(model, rows.batches("score", config.replay_batch_tokens))
    return {
        **row,
        "achieved": planned.plan.provenance["achieved_ratio"],
        "perplexity": perplexity.perplexity,
        "plan_digest": planned.plan.digest,
        "seconds": seconds,
    }


def _cells(row: dict[str, Any], dense: float) -> list[str]:
    if row["perplexity"] is None:
        return [row["preset"], "–", "–", "–", f"{row['seconds']:.0f}"]
    increase = row["perplexity"] / dense - 1
    numbers = f"{row['perplexity']:.3f}", f"{increase:+.1%}", f"{row['seconds']:.0f}"
    return [row["preset"], f"{row['achieved']:.2%}", *numbers]

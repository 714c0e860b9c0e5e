"""Perplexity, latency and size of a model on a text; or of two models, side by side.

  lit-prune evaluate --model pruned --text other-text.txt
  lit-prune evaluate --model pruned --against my-model --text other-text.txt

All of the text is scored, so take one that the model was not pruned by. Latency is measured where
the model is: prompt and new tokens can be chosen, and 0 prompt tokens skip it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.cli.console import quiet_down, say, table
from lit_prune.cli.options import add_model, add_text
from lit_prune.config import PruningConfig
from lit_prune.errors import ConfigError
from lit_prune.report import format_value
from lit_prune.whole_file import refuse_file, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

    from lit_prune.report import ReportRow

name, usage = "evaluate", "--model MODEL [--against MODEL] --text TEXT"
_ALL = 2**62  # tokens


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    add_model(parser)
    parser.add_argument(
        "--against", type=str | None, default=None, help="another model: the one before"
    )
    add_text(parser, "to score")
    parser.add_argument("--latency_prompt_tokens", type=int, default=128, help="0 skips latency")
    parser.add_argument("--latency_new_tokens", type=int, default=16, help="decoded after it")
    parser.add_argument("--latency_batch_size", type=int, default=1, help="prompts at once")
    parser.add_argument("--to", type=str | None, default=None, help="new JSON file for the numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")


def run(options: Namespace) -> None:
    """Measure, and lay out."""
    from lit_prune.calibration import collect_rows
    from lit_prune.cli.loading import documents_of, load
    from lit_prune.measurement import conditions, measure, report_rows

    quiet_down()
    workload = ("latency_prompt_tokens", "latency_new_tokens", "latency_batch_size")
    config = PruningConfig(pruning_ratio=0, **{name: options[name] for name in workload})
    target = None if options.to is None else Path(options.to)
    if target is not None:
        refuse_file(target, overwrite=options.overwrite)
    documents = documents_of(options)
    loaded = load(options.model, dtype=options.dtype, device=options.device)
    other = None
    if options.against is not None:  # before the first is measured: it may not be there
        other = load(options.against, dtype=options.dtype, device=options.device)
        if config.latency_prompt_tokens and other.model.dtype != loaded.model.dtype:
            raise ConfigError(
                f"{options.model} is {loaded.model.dtype}, {options.against} {other.model.dtype}: "
                "their latencies cannot be compared. Load both in one, by --dtype float32 say, or "
                "skip latency (--latency_prompt_tokens 0)."
            )
    rows, notes = collect_rows(loaded.model, loaded.batches(options, documents), _ALL)
    rows = replace(rows, split=False)  # all of it is scored
    say(f"measuring {options.model}")
    here = measure(loaded.model, rows, config)
    before = here
    if other is not None:
        say(f"measuring {options.against}")
        before = measure(other.model, rows, config)
    after = None if other is None else here
    lines, words = report_rows(before, after), [*notes, *conditions(before, after)["words"]]
    if target is not None:
        whole = {"model": options.model, "against": options.against, "words": words}
        whole["rows"] = [asdict(line) for line in lines]
        write_text(target, json.dumps(whole, indent=1))
    print(_table(lines, options))
    print("\n" + "\n".join(f"note: {word}" for word in words))


def _table(lines: Sequence[ReportRow], options: Namespace) -> str:
    if options.against is None:
        cells = [[row.label, format_value(row.before, row.unit)] for row in lines]
        return table([["", Path(options.model).name], *cells])
    header = ["", Path(options.against).name, Path(options.model).name, "ratio", ""]
    return table(
        [
            header,
            *(
                [
                    row.label,
                    format_value(row.before, row.unit),
                    format_value(row.after, row.unit),
                    "–" if row.ratio is None else f"{row.ratio:.3f}",
                    row.note,
                ]
                for row in lines
            ),
        ]
    )

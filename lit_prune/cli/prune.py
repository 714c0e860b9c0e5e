"""Make a model smaller, save it, and say what it has cost.

  lit-prune prune --model my-model --text my-text.txt --to pruned --pruning_ratio 0.3
  lit-prune prune --model org/name --text wikitext:wikitext-2-raw-v1 --to pruned --target_bytes 8GB
  lit-prune prune --model my-model --text my-texts/ --to pruned --max_perplexity_increase 5%

The text should be what the model is for: some hundred thousand tokens of it. Most of it calibrates,
the rest chooses and scores. The directory appears whole, loaded back and compared, or not at all;
what was cut and what it cost lies in it as plan.json, report.json and README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.cli.console import quiet_down
from lit_prune.cli.options import add_model, add_request, add_text, request_of
from lit_prune.cli.saved import add_saved, save, target_of
from lit_prune.cli.swept import add_sweep, points_of
from lit_prune.config import PruningConfig
from lit_prune.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lit_prune.methods import Method

# Allocators that leave every layer as wide as the next.
_ALIKE = ("uniform", "uniform_widths")
name, usage = "prune", "--model MODEL --text TEXT --to DIRECTORY --pruning_ratio RATIO"


def add_options(parser: ArgumentParser) -> None:
    """Add what the command reads."""
    add_model(parser)
    add_text(parser, "to calibrate on")
    add_saved(parser)
    add_sweep(parser)
    add_request(parser)


def run(options: Namespace) -> None:
    """Prune and save."""
    from lit_prune.cli.loading import documents_of, load
    from lit_prune.methods import preset
    from lit_prune.pruner import prune

    quiet_down()
    request = request_of(options)
    config = PruningConfig.from_options(request)
    config = (method := preset(config.preset)).resolve(config)
    if options.format == "stock":
        _refuse_unequal(config, method)
    points, target = points_of(options.sweep), target_of(options)
    documents = documents_of(options)
    loaded = load(options.model, dtype=options.dtype, device=options.device)
    result = prune(loaded.model, loaded.batches(options, documents), **request)
    notes = save(options, loaded, compensation=result.compensation, sweep=points)
    print(result.report)
    load_it = f"load it: lit_prune.load_pruned({str(target)!r})"
    print("", f"saved: {target}", load_it, *notes, sep="\n")


def _refuse_unequal(config: PruningConfig, method: Method) -> None:
    """Refuse to search for layers of different widths that the format could not hold in the end."""
    if (
        config.allocator in _ALIKE
        or config.granularities == ("block",)
        or config.pruning_ratio == 0
    ):
        return
    also = [name for name in method.allocators if name in _ALIKE]
    remedy = f"add --allocator {also[0]}" if also else "choose another preset"
    raise ConfigError(
        f"format 'stock' has one width for all layers, and allocator {config.allocator!r} gives "
        f"each its own: {remedy}, or take format 'padded', 'heterogeneous' or 'gguf'."
    )

"""Prune in stages while the model is being fine-tuned: a little after each epoch.

Run, offline, some minutes on two CPU cores::

    python recipes/iterative.py --text README.md
    python recipes/iterative.py --model my-model --text my.jsonl --ratios 0.1 0.2 0.3 --epochs 4

Each ratio is of what the dense model had, so the last one is what is gone in the end; the epochs
after a stage give the model time to recover from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L

from lit_prune import EntropyPruningCallback
from lit_prune.finetune import CausalLMModule, TextDataModule

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "python-4.8m"))
    parser.add_argument("--text", required=True, help="file, directory or name of a data set")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "iterative")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)

    pruner = EntropyPruningCallback(pruning_ratio=options.ratios, when="epoch_end")
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[pruner],
        devices=1,
        default_root_dir=options.output,
        enable_checkpointing=False,
    )
    data = TextDataModule(options.text, options.model, context_length=options.context_length)
    trainer.fit(CausalLMModule(options.model, learning_rate=options.learning_rate), data)
    for report in pruner.reports_:
        perplexity = report.row("perplexity")
        print(f"{report.headline()}: perplexity {perplexity.before:.2f} -> {perplexity.after:.2f}")
    folder = options.output / "pruned"
    print("saved:", pruner.save_pruned(folder, tokenizer=data.tokenizer, overwrite=True))


if __name__ == "__main__":
    main()

"""Prune, then recover: train the pruned model on, wholly or by LoRA, alone or beside the dense one.

Run, offline, some minutes on two CPU cores::

    python recipes/recover.py --text README.md
    python recipes/recover.py --text README.md --lora_rank 8 --distillation 0
    python recipes/recover.py --model my-model --text my-text.jsonl --ratio 0.4 --epochs 2

What is printed is perplexity on text that neither pruning nor recovery has seen, of the dense, the
pruned and the recovered model. The dense model is the teacher: its predictions are learned with the
weight ``--distillation``. Adapters are merged when the fit ends, so that what is saved is plain.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import lightning as L
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune import prune, save_pruned
from lit_prune.finetune import CausalLMModule, TextDataModule
from lit_prune.metrics import perplexity_of

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "python-4.8m"))
    parser.add_argument("--text", required=True, help="file, directory or name of a data set")
    parser.add_argument("--ratio", type=float, default=0.3, help="decoder parameters to remove")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--lora_rank", type=int, help="train adapters, not the weights")
    parser.add_argument("--distillation", type=float, default=0.5, help="0: no teacher")
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "recovered")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    data = TextDataModule(options.text, tokenizer, context_length=options.context_length)
    data.setup()
    unseen = data.val_dataloader()

    pruned = copy.deepcopy(dense)
    result = prune(pruned, data.train_dataloader(), pruning_ratio=options.ratio)
    print(result.report)
    found = {"dense": perplexity_of(dense, unseen), "pruned": perplexity_of(pruned, unseen)}

    module = CausalLMModule(
        pruned,
        learning_rate=options.learning_rate,
        lora_rank=options.lora_rank,
        teacher=dense if options.distillation else None,
        distillation=options.distillation,
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    recovered = module.model.cpu().eval()
    found["recovered"] = perplexity_of(recovered, unseen)
    print("\nperplexity on unseen text:")
    for name, each in found.items():
        print(f"  {name:>9}: {each.perplexity:.3f}")
    print("saved:", save_pruned(recovered, options.output, tokenizer=tokenizer, overwrite=True))


if __name__ == "__main__":
    main()

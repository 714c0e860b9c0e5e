"""Prune a model that needs no fine-tuning: one `trainer.validate`, or one call without a Trainer.

Run, offline, one minute on two CPU cores::

    python recipes/prune_validate.py
    python recipes/prune_validate.py --ratio 0.5 --rows 128

Both ways see the same samples, so they make the same plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from corpus import pack, stdlib_documents
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_prune import EntropyPruningCallback, prune

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "prune_validate"


class Validation(L.LightningModule):
    """All that `trainer.validate` needs: one causal language model and a validation step."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.model(**batch, labels=batch["input_ids"]).loss
        self.log("validation/loss", loss, batch_size=len(batch["input_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3, help="decoder parameters to remove")
    parser.add_argument("--rows", type=int, default=48, help="windows of 512 tokens")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "python-4.8m")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    rows = pack(stdlib_documents("choose"), tokenizer, context_length=512).with_format("torch")
    loader = DataLoader(rows.shuffle(seed=0).select(range(options.rows)), batch_size=4)

    # With a Trainer: `validate` observes, and prunes when it is over.
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    pruner = EntropyPruningCallback(pruning_ratio=options.ratio, when="validate")
    trainer = L.Trainer(callbacks=[pruner], accelerator="cpu", logger=False, default_root_dir=RUN)
    trainer.validate(Validation(model), loader)
    print(pruner.report_)

    # Without: the same pipeline as a function.
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    result = prune(model, loader, pruning_ratio=options.ratio)
    print(f"\nthe same plan both ways: {result.plan.digest == pruner.plan_.digest}")


if __name__ == "__main__":
    main()

"""Fine-tune and prune from a YAML file: LightningCLI, and the callback among its callbacks.

Run, offline, on two CPU cores (your own model and text on the command line, or in the file)::

    python recipes/train.py fit --config recipes/fine_tune_then_prune.yaml
    python recipes/train.py fit --config recipes/fine_tune_then_prune.yaml \
        --model.model my-model --data.tokenizer my-model --data.train my-text.jsonl

Your own LightningModule takes the place of `CausalLMModule` in the last line; nothing in it has to
know about pruning. The pruned model is saved in the folder of the run, as ``pruned``.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningCLI

from lit_prune import EntropyPruningCallback
from lit_prune.finetune import CausalLMModule, TextDataModule


class FineTuning(LightningCLI):
    """LightningCLI that saves what was pruned when the fit is over."""

    def after_fit(self) -> None:
        pruner = next(c for c in self.trainer.callbacks if isinstance(c, EntropyPruningCallback))
        print(pruner.report_)
        tokenizer, folder = self.datamodule.tokenizer, Path(self.trainer.log_dir) / "pruned"
        print("saved:", pruner.save_pruned(folder, tokenizer=tokenizer, overwrite=True))


if __name__ == "__main__":
    FineTuning(CausalLMModule, TextDataModule, save_config_kwargs={"overwrite": True})

"""Fine-tune the shipped model, prune 30 % of it, measure, save, load it in another process.

Run, offline, about three minutes on two CPU cores::

    python recipes/demo.py
    python recipes/demo.py --ratio 0.5 --steps 100

The model has only read Python source code. It is fine-tuned on prose: Python's own help topics.
Their *train* part is trained on; their *validation* part gives the validation loss, and pruning
calibrates on it; their *test* part is seen by neither, so the perplexity on it is the honest one.
"""

from __future__ import annotations

import argparse
import copy
import logging
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from corpus import fine_tuning_documents, pack
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lit_prune import EntropyPruningCallback, PruningReport
from lit_prune.metrics import perplexity_of

ROOT = Path(__file__).resolve().parents[1]
CONTEXT_LENGTH = 256
VALIDATION_WINDOWS = 80  # of about 120: enough to calibrate on, and three validations stay quick
PROMPT = 'The "for" statement is used to'

# What the other process runs: all that it takes to use a pruned model.
RELOAD = """
import sys
from transformers import AutoTokenizer
from lit_prune import load_pruned

directory, prompt = sys.argv[1:]
model, tokenizer = load_pruned(directory), AutoTokenizer.from_pretrained(directory)
ids = tokenizer(prompt, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False)[0]))
"""


class FineTuning(L.LightningModule):
    """Next-token fine-tuning; nothing in it knows about pruning."""

    def __init__(self, model: PreTrainedModel, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, labels=batch["input_ids"], use_cache=False).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("validation/loss", self.loss(batch), batch_size=len(batch["input_ids"]))

    def on_validation_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["validation/loss"]
        self.print(f"  step {self.global_step:4d}: validation loss {loss:.3f} nats per token")

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class KeepDense(L.Callback):
    """Copy the fine-tuned model before it is pruned, only so that the demo can compare the two."""

    def on_train_end(self, trainer: L.Trainer, pl_module: FineTuning) -> None:
        self.model = copy.deepcopy(pl_module.model)


def perplexity(model: PreTrainedModel, loader: DataLoader) -> float:
    """Return the perplexity per token: windows of 256 tokens, no overlap, float32."""
    return perplexity_of(model.eval(), loader).perplexity


def before_after(report: PruningReport) -> Table:
    """Return the report as a table for the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("before", "after", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", style="dim")  # what wraps where a terminal is narrow
    for row in report.table():
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3, help="decoder parameters to remove")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of fine-tuning")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "python-4.8m")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo")
    options = parser.parse_args()
    quiet_down()
    console, started = Console(), time.perf_counter()
    L.seed_everything(0, verbose=False)

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    train, validation, test = (
        pack(fine_tuning_documents(split), tokenizer, CONTEXT_LENGTH).with_format("torch")
        for split in ("train", "validation", "test")
    )
    training_batches = DataLoader(train, batch_size=2, shuffle=True)
    validation = validation.shuffle(seed=0).select(range(min(VALIDATION_WINDOWS, len(validation))))
    validation_batches, test_batches = (DataLoader(x, batch_size=8) for x in (validation, test))

    console.rule(f"1. fine-tune {options.checkpoint.name} for {options.steps} steps")
    module = FineTuning(model, options.steps)
    dense, pruner = KeepDense(), EntropyPruningCallback(pruning_ratio=options.ratio)
    logger = TensorBoardLogger(options.output.parent, options.output.name, default_hp_metric=False)
    trainer = L.Trainer(
        max_steps=options.steps,
        val_check_interval=max(1, options.steps // 2),
        check_val_every_n_epoch=None,
        callbacks=[dense, pruner],
        logger=logger,
        accelerator="cpu",
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    shipped = perplexity(model, test_batches)
    trainer.validate(module, validation_batches, verbose=False)
    module.train()
    trainer.fit(module, training_batches, validation_batches)

    console.rule(f"2. prune {options.ratio:.0%} of the decoder parameters: done when the fit ended")
    report = pruner.report_
    console.print(report.headline(), report.in_short(), before_after(report), sep="\n")
    for note in report.notes():
        console.print(indented("•", note), style="dim", highlight=False)
    console.print("Perplexity on the test text, which neither training nor pruning has seen:")
    fine_tuned, pruned = (perplexity(x, test_batches) for x in (dense.model, model))
    console.print(f"  {shipped:.2f} as shipped, {fine_tuned:.2f} fine-tuned, {pruned:.2f} pruned")

    console.rule("3. save, load in another process, generate (greedy, same prompt)")
    directory = pruner.save_pruned(options.output / "pruned", tokenizer=tokenizer, overwrite=True)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    before = tokenizer.decode(dense.model.generate(ids, max_new_tokens=32, do_sample=False)[0])
    after = subprocess.run(
        [sys.executable, "-c", RELOAD, str(directory), PROMPT],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    for name, text in (("fine-tuned", before), ("pruned, reloaded", after)):
        console.print(indented(f"{name}:", " ".join(text.split())), highlight=False, markup=False)

    console.rule("where everything lies")
    for what, where in {
        "pruned model": f"{shown(directory)}    lit_prune.load_pruned({str(shown(directory))!r})",
        "plan and report": shown(Path(logger.log_dir) / "pruning"),
        "pictures": f"tensorboard --logdir {shown(options.output)}    (see IMAGES, TEXT, SCALARS)",
    }.items():
        console.print(f"  {what:>16}: {where}", highlight=False, soft_wrap=True)
    console.print(f"  {time.perf_counter() - started:.0f} seconds in all")


def indented(mark: str, text: str) -> str:
    """Return the text in lines of 80, the first one marked."""
    return textwrap.fill(f"{mark} {text}", 80, initial_indent="  ", subsequent_indent="    ")


def shown(path: Path) -> Path:
    """Return the path as seen from here, where it lies below."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


def quiet_down() -> None:
    """Leave the terminal to the demo: no tips, no device list, no loading bars."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)


if __name__ == "__main__":
    main()

"""Train the small Llama that ships in ``checkpoints/``, on Python's standard library sources.

Run, offline, on two cores::

    OMP_WAIT_POLICY=passive python recipes/train_checkpoint.py --max-minutes 90

On a CPU with bf16 arithmetic, ``--precision bf16-mixed --compile`` trains half as much again in the
same time; on one without, bf16 is far slower than float32.

What it does: read the documents (`corpus.py`), train a byte-level BPE tokenizer on the train split,
train a 4.8 M parameter `LlamaForCausalLM` with a plain Lightning Trainer, export. The learning rate
follows the *clock* (warm-up, then a cosine over ``--max-minutes``), so the run ends decayed on a
slow or shared machine too; the price is that two runs agree only roughly. With ``--steps`` it
follows the steps, and one thread repeats a run bit by bit on a processor of the same kind.
``training.json`` beside the weights records what really happened.

Every few minutes it writes a resumable Lightning checkpoint (``<work folder>/last.ckpt``) and
replaces the exported directory, so that a usable model exists early. To continue, or to train for
a longer or shorter time than first asked: stop it, then ``--resume --max-minutes ...`` with another
``--seed``, which shuffles the blocks anew (the interrupted epoch starts over).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from corpus import HELD_OUT, corpus_digest, pack, stdlib_documents
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger("train_checkpoint")

ROOT = Path(__file__).resolve().parents[1]
CONTEXT_LENGTH = 512
VOCABULARY_SIZE = 4096
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"

# Grouped-query attention: four KV groups of two query heads.
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
}

# GPT-2's pattern, changed for source code: a newline takes the indentation after it along, a word
# its underscores; so a line start and an identifier can become one token each.
PRE_TOKENS = r"""\r?\n[ \t]*|[^\S\r\n]*\p{N}{1,3}| ?[\p{L}_]+| ?[^\s\p{L}\p{N}_]+|[^\S\r\n]+"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run may differ in; times in minutes of wall clock, peak learning rate.

    ``steps``, where positive, are what the schedule follows in place of ``max_minutes``.
    """

    max_minutes: float = 70.0
    warmup_fraction: float = 0.02
    steps: int = -1
    seed: int = 20261
    batch_size: int = 2
    short_context: int = 256
    short_fraction: float = 0.75
    learning_rate: float = 2e-3
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    threads: int = 2
    precision: str = "32-true"
    compile: bool = False
    export_minutes: float = 6.0
    work_dir: Path = ROOT / "runs" / "train_checkpoint"
    export_dir: Path = ROOT / "checkpoints" / "python-4.8m"
    resume: bool = False


def train_tokenizer(documents: Dataset) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on the train split; it can encode every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents["text"], trainer=trainer, length=len(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, **shape: int) -> LlamaForCausalLM:
    """Return the untrained model (tied embeddings) in float32; ``shape`` as in `LlamaConfig`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        **shape,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # 0.02 is meant for widths in the thousands; 1/sqrt(192) is 0.07.
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:  # residual branches start small, as in GPT-2
        for output in (block.self_attn.o_proj, block.mlp.down_proj):
            nn.init.normal_(output.weight, std=0.04 / math.sqrt(2 * config.num_hidden_layers))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


class LanguageModeling(L.LightningModule):
    """Next-token training whose learning rate is a function of the part that is over."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.minutes_before = 0.0  # spent by earlier processes of a resumed run
        self.started = time.monotonic()
        self.num_tokens = 0
        self.curve: list[dict[str, float]] = []
        self._nll = torch.zeros(2, dtype=torch.float64)

    @property
    def minutes(self) -> float:
        """Minutes of training so far, validation and export included."""
        return self.minutes_before + (time.monotonic() - self.started) / 60

    @property
    def progress(self) -> float:
        """Part of the training that is over, 0 to 1: of its steps where given, else its minutes."""
        if self.recipe.steps > 0:
            return min(self.global_step / self.recipe.steps, 1.0)
        return min(self.minutes / self.recipe.max_minutes, 1.0)

    def learning_rate(self, progress: float) -> float:
        """Return the rate: linear warm-up, then a cosine to ``final_fraction`` of the peak."""
        recipe = self.recipe
        if progress < recipe.warmup_fraction:
            return recipe.learning_rate * max(progress / recipe.warmup_fraction, 0.01)
        decayed = (progress - recipe.warmup_fraction) / (1 - recipe.warmup_fraction)
        cosine = 0.5 * (1 + math.cos(math.pi * decayed))
        return recipe.learning_rate * (recipe.final_fraction + (1 - recipe.final_fraction) * cosine)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; vectors (norms) are not decayed."""
        parameters = list(self.model.parameters())
        groups = [
            {
                "params": [p for p in parameters if p.ndim >= 2],
                "weight_decay": self.recipe.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        # Lightning refuses to clip the gradients of a fused optimizer under mixed precision.
        fused = self.recipe.precision == "32-true"
        return torch.optim.AdamW(
            groups, lr=self.recipe.learning_rate, betas=(0.9, 0.95), fused=fused
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean next-token loss of ``batch``, ``[blocks, tokens]``, in nats."""
        progress = self.progress
        rate = self.learning_rate(progress)
        if progress < self.recipe.short_fraction:
            # Attention is dear on a CPU: half the context trains 1.4 times the tokens per second.
            batch = batch.view(-1, self.recipe.short_context)
        for group in self.optimizers().param_groups:
            group["lr"] = rate
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.num_tokens += batch.numel()
        if batch_idx == 10 or batch_idx % 100 == 0:  # the first tells nothing about the speed
            speed = self.num_tokens / (60 * self.minutes)
            logger.info(
                "%.1f min, step %d, epoch %d: loss %.3f, lr %.2e, %.0f tokens/s on average",
                self.minutes, self.global_step, self.current_epoch, loss.item(), rate, speed,
            )  # fmt: skip
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop when all is done (an argument of the Trainer would count from its own start)."""
        if self.progress >= 1:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the clock and the curve, so that a resumed run continues both."""
        checkpoint["recipe_progress"] = {
            "minutes": self.minutes, "num_tokens": self.num_tokens, "curve": self.curve,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the clock and the curve of the interrupted run."""
        progress = checkpoint["recipe_progress"]
        self.minutes_before, self.num_tokens = progress["minutes"], progress["num_tokens"]
        self.curve = progress["curve"]
        self.started = time.monotonic()


class Exporter(L.Callback):
    """Now and then measure on choose, save a resumable checkpoint, replace the exported model."""

    def __init__(
        self, choose: Tensor, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
    ) -> None:
        # A quarter of the blocks, spread evenly, is enough for a curve.
        self.choose, self.tokenizer, self.record = choose[::4], tokenizer, record
        self.next_minute = 4.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LanguageModeling, *_: Any) -> None:
        """Export when it is time, and once more when training is about to end."""
        if pl_module.minutes < self.next_minute:
            return
        self.next_minute = pl_module.minutes + pl_module.recipe.export_minutes
        self.export(trainer, pl_module)

    def export(self, trainer: L.Trainer, pl_module: LanguageModeling) -> None:
        """Write ``last.ckpt`` and the exported directory."""
        point = {
            "minutes": round(pl_module.minutes, 2),
            "step": trainer.global_step,
            "num_tokens": pl_module.num_tokens,
        }
        nll = mean_nll(pl_module.model, self.choose)
        pl_module.curve.append(
            point | {"choose_nll": round(nll, 4), "choose_perplexity": round(math.exp(nll), 3)}
        )
        logger.info("choose: %s", pl_module.curve[-1])
        trainer.save_checkpoint(pl_module.recipe.work_dir / "last.ckpt")
        export(pl_module, self.tokenizer, self.record | {"finished": False})


@torch.no_grad()
def mean_nll(model: nn.Module, blocks: Tensor, batch_size: int = 4) -> float:
    """Return the mean next-token NLL (nats) over non-overlapping blocks, ``[blocks, tokens]``.

    Each block is scored alone, its first token only as context; losses are summed in float64.
    """
    training = model.training
    model.eval()
    total = 0.0
    for batch in blocks.split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        total += losses.double().sum().item()
    model.train(training)
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


def rounded_to_bf16(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a bf16 copy; loaded in float32 it computes with exactly these rounded weights."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    return copy.to(torch.bfloat16)


def export(
    module: LanguageModeling, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> None:
    """Write the Hugging Face directory beside its place, then rename: nobody reads half of one."""
    target = module.recipe.export_dir
    staging, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (staging, old):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir(parents=True)
    rounded_to_bf16(module.model).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    record = record | {
        "minutes": round(module.minutes, 2),
        "steps": module.trainer.global_step,
        "tokens_seen": module.num_tokens,
        "epochs": round(module.num_tokens / record["corpus"]["train"]["tokens"], 3),
        "tokens_per_second": round(module.num_tokens / (60 * module.minutes)),
        "choose_curve": module.curve,
    }
    (staging / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (staging / "README.md").write_text(model_card(record))
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def model_card(record: dict[str, Any]) -> str:
    """Return the README of the exported directory, every number taken from ``record``."""
    quality = {
        split: record.get("quality", {}).get(split, {}).get("perplexity", "not measured yet")
        for split in ("choose", "score")
    }
    state = "" if record["finished"] else "\n**Intermediate export: training was still running.**\n"
    return f"""---
license: psf-2.0
language: en
tags: [python, code]
---
# python-4.8m
{state}
A small Llama ({record["num_parameters"]:,} parameters, 10 layers, 4 KV groups of 2 query heads) for
tests and demonstrations of `lit_prune`. It continues Python source text, badly; nothing else.
On a CPU without bf16 arithmetic load it with `dtype=torch.float32`: bf16 is far slower there.

- Made by `recipes/train_checkpoint.py`; the command and all settings are in `training.json`.
- Text: the `.py` files of the standard library of Python {record["python"]} (tests and generated
  tables left out): {record["corpus"]["train"]["tokens"]:,} training tokens.
- Training: {record["tokens_seen"]:,} tokens in {record["steps"]:,} steps and {record["minutes"]}
  minutes, {record["hardware"]["cpu"]}, {record["hardware"]["threads"]} threads, precision
  {record["hardware"]["precision"]}.
- Perplexity per token on held-out packages, windows of {CONTEXT_LENGTH} tokens, no overlap, bf16
  weights computed in float32: choose {quality["choose"]}, score {quality["score"]}.
- The text is covered by the Python Software Foundation licence, version 2; so are these weights, as
  far as they reproduce it.
"""


def describe(
    recipe: Recipe, documents: dict[str, Dataset], blocks: dict[str, Tensor]
) -> dict[str, Any]:
    """Return what is known before training: versions, hardware, seeds, the corpus."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {
            package.__name__: package.__version__ for package in (torch, transformers, L)
        },
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "precision": recipe.precision,
        },
        "recipe": {
            name: value for name, value in vars(recipe).items() if not isinstance(value, Path)
        },
        "context_length": CONTEXT_LENGTH,
        "vocabulary_size": VOCABULARY_SIZE,
        "held_out": {split: sorted(packages) for split, packages in HELD_OUT.items()},
        "corpus": {
            split: {
                "documents": len(dataset),
                "bytes": sum(len(text.encode()) for text in dataset["text"]),
                "tokens": blocks[split].numel(),
                "digest": corpus_digest(dataset),
            }
            for split, dataset in documents.items()
        },
    }  # fmt: skip


def cpu_name() -> str:
    """Return the processor's name where Linux tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def parse_arguments() -> Recipe:
    """Read the command line; each field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in vars(Recipe()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(default), default=default, help=" ")
    arguments = vars(parser.parse_args())
    for name in ("work_dir", "export_dir"):
        arguments[name] = Path(arguments[name]).resolve()
    return Recipe(**arguments)


def main() -> None:
    """Train, export, score."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = parse_arguments()
    torch.set_num_threads(recipe.threads)
    L.seed_everything(recipe.seed)
    recipe.work_dir.mkdir(parents=True, exist_ok=True)
    documents = {split: stdlib_documents(split) for split in ("train", "choose", "score")}
    tokenizer = train_tokenizer(documents["train"])
    blocks = {
        split: torch.tensor(pack(dataset, tokenizer, CONTEXT_LENGTH)["input_ids"][:])
        for split, dataset in documents.items()
    }
    model = build_model(tokenizer, **SHAPE)
    record = describe(recipe, documents, blocks) | {"num_parameters": model.num_parameters()}
    logger.info("%s", json.dumps(record))

    if recipe.compile:
        model.compile()  # in place: names of the weights stay
    module = LanguageModeling(model, recipe)
    exporter = Exporter(blocks["choose"], tokenizer, record)
    loader = DataLoader(
        blocks["train"],
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=recipe.precision,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[exporter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=recipe.work_dir,
    )
    module.started = time.monotonic()
    trainer.fit(module, loader, ckpt_path=recipe.work_dir / "last.ckpt" if recipe.resume else None)

    exporter.export(trainer, module)
    exported = LlamaForCausalLM.from_pretrained(recipe.export_dir, dtype=torch.float32)
    record["quality"] = {
        "how": f"exported bf16 weights in float32, windows of {CONTEXT_LENGTH} tokens, no overlap",
    }
    for split in ("choose", "score"):
        nll = mean_nll(exported, blocks[split])
        record["quality"][split] = {"nll": round(nll, 4), "perplexity": round(math.exp(nll), 3)}
    export(module, tokenizer, record | {"finished": True})
    logger.info("quality: %s", record["quality"])


if __name__ == "__main__":
    main()

"""Train the models that methods are judged on beside the shipped one: one deep, one wide.

Run on your own text files, one document each (whole files are held out: every twentieth to choose
on, every twentieth to score on)::

    python recipes/train_benchmark.py deep --text novels/*.txt --out runs/novels-deep
    python recipes/train_benchmark.py wide --text novels/*.txt --out runs/novels-wide

``deep`` is a Llama of 16 narrow layers with grouped-query attention, ``wide`` one of four layers
with multi-head attention; both have 5–10 M parameters. On a GPU three minutes train them well:
``--accelerator gpu --precision bf16-mixed --batch-size 64 --max-minutes 3``. By the clock two runs
agree only roughly; ``--steps 7000 --threads 1`` trains the same model again, on a processor of the
same kind.

What is written is a Hugging Face directory with its tokenizer and ``training.json``: corpus, seed,
tokens, held-out perplexity, and which files were held out, so that ``compare.py --model
runs/novels-deep --text-of runs/novels-deep`` calibrates on training text and scores on the rest.
The training itself is that of `train_checkpoint.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from corpus import corpus_digest, pack
from datasets import Dataset
from torch.utils.data import DataLoader
from train_checkpoint import (
    CONTEXT_LENGTH,
    LanguageModeling,
    Recipe,
    build_model,
    cpu_name,
    mean_nll,
    rounded_to_bf16,
    train_tokenizer,
)

SCORED_BLOCKS = 200  # of each held-out split: enough to know the model by
SHAPES: dict[str, dict[str, int]] = {
    "deep": {
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 20,
    },
    "wide": {
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 40,
    },
}


def split_files(files: list[Path]) -> dict[str, list[Path]]:
    """Hold out every twentieth file to choose on and every twentieth to score on, by sorted name.

    Raises:
        SystemExit: If there are too few files to hold any out.
    """
    files = sorted(files)
    choose, score = files[7::20], files[13::20]
    if not score:
        raise SystemExit(
            f"--text: at least 14 files are needed to hold some out, got {len(files)}."
        )
    held_out = {*choose, *score}
    return {"train": [f for f in files if f not in held_out], "choose": choose, "score": score}


def read(files: list[Path]) -> Dataset:
    """Return one document for each file, with its name."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return Dataset.from_dict({"path": [file.name for file in files], "text": texts})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=-1, help="in place of --max-minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; faster")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed where it is fast")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--batch-size", type=int, default=2, help="blocks; a GPU wants 64")
    return parser.parse_args()


def main() -> None:
    """Train by the clock or by steps, save, score what is saved."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    L.seed_everything(options.seed)
    files = split_files(options.text)
    documents = {split: read(chosen) for split, chosen in files.items()}
    tokenizer = train_tokenizer(documents["train"])
    blocks = {
        split: torch.tensor(pack(dataset, tokenizer, CONTEXT_LENGTH)["input_ids"][:])
        for split, dataset in documents.items()
    }
    model = build_model(tokenizer, **SHAPES[options.shape])
    recipe = Recipe(
        max_minutes=options.max_minutes, warmup_fraction=1 / 40, steps=options.steps,
        threads=options.threads, seed=options.seed,
        precision=options.precision, batch_size=options.batch_size,
    )  # fmt: skip
    if options.compile:
        model.compile()  # in place: names of the weights stay
    module = LanguageModeling(model, recipe)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_epochs=-1,
        gradient_clip_val=1.0,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    generator = torch.Generator().manual_seed(options.seed)
    module.started = time.monotonic()
    trainer.fit(
        module,
        DataLoader(
            blocks["train"],
            batch_size=recipe.batch_size,
            shuffle=True,
            drop_last=True,
            generator=generator,
        ),
    )
    rounded = rounded_to_bf16(model.cpu())
    rounded.save_pretrained(options.out)
    model = rounded.float()  # what is saved is what is scored
    tokenizer.save_pretrained(options.out)
    record: dict[str, Any] = {
        "shape": options.shape,
        "parameters": model.num_parameters(),
        "seed": options.seed,
        "minutes": round(module.minutes, 2),
        "steps": trainer.global_step,
        "device": torch.cuda.get_device_name() if options.accelerator == "gpu" else cpu_name(),
        "threads": options.threads,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "tokens_seen": module.num_tokens,
        "corpus": {
            split: {
                "tokens": blocks[split].numel(),
                "digest": corpus_digest(documents[split]),
                "files": [str(file.resolve()) for file in files[split]],
            }
            for split in files
        },
        "perplexity": {
            split: round(math.exp(mean_nll(model, blocks[split][:SCORED_BLOCKS])), 3)
            for split in ("choose", "score")
        },
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    logging.info("perplexity %s after %d tokens", record["perplexity"], module.num_tokens)


if __name__ == "__main__":
    main()

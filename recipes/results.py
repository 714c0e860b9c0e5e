"""The quality table of the README: perplexity of the shipped model, pruned without fine-tuning.

Run, offline, about seven minutes on two CPU cores::

    python recipes/results.py
    python recipes/results.py --ratios 0.3 --score-every 8      # a quick look

Calibrated on windows of the training text, scored on packages that the model was never trained or
calibrated on (`corpus.HELD_OUT`). One calibration serves every column and row. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from benchmark import quiet_down, surroundings
from corpus import corpus_digest, pack, stdlib_documents
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune import prune
from lit_prune.metrics import perplexity_of

ROOT = Path(__file__).resolve().parents[1]
CONTEXT_LENGTH = 512
VARIANTS = {
    "`paper`": {},
    "`paper`, KV groups and channels only": {"granularities": ("kv_group", "channel")},
    "greedy search instead": {"allocator": "greedy"},
    "uniform ratio instead": {"allocator": "uniform"},
    "`paper` without compensation": {"compensation": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--rows", type=int, default=128, help="windows of calibration text")
    parser.add_argument("--score-every", type=int, default=2, help="score every n-th window")
    parser.add_argument("--seed", type=int, default=0, help="which windows calibrate")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "python-4.8m")
    options = parser.parse_args()
    quiet_down()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    documents = {split: stdlib_documents(split) for split in ("train", "score")}
    train, score = (
        pack(text, tokenizer, CONTEXT_LENGTH).with_format("torch") for text in documents.values()
    )
    score = score.select(range(0, len(score), options.score_every))
    calibration_rows = train.shuffle(seed=options.seed).select(range(options.rows))
    score_batches = DataLoader(score, batch_size=8)

    calibration = prune(
        model,
        DataLoader(calibration_rows, batch_size=8),
        pruning_ratio=0.3,
        dry_run=True,
        latency_prompt_tokens=0,
    ).calibration
    dense = perplexity_of(model, score_batches)

    print("| removed | " + " | ".join(VARIANTS) + " |")
    print("|---:|" + "---:|" * len(VARIANTS))
    print(f"| 0 % (dense) |{f' {dense.perplexity:.2f} |' * len(VARIANTS)}")
    for ratio in options.ratios:
        cells = []
        for variant in VARIANTS.values():
            pruned = copy.deepcopy(model)
            prune(
                pruned,
                calibration=calibration,
                pruning_ratio=ratio,
                latency_prompt_tokens=0,
                **variant,
            )
            cells.append(f"{perplexity_of(pruned, score_batches).perplexity:.2f}")
        print(f"| {ratio:.0%} | " + " | ".join(cells) + " |", flush=True)

    around = surroundings()
    print(
        f"\nPerplexity per token (float32), {dense.num_tokens:,} scored tokens in {dense.num_rows} "
        f"windows of {CONTEXT_LENGTH}, no overlap, of the held-out packages "
        f"({corpus_digest(documents['score'])[:12]}). Calibrated on "
        f"{calibration.num_tokens:,} tokens of the training text ({calibration.data_digest[:12]}), "
        f"seed {options.seed}. `{around['command']}`, commit {around['commit']}, {around['cpu']}, "
        f"{around['threads']} threads, Python {around['python']}, torch {around['torch']}, "
        f"transformers {around['transformers']}, {time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    main()

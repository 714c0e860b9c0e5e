"""The text of a comparison: what is calibrated on, what is scored, and what a bootstrap draws.

Scored text is cut into windows that never cross a document. What a bootstrap draws are documents;
where there are fewer than twenty (novels), stretches of 2,048 tokens of them, or single windows.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from corpus import fine_tuning_documents, pack, stdlib_documents
from datasets import Dataset, concatenate_datasets
from published import SOURCES, joined_tokens, random_windows, whole_windows

from lit_prune.calibration import Row, RowSet

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

FEWEST_DOCUMENTS = 20
STRETCH = 2048
# Of a larger corpus one random stretch of each document is tokenized: 128 rows are wanted.
MOST_CHARACTERS = 4_000_000


def digest_of(windows: Iterable[torch.Tensor]) -> str:
    """Return 16 hexadecimal digits that equal token ids share."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Scored:
    """Windows of token ids; a bootstrap draws those of one ``owner`` together."""

    name: str
    windows: list[torch.Tensor]
    owner: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)

    def describe(self) -> dict[str, Any]:
        """Say what was scored; equal descriptions are equal text."""
        return {
            "text": self.name,
            "tokens": self.num_tokens,
            "drawn_by_bootstrap": len(set(self.owner)),
            "digest": digest_of(self.windows),
        }


@dataclass(frozen=True)
class Texts:
    """All that a comparison reads.

    Attributes:
        trained_on: What is calibrated on, in words.
        blocks: To calibrate on: ``[rows, tokens]``, or one text ``[tokens]`` of which any stretch
            of ``context`` tokens may be a row.
        main: Text to score.
        other: Text of another kind to score.
        context: Tokens of a row.
    """

    trained_on: str
    blocks: torch.Tensor
    main: Scored
    other: Scored | None
    context: int

    def rows(self, seed: int, count: int) -> RowSet:
        """Draw a calibration set."""
        if self.blocks.ndim == 1:
            return RowSet.of(map(Row.of, random_windows(self.blocks, self.context, count, seed)))
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(seed))
        return RowSet.of(Row.of(self.blocks[i]) for i in order[:count])

    @property
    def window(self) -> torch.Tensor:
        """One row, ``[1, tokens]``, to measure on."""
        return self.blocks.reshape(-1)[: self.context][None]

    def describe(self) -> dict[str, Any]:
        return {
            "calibrated_on": self.trained_on,
            "calibration_digest": digest_of([self.blocks]),
            "scored": self.main.describe(),
            "other": self.other and self.other.describe(),
        }


def read_files(files: list[Path]) -> Dataset:
    """Return one document for each file; of a ``.jsonl`` file, the ``text`` of each line."""
    found: dict[str, list[str]] = {"path": [], "text": []}
    for file in sorted(files):
        whole = file.read_text(encoding="utf-8", errors="replace")
        lines = whole.splitlines() if file.suffix == ".jsonl" else []
        texts = [json.loads(line)["text"] for line in lines] or [whole]
        found["text"] += texts
        found["path"] += [file.name] * len(texts)
    return Dataset.from_dict(found)


def shortened(text: Dataset, most: int = MOST_CHARACTERS) -> Dataset:
    """Keep one random stretch of each document, so that all together have ``most`` characters."""
    total = sum(map(len, text["text"]))
    if total <= most:
        return text
    draw, kept = random.Random(0), []
    for document in text["text"]:
        length = len(document) * most // total
        start = draw.randint(0, len(document) - length)
        kept.append(document[start : start + length])
    return Dataset.from_dict({"path": text["path"][:], "text": kept})


def scored_windows(name: str, text: Dataset, tokenizer: Any, context: int, most: int) -> Scored:
    """Cut each document into windows of its own, evenly spaced ones if there are too many."""
    windows, owner = [], []
    for number, document in enumerate(text["text"]):
        ids = torch.tensor(tokenizer.encode(document, verbose=False))  # as its model knows texts
        for index, window in enumerate(ids.split(context)):
            if len(window) > context // 4:  # a short tail has little context
                windows.append(window)
                owner.append((number, index * context // STRETCH))
    step = max(1, -(-sum(len(w) for w in windows) // most))
    windows, owner = windows[::step], owner[::step]
    drawn = [number for number, _ in owner]
    if len(set(drawn)) < FEWEST_DOCUMENTS:
        stretches = {stretch: i for i, stretch in enumerate(dict.fromkeys(owner))}
        drawn = [stretches[stretch] for stretch in owner]
    if len(set(drawn)) < FEWEST_DOCUMENTS:
        drawn = list(range(len(windows)))
    if len(windows) < 2:
        raise SystemExit(f"{name}: {len(windows)} window of {context} tokens; no interval can be.")
    return Scored(name, windows, drawn)


def read_texts(options: argparse.Namespace, tokenizer: Any) -> Texts:
    """Read what the options name; by default the standard library and Python's help topics."""
    if getattr(options, "data", None):
        return _published(options, tokenizer)
    train_name, train = "standard library, train", None
    test_name, test = f"standard library, {options.split}", None
    if options.text_of:
        record = json.loads((options.text_of / "training.json").read_text())["corpus"]
        files = {split: [Path(file) for file in record[split]["files"]] for split in record}
        train_name, train = f"training files of {options.text_of.name}", files["train"]
        test_name, test = f"{options.split} files of {options.text_of.name}", files[options.split]
    if options.train:
        train_name, train = _names(options.train), options.train
    if options.test:
        test_name, test = _names(options.test), options.test
    calibration = shortened(read_files(train)) if train else stdlib_documents("train")
    blocks = pack(calibration, tokenizer, options.context)["input_ids"][:]
    scored = read_files(test) if test else stdlib_documents(options.split)
    return Texts(
        train_name,
        torch.tensor(blocks),
        scored_windows(test_name, scored, tokenizer, options.context, options.score_tokens),
        _other(options, tokenizer),
        options.context,
    )


def _published(options: argparse.Namespace, tokenizer: Any) -> Texts:
    """Read by the published protocol; a window is what a bootstrap draws."""
    local = dict(pair.split("=", 1) for pair in options.data_files)
    if strange := sorted(set(local) - {"train", "test"}):
        raise SystemExit(f"--data-files: {strange[0]!r} is neither train nor test.")
    train = joined_tokens(options.data, "train", tokenizer, local.get("train"))

    def scored(name: str, file: str | None = None) -> Scored:
        tokens = joined_tokens(name, "test", tokenizer, file)
        most = min(SOURCES[name].windows, options.score_tokens // options.context)
        windows = whole_windows(tokens, options.context, most)
        return Scored(Path(file).name if file else f"{name}, test", windows, [*range(len(windows))])

    other = _other(options, tokenizer) if options.other else None
    if options.other_data:
        other = scored(options.other_data)
    main = scored(options.data, local.get("test"))
    name = Path(local["train"]).name if "train" in local else f"{options.data}, train"
    return Texts(name, train, main, other, options.context)


def _other(options: argparse.Namespace, tokenizer: Any) -> Scored | None:
    if not options.other_tokens:
        return None
    if options.other:
        name, text = _names(options.other), read_files(options.other)
    else:
        name = "Python's help topics"
        splits = ("test", "validation")
        text = concatenate_datasets([fine_tuning_documents(split) for split in splits])
    return scored_windows(name, text, tokenizer, options.context, options.other_tokens)


def _names(files: list[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

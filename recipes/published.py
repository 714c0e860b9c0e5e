"""The published protocol's text: WikiText2, C4 and PTB through `datasets`, in whole windows.

Not run offline: names and files on the Hub are as their authors and the public code of the papers
have them, and were not loaded here. What happens after loading was run, on local files in their
place (``--data-files train=... test=...``).

- ``wikitext2``: train and test split, lines joined by a blank line.
- ``c4``: the first shard of ``en``; of the validation shard, the first 1,100 documents joined by a
  space, of which 256 windows are scored.
- ``ptb``: train and test split, sentences joined by a space.

Calibrated on random windows of the joined train text, scored on all windows of the joined test
text one after the other; what fills no window is left out. Special tokens are the tokenizer's own:
with most, one at the very beginning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, load_dataset

if TYPE_CHECKING:
    from collections.abc import Mapping

LOCAL = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # the rest is text, by lines
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"


@dataclass(frozen=True)
class Source:
    """Where a corpus is, and how its samples become one text."""

    path: str
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    column: str = "text"
    joint: str = "\n\n"
    first: int | None = None
    windows: int = 10**9
    common: Mapping[str, Any] = field(default_factory=dict)


SOURCES = {
    "wikitext2": Source(
        "Salesforce/wikitext",
        {"split": "train"},
        {"split": "test"},
        common={"name": "wikitext-2-raw-v1"},
    ),
    "c4": Source(
        "allenai/c4",
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
        {
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        joint=" ",
        first=1100,
        windows=256,
    ),
    "ptb": Source(
        "parquet",
        {"data_files": {"train": f"{_PTB}/train/*.parquet"}, "split": "train"},
        {"data_files": {"test": f"{_PTB}/test/*.parquet"}, "split": "test"},
        column="sentence",
        joint=" ",
    ),
}


def joined_tokens(name: str, side: str, tokenizer: Any, local: str | None = None) -> torch.Tensor:
    """Return the token ids of one side of a corpus, as one text.

    Args:
        name: Key of `SOURCES`.
        side: ``train`` or ``test``.
        tokenizer: Of the model.
        local: A file to read in place of the Hub's.
    """
    source = SOURCES[name]
    if local:
        suffix = "." + local.rsplit(".", 1)[-1]
        kind, column = LOCAL.get(suffix, "text"), "text"
        samples = load_dataset(kind, data_files={side: local}, split=side)
    else:
        options = source.train if side == "train" else source.test
        samples, column = load_dataset(source.path, **source.common, **options), source.column
    return _joined(samples, column, source, side, tokenizer)


def _joined(
    samples: Dataset, column: str, source: Source, side: str, tokenizer: Any
) -> torch.Tensor:
    if side == "test" and source.first:
        samples = samples.select(range(min(source.first, len(samples))))
    elif side == "train" and len(samples) > 50_000:  # far more than 128 windows are drawn from
        samples = samples.shuffle(seed=0).select(range(50_000))
    text = source.joint.join(samples[column])
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def whole_windows(tokens: torch.Tensor, context: int, most: int) -> list[torch.Tensor]:
    """Cut one text into windows, the first ``most`` of them.

    Raises:
        SystemExit: If it does not fill two.
    """
    windows = [window for window in tokens.split(context) if len(window) == context][:most]
    if len(windows) < 2:
        raise SystemExit(f"{len(tokens)} tokens do not fill two windows of {context}.")
    return windows


def random_windows(tokens: torch.Tensor, context: int, count: int, seed: int) -> torch.Tensor:
    """Return ``[count, context]`` windows that start anywhere in one text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - context + 1, (count,), generator=generator)
    return torch.stack([tokens[start : start + context] for start in starts.tolist()])

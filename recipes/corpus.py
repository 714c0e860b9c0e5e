"""The text of the shipped model, its demo and the benchmark, from the running Python; no network.

Two corpora, both part of every CPython (PSF licence): the standard library's own sources
(`stdlib_documents`), on which the shipped model was trained, and the help texts of
``pydoc_data.topics`` (`fine_tuning_documents`), which that model has never seen. Their contents
follow the running Python's version; `corpus_digest` tells one from another.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

Split = Literal["train", "choose", "score"]
FineTuningSplit = Literal["train", "validation", "test"]

# Whole packages or modules, by the first part of their path without ".py": none of their files is
# ever trained on. "choose" is for decisions, "score" only for numbers that are reported.
HELD_OUT: dict[str, frozenset[str]] = {
    "choose": frozenset(
        {
            "json",
            "optparse",
            "subprocess",
            "tomllib",
            "wsgiref",
            "heapq",
            "textwrap",
            "ftplib",
            "calendar",
        }
    ),
    "score": frozenset(
        {
            "argparse",
            "email",
            "csv",
            "pathlib",
            "queue",
            "random",
            "shutil",
            "statistics",
            "zoneinfo",
        }
    ),
}
LEFT_OUT_PACKAGES = frozenset({"site-packages", "dist-packages", "pydoc_data", "test"})
TEST_FOLDERS = frozenset({"test", "tests", "testing", "idle_test"})
SMALLEST_DOCUMENT_BYTES = 200


def stdlib_documents(split: Split) -> Dataset:
    """Return one split of the running Python's standard library sources, sorted by path.

    Left out: tests, installed packages, ``pydoc_data`` (the fine-tuning text), generated files,
    files under 200 bytes, and copies: of equal files the first one is kept, in the score split
    before choose before train, so that no split shares a document with another.

    Args:
        split: ``"train"``, ``"choose"`` or ``"score"``; `HELD_OUT` has the last two.

    Returns:
        Columns ``path`` (relative to the standard library, with ``/``) and ``text``.

    Raises:
        ValueError: If ``split`` is not one of the three names.
    """
    splits = ("score", "choose", "train")
    if split not in splits:
        raise ValueError(f"split must be one of {sorted(splits)}, got {split!r}.")
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = sorted(_python_sources(root))
    seen: set[str] = set()
    for name in splits:
        chosen = [(path, text) for path, text in documents if _split_of(path) == name]
        kept = []
        for path, text in chosen:
            digest = _sha256(text)
            if digest not in seen:
                seen.add(digest)
                kept.append((path, text))
        if name == split:
            break
    return _as_dataset(kept)


def fine_tuning_documents(split: FineTuningSplit) -> Dataset:
    """Return one split of Python's own help topics (``pydoc_data.topics``), sorted by topic name.

    The hash of a topic's text decides its split (about 80 % train, 10 % validation, 10 % test), so
    a text listed under two names counts once, and an edited topic does not move the others.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        Columns ``path`` (``pydoc_data.topics/<topic>``) and ``text``.

    Raises:
        ValueError: If ``split`` is not one of the three names.
    """
    by_bucket = dict.fromkeys(range(8), "train") | {8: "validation", 9: "test"}
    if split not in by_bucket.values():
        raise ValueError(f"split must be one of {sorted(set(by_bucket.values()))}, got {split!r}.")
    from pydoc_data.topics import topics  # 700 kB of literals: imported only where they are used

    kept: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name, text in sorted(topics.items()):
        digest = _sha256(text)
        if digest not in seen and by_bucket[int(digest, 16) % 10] == split:
            seen.add(digest)
            kept.append((f"pydoc_data.topics/{name}", text))
    return _as_dataset(kept)


def corpus_digest(dataset: Dataset) -> str:
    """Return the sha256 over paths and texts, in order; equal digests mean equal documents.

    Args:
        dataset: Documents with columns ``path`` and ``text``.
    """
    digest = hashlib.sha256()
    for path, text in zip(dataset["path"], dataset["text"], strict=True):
        for part in (path.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "big"))  # lengths first: no two lists read the same
            digest.update(part)
    return digest.hexdigest()


def pack(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Dataset:
    """Tokenize documents, join them, cut into full blocks.

    Args:
        dataset: Documents with a column ``text``.
        tokenizer: Tokenizer with an ``eos_token_id``, which ends each document, unless the
            tokenizer itself begins each one with its ``bos_token_id``.
        context_length: Tokens per block; the tail that fills no block is dropped.

    Returns:
        Column ``input_ids``, each ``[context_length]``.

    Raises:
        ValueError: If ``context_length`` is not positive, the tokenizer has no end-of-text token or
            the documents do not fill one block.
    """
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1 token, got {context_length}.")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; documents could not be told apart.")
    stream: list[int] = []
    for text in dataset["text"]:
        ids = tokenizer.encode(text, verbose=False)
        stream += ids
        # a tokenizer that opens every document itself has told them apart
        if not ids or ids[0] != tokenizer.bos_token_id:
            stream.append(tokenizer.eos_token_id)
    starts = range(0, len(stream) - context_length + 1, context_length)
    if not starts:
        raise ValueError(f"{len(stream)} tokens do not fill one block of {context_length}.")
    return Dataset.from_dict(
        {"input_ids": [stream[start : start + context_length] for start in starts]}
    )


def _python_sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(path, text)`` of each source that belongs to the corpus, in no particular order."""
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        if (
            path.parts[0] in LEFT_OUT_PACKAGES
            or TEST_FOLDERS & set(path.parts)
            or _is_generated(path)
        ):
            continue
        raw = file.read_bytes()
        if len(raw) < SMALLEST_DOCUMENT_BYTES:
            continue
        try:
            text = raw.decode()
        except (
            UnicodeDecodeError
        ):  # a few sources declare another encoding; they are not worth a detector
            continue
        yield path.as_posix(), text


def _is_generated(path: Path) -> bool:
    """Tell tables that a program wrote: character maps, build settings, platform constants."""
    if path.parts[0] == "encodings":
        # Each charmap codec is the same 40 lines around a table; the hand-written codecs remain.
        return path.stem not in {
            "__init__",
            "aliases",
            "idna",
            "punycode",
            "utf_8_sig",
            "utf_16",
            "utf_32",
        }
    return path.parts[0].startswith(("_sysconfigdata", "config-")) or path.name in {
        "_casefix.py",
        "keysyms.py",
        "topics.py",
    }


def _split_of(path: str) -> str:
    top = path.split("/", maxsplit=1)[0].removesuffix(".py")
    return next((split for split, packages in HELD_OUT.items() if top in packages), "train")


def _as_dataset(documents: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_dict(
        {"path": [path for path, _ in documents], "text": [text for _, text in documents]}
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

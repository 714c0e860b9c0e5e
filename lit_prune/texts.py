"""Text from where people have it, as windows of token ids: files, folders, names of `datasets`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.decoder import IGNORED_LABEL
from lit_prune.errors import ArtifactError, CalibrationError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Window:
    """One sample.

    Attributes:
        ids: Token ids.
        labels: The same, `IGNORED_LABEL` where a token is prompt only.
    """

    ids: list[int]
    labels: list[int]


class Padded:
    """Stack windows: ``input_ids``, ``attention_mask`` and ``labels``, padded on the right.

    Example:
        >>> batch = Padded()([Window([5, 6, 7], [-100, 6, 7]), Window([8], [8])])
        >>> batch["labels"].tolist()
        [[-100, 6, 7], [8, -100, -100]]
    """

    def __call__(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        """Return the batch, each ``[windows, tokens]``, int64."""
        most = max(len(window.ids) for window in windows)
        batch = {
            "input_ids": torch.zeros(len(windows), most, dtype=torch.int64),
            "attention_mask": torch.zeros(len(windows), most, dtype=torch.int64),
            "labels": torch.full((len(windows), most), IGNORED_LABEL),
        }
        for row, window in enumerate(windows):
            length = len(window.ids)
            batch["input_ids"][row, :length] = torch.tensor(window.ids)
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.tensor(window.labels)
        return batch


def read_documents(
    source: str | Path, *, split: str = "train", column: str = "text"
) -> list[dict[str, Any]]:
    """Read documents; each is a mapping with ``text``, ``messages``, or ``prompt``/``completion``.

    Args:
        source: A text file (one document), a ``.jsonl`` file (one on each line), a directory (its
            files, all levels, sorted), or the name of a data set of the `datasets` library,
            ``name`` or ``name:config``, which may open the network.
        split: Of a data set by name.
        column: Where text is found in ``.jsonl`` lines and data sets that have no chats.

    Raises:
        ArtifactError: If it does not exist, or cannot be read.
        CalibrationError: If there is no text in it.
    """
    path = Path(source)
    if path.is_file():
        documents = list(_file(path, column))
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
        documents = [document for file in files for document in _file(file, column, lenient=True)]
    elif _looks_like_a_path(source):
        raise ArtifactError(f"{source}: there is no such file or directory.")
    else:
        documents = list(_named(str(source), split, column))
    if not any(_characters(document) for document in documents):
        raise CalibrationError(f"{source} holds no text: give another file, or another column.")
    return documents


def windows_of(
    documents: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    packing: bool = True,
) -> list[Window]:
    """Tokenize documents and cut them into windows of at most ``context_length`` tokens.

    Args:
        documents: As `read_documents` returns them.
        tokenizer: Of the model. Chats need its chat template.
        context_length: Tokens of a window, at most.
        packing: Join documents, an end token between them, and cut full windows (a last one, of at
            least two tokens, may be shorter). Without: each document is cut on its own.

    Raises:
        ConfigError: If the tokenizer lacks what the documents need.
        CalibrationError: If nothing is left.
    """
    if context_length < 2:
        raise ConfigError(f"context_length must be at least 2 tokens, got {context_length}.")
    pieces = [tokenized(document, tokenizer) for document in documents]
    if packing:
        ids = [token for piece in pieces for token in piece.ids]
        pieces = [Window(ids, [label for piece in pieces for label in piece.labels])]
    windows = [
        Window(piece.ids[start:end], piece.labels[start:end])
        for piece in pieces
        for start in range(0, len(piece.ids), context_length)
        for end in (start + context_length,)
    ]
    windows = [window for window in windows if any(x != IGNORED_LABEL for x in window.labels[1:])]
    if not windows:
        raise CalibrationError("the text has no token to predict: give more of it.")
    return windows


def tokenized(document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Window:
    """Return the tokens of one document; the prompt of an answer is not to be predicted.

    Of ``messages`` the last is the answer, all before it the prompt, written by the tokenizer's
    chat template. A plain text ends with the tokenizer's end token.

    Raises:
        ConfigError: If there is no chat template for a chat, or it does not begin an answered chat
            as it does the prompt.
    """
    if "messages" in document:
        prompt, whole = _chat(document["messages"], tokenizer)
    elif "completion" in document:
        prompt = tokenizer.encode(document["prompt"], verbose=False)
        rest = tokenizer.encode(document["completion"], add_special_tokens=False, verbose=False)
        whole = [*prompt, *rest, *_end(tokenizer, [])]
    else:
        prompt, whole = [], tokenizer.encode(document["text"], verbose=False)
        whole = [*whole, *_end(tokenizer, whole)]
    return Window(whole, [IGNORED_LABEL] * len(prompt) + whole[len(prompt) :])


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return the end token, unless the tokenizer tells documents apart by itself."""
    opened = bool(ids) and ids[0] == tokenizer.bos_token_id
    closed = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return [] if opened or closed or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _chat(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise ConfigError(
            "the text holds chats (messages), and this tokenizer has no chat template: set "
            "tokenizer.chat_template, or give prompt and completion."
        )

    def ids(part: list[dict[str, str]], **options: Any) -> list[int]:
        text = tokenizer.apply_chat_template(part, tokenize=False, **options)
        return list(tokenizer.encode(str(text), add_special_tokens=False, verbose=False))

    prompt, whole = ids(messages[:-1], add_generation_prompt=True), ids(messages)
    if whole[: len(prompt)] != prompt:
        raise ConfigError(
            "the chat template does not begin an answered chat as it begins its prompt: where the "
            "answer starts cannot be told. Give prompt and completion."
        )
    return prompt, whole


def _file(path: Path, column: str, *, lenient: bool = False) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if lenient:  # pictures beside the text
            return
        raise ArtifactError(f"{path} is no text in UTF-8 ({error.reason}).") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    if path.suffix != ".jsonl":
        yield {"text": text}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield _document(json.loads(line), column)
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{path}, line {number}: expected a JSON object with {column!r}, 'messages', "
                    f"or 'prompt' and 'completion' ({error})."
                ) from error


def _named(name: str, split: str, column: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    dataset, _, config = name.partition(":")
    try:
        found = load_dataset(dataset, config or None, split=split)
    except Exception as error:  # what `datasets` raises is many things
        raise ArtifactError(
            f"{name!r} is no file or directory here, and `datasets` could not load it: "
            f"{' '.join(str(error).split()):.200}. Offline, give a local file or directory."
        ) from error
    for number, row in enumerate(found):
        try:
            yield _document(row, column)
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"row {number} of {name} ({split}) has the columns {sorted(row)}, expected "
                f"{column!r}, 'messages', or 'prompt' and 'completion': name another column."
            ) from error


def _document(row: dict[str, Any], column: str) -> dict[str, Any]:
    if column in row:
        if not isinstance(row[column], str):
            raise TypeError(f"{column!r} is no text")
        return {"text": row[column]}
    if "messages" in row:
        turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"]]
        if not turns:
            raise TypeError("messages is empty")
        return {"messages": turns}
    return {"prompt": str(row["prompt"]), "completion": str(row["completion"])}


def _characters(document: Mapping[str, Any]) -> bool:
    if "messages" in document:
        return True
    return bool((document.get("text") or document.get("completion") or "").strip())


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.relative_to(root).parts)


def _looks_like_a_path(source: str | Path) -> bool:
    """Whether a source that is not there is a path: names have at most one slash and no suffix."""
    text = str(source)
    return (
        isinstance(source, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or Path(text).suffix in (".txt", ".jsonl", ".json", ".md", ".py", ".csv", ".parquet")
    )

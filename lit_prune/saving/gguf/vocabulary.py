"""A Hugging Face tokenizer in the terms of llama.cpp, where that splits text in the same way.

llama.cpp has its own code for every way of splitting text into words, chosen by name. A name that
is only nearly right gives other tokens, and a model that is quietly worse. So only splits that are
known exactly get one; with any other tokenizer the file takes token ids, and the tokenizer lies
beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{_REST}": "qwen2",
}
_SPACE = "\u2581"  # SentencePiece's mark of a space


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What goes into ``tokenizer.ggml``.

    Attributes:
        kind: ``gpt2`` (byte-level), ``llama`` (SentencePiece), or ``none``: token ids only.
        reason: Why ids only, a clause; else empty.
        split: Name of the way that text is split, of ``gpt2``.
        tokens: By id; only as many as the tokenizer knows.
        types: ``gguf.TokenType`` of each.
        scores: Of ``llama``: what merges first.
        merges: Of ``gpt2``.
    """

    kind: str
    reason: str = ""
    split: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase | None) -> Vocabulary:
    """Translate a tokenizer.

    Example:
        >>> vocabulary_of(None).reason
        'no tokenizer was given'
    """
    if tokenizer is None:
        return Vocabulary(kind="none", reason="no tokenizer was given")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Vocabulary(kind="none", reason="the tokenizer has no tokenizers backend")
    whole = json.loads(backend.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        return Vocabulary(kind="none", reason=f"its tokenizer is of type {model['type']}")
    tokens, types = _tokens(whole)
    if len(set(tokens)) != len(tokens):
        return Vocabulary(kind="none", reason="two ids of its tokenizer mean the same text")
    if _is_sentencepiece(whole):
        return Vocabulary(
            kind="llama",
            tokens=tokens,
            types=types,
            # SentencePiece numbers its pieces by rank: the first merges first
            scores=tuple(-float(index) for index in range(len(tokens))),
        )
    split = _split_name(whole)
    if split is None:
        return Vocabulary(
            kind="none", reason="llama.cpp has no name for how its tokenizer splits text"
        )
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    if not merges:
        return Vocabulary(kind="none", reason="its tokenizer has no merges")
    return Vocabulary(kind="gpt2", split=split, tokens=tokens, types=types, merges=merges)


def write_vocabulary(
    writer: Any,  # noqa: ANN401 - optional package
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
) -> None:
    """Write the keys of ``tokenizer.ggml``, padded to the rows of the embeddings."""
    from gguf import TokenType

    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    writer.add_vocab_size(rows)
    if vocabulary.kind == "none":
        writer.add_tokenizer_model("none")
        return
    missing = range(len(vocabulary.tokens), rows)
    writer.add_tokenizer_model(vocabulary.kind)
    if vocabulary.split:
        writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list([*vocabulary.tokens, *(f"[PAD{index}]" for index in missing)])
    writer.add_token_types([*vocabulary.types, *[int(TokenType.UNUSED)] * len(missing)])
    if vocabulary.scores:
        writer.add_token_scores([*vocabulary.scores, *[-float(rows)] * len(missing)])
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    assert tokenizer is not None  # noqa: S101 - a vocabulary with tokens came from one
    for name in ("bos", "eos", "unk", "pad"):
        identity = getattr(tokenizer, f"{name}_token_id", None)
        if identity is not None:
            getattr(writer, f"add_{name}_token_id")(int(identity))
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id])
    writer.add_add_space_prefix(vocabulary.kind == "llama")
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _tokens(whole: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    from gguf import TokenType

    named: dict[int, str] = {index: token for token, index in whole["model"]["vocab"].items()}
    types = dict.fromkeys(named, TokenType.NORMAL)
    unknown = whole["model"].get("unk_token")
    for index, token in named.items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = TokenType.BYTE
    for added in whole["added_tokens"]:
        named[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    for index, token in named.items():
        if token == unknown:
            types[index] = TokenType.UNKNOWN
    size = max(named) + 1
    tokens = tuple(named.get(index, f"[PAD{index}]") for index in range(size))
    return tokens, tuple(int(types.get(index, TokenType.UNUSED)) for index in range(size))


def _is_sentencepiece(whole: dict[str, Any]) -> bool:
    """Whether it marks spaces and falls back to bytes as Llama 2's tokenizer does."""
    if not whole["model"].get("byte_fallback"):
        return False
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    old = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": _SPACE}, mark],
    }
    if whole["pre_tokenizer"] is None:
        return bool(whole["normalizer"] == old)
    metaspace = whole["pre_tokenizer"]
    return bool(
        whole["normalizer"] is None
        and metaspace.get("type") == "Metaspace"
        and metaspace.get("replacement") == _SPACE
        and metaspace.get("prepend_scheme") in ("first", "always")
    )


def _split_name(whole: dict[str, Any]) -> str | None:
    """Return the name of a byte-level split, or None where it is none of those known."""
    if (whole["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return None
    steps = whole["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return "gpt-2" if last.get("use_regex") else None
    if len(before) > 1:
        return None
    if before[0] == {"type": "Digits", "individual_digits": True}:
        return "smollm" if last.get("use_regex") else None
    pattern = before[0].get("pattern", {}).get("Regex")
    isolated = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
    return None if last.get("use_regex") or not isolated else _SPLITS.get(str(pattern))

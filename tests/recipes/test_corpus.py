"""The shipped model's text: splits share nothing, tests are left out, packing is exact."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import corpus

SPLITS = ("train", "choose", "score")
FINE_TUNING_SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def stdlib():
    return {split: corpus.stdlib_documents(split) for split in SPLITS}


@pytest.fixture(scope="module")
def fine_tuning():
    return {split: corpus.fine_tuning_documents(split) for split in FINE_TUNING_SPLITS}


@pytest.fixture
def byte_tokenizer():
    """One token per byte plus an end-of-text token: its token counts can be computed by hand."""
    vocabulary = {
        letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("column", ["path", "text"])
@pytest.mark.parametrize("documents", ["stdlib", "fine_tuning"])
def test_splits_are_disjoint(documents, column, request):
    values = [
        value for split in request.getfixturevalue(documents).values() for value in split[column]
    ]
    assert len(values) == len(set(values))


def test_held_out_shares_are_as_stated(stdlib):
    size = {
        split: sum(len(text.encode()) for text in documents["text"])
        for split, documents in stdlib.items()
    }
    # Wide bounds: a package may move or shrink between Python versions.
    assert 0.02 < size["choose"] / sum(size.values()) < 0.08
    assert 0.04 < size["score"] / sum(size.values()) < 0.12


def test_held_out_packages_are_whole(stdlib):
    assert not [
        path for path in stdlib["train"]["path"] if path.startswith(("email/", "json/", "argparse"))
    ]
    assert "json/decoder.py" in stdlib["choose"]["path"]
    assert "argparse.py" in stdlib["score"]["path"]


def test_tests_and_installed_packages_are_left_out(stdlib):
    parts = {
        part for split in stdlib.values() for path in split["path"] for part in path.split("/")
    }
    assert not parts & {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    assert not {part for part in parts if part.startswith("test_")}


def test_generated_tables_are_left_out(stdlib):
    paths = set(stdlib["train"]["path"])
    assert "encodings/cp437.py" not in paths
    assert "encodings/idna.py" in paths


def test_documents_are_sorted_and_long_enough(stdlib):
    for documents in stdlib.values():
        assert documents["path"] == sorted(documents["path"])
        assert (
            min(len(text.encode()) for text in documents["text"]) >= corpus.SMALLEST_DOCUMENT_BYTES
        )


def test_digest_is_the_same_on_a_second_reading(stdlib):
    assert corpus.corpus_digest(corpus.stdlib_documents("choose")) == corpus.corpus_digest(
        stdlib["choose"]
    )


def test_digest_tells_splits_and_order_apart(stdlib):
    choose = stdlib["choose"]
    reordered = choose.select(range(len(choose) - 1, -1, -1))
    digests = {corpus.corpus_digest(dataset) for dataset in (choose, reordered, stdlib["score"])}
    assert len(digests) == 3


@pytest.mark.parametrize("read", [corpus.stdlib_documents, corpus.fine_tuning_documents])
def test_unknown_split_is_refused(read):
    with pytest.raises(ValueError, match="split must be one of"):
        read("holdout")


def test_pack_cuts_the_joined_stream(byte_tokenizer):
    documents = corpus.Dataset.from_dict({"path": ["a", "b"], "text": ["x = 1", "y = 22"]})
    blocks = corpus.pack(documents, byte_tokenizer, context_length=4)
    # 5 + eos + 6 + eos = 13 tokens: three blocks, one token dropped
    assert [len(block) for block in blocks["input_ids"]] == [4, 4, 4]
    eos = byte_tokenizer.eos_token_id
    stream = [token for block in blocks["input_ids"] for token in block]
    assert [index for index, token in enumerate(stream) if token == eos] == [5]
    assert byte_tokenizer.decode(stream) == "x = 1<|endoftext|>y = 22"


def test_pack_refuses_text_that_fills_no_block(byte_tokenizer):
    documents = corpus.Dataset.from_dict({"path": ["a"], "text": ["x"]})
    with pytest.raises(ValueError, match="2 tokens do not fill one block of 4"):
        corpus.pack(documents, byte_tokenizer, context_length=4)


def test_pack_refuses_no_context(byte_tokenizer):
    with pytest.raises(ValueError, match="context_length"):
        corpus.pack(corpus.Dataset.from_dict({"text": ["x"]}), byte_tokenizer, context_length=0)

"""Text in, windows out: what is predicted is the text, or the answer alone."""

import json

import pytest
from transformers import AutoTokenizer

from lit_prune.decoder import IGNORED_LABEL
from lit_prune.errors import ArtifactError, CalibrationError, ConfigError
from lit_prune.texts import read_documents, tokenized, windows_of
from tests.recipes.conftest import SHIPPED

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def test_files_lines_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "then"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".hidden").write_text("no")
    assert [d["text"] for d in read_documents(tmp_path)] == ["first", "then", "second"]
    assert read_documents(tmp_path / "b.txt") == [{"text": "second"}]
    lines = [{"body": "x", "n": 1}, {"body": "y", "n": 2}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert [d["text"] for d in read_documents(tmp_path / "c.jsonl", column="body")] == ["x", "y"]


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        read_documents(tmp_path / "none")
    (tmp_path / "bad.jsonl").write_text("[]\n")
    with pytest.raises(ArtifactError, match=r"bad\.jsonl, line 1"):
        read_documents(tmp_path / "bad.jsonl")
    with pytest.raises(CalibrationError, match="holds no text"):
        read_documents(_file(tmp_path / "empty.txt", ""))


def _file(path, text):
    path.write_text(text)
    return path


def test_packing_loses_no_token_and_ends_documents(tokenizer):
    documents = [{"text": "import os"}, {"text": "x = 1\n" * 9}]
    windows = windows_of(documents, tokenizer, 8)
    ids = [token for window in windows for token in window.ids]
    wanted = [t for d in documents for t in [*tokenizer.encode(d["text"]), tokenizer.eos_token_id]]
    assert ids == wanted[: len(ids)]
    assert len(wanted) - len(ids) < 2
    assert all(window.ids == window.labels for window in windows)
    apart = windows_of(documents, tokenizer, 8, packing=False)
    assert apart[0].ids == wanted[: len(apart[0].ids)]
    assert apart[0].ids[-1] == tokenizer.eos_token_id


def test_only_the_answer_is_predicted(tokenizer):
    turns = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]
    with pytest.raises(ConfigError, match="no chat template"):
        tokenized({"messages": turns}, tokenizer)
    tokenizer.chat_template = TEMPLATE
    window = tokenized({"messages": turns}, tokenizer)
    answer = [label for label in window.labels if label != IGNORED_LABEL]
    assert tokenizer.decode(answer) == "four</s>"
    assert tokenizer.decode(window.ids) == "<user>two?</s><assistant>four</s>"
    tokenizer.chat_template = None
    window = tokenized({"prompt": "a = ", "completion": "1"}, tokenizer)
    answer = [label for label in window.labels if label != IGNORED_LABEL]
    assert tokenizer.decode(answer[:-1]) == "1"
    assert answer[-1] == tokenizer.eos_token_id


def test_a_window_of_prompt_alone_is_left_out(tokenizer):
    document = {"prompt": "x = 1\n" * 20, "completion": "pass"}
    windows = windows_of([document], tokenizer, 8)
    assert all(any(label != IGNORED_LABEL for label in window.labels[1:]) for window in windows)
    with pytest.raises(ConfigError, match="at least 2"):
        windows_of([document], tokenizer, 1)

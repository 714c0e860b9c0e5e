"""The published protocol on local files, and the bridge to lm-eval on a local task."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import published
import zero_shot

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """`datasets` writes what it reads: here, in this process and in those that it starts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def test_lines_are_joined_as_published(tokenizer, tmp_path):
    lines = [" = A title = ", "", "Some words of the text .", "More of them ."]
    file = tmp_path / "wiki.txt"
    file.write_text("\n".join(lines) + "\n")
    found = published.joined_tokens("wikitext2", "test", tokenizer, str(file))
    assert found.tolist() == tokenizer("\n\n".join(lines))["input_ids"]


def test_c4_takes_its_first_documents(tokenizer, tmp_path):
    documents = [f"document {number}" for number in range(1200)]
    file = tmp_path / "c4.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    found = published.joined_tokens("c4", "test", tokenizer, str(file))
    assert found.tolist() == tokenizer(" ".join(documents[:1100]), verbose=False)["input_ids"]
    whole = published.joined_tokens("c4", "train", tokenizer, str(file))
    assert whole.tolist() == tokenizer(" ".join(documents), verbose=False)["input_ids"]


def test_windows():
    tokens = torch.arange(25)
    assert [w.tolist()[0] for w in published.whole_windows(tokens, 8, 9)] == [0, 8, 16]
    assert len(published.whole_windows(tokens, 8, 2)) == 2
    with pytest.raises(SystemExit, match="do not fill two windows of 16"):
        published.whole_windows(tokens, 16, 9)
    drawn = published.random_windows(tokens, 8, 100, seed=0)
    assert drawn.shape == (100, 8)
    assert (drawn.diff(dim=1) == 1).all()
    assert (drawn.min(), drawn.max()) == (0, 24)
    assert torch.equal(drawn, published.random_windows(tokens, 8, 100, seed=0))
    assert not torch.equal(drawn, published.random_windows(tokens, 8, 100, seed=1))


@pytest.mark.slow
def test_compare_by_the_published_protocol(run_recipe, tiny_checkpoint, tmp_path):
    for name in ("train", "test"):
        lines = "".join(f"{name} line {number} of text .\n" for number in range(200))
        (tmp_path / f"{name}.txt").write_text(lines)
    files = [f"{name}={tmp_path / name}.txt" for name in ("train", "test")]
    out = tmp_path / "found.json"
    arguments = ("--data", "wikitext2", "--data-files", *files, "--context", 64, "--rows", 12)
    stdout = run_recipe(
        "compare.py",
        *("--model", tiny_checkpoint, *arguments, "--methods", "flap", "--ratios", 0.5),
        *("--out", out),
        cwd=tmp_path,
    )
    conditions = json.loads(out.read_text())["conditions"]
    assert conditions["calibrated_on"] == "train.txt"
    assert conditions["scored"]["text"] == "test.txt"
    assert conditions["scored"]["tokens"] == 63 * conditions["scored"]["drawn_by_bootstrap"]
    assert conditions["other"] is None
    assert "| `flap` |" in stdout


def local_task(folder):
    """Two questions whose answers a model cannot miss: the wrong ones are far longer."""
    rows = [
        {"question": "a b", "choices": ["c", "wrong " * 40], "gold": 0},
        {"question": "d e", "choices": ["wrong " * 40, "f"], "gold": 1},
    ]
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(f"""
task: two_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
""")


@needs_lm_eval
@pytest.mark.slow
def test_a_local_task_is_answered_from_the_command_line(run_recipe, tiny_checkpoint, tmp_path):
    local_task(tmp_path)
    arguments = ("--model", tiny_checkpoint, "--tasks", "two_questions", "--task_folder", tmp_path)
    assert "two_questions: 1.0000" in run_recipe("zero_shot.py", *arguments, cwd=tmp_path)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_answered_by_a_model_in_memory(tiny_checkpoint, tokenizer, tmp_path):
    local_task(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    found = zero_shot.accuracies(model, tokenizer, ["two_questions"], folder=tmp_path)
    assert found == {"two_questions": 1.0}


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"pip install \"lit-prune\[eval\]\""):
        zero_shot.accuracies(None, None)


def test_normalised_accuracy_comes_first():
    assert zero_shot._accuracy({"acc,none": 0.1, "acc_norm,none": 0.2}) == 0.2
    assert zero_shot._accuracy({"acc,none": 0.1}) == 0.1

"""The benchmark models: whole files are held out, and what is written is what others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import corpus
import train_benchmark

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_every_twentieth_file_is_held_out_twice():
    files = [Path(f"{number:02}.txt") for number in range(40)]
    found = train_benchmark.split_files(files[::-1])
    assert [file.stem for file in found["choose"]] == ["07", "27"]
    assert [file.stem for file in found["score"]] == ["13", "33"]
    assert len(found["train"]) == 36
    with pytest.raises(SystemExit, match="at least 14 files"):
        train_benchmark.split_files(files[:13])


@pytest.mark.slow
@pytest.mark.parametrize("shape", train_benchmark.SHAPES)
def test_a_model_is_trained_scored_and_read_by_compare(shape, tmp_path):
    texts = corpus.stdlib_documents("train")["text"]
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("\n".join(texts[number::20])[:60_000])
    out, files = tmp_path / "model", sorted(map(str, tmp_path.glob("*.txt")))
    train = [sys.executable, RECIPES / "train_benchmark.py", shape, "--text", *files]
    train += ["--steps", "20", "--threads", "1"]
    for folder in (out, tmp_path / "again"):
        subprocess.run([*train, "--out", folder], check=True, capture_output=True)
    record = json.loads((out / "training.json").read_text())
    held_out = {*record["corpus"]["choose"]["files"], *record["corpus"]["score"]["files"]}
    assert held_out.isdisjoint(record["corpus"]["train"]["files"])
    assert len(held_out) == 2
    assert record["steps"] == 20
    assert record["tokens_seen"] == 20 * 2 * 512
    assert 1 < record["perplexity"]["score"] < 8192
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == record["parameters"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(AutoTokenizer.from_pretrained(out)) <= model.config.vocab_size
    command = [sys.executable, RECIPES / "compare.py", "--model", out, "--text-of", out]
    options = ["--methods", "random", "--ratios", "0.3", "--rows", "16", "--context", "64"]
    options += ["--score-tokens", "512", "--other-tokens", "0", "--out", tmp_path / "found.json"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    assert "random" in (tmp_path / "found.json").read_text()

"""Whatever is wrong ends in one line with the remedy, a status, and nothing half-written."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.cli.conftest import QUICK, refused
from tests.recipes.conftest import ROOT


def test_nothing_and_help_teach(lit_prune):
    run = lit_prune()
    assert run.status == 0
    assert "lit-prune prune --model my-model" in run.out
    run = lit_prune("prune", "--help")
    assert run.status == 0
    assert "lit-prune prune --model org/name" in run.out
    assert "--max_perplexity_increase" in run.out


COMMANDS = ("prune", "plan", "apply", "sweep", "compare", "evaluate", "report", "export")


def test_help_is_there_before_torch():
    code = (
        "import sys; sys.argv[0] = 'lit-prune'; from lit_prune.cli import main; "
        f"bad = main(['--help']) or any(main([x, '--help']) for x in {COMMANDS}) "
        "or main(['prune', '--model', 'M']) != 2; sys.exit(bad or 'torch' in sys.modules)"
    )
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=path, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prun"], ["prune"]),
        (["prune"], ["--model"]),
        (["prune", "--pruning-ration", "0.3"], ["pruning_ration"]),
        (["prune", "--model", "M", "--text", "T", "--to", "X"], ["pruning_ratio is missing"]),
        (
            [
                *("prune", "--model", "M", "--text", "T", "--to", "X"),
                *("--pruning_ratio", "0.3", "--target_bytes", "8GB"),
            ],
            ["pruning_ratio and target_bytes are two targets"],
        ),
        (
            [
                *("prune", "--model", "M", "--text", "T", "--to", "X"),
                *("--pruning_ratio", "0.3", "--format", "stock"),
            ],
            ["one width for all layers", "add --allocator uniform_widths"],
        ),
        (
            [
                *("prune", "--model", "M", "--text", "T", "--to", "X", "--pruning_ratio", "0.3"),
                *("--preset", "owl", "--format", "stock"),
            ],
            ["allocator 'global' gives each its own", "choose another preset"],
        ),
        (
            ["prune", "--model", "M", "--text", "T", "--to", "X", "--pruning_ratio", "30"],
            ["for 30 % pass 0.3"],
        ),
        (
            ["prune", "--model", "M", "--text", "T", "--to", "X", "--target_bytes", "much"],
            ["target_bytes='8GB'"],
        ),
        (["sweep", "--model", "M", "--to", "X", "--ratios", "0.1"], ["--text", "--calibration"]),
        (["compare", "--model", "M", "--text", "T", "--presets", "flapp"], ["'flap'"]),
        (["prune", "--pruning_ratio", "abc"], ["--pruning_ratio: 'abc' is not a number"]),
        (
            ["prune", "--batch_size", "1.5"],
            ["'1.5' is not a whole number", "lit-prune prune --help"],
        ),
        (["prune", "--allocator", "x"], ["--allocator: 'x' is not one of 'depth_first', 'greedy'"]),
        (["sweep", "--ratios", "0.1", "a"], ["--ratios: 'a' is not a number"]),
        (
            [
                *("prune", "--model", "M", "--text", "TEXT", "--to", "X"),
                *("--pruning_ratio", "0.3", "--context_length", "0"),
            ],
            ["context_length must be at least 2"],
        ),
        (["prune", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["prune", "--model", "M", "--text", "", "--to", "X"], ["--text is empty"]),
        (["export", "--model", "", "--to", "X"], ["--model is empty"]),
        (["report", "--of", "X", "--to="], ["--to is empty"]),
    ],
)
def test_what_cannot_be_meant_is_status_2(
    lit_prune, tmp_path, monkeypatch, model_directory, text, words, said
):
    monkeypatch.chdir(tmp_path)
    there = {"M": model_directory, "TEXT": text}
    run = lit_prune(*(there.get(word, word) for word in words))
    refused(run, 2, *said)
    assert not list(tmp_path.iterdir())


def prune(run, model, text, to, *more):
    return run(
        "prune",
        "--model",
        model,
        "--text",
        text,
        "--to",
        to,
        "--pruning_ratio",
        "0.3",
        *QUICK,
        *more,
    )


def test_text_that_is_none_is_status_1(lit_prune, model_directory, tmp_path):
    def said(file, *words):
        refused(prune(lit_prune, model_directory, file, tmp_path / "out"), 1, *words)
        assert not (tmp_path / "out").exists()

    said(tmp_path / "missing.txt", "missing.txt", "no such file")
    # before the model, which may take minutes to load
    run = prune(lit_prune, "./nowhere", tmp_path / "missing.txt", tmp_path / "out")
    refused(run, 1, "missing.txt", "no such file")
    (tmp_path / "empty.txt").write_text(" \n")
    said(tmp_path / "empty.txt", "holds no text")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": 1}\n')
    said(tmp_path / "bad.jsonl", "bad.jsonl, line 2")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    said(tmp_path / "picture.png", "no text in UTF-8")
    (tmp_path / "short.txt").write_text("x = 1")
    said(tmp_path / "short.txt", "token")


def test_models_that_are_none_are_status_1(lit_prune, model_directory, text, tmp_path):
    def said(model, *words):
        refused(prune(lit_prune, model, text, tmp_path / "out"), 1, *words)
        assert not (tmp_path / "out").exists()

    said("./nowhere", "no such directory")
    said(tmp_path, "no config.json")
    half = shutil.copytree(model_directory, tmp_path / "half")
    os.truncate(half / "model.safetensors", 5000)
    said(half, "half could not be loaded", "cut short?")
    said(text / "heapq.txt", "is a file")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text(json.dumps({"model_type": "strange"}))
    said(tmp_path / "strange", "'strange'", "does not know")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    said(tmp_path / "t5", "t5 is a T5 model", "no causal language model")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    said(tmp_path / "bert", "bert")


def test_no_network_for_a_name_is_status_1(lit_prune, model_directory, text, tmp_path, monkeypatch):
    def no_network(*_args, **_options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", no_network)  # HF_HUB_OFFLINE is set for tests
    run = prune(lit_prune, "someone/some-model", text, tmp_path / "out")
    refused(run, 1, "'someone/some-model'", "local directory")
    run = prune(lit_prune, model_directory, "someone/some-text", tmp_path / "out")
    refused(run, 1, "'someone/some-text'", "local file")
    assert not (tmp_path / "out").exists()


def test_targets_that_are_in_the_way_are_refused_before_any_work(
    lit_prune, model_directory, text, tmp_path
):
    (tmp_path / "there").mkdir()
    run = prune(lit_prune, "./nowhere", text, tmp_path / "there")
    refused(run, 1, "exists", "--overwrite")
    (tmp_path / "there" / "mine.txt").write_text("mine")
    run = prune(lit_prune, "./nowhere", text, tmp_path / "there", "--overwrite")
    refused(run, 1, "delete it yourself")
    (tmp_path / "file").write_text("")
    run = prune(lit_prune, "./nowhere", text, tmp_path / "file" / "below")
    refused(run, 1, "is no directory")
    if os.path.isdir("/proc"):  # writable, it says, and is not
        refused(prune(lit_prune, "./nowhere", text, "/proc/x/y"), 1, "cannot be written to")
    run = lit_prune(
        "plan",
        "--model",
        "./nowhere",
        "--to",
        tmp_path / "there",
        "--pruning_ratio",
        "0.3",
        "--overwrite",
    )
    refused(run, 1, "mine.txt")
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["prune", "apply", "export"])
def test_a_format_that_cannot_be_written_is_refused_before_any_work(
    lit_prune, tmp_path, monkeypatch, command
):
    given = {"prune": ["--text", "T", "--pruning_ratio", "0.3"], "apply": ["--plan", "P"]}
    words = [command, "--model", "./nowhere", "--to", tmp_path / "out", *given.get(command, [])]
    refused(lit_prune(*words, "--format", "gguff"), 2, "did you mean 'gguf'")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(lit_prune(*words, "--format", "gguf"), 2, "pip install 'lit-prune[gguf]'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_file_that_is_in_the_way_is_refused_before_any_work(lit_prune, tmp_path, command):
    given = {
        "evaluate": ["evaluate", "--model", "./nowhere", "--text", "nothing.txt"],
        "report": ["report", "--of", "./nowhere"],
    }[command]
    (tmp_path / "mine.txt").write_text("mine")
    refused(lit_prune(*given, "--to", tmp_path / "mine.txt"), 1, "exists", "--overwrite")
    refused(lit_prune(*given, "--to", tmp_path, "--overwrite"), 1, "is a directory")
    refused(lit_prune(*given, "--to", tmp_path / "no" / "x"), 1, "is no directory")
    refused(lit_prune(*given, "--to", tmp_path / "mine.txt" / "x"), 1, "is no directory")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_verbose_shows_the_traceback(lit_prune, text, tmp_path):
    run = prune(lit_prune, "./nowhere", text, tmp_path / "out", "--verbose")
    assert run.status == 1
    assert "Traceback" in run.err
    assert run.err.strip().splitlines()[-1].startswith("lit-prune: error: ./nowhere")


def test_an_interrupted_run_leaves_nothing(lit_prune, model_directory, text, tmp_path, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_prune.saving.save.verify_saved", interrupt)
    run = prune(
        lit_prune, model_directory, text, tmp_path / "out", "--preset", "random",
        "--max_calibration_tokens", "2048",
    )  # fmt: skip
    refused(run, 130, "interrupted")
    assert not list(tmp_path.iterdir())


def test_what_does_not_exist_is_named(lit_prune, model_directory, tmp_path):
    run = lit_prune("apply", "--model", model_directory, "--plan", tmp_path, "--to", tmp_path / "x")
    refused(run, 1, "plan.json", "no such file")
    (tmp_path / "plan.json").write_text("{}")
    run = lit_prune("apply", "--model", model_directory, "--plan", tmp_path, "--to", tmp_path / "x")
    refused(run, 1, "plan.json", "must be an object")
    run = lit_prune(
        "export", "--model", model_directory, "--to", tmp_path / "x", "--format", "gguff"
    )
    refused(run, 2, "gguf")
    run = lit_prune(
        "sweep", "--model", model_directory, "--calibration", tmp_path / "c.safetensors",
        "--to", tmp_path / "x",
    )  # fmt: skip
    refused(run, 1, "c.safetensors")
    assert not (tmp_path / "x").exists()

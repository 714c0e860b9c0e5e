"""GGUF files: what goes where, what is refused, and what a real llama.cpp makes of them."""

import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_prune.decoder import spec_for
from lit_prune.errors import ArtifactError, ConfigError, FormatError, UnsupportedModelError
from lit_prune.plan import PruningPlan
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.saving.check import Different
from lit_prune.saving.check_gguf import read_back
from lit_prune.saving.files import sha256_of
from lit_prune.saving.formats import FORMATS
from lit_prune.saving.gguf.rope import llama3_divisors
from lit_prune.saving.gguf.vocabulary import vocabulary_of
from lit_prune.saving.manifest import Manifest
from lit_prune.surgery import apply_plan
from tests.models import tiny_model
from tests.saving.cases import ALIKE, FAMILIES, KINDS, listing, logits, pruned

CASES = [*itertools.product(FAMILIES, KINDS, (True, False))]
RUNS = importlib.util.find_spec("llama_cpp") is not None
IDS = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def architecture(family, kind, tie):
    """What each case is written as; None where it is refused."""
    mean = kind.endswith("_mean")
    if family == "qwen3":  # no biases; layers that differ only in openelm, which ties
        return None if mean else "qwen3" if kind in ALIKE else "openelm" if tie else None
    if kind not in ALIKE:
        return "deci"
    whole_heads = kind in ("dense", "shorter")  # what llama.cpp's qwen2 wants
    return "qwen2" if family == "qwen2" and whole_heads else "llama"


def architecture_of(path):
    return json.loads((path / "MANIFEST.json").read_text())["architecture"]


def field(reader, name):
    return reader.fields[name].contents()


@pytest.mark.parametrize(("family", "kind", "tie"), CASES)
def test_every_case_is_written_as_expected_or_refused_by_name(family, kind, tie, tmp_path):
    model, wanted = pruned(family, kind, tie=tie), architecture(family, kind, tie)
    if wanted is None:
        with pytest.raises(FormatError, match=r"cannot hold this model: .*These can: heterog"):
            save_pruned(model, tmp_path / "saved", format="gguf", verify=False)
        assert listing(tmp_path) == []
        return
    path = save_pruned(model, tmp_path / "saved", format="gguf", verify=False)
    assert architecture_of(path)["class"] == wanted
    reader = GGUFReader(path / "model.gguf")
    assert field(reader, "general.architecture") == wanted
    widths = field(reader, f"{wanted}.feed_forward_length")
    assert isinstance(widths, list) == (kind not in ALIKE)
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) == (not tie)
    assert all(torch.from_numpy(t.data.copy()).isfinite().all() for t in reader.tensors)


def test_refusals_say_which_format_can(tmp_path):
    for kind, can in (("uneven", r"heterogeneous \(exact\), padded"), ("uniform_mean", "heter")):
        with pytest.raises(FormatError, match=rf"These can: {can}") as found:
            save_pruned(pruned("qwen3", kind, tie=False), tmp_path / "x", format="gguf")
        # qwen3 has no class with those biases, padded or not
        assert ("padded" in str(found.value)) == (kind == "uneven")


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("mistral", {"sliding_window": 8}, "looks back 8 tokens"),
        ("llama", {"hidden_act": "gelu"}, "its MLPs use 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "scaled by 'dynamic'",
        ),
    ],
)
def test_other_mathematics_is_refused(family, options, words, tmp_path):
    with pytest.raises(FormatError, match=words):
        save_pruned(tiny_model(family, **options), tmp_path / "saved", format="gguf")
    assert listing(tmp_path) == []


def test_float64_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"torch\.float64 weights"):
        save_pruned(tiny_model().double(), tmp_path / "saved", format="gguf")


def test_without_the_package_the_way_to_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'lit-prune\[gguf\]'"):
        save_pruned(tiny_model(), tmp_path / "saved", format="gguf")


def test_transformers_loading_is_refused_by_name(tmp_path):
    path = save_pruned(pruned(), tmp_path / "saved", format="gguf", verify=False)
    with pytest.raises(ArtifactError, match=r"which llama\.cpp reads"):
        load_pruned(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_type(dtype, tmp_path):
    model = pruned("llama", "uneven").to(dtype)
    path = save_pruned(model, tmp_path / "saved", format="gguf", verify=False)
    types = {t.name: t.tensor_type.name for t in GGUFReader(path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert types["blk.0.ffn_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["uneven", pytest.param("uniform_mean", marks=pytest.mark.slow)])
def test_the_manifest_says_how_far_it_was_checked(kind, tmp_path):
    path = save_pruned(pruned(kind=kind), tmp_path / "saved", format="gguf")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["verified"] is RUNS
    words = "logits close" if RUNS else "not run: llama-cpp-python is not installed"
    assert words in manifest["verification"]
    assert "equal bit for bit" in manifest["verification"]
    card = (path / "README.md").read_text()
    assert "Llama('saved/model.gguf')" in card
    assert "The file takes token ids only: no tokenizer was given." in card


def test_a_weight_that_differs_is_found(tmp_path):
    path = save_pruned(pruned(), tmp_path / "saved", format="gguf", verify=False)
    file = path / "model.gguf"
    raw = bytearray(file.read_bytes())
    raw[-70] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Different, match="not those that were to be written"):
        read_back(file, "0" * 64)


def test_a_failed_check_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_prune.saving.gguf.prepared.tensor_digest", lambda _: "0" * 64)
    with pytest.raises(ArtifactError, match="not those that were to be written"):
        save_pruned(pruned(), tmp_path / "saved", format="gguf")
    assert listing(tmp_path) == []


def test_llama3_divisors_are_those_of_transformers():
    model = tiny_model(rope_parameters=LLAMA3, head_dim=16)
    plain = tiny_model(head_dim=16)
    wanted = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    torch.testing.assert_close(llama3_divisors(LLAMA3, 16), wanted)


# ---- tokenizers ----


def byte_level(*steps, normalizer=None, vocab_size=300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["def add(one, two): return one + two", "the cat and the other cat sat", "It's 12345"]
    tokenizer.train_from_iterator(text * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )


def split(pattern, behavior="isolated"):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), behavior)


def gpt2():
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False),),
    "llama-bpe": (split(LLAMA3_SPLIT), BYTES),
    "qwen2": (split(LLAMA3_SPLIT.replace("{1,3}", "")), BYTES),
    "smollm": (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_known_ways_to_split_are_named(name):
    found = vocabulary_of(byte_level(*SPLITS[name]))
    assert (found.kind, found.split) == ("gpt2", name)
    assert found.merges
    assert all(" " in merge for merge in found.merges)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        ((split(r"\w+|\W+"), BYTES), {}),
        ((split(LLAMA3_SPLIT, "removed"), BYTES), {}),
        ((pre_tokenizers.ByteLevel(add_prefix_space=True),), {}),
        ((pre_tokenizers.ByteLevel(add_prefix_space=False),), {"normalizer": normalizers.NFKC()}),
    ],
)
def test_an_unknown_way_gives_token_ids_only(steps, options, tmp_path):
    tokenizer = byte_level(*steps, **options)
    assert vocabulary_of(tokenizer).kind == "none"
    model = tiny_model(vocab_size=len(tokenizer))
    path = save_pruned(model, tmp_path / "saved", format="gguf", tokenizer=tokenizer, verify=False)
    assert field(GGUFReader(path / "model.gguf"), "tokenizer.ggml.model") == "none"
    card = (path / "README.md").read_text()
    assert "token ids only: llama.cpp has no name for how its tokenizer splits text" in card
    assert "tokenizer.json" in listing(path)


def sentencepiece():
    """A byte-fallback BPE tokenizer in the form of Llama 2's."""
    mark = "\u2581"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [(mark, "t"), ("h", "e"), (mark + "t", "he"), ("a", "t"), ("c", "at"), (mark, "cat")]
    merged = [left + right for left, right in merges]
    letters = [mark, *"etaoinshrdlucmfwypvbgkqjxz.,!'"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *merged, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_sentencepiece_is_known(tmp_path):
    tokenizer = sentencepiece()
    assert vocabulary_of(tokenizer).kind == "llama"
    rows = len(tokenizer) + 5
    model = tiny_model(vocab_size=rows)
    path = save_pruned(model, tmp_path / "saved", format="gguf", tokenizer=tokenizer, verify=False)
    reader = GGUFReader(path / "model.gguf")
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == rows
    assert tokens[-1] == f"[PAD{rows - 1}]"
    assert field(reader, "tokenizer.ggml.bos_token_id") == tokenizer.bos_token_id


def test_a_chat_template_travels(tmp_path):
    tokenizer = gpt2()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = tiny_model(vocab_size=len(tokenizer))
    path = save_pruned(model, tmp_path / "saved", format="gguf", tokenizer=tokenizer, verify=False)
    found = field(GGUFReader(path / "model.gguf"), "tokenizer.chat_template")
    assert found == tokenizer.chat_template


# ---- a real llama.cpp ----

SCRIPT = """
import sys, torch
from llama_cpp import Llama
from safetensors.torch import load_file
for path in sys.argv[1:]:
    wanted = load_file(path + ".safetensors")
    llama = Llama(path + "/model.gguf", n_ctx=64, n_threads=1, logits_all=True, type_k=0, type_v=0,
                  flash_attn=False, verbose=False)
    for row, logits in zip(wanted["ids"].tolist(), wanted["logits"]):
        llama.reset(); llama.eval(row)
        got = torch.from_numpy(llama.scores[:len(row)].copy())
        worst = float((got - logits).abs().max() / logits.abs().max())
        assert worst <= 1e-4, (path, worst)
    llama.reset()
    tokens = []
    for token in llama.generate(wanted["prompt"].tolist(), temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == 12: break
    assert tokens == wanted["greedy"].tolist(), (path, tokens, wanted["greedy"].tolist())
    print("equal", path)
"""


def in_llama_cpp(models_by_name, tmp_path):
    """Logits, and the greedy continuation through the cache, against transformers in float32."""
    from safetensors.torch import save_file

    paths = []
    for name, model in models_by_name.items():
        path = save_pruned(model, tmp_path / name, format="gguf", verify=False)
        prompt = IDS[:1, :8]
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        greedy = model.generate(prompt, **options, eos_token_id=None)[0, 8:]
        tensors = {"ids": IDS, "logits": logits(model), "prompt": prompt[0], "greedy": greedy}
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, f"{path}.safetensors")
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-2000:])
    assert done.stdout.count("equal") == len(paths)


@pytest.mark.gguf
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_every_plan_that_gguf_holds_in_llama_cpp(family, kv_heads, tmp_path):
    found = {
        f"{kind}-{tie}": pruned(family, kind, tie=tie, kv_heads=kv_heads)
        for kind, tie in itertools.product(KINDS, (True, False))
        if architecture(family, kind, tie)
    }
    in_llama_cpp(found, tmp_path)


@pytest.mark.gguf
def test_scaled_positions_and_biases_in_llama_cpp(tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    every = {"attention_bias": True, "mlp_bias": True}
    found = {
        "llama3": pruned("llama", "uneven", rope_parameters=LLAMA3),
        "linear": pruned("llama", "uniform", rope_parameters=linear),
        "biases": pruned("llama", "uniform_mean", **every),
        "biases_uneven": pruned("llama", "leading_mean", **every),
    }
    in_llama_cpp(found, tmp_path)


@pytest.mark.gguf
def test_biases_in_some_layers_only_in_llama_cpp(tmp_path):
    """Uniform in width, but cut (and so compensated) in different places."""
    model = tiny_model()
    plan = PruningPlan.keep_all(spec_for(model))
    apply_plan(model, plan)
    for layer in (1, 3):
        model.model.layers[layer].mlp.down_proj.bias = torch.nn.Parameter(torch.randn(32))
    in_llama_cpp({"some": model}, tmp_path)


@pytest.mark.gguf
@pytest.mark.parametrize("name", [*SPLITS, "sentencepiece"])
def test_text_is_cut_as_the_tokenizer_cuts_it(name, tmp_path):
    tokenizer = sentencepiece() if name == "sentencepiece" else byte_level(*SPLITS[name])
    model = tiny_model(vocab_size=len(tokenizer) + 3)
    path = save_pruned(model, tmp_path / "saved", format="gguf", tokenizer=tokenizer)
    assert "tokens of sample texts equal" in (path / "MANIFEST.json").read_text()


# ---- what every format owes ----


@pytest.mark.parametrize("name", FORMATS)
def test_f07_weights_that_are_not_plain_are_refused(name, tmp_path):
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        weight.detach().to(torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        save_pruned(model, tmp_path / "saved", format=name)
    assert listing(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_f39_writer_killed_at_random_moments_leaves_an_old_or_a_new_directory(tmp_path):
    target = tmp_path / "saved"
    old, new = pruned(kind="uneven"), pruned(kind="uniform_mean", seed=1)
    wanted = set()
    for number, model in enumerate((old, new)):
        path = save_pruned(model, tmp_path / f"{number}", format="gguf", verify=False)
        wanted.add(sha256_of(path / "model.gguf"))
    chance = random.Random(0)
    for _ in range(10):
        shutil.rmtree(target, ignore_errors=True)
        save_pruned(old, target, format="gguf", verify=False)
        if not (child := os.fork()):
            torch.set_num_threads(1)
            save_pruned(new, target, format="gguf", overwrite=True, verify=False)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = target if target.exists() else tmp_path / f".saved.old-{child}"
        Manifest.read(kept).check(kept)
        assert sha256_of(kept / "model.gguf") in wanted
        for rest in tmp_path.glob(".saved.*"):
            shutil.rmtree(rest)

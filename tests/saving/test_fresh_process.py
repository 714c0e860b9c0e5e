"""Every case in a process that knows nothing of ours, and in one that has the package."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.saving import save_pruned
from tests.saving.cases import FAMILIES, KINDS, logits, model_types, pruned

SCRIPT = """
import sys, torch; from pathlib import Path; torch.set_num_threads(1)
from safetensors.torch import load_file
sys.modules["lit_prune"] = None  # whoever imports it fails
from transformers import AutoModelForCausalLM
def compare(model, path, kind):
    found = load_file(path.with_suffix(".safetensors"))
    wanted, ids = found["logits"], found["ids"]
    with torch.no_grad():
        got = model(input_ids=ids).logits
    allowed = 0 if kind == "heterogeneous" else 1e-5 * wanted.abs().max()
    assert (got - wanted).abs().max() <= allowed, (path.name, kind, (got - wanted).abs().max())
    cached = model.generate(ids[:, :6], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(cached, found["generated"]), (path.name, kind)
paths = sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir())
for path in paths:
    kind = path.name.split("-")[-1]
    trust = {"trust_remote_code": True} if kind == "heterogeneous" else {}
    compare(AutoModelForCausalLM.from_pretrained(path, **trust), path, kind)
    print("stranger", path.name)
del sys.modules["lit_prune"]
from lit_prune import load_pruned
for path in paths:
    kind = path.name.split("-")[-1]
    compare(load_pruned(path), path, kind)
    compare(AutoModelForCausalLM.from_pretrained(path), path, kind)
    print("ours", path.name)
"""


def in_fresh_process(cases, tmp_path, formats):
    count = 0
    for number, (family, kind) in enumerate(cases):
        model = pruned(family, kind, tie=number % 2 == 0, kv_heads=4 if number % 3 == 0 else 2)
        for name in formats:
            if model_types(family, kind)[name] is None:
                continue
            path = tmp_path / "saved" / f"{family}-{kind}-{name}"
            save_pruned(model, path, format=name, verify=False)
            ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
            options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
            uncached = model.generate(ids[:, :6], **options, use_cache=False)
            found = {"logits": logits(model), "ids": ids, "generated": uncached}
            save_file(found, path.with_suffix(".safetensors"))
            count += 1
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path / "saved")],
        env={**os.environ, "PYTHONPATH": root, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split("\n")
    assert sum(line.startswith("stranger") for line in lines) == count
    assert sum(line.startswith("ours") for line in lines) == count


def test_a_case_of_each_family_and_format(tmp_path):
    kinds = ("leading_mean", "uniform_mean", "no_first_attention", "first_gone_mean")
    cases = list(zip(FAMILIES, kinds, strict=True)) + list(zip(FAMILIES, kinds[::-1], strict=True))
    in_fresh_process(cases, tmp_path, ("stock", "heterogeneous", "padded"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stock", "heterogeneous", "padded"])
def test_every_case(name, tmp_path):
    in_fresh_process(itertools.product(FAMILIES, KINDS), tmp_path, (name,))

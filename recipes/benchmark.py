"""What pruning costs and what it brings, as ratios of times measured side by side in one run.

Run, offline, about eight minutes on two CPU cores::

    python recipes/benchmark.py
    python recipes/benchmark.py --json benchmark.json
    python recipes/benchmark.py --cpu-time      # on a machine that others use meanwhile

Every time is a median over interleaved repetitions (A, B, A, B …), so that a machine that gets
slower half-way slows both. A goal that is missed says so. ``--quick`` only proves that it runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lit_prune import EntropyPruningCallback, apply_plan, prune
from lit_prune.calibration import Row, RowSet, bypass_units, replay
from lit_prune.config import PruningConfig
from lit_prune.decoder import DecoderParts, quiet
from lit_prune.measuring import calibrate
from lit_prune.metrics import footprint_of
from lit_prune.pruner import make_plan

ROOT = Path(__file__).resolve().parents[1]
CPU_TIME = "--cpu-time"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    layers: int = 4
    context: int = 512
    small_rows: int = 16
    wide_rows: int = 4
    batch: int = 4
    wide_batch: int = 2
    repetitions: int = 5
    memory_rows: int = 32
    ratios: tuple[float, ...] = (0.3, 0.5)


QUICK = Sizes(
    hidden_size=64, intermediate_size=256, layers=4, context=64, small_rows=8, wide_rows=8,
    repetitions=2, memory_rows=16,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """One ratio; ``goal`` is where it should lie, e.g. ``<= 1.15``, or empty."""

    name: str
    ratio: float
    goal: str
    detail: str

    @property
    def verdict(self) -> str:
        if not self.goal:
            return ""
        sign, bound = self.goal.split()
        met = self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)
        return "met" if met else "MISSED"


class Validation(L.LightningModule):
    """A user's module: a language model and a validation step."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(input_ids=batch, labels=batch, use_cache=False).loss)


def alternate(repetitions: int, *functions: Callable[[], object]) -> list[float]:
    """Return the median seconds of each function, run in turns after one warm-up round."""
    clock = time.process_time if CPU_TIME in sys.argv else time.perf_counter
    seconds: list[list[float]] = [[] for _ in functions]
    for repetition in range(repetitions + 1):
        for times, function in zip(seconds, functions, strict=True):
            started = clock()
            function()
            if repetition:
                times.append(clock() - started)
    return [statistics.median(times) for times in seconds]


def validation(name: str, model: PreTrainedModel, rows: Tensor, batch: int, n: int) -> Result:
    """Time ``trainer.validate`` with the callback, which observes, and without."""
    loader, module = DataLoader(rows, batch_size=batch), Validation(model)
    with tempfile.TemporaryDirectory() as folder:

        def run(*callbacks: L.Callback) -> Callable[[], object]:
            trainer = L.Trainer(
                accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=folder,
                logger=False, enable_progress_bar=False, enable_checkpointing=False,
            )  # fmt: skip
            return lambda: trainer.validate(module, loader, verbose=False)

        probed, plain = alternate(n, run(EntropyPruningCallback(pruning_ratio=0.3)), run())
    detail = f"{probed:.2f} s / {plain:.2f} s, {len(rows)} rows of {rows.shape[1]}, batch {batch}"
    return Result(
        name=f"validation with probes / without, {name}",
        ratio=probed / plain,
        goal="<= 1.15",
        detail=detail,
    )


def bypass(name: str, model: PreTrainedModel, rows: Tensor, batch: int, n: int) -> Result:
    """Time a replay with every bypass, a replay without, and plain forwards of the same rows."""
    text = RowSet(tuple(Row.of(row) for row in rows), split=False)
    units, tokens = bypass_units(DecoderParts(model)), batch * rows.shape[1]

    def forwards() -> None:
        with quiet(model):
            for part in text.batches("calibrate", tokens):
                model.base_model(**part.model_inputs(model.device), use_cache=False)

    whole, none, forward = alternate(
        n,
        lambda: replay(model, text, units, max_tokens=tokens),
        lambda: replay(model, text, max_tokens=tokens),
        forwards,
    )
    one = (whole - none) / len(units)
    return Result(
        name=f"one bypass / one forward pass, {name}",
        ratio=one / forward,
        goal="<= 0.6",
        detail=f"{one * 1e3:.0f} ms / {forward * 1e3:.0f} ms, mean of {len(units)} units, entropy "
        "included, forward without the head",
    )


def surgery(name: str, model: PreTrainedModel, rows: Tensor, n: int) -> list[Result]:
    """Time applying a plan, and loading the dense model from disk (from the page cache)."""
    config = PruningConfig(pruning_ratio=0.3, preset="paper", allocator="uniform")
    text = RowSet(tuple(Row.of(row) for row in rows), split=False)
    planned = make_plan(model, calibrate(model, text, config, progress=False), config)
    dtype = next(model.parameters()).dtype
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def load_model() -> None:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            for parameter in loaded.parameters():
                parameter.sum()  # the file is mapped: reading it happens on first use

        copies = [copy.deepcopy(model) for _ in range(2 * (n + 1))]
        checked, unchecked, load = alternate(
            n,
            lambda: apply_plan(copies.pop(), planned.plan, planned.compensation),
            lambda: apply_plan(copies.pop(), planned.plan, planned.compensation, verify=False),
            load_model,
        )
    return [
        Result(
            name=f"surgery{how} / loading the model, {name}",
            ratio=seconds / load,
            goal="",
            detail=f"{seconds * 1e3:.0f} ms / {load * 1e3:.0f} ms",
        )
        for how, seconds in (("", checked), (" without its own check", unchecked))
    ]


def prefill(model: PreTrainedModel, rows: Tensor, ratio: float, n: int) -> Result:
    """Time prefill of a dense and a pruned random model against what the FLOPs promise."""
    pruned, context = copy.deepcopy(model), rows.shape[1]
    report = prune(
        pruned, [{"input_ids": row[None]} for row in rows], pruning_ratio=ratio,
        latency_prompt_tokens=0, progress=False,
    ).report  # fmt: skip
    prompt = rows[:1]

    def run(which: PreTrainedModel) -> Callable[[], object]:
        return lambda: which(input_ids=prompt, use_cache=True, logits_to_keep=1)

    def flops(which: PreTrainedModel) -> int:
        count = footprint_of(which, context_length=context)  # the head: for the last token only
        return context * count.flops_per_token + count.head_flops_per_token

    with torch.inference_mode():
        before, after = alternate(2 * n, run(model), run(pruned))
    speed_up, promised = before / after, flops(model) / flops(pruned)
    return Result(
        name=f"prefill speed-up / FLOP ratio, {ratio:.0%} pruned, {words(model)}",
        ratio=speed_up / promised,
        goal=">= 0.85",
        detail=f"{speed_up:.2f}x / {promised:.2f}x, {before * 1e3:.0f} ms -> {after * 1e3:.0f} ms, "
        f"prompt of {context}, removed {report.achieved_ratio:.1%}",
    )


def memory(model_words: str, sizes: Sizes, arguments: list[str]) -> Result:
    """Compare peak memory of whole prunings in fresh processes, with 1 x and 10 x the text."""
    peaks = []
    for times in (1, 10):
        command = [sys.executable, __file__, *arguments, "--prune-rows"]
        found = subprocess.run(
            [*command, str(times * sizes.memory_rows)], check=True, capture_output=True, text=True
        )
        peaks.append(json.loads(found.stdout.splitlines()[-1]))
    one, ten = (peak["peak_bytes"] for peak in peaks)
    tokens = [peak["tokens"] for peak in peaks]
    return Result(
        name=f"peak RSS at 10 x the tokens / at 1 x, {model_words}",
        ratio=ten / one,
        goal="<= 1.05",
        detail=f"{ten / 1e6:.0f} MB / {one / 1e6:.0f} MB ({peaks[0]['loaded_bytes'] / 1e6:.0f} MB "
        f"with the model loaded), {tokens[1]} / {tokens[0]} tokens: validate, plan, prune, measure",
    )


def prune_rows(model: PreTrainedModel, count: int, sizes: Sizes) -> None:
    """Prune by ``trainer.validate`` on ``count`` rows; print the peak memory of this process."""
    loaded = peak_bytes()
    length = sizes.context // 4  # many short rows: what would grow, grows with rows and with tokens
    rows = random_rows(model, count, length)
    pruner = EntropyPruningCallback(
        pruning_ratio=0.3, when="validate", replay_batch_tokens=2 * length, latency_prompt_tokens=0,
        max_calibration_tokens=rows.numel(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, callbacks=[pruner], default_root_dir=folder, logger=False,
            enable_progress_bar=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.validate(Validation(model), DataLoader(rows, batch_size=2), verbose=False)
    found = {"peak_bytes": peak_bytes(), "loaded_bytes": loaded, "tokens": rows.numel()}
    print(json.dumps(found))


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; there `getrusage` of a child starts with its parent's peak
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wide_llama(sizes: Sizes) -> PreTrainedModel:
    """Return a random Llama, wide enough for arithmetic to take the time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.hidden_size // 64 or 1,
        num_key_value_heads=max(1, sizes.hidden_size // 128), head_dim=64, vocab_size=4096,
        max_position_embeddings=max(sizes.context, 128),
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_rows(model: PreTrainedModel, count: int, length: int) -> Tensor:
    """Return ``[count, length]`` random token ids; no special tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (count, length), generator=generator)


def words(model: PreTrainedModel) -> str:
    return f"{model.config.num_hidden_layers} layers of width {model.config.hidden_size}"


def surroundings() -> dict[str, object]:
    """Return what the numbers depend on."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit or "unknown",
        "cpu": next(name, platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "clock": "CPU time" if CPU_TIME in sys.argv else "wall clock",
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, transformers, L)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that it runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(CPU_TIME, action="store_true", help="of one thread, for busy machines")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "python-4.8m")
    parser.add_argument("--prune-rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    quiet_down()
    sizes = QUICK if options.quick else Sizes()
    small = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    if options.prune_rows:
        prune_rows(small, options.prune_rows, sizes)
        return

    around = surroundings()
    print("\n".join(f"{key}: {value}" for key, value in around.items()) + "\n", flush=True)
    results: list[Result] = []

    def show(*found: Result) -> None:
        for result in found:
            results.append(result)
            goal = f"goal {result.goal}: {result.verdict}" if result.goal else ""
            print(f"{result.ratio:6.3f}  {result.name}  {goal}")
            print(f"        {result.detail}", flush=True)

    n, wide = sizes.repetitions, wide_llama(sizes)
    small_rows = random_rows(small, sizes.small_rows, sizes.context)
    wide_rows = random_rows(wide, sizes.wide_rows, sizes.context)
    for name, model, rows, batch in (
        (options.checkpoint.name, small, small_rows, sizes.batch),
        (words(wide), wide, wide_rows, sizes.wide_batch),
    ):
        show(validation(name, model, rows, batch, n))
        show(bypass(name, model, rows[: 2 * batch], batch, max(1, n // 2)))
        show(*surgery(name, model, rows[:2], n))
    threads = str(torch.get_num_threads())
    passed_on = ["--threads", threads, "--checkpoint", str(options.checkpoint)]
    show(memory(options.checkpoint.name, sizes, [*passed_on, *["--quick"] * options.quick]))
    for ratio in sizes.ratios:
        show(prefill(wide, wide_rows, ratio, n))
    if missed := sum(result.verdict == "MISSED" for result in results):
        print(f"\n{missed} goals missed")
    if options.json:
        found = [asdict(result) | {"verdict": result.verdict} for result in results]
        whole = {"surroundings": around, "results": found}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


def quiet_down() -> None:
    """Leave the terminal to the numbers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()

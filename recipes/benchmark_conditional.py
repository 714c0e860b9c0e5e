"""What the default preset costs, as ratios in one run, at three widths.

Run, offline, a few minutes on two CPU cores::

    python recipes/benchmark_conditional.py
    python recipes/benchmark_conditional.py --quick      # tiny: proves that it runs
    python recipes/benchmark_conditional.py --cpu-time   # on a machine that others use meanwhile

For a random Llama of each width: the whole pruning (statistics, damage curves, sensitivities,
search, compensation, surgery) over one forward pass of the calibration text; what covariances add
to a replay over their own matrix products (goal <= 1.5); and how far the peak memory of the process
rises above that of the loaded model, over the size of its weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys

import torch
from benchmark import CPU_TIME, alternate, peak_bytes, quiet_down, random_rows, surroundings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_prune import apply_plan
from lit_prune.calibration import Row, RowSet, replay, replay_within
from lit_prune.config import PruningConfig
from lit_prune.decoder import KINDS, DecoderParts, quiet
from lit_prune.measuring import calibrate
from lit_prune.planning import compensated, make_plan

CONFIG = PruningConfig(pruning_ratio=0.3)
BATCH_TOKENS = 2048


def llama(hidden: int, layers: int) -> PreTrainedModel:
    """Return a random Llama with heads of 64 (or fewer), two query heads to a KV group."""
    heads = max(hidden // 64, 4)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, vocab_size=4096,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def text_of(model: PreTrainedModel, rows: int, length: int) -> RowSet:
    return RowSet.of(Row.of(row) for row in random_rows(model, rows, length))


def prune_once(model: PreTrainedModel, text: RowSet) -> None:
    """Run everything between text and pruned model, without measuring before and after."""
    calibration = calibrate(model, text, CONFIG, progress=False)
    planned = compensated(model, make_plan(model, calibration, CONFIG), calibration, CONFIG)
    apply_plan(copy.deepcopy(model), planned.plan, planned.compensation)


def measure(hidden: int, layers: int, rows: int, length: int, n: int) -> dict[str, object]:
    model = llama(hidden, layers)
    text, parts = text_of(model, rows, length), DecoderParts(model)

    def forward() -> None:
        with quiet(model):
            for part in text.batches("calibrate", BATCH_TOKENS):
                model(**part.model_inputs(model.device), use_cache=False)

    tokens = text.num_tokens("calibrate")
    widths = [parts.output(layer, kind).in_features for layer in range(layers) for kind in KINDS]
    inputs = [torch.randn(tokens, width, dtype=torch.float64) for width in widths]

    def products() -> None:
        for x in inputs:
            x.T @ x

    whole, once, with_covariances, without, own = alternate(
        n,
        lambda: prune_once(model, text),
        forward,
        lambda: replay_within(
            model, text, covariance_bytes=CONFIG.covariance_bytes, max_tokens=BATCH_TOKENS
        ),
        lambda: replay(model, text, max_tokens=BATCH_TOKENS),
        products,
    )
    size = [str(hidden), str(layers), str(rows), str(length)]
    command = [sys.executable, __file__, "--peak", *size]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = json.loads(found.splitlines()[-1])
    return {
        "width": hidden,
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "pruning / forward": whole / once,
        "seconds": f"{whole:.1f} / {once:.2f}",
        "covariances / products": (with_covariances - without) / own,
        "peak rise / weights": (peak["peak"] - peak["loaded"]) / peak["weights"],
    }


def peak_of(hidden: int, layers: int, rows: int, length: int) -> None:
    """Print the peak memory of one pruning; for a process of its own."""
    model = llama(hidden, layers)
    loaded, text = peak_bytes(), text_of(model, rows, length)
    calibration = calibrate(model, text, CONFIG, progress=False)
    planned = compensated(model, make_plan(model, calibration, CONFIG), calibration, CONFIG)
    apply_plan(model, planned.plan, planned.compensation)
    weights = sum(p.numel() * p.element_size() for p in llama(hidden, layers).parameters())
    print(json.dumps({"peak": peak_bytes(), "loaded": loaded, "weights": weights}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that it runs")
    parser.add_argument(CPU_TIME, action="store_true", help="of one thread, for busy machines")
    parser.add_argument("--peak", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    quiet_down()
    if options.peak:
        peak_of(*options.peak)
        return
    print("\n".join(f"{key}: {value}" for key, value in surroundings().items()) + "\n")
    full = [(256, 8, 32, 256, 2), (512, 6, 32, 256, 2), (1024, 4, 32, 256, 2)]
    for size in [(64, 2, 24, 32, 1)] if options.quick else full:
        for name, value in measure(*size).items():
            print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")
        print(flush=True)


if __name__ == "__main__":
    main()

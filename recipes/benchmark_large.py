"""Prune a model of the shape of Llama-2-7B, end to end: minutes, peak memory, latency.

The weights are random and so is the text, so quality is no subject here; costs are. Run on a GPU
with 40 GB (and 100 GB of host memory, where covariances of the whole model lie)::

    python recipes/benchmark_large.py
    python recipes/benchmark_large.py --layers 4 --rows 32    # a piece of it
    python recipes/benchmark_large.py --quick --device cpu    # tiny: proves that it runs

Printed as each is known, at last as one JSON object: seconds and rise in memory of the statistics
and of plan, compensation and surgery, and the report's table, before and after.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from benchmark import quiet_down, random_rows, surroundings
from process_memory import Rise
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_prune import PruningConfig
from lit_prune.calibration import Row, RowSet
from lit_prune.measuring import calibrate
from lit_prune.pruner import carry_out

T = TypeVar("T")


def llama(layers: int, device: str, *, quick: bool) -> PreTrainedModel:
    """Return Llama-2-7B's shape with random bf16 weights, made on the device."""
    small = {
        "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512,
    }  # fmt: skip
    large = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    }  # fmt: skip
    config = LlamaConfig(
        **(small if quick else large), num_hidden_layers=layers, max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def costs(device: str, work: Callable[[], T]) -> tuple[T, dict[str, float | None]]:
    """Run something; return what it made, its seconds, and how far memory rose (GB)."""
    rises = {kind: Rise(torch.device(kind)) for kind in dict.fromkeys(("cpu", device))}
    started = time.perf_counter()
    made = work()
    if "cuda" in device:
        torch.cuda.synchronize()
    found: dict[str, float | None] = {"seconds": round(time.perf_counter() - started, 2)}
    for kind, rise in rises.items():
        risen = rise.stop()
        found[f"rise_{kind}_gb"] = None if risen is None else round(risen / 1e9, 2)
    return made, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that it runs")
    options = parser.parse_args()
    quiet_down()
    if options.quick:
        options.layers, options.rows, options.tokens = 2, 24, 32
    found: dict[str, object] = surroundings() | {"dtype": "bfloat16"}
    if options.device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name()

    def tell(**facts: object) -> None:
        found.update(facts)
        print(facts, flush=True)

    model = llama(options.layers, options.device, quick=options.quick)
    tell(
        parameters=model.num_parameters(),
        weights_gb=round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 2),
    )
    text = RowSet.of(Row.of(row) for row in random_rows(model, options.rows, options.tokens))
    config = PruningConfig(pruning_ratio=options.ratio)
    calibration, cost = costs(
        options.device, lambda: calibrate(model, text, config, progress=False)
    )
    tell(tokens=text.num_tokens("calibrate"), calibrate=cost)
    (_, report), cost = costs(
        options.device, lambda: carry_out(model, calibration, config, progress=False)
    )
    tell(plan_measure_and_cut=cost)
    print(report)
    print(json.dumps(found | {"report": json.loads(report.to_json())}))


if __name__ == "__main__":
    main()

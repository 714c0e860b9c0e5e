"""Prune a model of the shape of Llama-2-7B, end to end: minutes, peak memory, latency.

The weights are random and so is the text, so quality is no subject here; costs are. Run on a GPU
with 40 GB (and 100 GB of host memory, where covariances of the whole model lie)::

    python recipes/benchmark_large.py
    python recipes/benchmark_large.py --layers 4 --rows 32    # a piece of it
    python recipes/benchmark_large.py --quick --device cpu    # tiny: proves that it runs

Printed as each is known, at last as one JSON object: seconds and peak memory of the statistics and
of plan, compensation and surgery, and the report's table, before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from benchmark import quiet_down, random_rows, surroundings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_prune import PruningConfig
from lit_prune.calibration import Row, RowSet
from lit_prune.measuring import calibrate
from lit_prune.pruner import carry_out


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


class Peak:
    """Seconds and highest memory (GB) of what runs inside the ``with``."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> Peak:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.found = {"host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
        if self.cuda:
            torch.cuda.synchronize()
            self.found["device_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.found["seconds"] = time.perf_counter() - self.started
        self.found = {name: round(value, 2) for name, value in self.found.items()}


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
    with Peak(options.device) as peak:
        calibration = calibrate(model, text, config, progress=False)
    tell(tokens=text.num_tokens("calibrate"), calibrate=peak.found)
    with Peak(options.device) as peak:
        _, report = carry_out(model, calibration, config, progress=False)
    tell(plan_measure_and_cut=peak.found)
    print(report)
    print(json.dumps(found | {"report": json.loads(report.to_json())}))


if __name__ == "__main__":
    main()

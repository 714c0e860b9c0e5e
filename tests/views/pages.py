"""Reports and plans for pages, made by hand: every answer can be constructed."""

from dataclasses import asdict, replace

from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.report import PruningReport, ReportRow
from tests.measured import latency

HOSTILE = "<script>alert('x')</script>&\"\u202e\udc80 `<b>`"


def made_plan(layers=None, *, sizes=True, **provenance):
    """Four layers of 4 KV groups and 64 channels: one whole, one narrower, one bare, one gone."""
    all_groups, all_channels = tuple(range(4)), tuple(range(64))
    layers = layers or [
        (all_groups, all_channels),
        ((0, 2), tuple(range(32))),
        ((), all_channels),
        ((), ()),
    ]
    if sizes:
        provenance["sizes"] = {"attention": [4] * len(layers), "mlp": [64] * len(layers)}
    kept = tuple(LayerPlan(i, *layer) for i, layer in enumerate(layers))
    return PruningPlan("abc", kept, provenance=provenance)


def predicted():
    """Prices as `conditional` leaves them."""
    return {
        "measure": "predicted damage",
        "unit": "nats per token",
        "whole": {"attention": [0.1, 0.2, 0.003, 0.004], "mlp": [5.0, 0.5, None, 0.02]},
        "cut": {"attention": [0.0, 0.05, 0.003, 0.004], "mlp": [0.0, 0.1, 0.0, 0.02]},
        "curves": {
            "attention": [[0.0, 0.01, 0.1], [0.0, 0.05, 0.2], [0.0, 0.003], None],
            "mlp": [[0.0, 1.0, 5.0], [0.0, 0.1, 0.5], None, [0.0, 0.001, 0.02]],
        },
    }


def transfer():
    """Prices as `paper` leaves them."""
    whole = {"block": [3.0, 2.0, 1.0, 0.0], "attention": [0.2] * 4, "mlp": [0.3, 0.2, 0.1, None]}
    return {"measure": "transfer entropy", "unit": "nats", "whole": whole}


def timed(batch_size=1, reasons=None, **after):
    """What a report holds of one batch size; ``after`` says what has changed."""
    before = latency(batch_size=batch_size)
    return {
        "before": asdict(before),
        "after": asdict(replace(before, **after)),
        "reasons": reasons or {},
    }


def made_report(plan, *, latency=(), **changes):
    rows = (
        row("total_parameters", "count", 2_000_000, 1_500_000),
        row("perplexity", "perplexity", 10.0, 11.0),
        row("prefill_seconds", "seconds", 0.02, 0.021, "inside the spread"),
        row("peak_forward_bytes", "bytes", None, None),
    )
    whole = {
        "requested_ratio": 0.3,
        "achieved_ratio": 0.301,
        "total_ratio": 0.25,
        "preset": "conditional",
        "plan_digest": plan.digest,
        "dry_run": False,
        "rows": rows,
        "calibration": {
            "samples": 40,
            "tokens": {"calibrate": 2304, "choose": 1408, "score": 1408},
            "data_digest": "fedcba",
            "split": "disjoint samples",
        },
        "config": {"pruning_ratio": 0.3, "seed": 0, "preset": "conditional"},
        "conditions": {"latency": list(latency), "words": ["perplexity: of 1397 tokens"]},
        "warnings": ("only 3 tokens",),
        "versions": {"torch": "2"},
    }
    return PruningReport(**{**whole, **changes})


def row(key, unit, before, after, note=""):
    label = key.replace("_", " ")
    return ReportRow(key=key, label=label, unit=unit, before=before, after=after, note=note)

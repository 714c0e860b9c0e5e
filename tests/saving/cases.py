"""Tiny models, pruned by hand-made plans, in every shape that a saved model can have."""

import copy
import functools
import json

import torch

from lit_prune.calibration import Row, RowSet, replay
from lit_prune.decoder import spec_for
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.record import PruningRecord
from lit_prune.report import PruningReport, ReportRow
from lit_prune.saving.files import sha256_of
from lit_prune.surgery import apply_plan, mean_compensation
from tests.models import CONFIGS, tiny_model, tiny_rows

FAMILIES = sorted(CONFIGS)
ALL, HALF, FEW = tuple(range(48)), tuple(range(0, 48, 2)), (3, 5, 8)
# What each of the four layers keeps: KV groups, channels.
PLANS = {
    "uniform": [((0,), HALF)] * 4,
    "shorter": [((0, 1), ALL), ((), ()), ((0, 1), ALL), ((0, 1), ALL)],
    "uneven": [((1,), FEW), ((0, 1), HALF), ((0,), ALL), ((0, 1), ALL)],
    "no_first_attention": [((), HALF), ((0,), HALF), ((0, 1), HALF), ((0,), HALF)],
    "no_mlp": [((0, 1), ALL), ((0,), ()), ((), FEW), ((), ())],
    "leading": [((), ()), ((), FEW), ((1,), ()), ((0, 1), HALF)],
    "first_gone": [((), ()), ((1,), HALF), ((0,), HALF), ((0,), HALF)],
}
# With the mean of what was cut as biases, and as a constant in place of the first attention.
COMPENSATED = ("uniform_mean", "no_first_attention_mean", "leading_mean", "first_gone_mean")
KINDS = ("dense", *PLANS, *COMPENSATED)
# Layers that are all alike: a stock class of some family holds them.
ALIKE = ("dense", "uniform", "shorter", "first_gone", "uniform_mean", "first_gone_mean")


def model_types(family, kind):
    """What each format is written as; None where it is refused."""
    mean = kind.endswith("_mean")
    # llama has flags for all biases, mistral for none, qwen2 for no outputs, qwen3 for no MLP
    carrier = family if not mean or family == "llama" else None if family == "qwen3" else "granite"
    return {
        "stock": carrier if kind in ALIKE else None,
        "heterogeneous": f"pruned_{family}",
        "padded": carrier,
    }


def pruned(family="llama", kind="uneven", **options):
    """A model of one's own, with a ``pruning_record``."""
    try:
        return copy.deepcopy(_pruned(family, kind, **options))
    except TypeError:  # an option that is no key
        return _pruned.__wrapped__(family, kind, **options)


@functools.cache
def _pruned(family, kind, **options):
    model = tiny_model(family, **options)
    if kind == "dense":
        return model
    spec = spec_for(model)
    layers = PLANS[kind.removesuffix("_mean")]
    plan = PruningPlan(
        spec.fingerprint,
        tuple(LayerPlan(i, groups, channels) for i, (groups, channels) in enumerate(layers)),
        provenance={"seed": 7},
    )
    compensation = None
    if kind.endswith("_mean"):
        rows = RowSet.of(Row.of(row) for row in tiny_rows(8))
        compensation = mean_compensation(model, plan, replay(model, rows).units)
    apply_plan(model, plan, compensation)
    model.pruning_record = PruningRecord(plan, report_for(plan))
    return model


def report_for(plan):
    row = ReportRow(
        key="parameters", label="Parameters", unit="count", before=200.0, after=100.0, note="half"
    )
    return PruningReport(
        requested_ratio=0.5,
        achieved_ratio=0.499,
        total_ratio=0.4,
        preset="paper",
        plan_digest=plan.digest,
        dry_run=False,
        rows=(row,),
        calibration={"samples": 8, "tokens": {"calibrate": 64}, "data_digest": "abc123"},
        config={"seed": 7},
        warnings=("a warning",),
    )


def logits(model):
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def alter(path, change):
    """Change a JSON file in place."""
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


def forge(directory):
    """Make the manifest agree with the files again, as an attacker would."""

    def update(whole):
        for name in whole["files"]:
            path = directory / name
            if path.is_file():
                whole["files"][name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}

    alter(directory / "MANIFEST.json", update)

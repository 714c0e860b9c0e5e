"""What the tests of single presets share: models, their calibrations, plans."""

from functools import cache

import torch

from lit_prune.allocation import make_budget
from lit_prune.calibration import Row, RowSet
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.measuring import calibrate
from lit_prune.methods import PRESETS
from lit_prune.methods.decision import Case
from lit_prune.planning import make_plan
from tests.models import tiny_model, tiny_rows

# KV heads: multi-head attention (4 query heads), grouped queries.
KV_HEADS = (4, 2)


@cache
def model_of(kv_heads):
    """Layers of unequal weight, so that a method has something to see."""
    model = tiny_model(kv_heads=kv_heads, layers=4, intermediate_size=96)
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, (1.0, 0.4, 0.2, 0.7), strict=True):
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


@cache
def calibrated(name, kv_heads, order=1):
    rows = RowSet.of(map(Row.of, tiny_rows(16, uneven=True)[::order]))
    config = PruningConfig(pruning_ratio=0.3, preset=name)
    return calibrate(model_of(kv_heads), rows, config, progress=False)


def plan(name, kv_heads, ratio, *, order=1, **options):
    config = PruningConfig(pruning_ratio=ratio, preset=name, **options)
    return make_plan(model_of(kv_heads), calibrated(name, kv_heads, order), config).plan


def check_ratio(name, kv_heads, ratio, **options):
    """The plan removes what was asked for, and the same plan is made from the same text."""
    found = plan(name, kv_heads, ratio, **options)
    assert abs(found.provenance["achieved_ratio"] - ratio) <= 0.005
    assert plan(name, kv_heads, ratio, order=-1, **options) == found
    return found


def case_of(name, kv_heads, ratio=0.3, judge=None, **options):
    """The case that a preset is given."""
    config = PRESETS[name].resolve(PruningConfig(pruning_ratio=ratio, preset=name, **options))
    model = model_of(kv_heads)
    budget = make_budget(spec_for(model), config)
    calibration = calibrated(name, kv_heads)
    return Case(model=model, calibration=calibration, budget=budget, judge=judge, diverges=None)

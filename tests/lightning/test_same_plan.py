"""Law 5: the same samples, the same kept units, whatever road they come on."""

import pytest

from lit_prune import prune
from tests.lightning.modules import LM, fit, loader, pruner, trainer
from tests.models import batches_of, tiny_model, tiny_rows

ROWS = tiny_rows(40, 24, seed=4, uneven=True)
OPTIONS = {"channel_multiple": 4, "latency_prompt_tokens": 0}


def by_prune(folder, rows, **options):
    model = tiny_model(kv_heads=4)
    batches = batches_of(rows, 7)
    return prune(model, batches, pruning_ratio=0.3, progress=False, **OPTIONS, **options).plan


def by_validate(folder, rows, *, loaded=None, **options):
    callback, module = pruner(when="validate", **options), LM(tiny_model(kv_heads=4))
    trainer(folder, callback).validate(module, loaded or loader(rows), verbose=False)
    return callback.plan_


def by_fit(folder, rows, *, loaded=None, run=None, **options):
    callback, module = pruner(**options), LM(tiny_model(kv_heads=4), lr=0.0)
    fit(folder, module, callback, val=loaded or loader(rows), **(run or {}))
    return callback.plan_


ROADS = [
    {"preset": "conditional"},
    {"preset": "paper"},
    {"preset": "paper", "allocator": "uniform"},
]


@pytest.mark.parametrize("options", ROADS, ids=str)
def test_law_5_every_road_gives_the_same_plan(tmp_path, options):
    turned = ROWS[::-1]
    plans = {
        "prune": by_prune(tmp_path, ROWS, **options),
        "again": by_prune(tmp_path, ROWS, **options),
        "validate": by_validate(tmp_path, ROWS, **options),
        "fit": by_fit(tmp_path, ROWS, **options),
        "one by one, unpadded": by_validate(tmp_path, ROWS, loaded=loader(ROWS, 1), **options),
        "padded on the left, turned": by_fit(
            tmp_path, ROWS, loaded=loader(turned, 5, side="left", extra=3), **options
        ),
        "repeated": by_validate(tmp_path, ROWS + ROWS[:9], **options),
        "several validations": by_fit(
            tmp_path, ROWS, run={"max_epochs": 2, "val_check_interval": 1}, **options
        ),
    }
    assert {plan.digest for plan in plans.values()} == {plans["prune"].digest}


def test_other_samples_give_another_plan(tmp_path):
    other = tiny_rows(40, 24, seed=9)
    assert by_prune(tmp_path, ROWS).digest != by_prune(tmp_path, other).digest

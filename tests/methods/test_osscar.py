from itertools import combinations

import pytest
import torch

from lit_prune.decoder import DecoderParts
from lit_prune.importance import conditional_mean, damped, output_error
from lit_prune.importance.columns import columns_of
from tests.methods.cases import KV_HEADS, calibrated, check_ratio, model_of, plan

NAME = "osscar"


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_ratio_is_met_by_layers_alike(kv_heads, ratio):
    found = check_ratio(NAME, kv_heads, ratio)
    assert len({len(layer.kv_groups) for layer in found.layers}) == 1
    assert len({len(layer.channels) for layer in found.layers}) == 1


def error(kv_heads, place, units, width):
    weight = DecoderParts(model_of(kv_heads)).output(*place).weight.detach().double()
    covariance = damped(calibrated(NAME, kv_heads).covariances[place], 0.01)
    columns = columns_of(torch.tensor(units), width)
    return output_error(covariance, weight, conditional_mean(covariance, weight, columns), columns)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_swaps_are_never_worse_than_elimination(kv_heads):
    found = plan(NAME, kv_heads, 0.5)
    exchanges = found.provenance["method"]["exchanges"]
    assert sum(search["swaps"] for search in exchanges) > 0
    for search in exchanges:
        place = (search["layer"], search["kind"])
        layer = found.layers[place[0]]
        attends = place[1] == "attention"
        units = layer.kv_groups if attends else layer.channels
        here = error(kv_heads, place, units, 32 // kv_heads if attends else 1)
        curve = calibrated(NAME, kv_heads).curves[place]
        eliminated = float(curve[len(curve) - 1 - len(units), 1])
        assert search["error"] == pytest.approx([eliminated, here])
        assert here <= eliminated * (1 + 1e-9)


def test_kv_groups_are_the_best_of_all_choices():
    found = plan(NAME, 4, 0.5)
    for index, layer in enumerate(found.layers):
        place, kept = (index, "attention"), layer.kv_groups
        best = min(error(4, place, some, 8) for some in combinations(range(4), len(kept)))
        assert error(4, place, kept, 8) == pytest.approx(best)


def test_protected_layers_and_nothing_asked():
    found = check_ratio(NAME, 2, 0.25, protected_layers=(0,))
    assert len(found.layers[0].channels) == 96
    nothing = plan(NAME, 2, 0.0)
    assert all(len(layer.channels) == 96 for layer in nothing.layers)

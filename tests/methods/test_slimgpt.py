import math

import pytest
import torch

from lit_prune.importance import conditional_mean
from lit_prune.importance.columns import columns_of
from lit_prune.importance.pivot import kept_table
from lit_prune.methods.slimgpt import batched_greedy, group_errors, layer_ratios
from tests.importance.gaussians import covariance_of, random_weight
from tests.methods.cases import KV_HEADS, check_ratio, plan

NAME = "slimgpt"


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_ratio_is_met(kv_heads, ratio):
    check_ratio(NAME, kv_heads, ratio)


def test_ratios_rise_with_the_logarithm_of_the_layer():
    ratios = layer_ratios([10.0] * 32, 0.5 * 320)
    assert sum(ratios) / 32 == pytest.approx(0.5)
    for i, ratio in enumerate(ratios):
        assert ratio == pytest.approx(ratios[-1] * math.log(i + 1) / math.log(32))
    # the value that others report for 32 layers at 50 %
    assert ratios[-1] == pytest.approx(0.68, abs=0.005)


@pytest.mark.parametrize(
    ("sizes", "target"),
    [([1.0, 1.0, 1.0, 1.0], 3.6), ([1.0, 1.0], 1.5), ([5.0], 2.0), ([0.0, 3.0, 1.0], 1.0)],
)
def test_ratios_meet_the_target_and_stay_ratios(sizes, target):
    ratios = layer_ratios(sizes, target)
    assert sum(size * ratio for size, ratio in zip(sizes, ratios, strict=True)) == pytest.approx(
        target
    )
    assert all(0 <= ratio <= 1 for ratio in ratios)
    assert ratios == sorted(ratios)


def naive_errors(covariance, weight, left, width):
    """By the formula: a Cholesky factor for each unit's block of the inverse."""
    columns = columns_of(torch.tensor(left), width)
    inverse = torch.linalg.inv(covariance[columns][:, columns])
    new = conditional_mean(covariance, weight, columns)
    errors = []
    for number in range(len(left)):
        own = range(number * width, (number + 1) * width)
        factor = torch.linalg.cholesky(inverse[own][:, own])
        errors.append(
            sum((new[:, j].square().sum() / factor[k, k] ** 2).item() for k, j in enumerate(own))
        )
    return errors


@pytest.mark.parametrize(("columns", "width"), [(40, 1), (40, 8)])
def test_errors_follow_the_formula(columns, width):
    covariance, weight = covariance_of(columns), random_weight(12, columns)
    expected = naive_errors(covariance, weight, list(range(columns // width)), width)
    found = group_errors(kept_table(covariance, weight), width)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("columns", "width", "count"), [(70, 1, 30), (48, 8, 2)])
def test_batches_are_those_of_the_formula(columns, width, count):
    covariance, weight = covariance_of(columns, condition=1e3), random_weight(12, columns)
    left = list(range(columns // width))
    while (over := len(left) - count) > 0:
        batch = 1 if width > 1 else min(over, max(8, min(1024, over // 2)))
        errors = naive_errors(covariance, weight, left, width)
        gone = sorted(range(len(left)), key=errors.__getitem__)[:batch]
        left = [unit for number, unit in enumerate(left) if number not in gone]
    assert batched_greedy(covariance, weight, count, width).tolist() == left


def test_deep_layers_lose_more():
    found = plan(NAME, 2, 0.3)
    kept = [len(layer.channels) for layer in found.layers]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_protected_layers_and_nothing_asked():
    found = check_ratio(NAME, 2, 0.25, protected_layers=(3,))
    assert len(found.layers[3].channels) == 96
    nothing = plan(NAME, 2, 0.0)
    assert all(len(layer.channels) == 96 for layer in nothing.layers)

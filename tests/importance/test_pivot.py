from itertools import combinations

import pytest
import torch

from lit_prune.errors import ScoreError
from lit_prune.importance import conditional_mean, damage_curve, output_error
from lit_prune.importance.columns import columns_of
from lit_prune.importance.pivot import cut_table, exchanged, kept_table, pivot, unit_errors
from tests.importance.gaussians import covariance_of, random_weight

# columns, outputs, columns of a unit, units kept
CASES = [(24, 9, 1, 13), (24, 40, 1, 5), (30, 7, 3, 4), (40, 9, 10, 2)]


def error(covariance, weight, units, width):
    """Expected squared output error of least squares on these units, solved directly."""
    columns = columns_of(torch.tensor(sorted(units), dtype=torch.int64), width)
    new = conditional_mean(covariance, weight, columns)
    return output_error(covariance, weight, new, columns)


def problem(columns, out, seed=0):
    return covariance_of(columns, condition=1e3, seed=seed), random_weight(out, columns, seed + 1)


@pytest.mark.parametrize(("columns", "out", "width", "count"), CASES)
def test_table_tells_what_every_unit_is_worth(columns, out, width, count):
    covariance, weight = problem(columns, out)
    table = cut_table(covariance, weight)
    kept = set(range(0, columns // width, 2))
    pivot(table, columns_of(torch.tensor(sorted(kept)), width))
    here = error(covariance, weight, kept, width)
    expected = [
        abs(error(covariance, weight, kept ^ {unit}, width) - here)
        for unit in range(columns // width)
    ]
    torch.testing.assert_close(unit_errors(table, width), torch.tensor(expected).double())


def test_all_kept_is_all_cut_pivoted_on_everything():
    covariance, weight = problem(12, 5)
    table = cut_table(covariance, weight)
    pivot(table, torch.arange(12))
    torch.testing.assert_close(table, kept_table(covariance, weight))


def test_pivoting_twice_changes_nothing():
    covariance, weight = problem(12, 5)
    table = cut_table(covariance, weight)
    before = table.clone()
    for _ in range(2):
        pivot(table, torch.tensor([3, 7, 8]))
    torch.testing.assert_close(table, before)


@pytest.mark.parametrize(("columns", "out", "width", "count"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_no_single_exchange_improves_the_result(columns, out, width, count, seed):
    covariance, weight = problem(columns, out, seed)
    order = damage_curve(covariance, weight, width).order
    first = order[len(order) - count :]
    kept, swaps = exchanged(covariance, weight, first, width)
    assert len(kept) == count
    assert kept.tolist() == sorted(set(kept.tolist()))
    here = error(covariance, weight, kept.tolist(), width)
    assert here <= error(covariance, weight, first.tolist(), width) * (1 + 1e-12)
    assert (swaps > 0) == (set(kept.tolist()) != set(first.tolist()))
    cut = set(range(len(order))) - set(kept.tolist())
    others = [
        error(covariance, weight, set(kept.tolist()) - {leaves} | {enters}, width)
        for leaves in kept.tolist()
        for enters in cut
    ]
    # an exchange may be left undone for less than 1e-9 of what is written
    assert min(others) >= here - 2e-9 * error(covariance, weight, set(), width)


@pytest.mark.parametrize("seed", range(8))
def test_against_every_choice_of_units(seed):
    """The best of all choices, and never worse than elimination alone."""
    covariance, weight = problem(9, 4, seed)
    order = damage_curve(covariance, weight).order
    for count in (3, 5):
        first = order[len(order) - count :]
        kept, _ = exchanged(covariance, weight, first)
        best = min(error(covariance, weight, some, 1) for some in combinations(range(9), count))
        found = error(covariance, weight, kept.tolist(), 1)
        assert found >= best * (1 - 1e-9)
        assert found <= 1.2 * best  # a local optimum may miss the best; on these, by little


def test_exchange_finds_what_elimination_misses():
    """x2 = x0 + x1 leaves first, as the other two tell it; if one may stay, it is that one."""
    root = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).double()
    covariance = root.T @ root + 0.01 * torch.eye(3)
    weight = torch.tensor([[1.0, 1.0, 0.01]])
    order = damage_curve(covariance, weight).order
    assert order[0] == 2
    kept, swaps = exchanged(covariance, weight, order[2:])
    assert (kept.tolist(), swaps) == ([2], 1)


def test_max_swaps_ends_it():
    covariance, weight = problem(24, 9)
    worst = damage_curve(covariance, weight).order[:10]
    _, free = exchanged(covariance, weight, worst)
    assert free > 2
    assert exchanged(covariance, weight, worst, max_swaps=2)[1] == 2


def test_few_candidates_still_never_lose():
    covariance, weight = problem(24, 9)
    worst = damage_curve(covariance, weight).order[:10]
    kept, swaps = exchanged(covariance, weight, worst, candidates=1)
    assert swaps
    before = error(covariance, weight, worst.tolist(), 1)
    assert error(covariance, weight, kept.tolist(), 1) < before


@pytest.mark.parametrize("kept", [[], [0, 1, 2, 3]])
def test_nothing_to_exchange(kept):
    covariance, weight = problem(4, 2)
    found, swaps = exchanged(covariance, weight, torch.tensor(kept, dtype=torch.int64))
    assert (found.tolist(), swaps) == (kept, 0)


def test_a_singular_covariance_is_refused():
    with pytest.raises(ScoreError, match="not positive definite"):
        exchanged(torch.ones(3, 3), torch.ones(1, 3), torch.tensor([0, 1]))

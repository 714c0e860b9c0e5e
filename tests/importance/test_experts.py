"""Damage of removing experts, against sums over tokens written out."""

import itertools

import pytest
import torch

from lit_prune.errors import ScoreError
from lit_prune.importance import experts_damage, experts_order

TOKENS, EXPERTS, WIDTH = 40, 5, 3


@pytest.fixture
def written():
    """What each expert adds, ``[tokens, experts, width]``, mostly zero as if routed."""
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(TOKENS, EXPERTS, WIDTH, generator=generator, dtype=torch.float64)
    return made * (torch.rand(TOKENS, EXPERTS, 1, generator=generator) < 0.5)


def gram_of(written):
    return torch.einsum("teh,tfh->ef", written, written) / TOKENS


def naive(written, gone):
    return float(written[:, list(gone)].sum(1).square().sum(-1).mean())


def test_the_damage_of_an_order_is_the_mean_squared_norm_of_what_vanishes(written):
    for order in ([2, 0, 4, 1, 3], [3, 1, 4, 0, 2]):
        found = experts_damage(gram_of(written), torch.tensor(order))
        wanted = [naive(written, order[:count]) for count in range(EXPERTS + 1)]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_each_expert_that_leaves_is_the_one_that_adds_least(written):
    order = experts_order(gram_of(written)).tolist()
    assert sorted(order) == list(range(EXPERTS))
    for count in range(1, EXPERTS + 1):
        gone, rest = order[: count - 1], set(range(EXPERTS)) - set(order[: count - 1])
        best = min(rest, key=lambda expert: naive(written, [*gone, expert]))
        assert order[count - 1] == best


def test_greedy_finds_a_pair_that_cancels_and_experts_that_never_write(written):
    written[:, 1] = -written[:, 3]  # together they add nothing
    written[:, 4] = 0
    order = experts_order(gram_of(written)).tolist()
    damage = experts_damage(gram_of(written), torch.tensor(order))
    assert order[0] == 4
    assert float(damage[1]) == 0
    pairs = itertools.pairwise(order)
    assert (1, 3) in pairs or (3, 1) in itertools.pairwise(order)


@pytest.mark.parametrize(
    ("gram", "reason"),
    [(torch.ones(2, 3), r"shape \[2, 3\]"), (torch.full((2, 2), torch.nan), "4 of 4 values")],
)
def test_what_is_no_gram_matrix_is_refused(gram, reason):
    with pytest.raises(ScoreError, match=reason):
        experts_order(gram)
    with pytest.raises(ScoreError, match="expected each of 2 experts exactly once"):
        experts_damage(torch.eye(2), torch.tensor([0, 0]))

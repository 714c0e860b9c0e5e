import itertools
import math
import random
import warnings

import numpy as np
import pytest

from lit_prune.allocation import cluster_ladder, lowest_cluster, mean_ladder
from lit_prune.errors import ConfigError, ScoreError

METHODS = ("kmeans", "exact")


def inertia(values, clusters):
    return sum(sum((values[i] - np.mean(values[list(c)])) ** 2 for i in c) for c in clusters)


def least_inertia(values, num_clusters):
    """Every way to cut the sorted values into ``num_clusters`` runs."""
    ordered = np.sort(values)
    cuts = itertools.combinations(range(1, len(ordered)), num_clusters - 1)
    return min(
        sum(((p - p.mean()) ** 2).sum() for p in np.split(ordered, list(cut))) for cut in cuts
    )


@pytest.mark.parametrize("seed", range(60))
def test_exact_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=int(rng.integers(5, 13)))
    if seed % 3 == 0:
        values = np.round(values, 1)  # repeated values
    num_clusters = int(rng.integers(2, 5))
    if len(np.unique(values)) <= num_clusters:
        return
    found = inertia(values, cluster_ladder(values, num_clusters, method="exact"))
    assert found == pytest.approx(least_inertia(values, num_clusters), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_exact_is_never_worse_than_kmeans(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(-3, 1, 150), rng.gamma(2.0, 1.0, 250)])
    for num_clusters in (2, 3, 6):
        exact = inertia(values, cluster_ladder(values, num_clusters, method="exact"))
        kmeans = inertia(values, cluster_ladder(values, num_clusters, method="kmeans"))
        assert exact <= kmeans * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_ladder_partitions_the_units_in_ascending_order(method):
    values = np.random.default_rng(3).normal(size=300)
    ladder = cluster_ladder(values, 6, method=method)
    assert sorted(itertools.chain(*ladder)) == list(range(300))
    assert all(list(step) == sorted(step) for step in ladder)
    for low, high in itertools.pairwise(ladder):
        assert values[list(low)].max() < values[list(high)].min()
    assert ladder[0] == lowest_cluster(values, 6, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_more_clusters_give_a_smaller_lowest_one_on_a_flat_distribution(method):
    values = np.linspace(0, 1, 600)
    sizes = [len(lowest_cluster(values, k, method=method)) for k in (2, 3, 6)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("method", METHODS)
def test_wide_mlp_is_clustered_quickly_and_independently_of_scale(method):
    values = np.random.default_rng(0).normal(size=14336)
    lowest = lowest_cluster(values, 6, method=method)
    assert 0 < len(lowest) < 14336 / 2
    assert lowest == lowest_cluster(values * 2.0**40, 6, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_f19_equal_entropies_have_no_lowest_cluster(method):
    assert lowest_cluster([1.5] * 8, 3, method=method) == ()
    assert cluster_ladder([1.5] * 8, 3, method=method) == (tuple(range(8)),)
    assert lowest_cluster([1.5], 3, method=method) == ()
    assert lowest_cluster([], 3, method=method) == ()
    assert cluster_ladder([], 3, method=method) == ()


@pytest.mark.parametrize("method", METHODS)
def test_f19_fewer_distinct_values_than_clusters(method):
    assert cluster_ladder([2.0, 1.0, 2.0, 1.0], 6, method=method) == ((1, 3), (0, 2))
    # dead channels: the floor of the entropy, far below everything else
    values = [-13.8, 0.1, -13.8, 0.2, 0.15]
    assert lowest_cluster(values, 3, method=method) == (0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_f20_an_entropy_that_is_not_finite_is_refused_by_unit(method, bad):
    with pytest.raises(ScoreError, match="entropy of unit 1 is"):
        lowest_cluster([0.0, bad, 1.0], 2, method=method)


def test_f20_a_wrong_shape_is_refused():
    with pytest.raises(ScoreError, match=r"got shape \(2, 3\)"):
        lowest_cluster(np.zeros((2, 3)), 2)


@pytest.mark.parametrize("method", METHODS)
def test_f21_equal_values_share_a_cluster_and_the_order_of_units_does_not_matter(method):
    rng = random.Random(5)
    values = np.round(np.random.default_rng(5).normal(size=200), 1)
    ladder = cluster_ladder(values, 4, method=method)
    of_value = {}
    for k, step in enumerate(ladder):
        for unit in step:
            assert of_value.setdefault(values[unit], k) == k
    order = list(range(200))
    rng.shuffle(order)
    shuffled = cluster_ladder(values[order], 4, method=method)
    assert [sorted(order[i] for i in step) for step in shuffled] == [list(s) for s in ladder]


def test_f21_kmeans_does_not_depend_on_threads_or_global_seeds():
    from threadpoolctl import threadpool_limits

    values = np.random.default_rng(8).normal(size=5000)
    np.random.seed(0)
    with threadpool_limits(limits=1):
        one = cluster_ladder(values, 6)
    np.random.seed(1)
    with threadpool_limits(limits=2):
        two = cluster_ladder(values, 6)
    assert one == two


def test_kmeans_is_quiet_where_values_almost_coincide():
    values = 1e6 + np.arange(12) * 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ladder = cluster_ladder(values, 4)
    assert sorted(itertools.chain(*ladder)) == list(range(12))


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="num_clusters must be at least 2, got 1"):
        lowest_cluster([1.0, 2.0], 1)
    with pytest.raises(ConfigError, match="clustering method must be one of"):
        lowest_cluster([1.0, 2.0], 2, method="jenks")


@pytest.mark.parametrize("seed", range(20))
def test_mean_threshold_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=30).round(1 if seed % 2 else 9)
    mean = math.fsum(values) / 30
    below = tuple(i for i in range(30) if values[i] < mean)
    assert mean_ladder(values) == (below, tuple(i for i in range(30) if i not in below))


def test_f19_f21_mean_threshold_of_equal_values_and_in_any_order():
    assert mean_ladder([]) == ()
    # the mean of these is one rounding above all of them
    assert np.mean([0.1] * 3) > 0.1
    assert mean_ladder([0.1] * 3) == ((0, 1, 2),)
    values = np.round(np.random.default_rng(5).normal(size=200), 1)
    order = np.random.default_rng(6).permutation(200)
    shuffled = mean_ladder(values[order])
    assert [sorted(order[list(step)].tolist()) for step in shuffled] == [
        list(step) for step in mean_ladder(values)
    ]
    with pytest.raises(ScoreError, match="entropy of unit 1 is nan"):
        mean_ladder([0.0, math.nan])

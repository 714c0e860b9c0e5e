"""Which units carry least: one-dimensional clusters of unit entropies (paper A, section 3.3)."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from lit_prune.errors import ConfigError, ScoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]
    Indices = npt.NDArray[np.int64]

ClusterMethod = Literal["kmeans", "exact"]


def lowest_cluster(
    entropy: Sequence[float] | npt.NDArray[np.floating],
    num_clusters: int,
    *,
    method: ClusterMethod = "kmeans",
    seed: int = 0,
) -> tuple[int, ...]:
    """Indices of the units in the cluster of lowest mean entropy: those that the paper prunes.

    Units that are all equal form one cluster, of which none stands out as low: nothing is returned.

    Args:
        entropy: One value for each unit of one sub-block, ``[units]``, nats, finite.
        num_clusters: K, at least 2. A larger K gives a smaller lowest cluster. With fewer distinct
            values than clusters, each distinct value is a cluster.
        method: ``"kmeans"`` is the paper's (scikit-learn: k-means++, 10 starts); ``"exact"`` is the
            global optimum of the same objective by dynamic programming, without seed.
        seed: Of the k-means++ starts.

    Returns:
        Unit indices, ascending. Equal entropies are always in the same cluster, and the result does
        not depend on the order of the units or on the number of threads.

    Raises:
        ConfigError: If ``num_clusters`` is below 2 or ``method`` is unknown.
        ScoreError: If an entropy is not finite; names the first such unit.

    Example:
        >>> lowest_cluster([0.1, 5.0, 0.2, 4.9, 9.0], 3)
        (0, 2)
        >>> lowest_cluster([1.0, 1.0, 1.0], 3)
        ()

    References:
        Yang et al., "Let LLM Tell What to Prune and How Much to Prune", ICML 2025, section 3.3 and
        appendix A.
    """
    ladder = cluster_ladder(entropy, num_clusters, method=method, seed=seed)
    return ladder[0] if len(ladder) > 1 else ()


def cluster_ladder(
    entropy: Sequence[float] | npt.NDArray[np.floating],
    num_clusters: int,
    *,
    method: ClusterMethod = "kmeans",
    seed: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """All clusters, lowest mean entropy first: the order in which a target is topped up.

    A partition of the units: each index is in exactly one cluster. Arguments and errors as in
    `lowest_cluster`, whose result is the first step (unless the ladder has only one).

    Returns:
        At most ``num_clusters`` tuples of unit indices, each ascending, none empty.

    Example:
        >>> cluster_ladder([0.1, 5.0, 0.2, 4.9, 9.0], 3, method="exact")
        ((0, 2), (1, 3), (4,))
    """
    if method not in get_args(ClusterMethod):
        raise ConfigError(
            f"clustering method must be one of {get_args(ClusterMethod)}, got {method!r}."
        )
    if isinstance(num_clusters, bool) or num_clusters < 2:
        raise ConfigError(
            f"num_clusters must be at least 2, got {num_clusters!r}: a single cluster holds "
            "every unit."
        )
    distinct, inverse, counts = _distinct(entropy)
    if len(distinct) <= num_clusters:
        label = np.arange(len(distinct))
    else:
        # To [-1, 1]: the objective does not change, and neither squares nor differences can
        # overflow.
        scaled = distinct / max(abs(distinct[0]), abs(distinct[-1]))
        scaled = scaled - np.average(scaled, weights=counts)
        weight = counts.astype(np.float64)
        if method == "exact":
            label = _exact_labels(scaled, weight, num_clusters)
        else:
            label = _kmeans_labels(scaled, weight, num_clusters, seed)
    return _ladder(label[inverse])


def mean_ladder(
    entropy: Sequence[float] | npt.NDArray[np.floating],
) -> tuple[tuple[int, ...], ...]:
    """Units below the mean, then the others: the threshold that the paper compares K-means with.

    Arguments and errors as in `cluster_ladder`; units that are all equal are one step.

    Example:
        >>> mean_ladder([0.1, 5.0, 0.2, 4.9, 9.0])
        ((0, 2), (1, 3, 4))
    """
    distinct, inverse, counts = _distinct(entropy)
    if not len(distinct):
        return ()
    # rounding must not put the largest value below the mean
    mean = min(np.average(distinct, weights=counts), distinct[-1])
    return _ladder((distinct >= mean).astype(np.int64)[inverse])


def _distinct(
    entropy: Sequence[float] | npt.NDArray[np.floating],
) -> tuple[Vector, Indices, Indices]:
    """Return the sorted distinct values, which of them each unit has, and how many units have each.

    Working on these keeps equal units together and forgets the units' order.
    """
    values = np.asarray(entropy, np.float64)
    if values.ndim != 1:
        raise ScoreError(
            f"unit entropies must be one value for each unit, got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        unit = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ScoreError(f"entropy of unit {unit} is {values[unit]}; expected finite (nats).")
    return np.unique(values, return_inverse=True, return_counts=True)


def _ladder(label: Indices) -> tuple[tuple[int, ...], ...]:
    """Return the units of each label, lowest first, labels without units left out."""
    clusters = (np.flatnonzero(label == k) for k in range(int(label.max(initial=-1)) + 1))
    return tuple(tuple(units.tolist()) for units in clusters if len(units))


def _kmeans_labels(values: Vector, weight: Vector, num_clusters: int, seed: int) -> Indices:
    from sklearn.cluster import KMeans  # slow to import, and not every allocation clusters
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    model = KMeans(num_clusters, init="k-means++", n_init=10, random_state=seed)
    # Threads add their partial sums in the order in which they finish: one thread, one result.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # ConvergenceWarning: values a rounding apart may coincide; fewer clusters are fine here.
        warnings.simplefilter("ignore")
        model.fit(values[:, None], sample_weight=weight)
    centres = np.sort(model.cluster_centers_[:, 0])
    # Nearest centre, read off the midpoints: intervals whatever rounding the labels saw.
    label: Indices = np.searchsorted((centres[:-1] + centres[1:]) / 2, values, side="left")
    return label


def _exact_labels(values: Vector, weight: Vector, num_clusters: int) -> Indices:
    """Label sorted distinct values: least weighted sum of squared distances to the means.

    ``D_k(j) = min_i D_{k-1}(i) + cost(i, j)``. The best ``i`` never falls as ``j`` grows (the cost
    is Monge), so divide and conquer needs O(K n log n); see Wang and Song, "Ckmeans.1d.dp", The R
    Journal 3/2 (2011), and Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence
    clustering in 1D" (2017).
    """
    n = len(values)
    prefix = np.zeros((3, n + 1))
    np.cumsum([weight, weight * values, weight * values**2], axis=1, out=prefix[:, 1:])

    def cost(start: Indices, stop: Indices) -> Vector:
        mass, first, second = prefix[:, stop] - prefix[:, start]
        within: Vector = np.maximum(second - first**2 / mass, 0.0)
        return within

    everything = np.arange(1, n + 1)
    best = np.full(n + 1, math.inf)
    best[1:] = cost(np.zeros(n, np.int64), everything)
    splits = np.zeros((num_clusters, n + 1), np.int64)
    for k in range(1, num_clusters):
        best, splits[k] = _next_row(best, cost, k)
    label = np.zeros(n, np.int64)
    stop = n
    for k in range(num_clusters - 1, 0, -1):
        start = int(splits[k, stop])
        label[start:stop] = k
        stop = start
    return label


def _next_row(
    best: Vector, cost: Callable[[Indices, Indices], Vector], k: int
) -> tuple[Vector, Indices]:
    """One more cluster: all midpoints of one recursion depth at once, in numpy."""
    n = len(best) - 1
    row, split = np.full(n + 1, math.inf), np.zeros(n + 1, np.int64)
    # Each part: prefixes low..high (inclusive) whose best split lies in first..last (inclusive).
    low, high = np.array([k + 1]), np.array([n])
    first, last = np.array([k]), np.array([n - 1])
    while len(low):
        middle = (low + high) // 2
        final = np.minimum(last, middle - 1)
        length = final - first + 1
        offset = np.concatenate([[0], np.cumsum(length)[:-1]])
        start = np.arange(int(length.sum())) + np.repeat(first - offset, length)
        value = best[start] + cost(start, np.repeat(middle, length))
        row[middle] = np.minimum.reduceat(value, offset)
        # The first of equal minima, so that ties do not depend on how the work is cut.
        hit = np.flatnonzero(value == np.repeat(row[middle], length))
        part = np.searchsorted(offset, hit, side="right") - 1
        split[middle] = start[hit[np.unique(part, return_index=True)[1]]]
        left, right = low < middle, middle < high
        low, high, first, last = (
            np.concatenate([low[left], middle[right] + 1]),
            np.concatenate([middle[left] - 1, high[right]]),
            np.concatenate([first[left], split[middle][right]]),
            np.concatenate([split[middle][left], last[right]]),
        )
    return row, split

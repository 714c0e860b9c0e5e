"""From scores and a budget to what goes: pure functions over plain numbers, no model in sight."""

from lit_prune.allocation.budget import Budget, make_budget
from lit_prune.allocation.clusters import cluster_ladder, lowest_cluster
from lit_prune.allocation.depth_first import depth_first
from lit_prune.allocation.greedy import greedy
from lit_prune.allocation.ratios import block_ratios
from lit_prune.allocation.reachable import reachable_totals
from lit_prune.allocation.search import Candidate, Selection
from lit_prune.allocation.settle import Ranking, meet, settle
from lit_prune.allocation.uniform import uniform_choice, uniform_counts

__all__ = [
    "Budget",
    "Candidate",
    "Ranking",
    "Selection",
    "block_ratios",
    "cluster_ladder",
    "depth_first",
    "greedy",
    "lowest_cluster",
    "make_budget",
    "meet",
    "reachable_totals",
    "settle",
    "uniform_choice",
    "uniform_counts",
]

"""From scores and a budget to what goes: pure functions over plain numbers, no model in sight."""

from lit_prune.allocation.alike import alike_choice
from lit_prune.allocation.budget import Budget, make_budget
from lit_prune.allocation.clusters import cluster_ladder, lowest_cluster, mean_ladder
from lit_prune.allocation.cost import Cost, cost_of, latency_cost, parameter_cost
from lit_prune.allocation.coupled import Allocation, coupled_search
from lit_prune.allocation.depth_first import depth_first
from lit_prune.allocation.exact import ReachableTotals
from lit_prune.allocation.greedy import greedy
from lit_prune.allocation.joint import JointSelection, Level, joint_search
from lit_prune.allocation.lowest import global_choice, ratio_choice
from lit_prune.allocation.ratios import block_ratios
from lit_prune.allocation.reachable import reachable_totals
from lit_prune.allocation.search import Candidate, Selection
from lit_prune.allocation.settle import Ranking, meet, require_met, settle, settled
from lit_prune.allocation.targets import aimed, refuse_impossible
from lit_prune.allocation.uniform import uniform_choice

__all__ = [
    "Allocation",
    "Budget",
    "Candidate",
    "Cost",
    "JointSelection",
    "Level",
    "Ranking",
    "ReachableTotals",
    "Selection",
    "aimed",
    "alike_choice",
    "block_ratios",
    "cluster_ladder",
    "cost_of",
    "coupled_search",
    "depth_first",
    "global_choice",
    "greedy",
    "joint_search",
    "latency_cost",
    "lowest_cluster",
    "make_budget",
    "mean_ladder",
    "meet",
    "parameter_cost",
    "ratio_choice",
    "reachable_totals",
    "refuse_impossible",
    "require_met",
    "settle",
    "settled",
    "uniform_choice",
]

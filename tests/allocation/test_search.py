import itertools
import math
import random

import pytest

from lit_prune.allocation import Candidate, Selection, depth_first, greedy
from lit_prune.allocation.bounds import CostBounds
from lit_prune.allocation.search import layer_options
from lit_prune.errors import BudgetError, ConfigError, ScoreError


def candidate(layer, kind, cost, size):
    name = f"layer {layer}" + ("" if kind == "block" else f" {kind}")
    return Candidate(name=name, layer=layer, kind=kind, cost=cost, size=size)


def random_model(rng, num_layers, sizes):
    """Three candidates for most layers; costs of blocks below and above the sum of their halves."""
    out = []
    for layer in range(num_layers):
        attention, mlp = sizes(rng)
        norms = rng.choice([0, 1])
        costs = [rng.random(), rng.random(), rng.random() * 2]
        if rng.random() < 0.2:
            costs = [0.25, 0.5, 0.75]  # ties
        made = [
            candidate(layer, "attention", costs[0], attention),
            candidate(layer, "mlp", costs[1], mlp),
            candidate(layer, "block", costs[2], attention + mlp + norms),
        ]
        out += made if rng.random() < 0.8 else rng.sample(made, rng.randint(1, 2))
    return out


SIZES = {
    "equal": lambda rng: (67, 135),
    "nearly": lambda rng: (67 + rng.randint(0, 1), 135 + rng.randint(0, 1)),
    "random": lambda rng: (rng.randint(1, 99), rng.randint(1, 199)),
    "large": lambda rng: (rng.randint(10**7, 10**8), rng.randint(10**7, 10**8)),
}


def options_naively(candidates):
    layers = {}
    for c in candidates:
        layers.setdefault(c.layer, []).append(c)
    for parts in layers.values():
        halves = [c for c in parts if c.kind != "block"]
        whole = [[c] for c in parts if c.kind == "block"]
        yield [
            *itertools.chain.from_iterable(itertools.combinations(halves, k) for k in range(3)),
            *whole,
        ]


def exhaustive(candidates, minimum, maximum, limit):
    """Least cost over every allowed selection (or None), and how many selections there are."""
    best, count = None, 0
    for choice in itertools.product(*options_naively(candidates)):
        count += 1
        chosen = [*itertools.chain.from_iterable(choice)]
        size = sum(c.size for c in chosen)
        lost = len({c.layer for c in chosen if c.kind != "mlp"})
        if minimum <= size <= maximum and lost <= limit:
            cost = math.fsum(c.cost for c in chosen)
            best = cost if best is None else min(best, cost)
    return best, count


def check(selection, candidates, minimum, maximum, limit):
    assert set(selection.chosen) <= set(candidates)
    assert list(selection.chosen) == sorted(selection.chosen, key=lambda c: (c.layer, c.kind))
    kinds = {}
    for c in selection.chosen:
        kinds.setdefault(c.layer, []).append(c.kind)
    assert all(
        len(k) == len(set(k)) and (k == ["block"] or "block" not in k) for k in kinds.values()
    )
    assert sum(any(k != "mlp" for k in ks) for ks in kinds.values()) <= limit
    assert selection.size == sum(c.size for c in selection.chosen)
    assert selection.cost == math.fsum(c.cost for c in selection.chosen)
    assert minimum <= selection.size <= maximum


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", range(75))
def test_depth_first_equals_exhaustive_search(seed, sizes):
    rng = random.Random(f"{seed} {sizes}")
    num_layers = rng.randint(1, 6)
    candidates = random_model(rng, num_layers, SIZES[sizes])
    top = sum(max(sum(c.size for c in o) for o in os) for os in options_naively(candidates))
    minimum = int(top * rng.uniform(0.02, 1.05))
    maximum = rng.choice([None, minimum + int(top * rng.choice([0, 0.005, 0.05, 0.3]))])
    limit = rng.choice([None, num_layers, num_layers - 1, num_layers // 2, 0])
    within = top if maximum is None else maximum
    at_most = num_layers if limit is None else limit
    best, count = exhaustive(candidates, minimum, within, at_most)

    arguments = {"minimum": minimum, "maximum": maximum, "max_attention_removed": limit}
    seed_selection = greedy(candidates, **arguments)
    if best is None:
        assert seed_selection is None
        with pytest.raises(BudgetError):
            depth_first(candidates, **arguments)
        return
    found = depth_first(candidates, **arguments)
    check(found, candidates, minimum, within, at_most)
    assert found.optimal
    assert found.bound == found.cost
    assert found.cost == pytest.approx(best, rel=1e-11, abs=0)
    assert found.nodes <= count
    if seed_selection is not None:
        check(seed_selection, candidates, minimum, within, at_most)
        assert found.cost <= seed_selection.cost


def test_fewer_nodes_than_exhaustive_enumeration():
    candidates = random_model(random.Random(11), 8, SIZES["random"])
    top = sum(c.size for c in candidates if c.kind == "block")
    found = depth_first(candidates, minimum=top // 3, maximum=top // 3 + top // 200)
    best, count = exhaustive(candidates, top // 3, top // 3 + top // 200, 8)
    assert found.cost == pytest.approx(best, rel=1e-12)
    assert found.nodes < count / 1000


def test_greedy_is_strictly_worse_on_this_instance():
    # Cheapest per parameter first: layer 0 (0.100), then layer 1 (0.125), 3.5 in all. Layer 2
    # (0.128) alone is enough.
    blocks = [
        candidate(0, "block", 1.0, 10),
        candidate(1, "block", 2.5, 20),
        candidate(2, "block", 3.2, 25),
    ]
    greedily, exact = greedy(blocks, minimum=25), depth_first(blocks, minimum=25)
    assert [c.layer for c in greedily.chosen] == [0, 1]
    assert greedily.cost == pytest.approx(3.5)
    assert [c.layer for c in exact.chosen] == [2]
    assert exact.cost == pytest.approx(3.2)
    assert exact.optimal
    assert not greedily.optimal


def test_greedy_drops_what_became_unnecessary():
    blocks = [candidate(0, "block", 0.1, 5), candidate(1, "block", 1.0, 30)]
    assert [c.layer for c in greedy(blocks, minimum=30).chosen] == [1]


def test_greedy_returns_none_where_it_gets_stuck():
    blocks = [candidate(0, "block", 0.1, 20), candidate(1, "block", 9.0, 25)]
    assert greedy(blocks, minimum=25, maximum=30) is None
    assert [c.layer for c in depth_first(blocks, minimum=25, maximum=30).chosen] == [1]


def test_a_block_excludes_its_own_halves_and_may_cost_less_than_both():
    parts = [
        candidate(0, "attention", 1.0, 4),
        candidate(0, "mlp", 1.0, 8),
        candidate(0, "block", 1.5, 12),
    ]
    assert [c.kind for c in depth_first(parts, minimum=12).chosen] == ["block"]
    dear = [*parts[:2], candidate(0, "block", 2.5, 12)]
    assert [c.kind for c in depth_first(dear, minimum=12).chosen] == ["attention", "mlp"]


def test_attention_limit_is_respected_by_both():
    blocks = [candidate(i, "block", 1.0, 10) for i in range(4)]
    blocks += [candidate(i, "mlp", 5.0, 7) for i in range(4)]
    for search in (greedy, depth_first):
        found = search(blocks, minimum=27, max_attention_removed=2)
        assert sum(c.kind == "block" for c in found.chosen) == 2
    assert [c.kind for c in depth_first(blocks, minimum=7, max_attention_removed=0).chosen] == [
        "mlp"
    ]


@pytest.mark.parametrize("minimum", [0, -5])
def test_nothing_to_free_chooses_nothing(minimum):
    for search in (greedy, depth_first):
        found = search([candidate(0, "block", 1.0, 10)], minimum=minimum)
        assert (found.chosen, found.cost, found.optimal) == ((), 0.0, True)


@pytest.mark.parametrize("num_layers", [32, 80])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [None, 0.01, 0.001])
def test_f24_real_depths_are_proven_within_few_nodes(num_layers, sizes, width):
    rng = random.Random(f"{num_layers} {sizes}")
    candidates = random_model(rng, num_layers, SIZES[sizes])
    top = sum(max(sum(c.size for c in o) for o in os) for os in options_naively(candidates))
    for ratio in (0.1, 0.3, 0.5):
        minimum = int(top * ratio)
        maximum = None if width is None else minimum + int(top * width)
        try:
            found = depth_first(
                candidates, minimum=minimum, maximum=maximum, max_attention_removed=num_layers - 1
            )
        except BudgetError:
            assert sizes in ("equal", "nearly")  # few sums: a narrow window may hold none
            assert width == 0.001
            continue
        assert found.optimal
        assert found.nodes < 50_000


def test_f24_node_limit_returns_the_best_so_far_with_its_bound():
    # Many near-equal ratios and a narrow window: greedy is not optimal, and one node proves
    # nothing.
    hits = 0
    for seed in range(40):
        candidates = random_model(random.Random(seed), 6, SIZES["large"])
        top = sum(max(sum(c.size for c in o) for o in os) for os in options_naively(candidates))
        window = {"minimum": top // 3, "maximum": top // 3 + top // 20}
        seed_selection = greedy(candidates, **window)
        best, _ = exhaustive(candidates, window["minimum"], window["maximum"], 6)
        if seed_selection is None or seed_selection.cost <= best * (1 + 1e-9):
            continue
        for node_limit in (0, 1, 3):
            cut = depth_first(candidates, **window, node_limit=node_limit)
            assert not cut.optimal
            assert cut.nodes <= node_limit
            assert cut.bound <= best * (1 + 1e-12)
            assert best <= cut.cost * (1 + 1e-12)
            assert cut.cost <= seed_selection.cost
            hits += 1
    assert hits >= 15


def test_f24_node_limit_without_a_selection_is_said():
    blocks = [candidate(0, "block", 0.1, 20), candidate(1, "block", 9.0, 25)]
    with pytest.raises(BudgetError, match="was found within 0 search nodes"):
        depth_first(blocks, minimum=25, maximum=30, node_limit=0)


def test_f24_no_selection_names_the_nearest_sizes():
    blocks = [candidate(i, "block", 1.0, 1000) for i in range(5)]
    with pytest.raises(
        BudgetError, match=r"frees 2,500 to 2,600 parameters.* nearest .* are 2,000 and 3,000\."
    ):
        depth_first(blocks, minimum=2500, maximum=2600)
    with pytest.raises(BudgetError, match=r"at least 9,000 .* are 5,000\."):
        depth_first(blocks, minimum=9000)
    with pytest.raises(BudgetError, match=r"at most 3 layers without attention; .* are 3,000\."):
        depth_first(blocks, minimum=4000, max_attention_removed=3)
    with pytest.raises(BudgetError, match=r"are 0\."):
        depth_first([], minimum=1)


@pytest.mark.parametrize("sizes", SIZES)
def test_f24_never_worse_than_greedy(sizes):
    for seed in range(20):
        candidates = random_model(random.Random(seed), 20, SIZES[sizes])
        top = sum(c.size for c in candidates if c.kind == "block")
        for node_limit in (0, 5, 1000):
            first = greedy(candidates, minimum=top // 3)
            assert (
                depth_first(candidates, minimum=top // 3, node_limit=node_limit).cost <= first.cost
            )


@pytest.mark.parametrize("sizes", SIZES)
def test_f21_the_order_of_candidates_does_not_matter(sizes):
    rng = random.Random(sizes)
    candidates = random_model(rng, 16, SIZES[sizes])
    top = sum(c.size for c in candidates if c.kind == "block")
    window = {"minimum": top // 3, "maximum": top // 3 + top // 20, "max_attention_removed": 7}
    exact, first = depth_first(candidates, **window), greedy(candidates, **window)
    for _ in range(5):
        rng.shuffle(candidates)
        assert depth_first(candidates, **window) == exact
        assert greedy(candidates, **window) == first


def test_f21_ties_go_to_the_first_layers_and_are_not_searched():
    blocks = [candidate(i, "block", 0.1, 10) for i in range(60)]
    found = depth_first(blocks, minimum=295, maximum=305)
    assert [c.layer for c in found.chosen] == list(range(30))
    assert found.nodes <= 61
    assert [c.layer for c in greedy(blocks, minimum=295).chosen] == list(range(30))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("search", [greedy, depth_first])
def test_f20_a_cost_that_cannot_be_ranked_is_refused_by_name(search, bad):
    with pytest.raises(
        ScoreError, match=r"cost of layer 1 attention is .*expected finite and >= 0"
    ):
        search([candidate(0, "block", 1.0, 5), candidate(1, "attention", bad, 5)], minimum=3)


def test_what_cannot_be_meant_is_refused():
    one = candidate(0, "block", 1.0, 5)
    with pytest.raises(ConfigError, match="are the same block of layer 0"):
        depth_first([one, one], minimum=3)
    with pytest.raises(ConfigError, match="maximum must not be below minimum, got 2 and 3"):
        depth_first([one], minimum=3, maximum=2)
    with pytest.raises(ConfigError, match="expected a size >= 0"):
        depth_first([candidate(0, "block", 1.0, -5)], minimum=3)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_never_exceed_the_best_completion(seed, monkeypatch):
    from lit_prune.allocation import bounds as module

    monkeypatch.setattr(module, "_BUCKETS", 16)  # coarse: the rounding slack must cover it
    rng = random.Random(seed)
    layers = layer_options(random_model(rng, 5, SIZES["large"]))
    top = sum(max(o.size for o in options) for options in layers)
    minimum, limit = int(top * rng.uniform(0.1, 0.8)), rng.randint(0, 5)
    maximum = rng.choice([None, minimum + top // 20])
    bounds = CostBounds(layers, minimum=minimum, maximum=maximum, attention_limit=limit)
    # Without a maximum the search never needs more than the minimum and one layer.
    most = top if maximum is None else maximum
    for level in range(6):
        above = [rng.choice(options) for options in layers[:level]]
        size, lost = sum(o.size for o in above), sum(o.attention for o in above)
        if size >= minimum:
            continue
        best = min(
            (
                math.fsum(o.cost for o in rest)
                for rest in itertools.product(*layers[level:])
                if minimum <= size + sum(o.size for o in rest) <= most
                and lost + sum(o.attention for o in rest) <= limit
            ),
            default=math.inf,
        )
        assert bounds.completion(level, size, lost) <= best * (1 + 1e-12)


def test_selection_is_a_value():
    found = depth_first([candidate(0, "block", 1.0, 5)], minimum=3)
    assert found == Selection.of([candidate(0, "block", 1.0, 5)], optimal=True, nodes=found.nodes)
    with pytest.raises(AttributeError):
        found.cost = 2.0

"""Every rival against its published formula, written out here from raw weights and activations."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lit_prune.allocation import make_budget
from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.errors import BudgetError
from lit_prune.measuring import calibrate
from lit_prune.methods import Case, blockpruner, flap, llm_pruner, magnitude, owl, preset, wanda
from lit_prune.planning import make_plan
from tests.models import tiny_model
from tests.naive import (
    captured,
    deleted,
    inputs_of,
    mean_nll,
    output_of,
    places_of,
    uneven_rows,
    zeroed,
)
from tests.state import unchanged

# float32 forwards in other batches
CLOSE = {"rtol": 1e-4, "atol": 1e-7}


def no_judge(kept, side):
    raise AssertionError("a method that scores measures no loss")


def request(name, ratio=0.25, **options):
    return preset(name).resolve(PruningConfig(pruning_ratio=ratio, preset=name, **options))


def case_of(model, rows, name, ratio=0.25, **options):
    config = request(name, ratio, **options)
    calibration = calibrate(model, rows, config, progress=False)
    budget = make_budget(spec_for(model), config)
    return Case(model=model, calibration=calibration, budget=budget, judge=no_judge, diverges=None)


def planned(model, rows, name, ratio=0.25, **options):
    config = request(name, ratio, **options)
    with unchanged(model):
        return make_plan(model, calibrate(model, rows, config, progress=False), config)


def kept_of(plan):
    found = {}
    for layer in plan.layers:
        found[layer.index, "attention"] = layer.kv_groups
        found[layer.index, "mlp"] = layer.channels
    return found


def removed_places(plan):
    return [place for place, units in kept_of(plan).items() if not units]


def columns_of_unit(model, kind, unit):
    """Columns of the output projection that a KV group or channel owns."""
    if kind == "mlp":
        return [unit]
    width = 32 // model.config.num_key_value_heads  # 4 query heads of 8, shared by the groups
    return list(range(unit * width, (unit + 1) * width))


def num_units(model, place):
    return model.config.num_key_value_heads if place[1] == "attention" else 48


@pytest.fixture(scope="module", params=[4, 2, 1], ids=["multi-head", "gqa", "mqa"])
def subject(request):
    """A model whose columns weigh differently, text, and what passes through the model."""
    model = tiny_model("qwen2", kv_heads=request.param, layers=4, seed=request.param)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, kind in places_of(model):
            weight = output_of(model, layer, kind).weight
            # heavy tails: outliers, more of them in deeper layers
            weight[:, torch.randperm(weight.shape[1], generator=draw)[: 1 + 2 * layer]] *= 6
    rows = uneven_rows()
    return model, rows, captured(model, rows)


def expected(subject, score_of_column, fold):
    """Scores of units from scores of columns, by loops."""
    model, _, seen = subject
    found = {}
    for place in places_of(model):
        weight = output_of(model, *place).weight.detach().double()
        x = seen["writes"][place]
        columns = score_of_column(weight, x, place[1])
        found[place] = [
            fold([columns[c] for c in columns_of_unit(model, place[1], unit)])
            for unit in range(num_units(model, place))
        ]
    return found


def check_scores(found, wanted):
    assert set(found) == set(wanted)
    for place, scores in wanted.items():
        torch.testing.assert_close(
            found[place].double(), torch.tensor(scores, dtype=torch.float64), **CLOSE
        )


def check_highest_stay(plan, scores):
    """In every sub-block the units of highest score stay; returns how many."""
    counts = {}
    for place, kept in kept_of(plan).items():
        order = sorted(range(len(scores[place])), key=lambda unit: (-scores[place][unit], -unit))
        assert set(kept) == set(order[: len(kept)]), place
        counts[place] = len(kept)
    return counts


# ---------------------------------------------------------------------------- scores of units


def wanda_column(weight, x, _kind):
    """``mean_i |W_ij| * ||x_j||``, up to the number of tokens."""
    return [
        float(weight[:, j].abs().mean()) * math.sqrt(float(x[:, j].square().mean()))
        for j in range(weight.shape[1])
    ]


@pytest.mark.parametrize("name", ["wanda", "wanda_ls"])
def test_wanda(subject, name):
    model, rows, _ = subject
    wanted = expected(subject, wanda_column, sum)
    check_scores(wanda.score(case_of(model, rows, name)), wanted)
    counts = check_highest_stay(planned(model, rows, name).plan, wanted)
    for kind in ("attention", "mlp"):  # the same everywhere
        assert len({counts[layer, kind] for layer in range(4)}) == 1


def flap_column(weight, x, kind):
    """``Var(x_j) * ||W_:j||^2``, in attention squared; standardised over the layer."""
    metric = [
        float(x[:, j].var(correction=0)) * float(weight[:, j].square().sum())
        for j in range(weight.shape[1])
    ]
    if kind == "attention":
        metric = [m * m for m in metric]
    mean = sum(metric) / len(metric)
    spread = math.sqrt(sum((m - mean) ** 2 for m in metric) / (len(metric) - 1))
    return [(m - mean) / spread for m in metric]


@pytest.mark.parametrize("name", ["flap", "flap_ls"])
def test_flap(subject, name):
    model, rows, _ = subject
    wanted = expected(subject, flap_column, lambda column: sum(column) / len(column))
    check_scores(flap.score(case_of(model, rows, name)), wanted)
    plan = planned(model, rows, name, channel_multiple=1).plan
    counts = check_highest_stay(plan, wanted)
    assert len({counts[layer, "mlp"] for layer in range(4)}) > 1  # one threshold, other widths
    # one threshold for all layers: channels that went score below those that stayed
    kept = kept_of(plan)
    cut = [
        wanted[place][unit]
        for place in wanted
        for unit in range(48 if place[1] == "mlp" else 0)
        if unit not in kept[place]
    ]
    stayed = [wanted[p][u] for p in wanted if p[1] == "mlp" for u in kept[p]]
    assert max(cut) <= min(stayed)


def test_magnitude(subject):
    model, rows, _ = subject
    wanted = {}
    for place in places_of(model):
        layer, kind = place
        wanted[place] = []
        for unit in range(num_units(model, place)):
            columns = columns_of_unit(model, kind, unit)
            weight = output_of(model, layer, kind).weight.detach().double()
            total = float(weight[:, columns].square().sum())
            for number, linear in enumerate(inputs_of(model, layer, kind)):
                own = range(unit * 8, unit * 8 + 8) if kind == "attention" and number else columns
                total += float(linear.weight.detach().double()[list(own)].square().sum())
            wanted[place].append(total)
    check_scores(magnitude.score(case_of(model, rows, "magnitude")), wanted)
    check_highest_stay(planned(model, rows, "magnitude").plan, wanted)


def naive_taylor(model, rows, samples=10):
    """Sum of ``|g * w|`` over what leaves with a unit; one ordinary backward for each sample."""
    chosen = rows.side("calibrate")[:samples]
    for row in chosen:
        ids = row.ids[None]
        (model(input_ids=ids, labels=ids).loss / len(chosen)).backward()
    found = {}
    for place in places_of(model):
        layer, kind = place
        found[place] = []
        for unit in range(num_units(model, place)):
            columns = columns_of_unit(model, kind, unit)
            weight = output_of(model, layer, kind).weight
            total = float((weight.grad * weight.detach())[:, columns].abs().sum())
            for number, linear in enumerate(inputs_of(model, layer, kind)):
                own = columns if kind == "mlp" or not number else range(unit * 8, unit * 8 + 8)
                for p in linear.parameters():  # the rows of weight and, in qwen2's q, k, v, bias
                    total += float((p.grad * p.detach())[list(own)].abs().sum())
            found[place].append(total)
    model.zero_grad(set_to_none=True)
    return found


def test_llm_pruner(subject):
    model, rows, _ = subject
    wanted = naive_taylor(model, rows)
    check_scores(llm_pruner.score(case_of(model, rows, "llm_pruner")), wanted)
    check_highest_stay(planned(model, rows, "llm_pruner").plan, wanted)


def test_llm_pruner_leaves_the_outer_layers_alone():
    """4 + 2 of 32: with 16 layers the first 2 and the last."""
    model = tiny_model(layers=16, kv_heads=4)
    found = planned(model, uneven_rows(), "llm_pruner", 0.2)
    assert found.plan.provenance["method"]["left_alone"] == [0, 1, 15]
    counts = {place: len(kept) for place, kept in kept_of(found.plan).items()}
    for layer in range(16):
        whole = (counts[layer, "attention"], counts[layer, "mlp"]) == (4, 48)
        assert whole == (layer in (0, 1, 15))
    assert len({counts[layer, "mlp"] for layer in range(2, 15)}) == 1


def test_llm_pruner_says_where_the_outer_layers_cannot_be_left_alone():
    model = tiny_model(layers=16, kv_heads=4)
    found = planned(model, uneven_rows(), "llm_pruner", 0.75)
    trace = found.plan.provenance["method"]
    assert trace["left_alone"] == []
    assert "cannot be met" in trace["why"]
    assert {len(layer.channels) for layer in found.plan.layers} != {48}


def naive_outliers(subject):
    model, _, seen = subject
    found = []
    for layer in range(4):
        metric = []
        for kind in ("attention", "mlp"):
            reads = seen["reads"][layer, kind].square().sum(0).sqrt()
            metric += [(w.weight.detach().abs() * reads) for w in inputs_of(model, layer, kind)]
            writes = seen["writes"][layer, kind].square().sum(0).sqrt()
            metric.append(output_of(model, layer, kind).weight.detach().abs() * writes)
        metric = torch.cat([m.flatten() for m in metric])
        found.append((float((metric > 5 * metric.mean()).sum()), len(metric)))
    return found


def test_owl(subject):
    model, rows, _ = subject
    counted = naive_outliers(subject)
    found = owl.outlier_fractions(case_of(model, rows, "owl"))
    for fraction, (outliers, size) in zip(found, counted, strict=True):
        assert fraction * size == pytest.approx(outliers, abs=1)  # one may be on the threshold
    assert len({round(fraction, 4) for fraction in found}) == 4
    plan = planned(model, rows, "owl", 0.3).plan
    check_highest_stay(plan, expected(subject, wanda_column, sum))
    # the published code, in terms of what is kept
    fractions = [outliers / size for outliers, size in counted]
    least, most = min(fractions), max(fractions)
    scaled = [(f - least) / (most - least) * 0.16 for f in fractions]
    keeps = [s - sum(scaled) / 4 + (1 - 0.3) for s in scaled]
    ratios = plan.provenance["method"]["layer_ratios"]
    assert ratios == pytest.approx([1 - keep for keep in keeps], abs=2e-3)
    assert sum(ratios) / 4 == pytest.approx(0.3)
    widths = [len(layer.channels) for layer in plan.layers]
    assert widths[ratios.index(min(ratios))] > widths[ratios.index(max(ratios))]


def test_random_depends_on_the_seed_only(subject):
    model, rows, _ = subject
    twin = tiny_model("qwen2", kv_heads=model.config.num_key_value_heads, layers=4, seed=77)
    other = uneven_rows(30, seed=5)
    plan = planned(model, rows, "random").plan
    assert planned(twin, other, "random").plan.digest == plan.digest
    assert planned(model, rows, "random", seed=1).plan.digest != plan.digest
    layers = [layer.channels for layer in plan.layers]
    assert len({len(channels) for channels in layers}) == 1
    assert len(set(layers)) == 4  # drawn anew for every layer


# -------------------------------------------------------------------------- whole pieces leave


def removal_model(**options):
    """Blocks of unequal weight in the residual stream."""
    model = tiny_model(layers=6, **options)
    with torch.no_grad():
        for layer, scale in enumerate((1.0, 0.5, 0.9, 0.3, 0.7, 0.4)):
            output_of(model, layer, "attention").weight.mul_(scale)
            output_of(model, layer, "mlp").weight.mul_(1.2 - scale)
    return model


def naive_greedy(model, rows, pieces, sizes, ratio):
    """Delete, measure, keep the best; go on while the ratio can still be met.

    Every later choice is tried by listing all of them, and the last attention stays.
    """
    total, gone, steps = sum(sizes.values()), [], []
    target, slack = ratio * total, 0.005 * total

    def size(chosen):
        return sum(sizes[place] for piece in chosen for place in piece)

    def possible(chosen):
        left = [piece for piece in pieces if piece not in chosen]
        return any(
            abs(size([*chosen, *more]) - target) <= slack and attends([*chosen, *more])
            for n in range(len(left) + 1)
            for more in itertools.combinations(left, n)
        )

    def attends(chosen):
        lost = sum(place[1] == "attention" for piece in chosen for place in piece)
        return lost < sum(kind == "attention" for _, kind in sizes)

    while True:
        drafts = [[*gone, p] for p in pieces if p not in gone and possible([*gone, p])]
        if abs(size(gone) - target) <= slack and not any(
            abs(size(draft) - target) < abs(size(gone) - target) for draft in drafts
        ):
            return gone, steps
        losses = []
        for draft in drafts:
            with deleted(model, *(place for piece in draft for place in piece)):
                losses.append(mean_nll(model, rows))
        best = min(range(len(drafts)), key=losses.__getitem__)
        gone = drafts[best]
        steps.append(losses[best])


def parameter_sizes(model):
    """Parameters of each sub-block, its norm included."""
    found = {}
    for layer, block in enumerate(model.model.layers):
        for kind, parts in (
            ("attention", (block.self_attn, block.input_layernorm)),
            ("mlp", (block.mlp, block.post_attention_layernorm)),
        ):
            found[layer, kind] = sum(p.numel() for part in parts for p in part.parameters())
    return found


def check_removal(model, rows, name, ratio, pieces, *, steps_at_least):
    gone, losses = naive_greedy(model, rows, pieces, parameter_sizes(model), ratio)
    plan = planned(model, rows, name, ratio).plan
    assert set(removed_places(plan)) == {place for piece in gone for place in piece}
    steps = plan.provenance["method"]["steps"]
    assert [step["mean_nll_on_calibrate_text"] for step in steps] == pytest.approx(losses, rel=1e-5)
    named = [[f"layer {layer} {kind}" for layer, kind in piece] for piece in gone]
    assert [step["removed"] for step in steps] == named
    assert len(steps) >= steps_at_least
    for place, kept in kept_of(plan).items():  # whole or not at all
        assert len(kept) in (0, num_units(model, place))


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_sleb_is_greedy_over_blocks_and_keeps_the_first_and_the_last(kv_heads):
    model, rows = removal_model(kv_heads=kv_heads), uneven_rows(15)
    pieces = [((layer, "attention"), (layer, "mlp")) for layer in range(1, 5)]
    check_removal(model, rows, "sleb", 0.5, pieces, steps_at_least=3)


@pytest.mark.parametrize(("kv_heads", "ratio"), [(2, 0.3), (4, 0.43)])
def test_blockpruner_is_greedy_over_attentions_and_mlps(kv_heads, ratio):
    """Attentions and MLPs differ in size: what could not be met any more is not entered."""
    model, rows = removal_model(kv_heads=kv_heads), uneven_rows(15)
    pieces = [(place,) for place in places_of(model)]
    check_removal(model, rows, "blockpruner", ratio, pieces, steps_at_least=3)


def test_blockpruner_does_not_spend_itself_on_attentions():
    """Without all six attentions the ratio would be met, but the last one has to stay."""
    model, rows = tiny_model(layers=6, intermediate_size=96), uneven_rows(15)

    def attentions_are_cheap(kept, _side):
        return sum(10 if kind == "mlp" else 1 for (_, kind), units in kept.items() if not units)

    case = replace(case_of(model, rows, "blockpruner", 0.25), judge=attentions_are_cheap)
    counts = blockpruner.decide(case).counts
    gone = [kind for (_, kind), count in counts.items() if not count]
    assert sorted(gone) == ["attention"] * 3 + ["mlp"]


def test_greedy_is_not_one_shot():
    """What the second step removes depends on the first: the loss is measured again."""
    model, rows, alone = tiny_model(layers=8, seed=1), uneven_rows(15), []
    for layer in range(1, 7):
        with deleted(model, (layer, "attention"), (layer, "mlp")):
            alone.append((mean_nll(model, rows), layer))
    gone = {layer for layer, _ in removed_places(planned(model, rows, "sleb", 0.375).plan)}
    assert len(gone) == 3
    assert gone != {layer for _, layer in sorted(alone)[:3]}


def test_the_loss_is_measured_with_the_compensation_of_the_request():
    """Asked for means in place of what goes, the search sees them."""
    model, rows = removal_model(), uneven_rows(15)
    found = planned(model, rows, "blockpruner", 0.3, compensation="mean")
    steps = found.plan.provenance["method"]["steps"]
    gone, seen = [], captured(model, rows)
    for step in steps:
        _, layer, kind = step["removed"][0].split()
        gone.append((int(layer), kind))
        constants = {
            place: output_of(model, *place).weight.detach().double() @ seen["writes"][place].mean(0)
            for place in gone
        }
        with deleted(model, *gone, constants=constants):
            wanted = mean_nll(model, rows)
        assert step["mean_nll_on_calibrate_text"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shortgpt_removes_the_blocks_of_least_influence(family):
    model, rows = tiny_model(family, layers=6, seed=3), uneven_rows()
    seen = captured(model, rows)
    influence = []
    for layer in range(6):
        cosines = [
            float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for a, b in zip(seen["enters"][layer], seen["leaves"][layer], strict=True)
        ]
        influence.append(1 - sum(cosines) / len(cosines))
    plan = planned(model, rows, "shortgpt", 1 / 3).plan
    assert plan.provenance["method"]["block_influence"] == pytest.approx(influence, abs=1e-5)
    lowest = sorted(range(6), key=influence.__getitem__)[:2]
    assert {layer for layer, _ in removed_places(plan)} == set(lowest)
    assert len(removed_places(plan)) == 4


@pytest.mark.parametrize(
    ("layers", "ratio", "gone"),
    [
        (12, 0.5, [0, 2, 4, 6, 8, 10]),  # every other
        (6, 0.5, [0, 2, 4]),
        (9, 1 / 3, [1, 4, 7]),  # every third
        (8, 0.25, [2, 6]),
        (5, 0.2, [2]),
    ],
)
def test_layerdrop_spaces_evenly_whatever_the_text(layers, ratio, gone):
    for seed in range(2):
        model = tiny_model(layers=layers, seed=seed)
        plan = planned(model, uneven_rows(15, seed=seed), "layerdrop", ratio).plan
        assert [layer.index for layer in plan.layers if not layer.channels] == gone
        assert [layer.index for layer in plan.layers if not layer.kv_groups] == gone


def test_layerdrop_spaces_what_is_not_protected():
    model = tiny_model(layers=8)
    plan = planned(model, uneven_rows(15), "layerdrop", 0.25, protected_layers=(2, 6)).plan
    gone = [layer.index for layer in plan.layers if not layer.channels]
    assert len(gone) == 2
    assert not {2, 6} & set(gone)
    assert gone[0] < 4 <= gone[1]


# ---------------------------------------------------------------------------------------- 2SSP


def naive_two_ssp(model, rows, ratio, *, width):
    """Norms, number of attentions, equal channels everywhere, then attentions by loss."""
    sizes, layers = parameter_sizes(model), len(model.model.layers)
    attention = sum(size for (_, kind), size in sizes.items() if kind == "attention")
    mlp = sum(sizes.values()) - attention
    number = round(layers * ratio ** (mlp / attention / 1.5))
    number = min(number, layers - 1)
    missing = ratio * (mlp + attention) - number * attention / layers
    cut = round(missing / layers / 96)  # a channel is a row of gate, a row of up, a column of down
    seen = captured(model, rows)["writes"]
    kept = {}
    for layer in range(layers):
        norms = seen[layer, "mlp"].square().sum(0).sqrt()
        order = sorted(range(len(norms)), key=lambda c: float(norms[c]))
        kept[layer, "mlp"] = set(order[cut:])
    lost = {place: set(range(48)) - channels for place, channels in kept.items()}
    gone = []
    with zeroed(model, lost, width):
        while len(gone) < number:
            losses = []
            for layer in set(range(layers)) - set(gone):
                with deleted(model, *((other, "attention") for other in [*gone, layer])):
                    losses.append((mean_nll(model, rows), layer))
            gone.append(min(losses)[1])
    return number, kept, gone


@pytest.mark.parametrize(("kv_heads", "ratio"), [(4, 0.5), (2, 0.5), (1, 0.25)])
def test_two_ssp(kv_heads, ratio):
    model, rows = removal_model(kv_heads=kv_heads), uneven_rows(15)
    number, kept, gone = naive_two_ssp(model, rows, ratio, width=32 // kv_heads)
    plan = planned(model, rows, "two_ssp", ratio, channel_multiple=1).plan
    assert 1 <= number < 6
    found = kept_of(plan)
    assert [place for place, units in found.items() if not units] == [
        (layer, "attention") for layer in sorted(gone)
    ]
    steps = [step["removed"] for step in plan.provenance["method"]["steps"]]
    assert steps == [f"layer {layer} attention" for layer in gone]
    for place, channels in kept.items():
        assert set(found[place]) == channels
    for layer in set(range(6)) - set(gone):
        assert len(found[layer, "attention"]) == kv_heads


def test_two_ssp_never_removes_the_last_attention():
    """Its formula rounds to all of them where MLPs are small."""
    model = tiny_model(intermediate_size=24)
    plan = planned(model, uneven_rows(15), "two_ssp", 0.8, channel_multiple=1).plan
    assert sum(bool(layer.kv_groups) for layer in plan.layers) == 1
    assert plan.provenance["achieved_ratio"] == pytest.approx(0.8, abs=0.005)


# -------------------------------------------------------------------- what cannot be reached


@pytest.mark.parametrize("name", ["sleb", "shortgpt", "layerdrop"])
def test_blocks_alone_do_not_reach_every_ratio(name):
    model = tiny_model(layers=8)
    message = r"0\.3 of .* cannot be reached.* reachable ratios .* are 0\.2500 and 0\.3750"
    with pytest.raises(BudgetError, match=message):
        make_budget(spec_for(model), request(name, 0.3))


def test_sleb_says_what_it_reaches_with_its_first_and_last_block_kept():
    model = tiny_model(layers=4)
    with pytest.raises(BudgetError, match=r"0\.75 of .* was not met: .* removes 0\.[05]"):
        planned(model, uneven_rows(15), "sleb", 0.75)

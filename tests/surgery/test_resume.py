import random

import pytest

from lit_prune.calibration import Row, RowSet
from lit_prune.decoder import FAMILIES, DecoderParts, quiet, spec_for
from lit_prune.metrics import quality_of
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import Resumed, masked
from tests.models import MIXTURES, tiny_model, tiny_rows
from tests.state import unchanged


def drafts(spec, number):
    """Random plans, each unlike the one before in one layer; the first removes nothing."""
    draw, refused = random.Random(0), dict(spec.refused)
    layers = list(PruningPlan.keep_all(spec).layers)
    for _ in range(number):
        yield PruningPlan(spec.fingerprint, tuple(layers))
        index = draw.randrange(len(layers))
        kept = {}
        for part in spec.blocks[index].sub_blocks:
            # a router must have as many to choose as it wants; some heads cannot leave
            least = 2 if part.kind == "mlp" else part.num_units if "kv_group" in refused else 1
            count = draw.randint(least, part.num_units)
            kept[part.kind] = tuple(sorted(draw.sample(range(part.num_units), count)))
        layers[index] = LayerPlan(index, kept.get("attention", ()), kept.get("mlp", ()))


def batches_of(model):
    rows = RowSet.of(Row.of(row) for row in tiny_rows(9, uneven=True))
    return list(rows.batches("calibrate", 64))


def run(model, plan, measure):
    with quiet(model), masked(model, plan):
        return measure(plan)


@pytest.mark.parametrize("family", sorted({*FAMILIES, *MIXTURES}))
def test_a_draft_resumed_has_the_loss_of_one_run_whole(family):
    model = tiny_model(family, layers=3)
    batches = batches_of(model)
    assert len(batches) > 1
    runs = Resumed(DecoderParts(model).layers, batches)
    with unchanged(model):
        for plan in drafts(spec_for(model), 6):
            resumed = run(model, plan, lambda p: runs.of(p, lambda found: quality_of(model, found)))
            whole = run(model, plan, lambda _p: quality_of(model, batches))
            assert resumed == whole


def test_only_layers_from_the_first_change_on_are_computed():
    model = tiny_model(layers=4)
    spec, batches = spec_for(model), batches_of(model)
    runs = Resumed(DecoderParts(model).layers, batches)
    computed = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
    whole = PruningPlan.keep_all(spec)
    less = list(whole.layers)
    less[2] = LayerPlan(2, (0, 1), (3, 4))
    for plan, from_layer in (
        (whole, 0),
        (PruningPlan(spec.fingerprint, tuple(less)), 2),
        (whole, 2),
        (whole, 4),
    ):
        computed.clear()
        run(model, plan, lambda p: runs.of(p, lambda found: quality_of(model, found)))
        assert computed == [*range(from_layer, 4)] * len(batches)


def test_after_an_error_nothing_half_done_is_used():
    model = tiny_model(layers=3)
    spec, batches = spec_for(model), batches_of(model)
    runs = Resumed(DecoderParts(model).layers, batches)
    first, second = list(drafts(spec, 2))

    def broken(found):
        taken = iter(found)
        model(**next(taken).model_inputs("cpu"))
        raise KeyboardInterrupt

    def good(found):
        return quality_of(model, found)

    run(model, first, lambda p: runs.of(p, good))
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        run(model, second, lambda p: runs.of(p, broken))
    assert not any("forward" in vars(module) for module in model.modules())
    assert run(model, first, lambda p: runs.of(p, good)) == run(
        model, first, lambda _p: quality_of(model, batches)
    )


def test_layers_that_another_tool_patched_stay_patched():
    model = tiny_model(layers=2)
    layer = model.model.layers[0]
    before = layer.forward

    def doubled(hidden, **others):
        return before(hidden, **others) * 2

    layer.forward = doubled
    batches = batches_of(model)
    runs = Resumed(DecoderParts(model).layers, batches)
    for plan in drafts(spec_for(model), 3):
        resumed = run(model, plan, lambda p: runs.of(p, lambda found: quality_of(model, found)))
        assert resumed == run(model, plan, lambda _p: quality_of(model, batches))
    assert layer.forward is doubled

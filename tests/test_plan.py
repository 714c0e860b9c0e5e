import json

import pytest
import torch

from lit_prune.decoder import DecoderSpec, spec_for
from lit_prune.errors import PlanMismatchError
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import apply_plan
from tests.models import tiny_model
from tests.state import state_digest


@pytest.fixture(scope="module")
def spec():
    return spec_for(tiny_model(layers=2))


def plan_json(**changes):
    plan = PruningPlan("abc", (LayerPlan(0, (0, 1), (0, 2)),), provenance={"seed": 0})
    raw = json.loads(plan.to_json()) | changes
    return json.dumps({k: v for k, v in raw.items() if v != "absent"})


def entry(**changes):
    return [{"index": 0, "kv_groups": [0, 1], "channels": [0, 2]} | changes]


def test_round_trip_and_digest(spec):
    plan = PruningPlan.keep_all(spec)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    plan.validate(spec)


def test_the_digest_is_of_kept_units_and_fingerprint_alone():
    layers = (LayerPlan(0, (0,), (1, 2)),)
    plan = PruningPlan("abc", layers)
    assert PruningPlan("abc", layers, provenance={"seed": 3}).digest == plan.digest
    assert PruningPlan("abd", layers).digest != plan.digest
    assert PruningPlan("abc", (LayerPlan(0, (0,), (1, 3)),)).digest != plan.digest
    assert PruningPlan("abc", (LayerPlan(0, (1, 2), (0,)),)).digest != plan.digest


HOSTILE = [
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"a": 1, "a": 2}', "a key occurs twice"),
    (plan_json(provenance={"x": 1})[:-1] + ', "layers": []}', "a key occurs twice"),
    ('{"provenance": {"x": NaN}}', "NaN is not a JSON number"),
    ('{"provenance": {"x": -Infinity}}', "-Infinity is not a JSON number"),
    ("[]", "must be an object with the keys"),
    ("3", "must be an object with the keys"),
    ("{}", "must be an object with the keys"),
    (plan_json(extra=1), "must be an object with the keys"),
    (plan_json(layers="absent"), "must be an object with the keys"),
    (plan_json(schema_version=2), "has schema_version 2; this lit_prune reads up to 1"),
    (plan_json(schema_version=0), "has schema_version 0"),
    (plan_json(schema_version="1"), "has schema_version '1'"),
    (plan_json(schema_version=True), "has schema_version True"),
    (plan_json(schema_version=1.0), "has schema_version 1.0"),
    (plan_json(model_fingerprint=3), "model_fingerprint must be text"),
    (plan_json(layers={}), "layers a list"),
    (plan_json(layers=[3]), "plan entry 0 must have index, kv_groups and channels"),
    (plan_json(layers=entry(extra=1)), "plan entry 0 must have index"),
    (plan_json(layers=entry(kv_groups="01")), "kv_groups of plan entry 0 must be a list of int"),
    (plan_json(layers=entry(channels=[0, True])), "channels of plan entry 0 must be a list of int"),
    (plan_json(layers=entry(channels=[1.0])), "channels of plan entry 0 must be a list of int"),
    (plan_json(layers=entry(index="0")), "index of plan entry 0 must be an integer"),
    (plan_json(layers=entry(channels=[0, 3])), "plan was altered: its digest is"),
    (plan_json(digest="0" * 64), "plan was altered: its digest is"),
    (plan_json(provenance=[1]), "provenance must be an object"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=[m[:30] for _, m in HOSTILE])
def test_f25_f38_a_hostile_plan_is_refused(text, message):
    with pytest.raises(PlanMismatchError, match=message):
        PruningPlan.from_json(text)


def test_a_plan_without_digest_or_provenance_is_read():
    plan = PruningPlan.from_json(plan_json(digest="absent", provenance="absent"))
    assert plan.provenance == {}


KEEP = (0, 1), tuple(range(48))
MISFITS = [
    ([KEEP], r"plan has 1 layers, the model 2"),
    ([KEEP, KEEP, KEEP], r"plan has 3 layers, the model 2"),
    ([((0, 2), KEEP[1]), KEEP], r"kv_groups of layer 0 must lie in \[0, 2\), got 0 … 2"),
    ([KEEP, ((0,), (-1, 3))], r"channels of layer 1 must lie in \[0, 48\), got -1 … 3"),
    ([KEEP, ((0,), (3, 48))], r"channels of layer 1 must lie in \[0, 48\), got 3 … 48"),
    ([((1, 0), KEEP[1]), KEEP], r"kv_groups of layer 0 must be ascending without repeats"),
    ([KEEP, (KEEP[0], (5, 5))], r"channels of layer 1 must be ascending without repeats"),
    ([((), KEEP[1]), ((), KEEP[1])], r"plan removes every attention sub-block"),
]


@pytest.mark.parametrize(("layers", "message"), MISFITS)
def test_f25_a_plan_that_does_not_fit_names_the_first_difference(spec, layers, message):
    made = tuple(LayerPlan(i, *kept) for i, kept in enumerate(layers))
    with pytest.raises(PlanMismatchError, match=message):
        PruningPlan(spec.fingerprint, made).validate(spec)


def test_f25_another_architecture_and_another_order(spec):
    with pytest.raises(PlanMismatchError, match="made for a model with fingerprint abcabcabcabc…"):
        PruningPlan("abc" * 9, PruningPlan.keep_all(spec).layers).validate(spec)
    swapped = PruningPlan.keep_all(spec).layers[::-1]
    with pytest.raises(PlanMismatchError, match="plan entry 0 is for layer 1; expected 0"):
        PruningPlan(spec.fingerprint, swapped).validate(spec)


def test_a_spec_survives_json(spec):
    assert DecoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def random_plan(spec, generator, gone=0.3):
    """Keep about half of everything; some sub-blocks, and so some layers, go whole."""

    def some(count):
        if torch.rand((), generator=generator) < gone:
            return ()
        kept = torch.rand(count, generator=generator) < 0.6
        return tuple(torch.arange(count)[kept].tolist()) or (count - 1,)

    layers = [
        LayerPlan(
            block.index,
            some(block.attention.num_units) if block.attention else (),
            some(block.mlp.num_units) if block.mlp else (),
        )
        for block in spec.blocks
    ]
    if not any(x.kv_groups for x in layers):  # one attention must stay
        place = next(b.index for b in spec.blocks if b.attention)
        layers[place] = LayerPlan(place, (0,), layers[place].channels)
    return PruningPlan(spec.fingerprint, tuple(layers))


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_after_another_keeps_what_both_keep(seed):
    """Three plans one after the other, and at once: the same weights to the bit."""
    generator = torch.Generator().manual_seed(seed)
    steps, dense = (
        tiny_model("qwen2", layers=6, kv_heads=4),
        tiny_model("qwen2", layers=6, kv_heads=4),
    )
    whole = None
    for _ in range(3):
        plan = random_plan(spec_for(steps), generator, gone=0.2)
        apply_plan(steps, plan, verify=False)
        whole = plan if whole is None else plan.after(whole)
    whole.validate(spec_for(dense))
    apply_plan(dense, whole)
    assert state_digest(dense) == state_digest(steps)
    count = len(steps.model.layers)
    assert len(whole.stack(count)) == count


def test_a_first_layer_that_holds_a_constant_stays_in_the_stack():
    layers = (LayerPlan(0, (), ()), LayerPlan(1, (), ()), LayerPlan(2, (0, 1), (3, 5)))
    first = PruningPlan("abc", layers)
    assert first.stack(1) == (2,)
    assert first.stack(2) == (0, 2)
    second = PruningPlan("def", (LayerPlan(0, (), ()), LayerPlan(1, (1,), (1,))))
    assert second.after(first).layers == (*layers[:2], LayerPlan(2, (1,), (5,)))
    sized = PruningPlan("abc", layers, provenance={"sizes": {"mlp": [9, 9, 9]}, "seed": 1})
    assert second.after(sized).provenance == {"sizes": {"mlp": [9, 9, 9]}}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((LayerPlan(0, (0,), (0,)),) * 3, "leaves 2 of 2 layers, not 3"),
        ((LayerPlan(0, (0,), (2,)), LayerPlan(1, (), ())), "layer 0 keeps units that plan"),
        ((LayerPlan(0, (), ()), LayerPlan(1, (1,), ())), "layer 1 keeps units that plan"),
    ],
)
def test_a_plan_of_another_model_is_not_composed(layers, words):
    first = PruningPlan("abc", (LayerPlan(0, (0, 1), (0, 2)), LayerPlan(1, (4,), (7,))))
    with pytest.raises(PlanMismatchError, match=words):
        PruningPlan("def", layers).after(first)

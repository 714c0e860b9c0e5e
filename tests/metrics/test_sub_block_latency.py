"""The table's shapes and calls are checked; how long anything takes is not."""

import itertools

import pytest
import torch

from lit_prune.decoder import DecoderParts, quiet, spec_for
from lit_prune.errors import ConfigError
from lit_prune.metrics import measure_sub_blocks, sub_block_latency
from lit_prune.metrics.sub_block_latency import _record, _twins, ladder
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.surgery import apply_plan
from tests.models import tiny_model
from tests.state import unchanged

FAMILIES = [
    ("llama", {}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3", {}),
]


def ticking():
    ticks = itertools.count()
    return lambda: float(next(ticks))


def measured(model, **options):
    sizes = {"prompt_tokens": 10, "new_tokens": 3, "batch_size": 2, "clock": ticking()}
    return measure_sub_blocks(model, **{**sizes, **options})


@pytest.fixture
def by_size(monkeypatch):
    """A run takes as many microseconds as its sub-block has parameters."""

    def time(_calls, twins, _clock):
        return 1e-6 * sum(p.numel() for p in twins[0].parameters())

    monkeypatch.setattr(sub_block_latency._Calls, "time", time)


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_every_sub_block_has_a_ladder_up_to_all_of_its_units(family, options, kv_heads):
    model = tiny_model(family, kv_heads=kv_heads, **options)
    with unchanged(model):
        found = measured(model)
    spec = spec_for(model)
    assert list(found.seconds) == [(i, part.kind) for i, part in spec.sub_blocks]
    for index, part in spec.sub_blocks:
        rows = found.seconds[index, part.kind]
        assert rows.dtype == torch.float64
        assert rows[:, 0].tolist() == list(ladder(part.num_units))
        assert rows[:, 1].tolist() == [1.0] * len(rows)  # one tick from before to after
    waited = found.conditions.pop("waited")
    assert waited is None or waited >= 0  # by the system's count, whatever the clock
    assert found.conditions == {
        "device": f"cpu ({torch.get_num_threads()} threads)",
        "dtype": "float32",
        "batch_size": 2,
        "prompt_tokens": 10,
        "new_tokens": 3,
        "warmup": 2,
        "repetitions": 7,
    }


SLIDES = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {**SLIDES, "attn_implementation": "eager"}),
        ("qwen2", {**SLIDES, "attn_implementation": "sdpa"}),
        *((family, {}) for family in ("phi3", "gpt2", "gpt_neox", "opt", "falcon", "bloom")),
    ],
)
def test_copies_compute_what_the_model_computes(family, options):
    """All calls of a prompt and three tokens, on a cache of their own."""
    model = tiny_model(family, **options)
    parts = DecoderParts(model)
    places = [(0, "attention"), (1, "mlp"), (3, "attention")]
    outputs = {place: [] for place in places}
    handles = [
        parts.sub_block(*place).register_forward_hook(
            lambda _m, _a, out, seen=outputs[place]: seen.append(
                out if isinstance(out, torch.Tensor) else out[0]
            )
        )
        for place in places
    ]
    with quiet(model):
        calls = _record(parts, places, torch.ones((2, 10), dtype=torch.int64), 3)
        for handle in handles:
            handle.remove()
        for place in places:
            seen = []
            (twin,) = _twins(parts, place, parts.units(*place), 1)
            twin.register_forward_hook(
                lambda _m, _a, out, seen=seen: seen.append(
                    out if isinstance(out, torch.Tensor) else out[0]
                )
            )
            for _ in range(2):  # a second run starts from an empty cache again
                seen.clear()
                calls[place].time([twin], ticking())
                assert len(seen) == 4
                for got, wanted in zip(seen, outputs[place], strict=True):
                    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_narrow_copies_are_what_surgery_leaves(family):
    model = tiny_model(family)
    parts = DecoderParts(model)
    narrow = {(1, "attention"): _twins(parts, (1, "attention"), 1, 1)[0]}
    narrow[1, "mlp"] = _twins(parts, (1, "mlp"), 20, 1)[0]
    whole = [LayerPlan(i, (0, 1), tuple(range(48))) for i in range(4)]
    whole[1] = LayerPlan(1, (0,), tuple(range(20)))
    apply_plan(model, PruningPlan(spec_for(model).fingerprint, tuple(whole)))
    for place, twin in narrow.items():
        wanted = dict(DecoderParts(model).sub_block(*place).named_parameters())
        got = dict(twin.named_parameters())
        assert got.keys() == wanted.keys()
        for name, parameter in got.items():
            assert torch.equal(parameter, wanted[name])


def test_hooks_of_the_user_are_not_run_by_copies():
    model, seen = tiny_model(layers=2), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with unchanged(model):
        measured(model, new_tokens=3)
    handle.remove()
    assert len(seen) == 4  # the recording: a prompt and three tokens


def test_equal_shapes_share_one_measurement(by_size, monkeypatch):
    model, made = tiny_model(layers=4), []
    layer = LayerPlan(2, (1,), tuple(range(30)))
    plan = [LayerPlan(i, (0, 1), tuple(range(48))) for i in range(4)]
    plan[2] = layer
    apply_plan(model, PruningPlan(spec_for(model).fingerprint, tuple(plan)))

    def twins(parts, place, count, most):
        made.append((place, most))
        return _twins(parts, place, count, most)

    monkeypatch.setattr(sub_block_latency, "_twins", twins)
    found = measured(model)
    assert {place for place, _ in made} == {
        (0, "attention"), (0, "mlp"), (2, "attention"), (2, "mlp"),
    }  # fmt: skip
    # no more copies than the model has of that shape: its caches would hold no more
    assert dict(made)[0, "mlp"] == 3
    assert dict(made)[2, "mlp"] == 1
    assert torch.equal(found.seconds[0, "mlp"], found.seconds[3, "mlp"])
    assert found.seconds[0, "mlp"][-1, 1] == pytest.approx(3 * 32 * 48e-6)
    assert found.seconds[2, "mlp"][-1, 1] == pytest.approx(3 * 32 * 30e-6)


def test_copies_take_turns_but_fill_no_more_than_a_cache(monkeypatch):
    parts = DecoderParts(tiny_model(layers=4))
    one = 3 * 32 * 48 * 4
    assert len(_twins(parts, (0, "mlp"), 48, 4)) == 4
    monkeypatch.setattr(sub_block_latency, "_COLD_BYTES", 2 * one)
    assert len(_twins(parts, (0, "mlp"), 48, 4)) == 2
    assert len(_twins(parts, (0, "mlp"), 12, 4)) == 4
    monkeypatch.setattr(sub_block_latency, "_COLD_BYTES", 1)
    assert len(_twins(parts, (0, "mlp"), 48, 4)) == 1


def test_the_median_of_what_follows_the_warm_up_counts():
    model = tiny_model(layers=1, kv_heads=1, intermediate_size=1)
    runs = itertools.cycle([100.0, 3.0, 1.0, 2.0, 50.0])  # the first is thrown away
    now, starting = [0.0], [True]

    def clock():
        if not starting[0]:
            now[0] += next(runs)
        starting[0] = not starting[0]
        return now[0]

    found = measured(model, clock=clock, warmup=1, repetitions=4)
    assert found.seconds[0, "mlp"].tolist() == [[1.0, 2.5]]


def test_a_clock_that_stands_still_is_refused_and_nothing_is_left_behind():
    model = tiny_model(layers=1)
    with unchanged(model), pytest.raises(ConfigError, match=r"advanced no time over 4 calls"):
        measured(model, clock=lambda: 1.0)


def test_ladders_are_short_and_fine():
    for units in (1, 2, 4, 8, 16, 32, 48, 688, 2048, 11008, 14336):
        steps = ladder(units)
        assert steps == tuple(sorted(set(steps)))
        assert steps[-1] == units
        assert len(steps) <= 16
        assert steps[0] <= max(1, units // 12)


@pytest.mark.gpu
def test_on_a_gpu_wider_takes_longer():
    model = tiny_model(layers=2, intermediate_size=8192, hidden_size=1024).cuda()
    found = measure_sub_blocks(model, prompt_tokens=100, new_tokens=2, batch_size=8)
    rows = found.seconds[0, "mlp"]
    assert rows[-1, 1] > rows[0, 1] > 0

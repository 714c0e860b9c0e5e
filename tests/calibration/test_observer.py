import math

import pytest
import torch

from lit_prune.calibration import Observer, Row, RowSet, collect_rows, replay
from lit_prune.errors import CalibrationError
from tests.models import batches_of, padded_batch, tiny_model, tiny_rows
from tests.state import num_hooks, state_digest, unchanged


def observe(model, batches, *, max_tokens=10**6, forward=None):
    observer = Observer(model, max_tokens=max_tokens)
    observer.open()
    try:
        with torch.no_grad():
            for batch in batches:
                (forward or (lambda batch: model(**batch)))(batch)
    finally:
        observer.close()
    return observer


def test_observed_moments_equal_replayed_ones_padded_and_repeated_or_not():
    model, rows = tiny_model(layers=2), tiny_rows(24, uneven=True)
    wanted = replay(model, RowSet.of(map(Row.of, rows))).units
    for batches in (
        batches_of(rows, 5),
        batches_of(rows[::-1], 7, side="left", extra=4),
        batches_of([*rows, *rows[:8]], 3),
    ):
        with unchanged(model):
            observer = observe(model, batches)
        for place, (mean, variance) in observer.unit_moments().items():
            torch.testing.assert_close(mean, wanted[place][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(variance, wanted[place][1], rtol=1e-4, atol=1e-7)
        assert set(observer.rows) == {Row.of(row).digest for row in rows}


def test_the_user_sees_the_same_logits_and_gradients():
    model = tiny_model(layers=2)
    batch = padded_batch(tiny_rows(3))
    plain = model(**batch).logits
    plain.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    observer = Observer(model, max_tokens=10**6)
    observer.open()
    watched = model(**batch).logits
    watched.sum().backward()
    observer.close()
    assert torch.equal(plain, watched)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, batch: model(batch["input_ids"], batch["attention_mask"]),
        lambda model, batch: model(batch["input_ids"], attention_mask=batch["attention_mask"]),
        lambda model, batch: torch.nn.Sequential(model)[0](**batch, labels=batch["input_ids"]),
    ],
)
def test_arguments_are_found_however_they_are_passed(forward):
    model, rows = tiny_model(layers=1), tiny_rows(5, uneven=True)
    observer = observe(model, [padded_batch(rows)], forward=lambda b: forward(model, b))
    assert set(observer.rows) == {Row.of(row).digest for row in rows}


def test_f13_packed_rows_are_observed_as_their_segments():
    model, rows = tiny_model(layers=2), tiny_rows(24, uneven=True)
    wanted = observe(model, batches_of(rows, 6))
    batches = [
        {
            "input_ids": torch.cat(rows[i : i + 6])[None],
            "position_ids": torch.cat([torch.arange(len(row)) for row in rows[i : i + 6]])[None],
        }
        for i in range(0, 24, 6)
    ]
    with pytest.raises(
        CalibrationError, match=r"restart 5 times, but with a KV cache .*use_cache=Fal"
    ):
        observe(model, batches)  # the config's use_cache is True
    found = observe(model, batches, forward=lambda batch: model(**batch, use_cache=False))
    assert set(found.rows) == set(wanted.rows)
    assert "packed rows" in found.notes[0]
    for place, (mean, variance) in found.unit_moments().items():
        torch.testing.assert_close(mean, wanted.unit_moments()[place][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, wanted.unit_moments()[place][1], rtol=1e-4, atol=1e-7)


def test_f13_generation_without_a_cache_is_passed_over_too():
    model, rows = tiny_model(layers=1), tiny_rows(20)
    before, options = state_digest(model), {"max_new_tokens": 3, "do_sample": False}

    def validate(batch):
        model.generate(**batch, **options, use_cache=False)
        with pytest.raises(ValueError, match="no_such"):  # a failure does not leave it blind
            model.generate(**batch, no_such=1)
        model(**batch)

    wanted = observe(model, batches_of(rows, 5))
    found = observe(model, batches_of(rows, 5), forward=validate)
    assert set(found.rows) == set(wanted.rows)
    assert all(
        torch.equal(found.unit_moments()[place][1], variance)
        for place, (_, variance) in wanted.unit_moments().items()
    )
    assert state_digest(model) == before


def test_a_generate_of_the_users_own_is_called_and_put_back():
    model, rows = tiny_model(layers=1), tiny_rows(2)
    model.generate = own = lambda batch: model(**batch) and "theirs"
    said = []
    found = observe(
        model, [padded_batch(rows)], forward=lambda batch: said.append(model.generate(batch))
    )
    assert said == ["theirs"]
    assert not found.rows
    assert model.generate is own


def test_a_model_that_cannot_generate_is_observed_all_the_same(monkeypatch):
    model, rows = tiny_model(layers=1), tiny_rows(2)
    monkeypatch.setattr(type(model), "generate", None)
    assert len(observe(model, [padded_batch(rows)]).rows) == 2
    assert "generate" not in vars(model)


def test_forwards_with_a_cache_are_passed_over():
    model, rows = tiny_model(layers=1), tiny_rows(3)
    observer = observe(
        model,
        [padded_batch(rows, side="left")],
        forward=lambda batch: model.generate(**batch, max_new_tokens=3, do_sample=False),
    )
    assert not observer.rows
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = padded_batch(rows)["input_ids"]
    observer = observe(model, [ids], forward=lambda x: model(x, None, None, cache))
    assert not observer.rows


def test_paused_and_capped():
    model, rows = tiny_model(layers=1), tiny_rows(12, 10)
    observer = Observer(model, max_tokens=55)
    observer.open()
    observer.paused = True
    model(**padded_batch(rows[8:]))
    assert not observer.rows
    observer.paused = False
    for batch in batches_of(rows[:8], 4):
        model(**batch)
    observer.close()
    collected, notes = collect_rows(model, batches_of(rows[:8], 4), 55)
    assert set(observer.rows) == {row.digest for row in collected.rows}
    assert observer.notes == list(notes)
    assert "max_calibration_tokens" in notes[0]


def test_labels_of_repeats_are_merged():
    model, rows = tiny_model(layers=1), tiny_rows(2)
    first, second = padded_batch(rows), padded_batch(rows)
    first["labels"], second["labels"] = first["input_ids"].clone(), first["input_ids"].clone()
    first["labels"][:, 4:] = -100
    second["labels"][:, :4] = -100
    observer = observe(model, [first, second])
    assert all(row.scored.all() for row in observer.rows.values())
    assert observer.num_tokens == 48


def test_f12_a_bad_batch_stops_at_the_models_forward():
    model = tiny_model(layers=1)
    with unchanged(model), pytest.raises(CalibrationError, match="forward 1: token ids run from"):
        observe(model, [padded_batch(tiny_rows(2)), {"input_ids": torch.full((1, 4), 64)}])
    with pytest.raises(CalibrationError, match="forward 0: no input_ids among"):
        observe(model, [{"inputs_embeds": torch.zeros(1, 3, 32)}])


def test_f15_a_silent_probe_is_named():
    model = tiny_model(layers=2)
    last = model.model.layers[1].mlp

    def fused(x):  # goes past the projection's hooks
        hidden = torch.nn.functional.silu(last.gate_proj(x)) * last.up_proj(x)
        return torch.nn.functional.linear(hidden, last.down_proj.weight)

    last.forward = fused
    message = r"layers\.1\.mlp\.down_proj saw 0 tokens in forward 0, expected 48 \(1 of 4 probes"
    with pytest.raises(CalibrationError, match=message):
        observe(model, [padded_batch(tiny_rows(2))])
    del last.forward
    assert num_hooks(model) == 0


def test_f15_a_projection_that_runs_twice_is_named():
    model = tiny_model(layers=1)
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + plain(x)
    with pytest.raises(CalibrationError, match=r"down_proj saw 2 call\(s\).*expected 1 of"):
        observe(model, [padded_batch(tiny_rows(2))])
    del mlp.forward


@pytest.mark.parametrize("where", ["activation", "weight"])
def test_f16_a_batch_with_nan_is_not_added_and_named(where):
    model, rows = tiny_model(layers=2), tiny_rows(16)
    observer = Observer(model, max_tokens=10**6)
    observer.open()
    model(**padded_batch(rows[:8]))
    before = {k: [x.clone() for x in v] for k, v in observer.unit_moments().items()}
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        if where == "weight":
            weight[3, 4] = math.nan
        else:
            weight.mul_(1e38)  # finite, but its products are not
            model.model.layers[1].mlp.gate_proj.weight.mul_(100)
    with pytest.raises(CalibrationError, match=r"are not finite: .* in forward 1") as caught:
        model(**padded_batch(rows[8:]))
    remedy = "load the checkpoint again" if where == "weight" else "bfloat16 or float32"
    assert remedy in str(caught.value)
    observer.close()
    assert len(observer.rows) == 8
    after = observer.unit_moments()
    assert all(torch.equal(a, b) for k in before for a, b in zip(before[k], after[k], strict=True))
    assert num_hooks(model) == 0


def test_an_error_of_the_user_inside_the_forward_does_not_spoil_the_next_batch():
    model, rows = tiny_model(layers=1), tiny_rows(12)
    observer = Observer(model, max_tokens=10**6)
    observer.open()
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**padded_batch(rows[:6]))
    handle.remove()
    model(**padded_batch(rows[6:]))
    observer.close()
    assert set(observer.rows) == {Row.of(row).digest for row in rows[6:]}
    wanted = observe(model, [padded_batch(rows[6:])]).unit_moments()
    found = observer.unit_moments()
    assert all(torch.equal(wanted[k][1], found[k][1]) for k in wanted)


def test_f18_opening_that_fails_leaves_no_hook(monkeypatch):
    model = tiny_model(layers=2)
    before = state_digest(model)
    calls = []
    plain = torch.nn.Linear.register_forward_pre_hook

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Linear, "register_forward_pre_hook", failing)
    observer = Observer(model, max_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        observer.open()
    assert not observer.is_open
    assert state_digest(model) == before


def test_closing_twice_is_safe():
    model = tiny_model(layers=1)
    observer = Observer(model, max_tokens=1)
    observer.open()
    assert observer.is_open
    observer.close()
    observer.close()
    assert not observer.is_open
    assert num_hooks(model) == 0
    assert observer.unit_moments() == {}
    assert observer.calibration().num_tokens == 0


def test_user_hooks_survive():
    model, seen = tiny_model(layers=1), []
    model.register_forward_hook(lambda *_: seen.append(1))
    observe(model, [padded_batch(tiny_rows(2))])
    assert seen == [1]
    assert num_hooks(model) == 1


def test_bfloat16_activations():
    model, rows = tiny_model(layers=1).to(torch.bfloat16), tiny_rows(16)
    found = observe(model, batches_of(rows, 4)).unit_moments()
    wanted = replay(model, RowSet.of(map(Row.of, rows))).units
    for place, (_, variance) in found.items():
        assert variance.dtype == torch.float64
        torch.testing.assert_close(variance, wanted[place][1], rtol=0.05, atol=1e-6)

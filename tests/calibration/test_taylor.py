"""Gradient scores of units, against an ordinary backward for each sample."""

import pytest
import torch

from lit_prune.calibration import TAYLOR_SCORES, Row, RowSet, measure_taylor
from lit_prune.errors import CalibrationError
from tests.models import tiny_model
from tests.naive import inputs_of, output_of, places_of, uneven_rows
from tests.state import unchanged


def own_slices(model, layer, kind, unit):
    """Weight, gradient index: what leaves with a unit, as (parameter, lines) pairs."""
    groups = model.config.num_key_value_heads
    wide = range(unit * 32 // groups, (unit + 1) * 32 // groups) if kind == "attention" else [unit]
    found = []
    for number, linear in enumerate(inputs_of(model, layer, kind)):
        narrow = range(unit * 8, unit * 8 + 8) if kind == "attention" and number else wide
        found += [(p, [(row,) for row in narrow]) for p in linear.parameters()]
    weight = output_of(model, layer, kind).weight
    found.append((weight, [(slice(None), column) for column in wide]))
    return found


def naive(model, rows, samples):
    """The four scores, line by line, in float64."""
    chosen = [row for row in rows.side("calibrate") if len(row.ids) > 1][:samples]
    parameters = list(model.parameters())
    first = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    second = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in chosen:
        model.zero_grad()
        model(input_ids=row.ids[None], labels=row.ids[None]).loss.backward()
        for i, p in enumerate(parameters):
            first[i] += p.grad.double() / len(chosen)
            second[i] += p.grad.double() ** 2 / len(chosen)
    model.zero_grad(set_to_none=True)
    where = {id(p): i for i, p in enumerate(parameters)}
    units = {"attention": model.config.num_key_value_heads, "mlp": 48}
    found = {}
    for layer, kind in places_of(model):
        found[layer, kind] = []
        for unit in range(units[kind]):
            scores = [0.0] * 4
            for p, lines in own_slices(model, layer, kind, unit):
                w, g, h = p.detach().double(), first[where[id(p)]], second[where[id(p)]]
                for line in lines:
                    linear = g[line] * w[line]
                    mixed = linear - 0.5 * w[line] ** 2 * h[line]
                    for i, terms in ((0, linear), (2, mixed)):
                        scores[i] += abs(float(terms.sum()))
                        scores[i + 1] += float(terms.abs().sum())
            found[layer, kind].append(scores)
    return {place: torch.tensor(scores) for place, scores in found.items()}


@pytest.mark.parametrize(
    ("family", "kv_heads"), [("llama", 4), ("qwen2", 2), ("qwen3", 1)], ids=str
)
def test_against_plain_backward_passes(family, kv_heads):
    """qwen2 has biases in q, k, v, which leave with their rows."""
    model, rows = tiny_model(family, kv_heads=kv_heads, layers=2), uneven_rows()
    assert TAYLOR_SCORES == ("vector_first", "element_first", "vector_mixed", "element_mixed")
    with unchanged(model):
        found = measure_taylor(model, rows, max_samples=4)
    for place, wanted in naive(model, rows, 4).items():
        assert found[place].dtype == torch.float64
        torch.testing.assert_close(found[place], wanted.double(), rtol=1e-4, atol=1e-6)


def test_gradients_and_flags_are_left_as_they_were():
    model, rows = tiny_model(layers=2), uneven_rows()
    wanted = measure_taylor(model, rows)
    marks = {}
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
        if i % 2:
            p.grad = torch.full_like(p, float(i))
            marks[i] = p.grad
    with unchanged(model), torch.no_grad():
        again = measure_taylor(model, rows)
    for i, p in enumerate(model.parameters()):
        assert p.grad is marks.get(i)
        if i in marks:
            assert bool((p.grad == i).all())
    assert all(torch.equal(again[place], wanted[place]) for place in wanted)


def test_a_wholly_frozen_model_is_scored_alike():
    """As under adapters: what cannot be trained can still be cut."""
    model, rows = tiny_model(layers=2), uneven_rows()
    wanted = measure_taylor(model, rows)
    model.requires_grad_(False)
    with torch.inference_mode(), unchanged(model):
        found = measure_taylor(model, rows)
    assert all(torch.equal(found[place], wanted[place]) for place in wanted)
    assert not any(p.requires_grad for p in model.parameters())


def test_padding_order_dropout_and_mode_do_not_matter():
    ids = [row.ids for row in uneven_rows().rows]
    model = tiny_model(layers=2, attention_dropout=0.5)
    wanted = measure_taylor(model, RowSet.of(map(Row.of, ids)))
    model.train()
    model.gradient_checkpointing_enable()
    with unchanged(model):
        found = measure_taylor(model, RowSet.of(map(Row.of, ids[::-1])))
    assert all(torch.equal(found[place], wanted[place]) for place in wanted)


def test_more_samples_count_only_up_to_the_limit():
    model, rows = tiny_model(layers=1), uneven_rows(40)
    chosen = rows.side("calibrate")
    assert len(chosen) > 12
    few, all_ = measure_taylor(model, rows), measure_taylor(model, rows, max_samples=10**6)
    assert not torch.allclose(few[0, "mlp"], all_[0, "mlp"])
    alone = RowSet(tuple(chosen[:10]), split=False)
    ten = measure_taylor(model, alone)
    assert all(torch.equal(few[place], ten[place]) for place in few)


def test_a_gradient_that_is_not_finite_is_refused_and_leaves_no_trace():
    model, rows = tiny_model(layers=2), uneven_rows()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, gradient):
            return gradient * float("nan")

    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_hook(lambda _m, _a, out: Poison.apply(out))
    with unchanged(model), pytest.raises(CalibrationError, match="not finite on sample 0"):
        measure_taylor(model, rows)
    handle.remove()
    assert all(p.grad is None for p in model.parameters())


def test_rows_of_one_token_have_no_gradient():
    model = tiny_model(layers=1)
    rows = RowSet.of(Row.of(torch.tensor([token])) for token in range(3, 20))
    with unchanged(model), pytest.raises(CalibrationError, match="no sample with two tokens"):
        measure_taylor(model, rows)


def test_out_of_memory_says_what_to_do(monkeypatch):
    model, rows = tiny_model(layers=1), uneven_rows()

    def exhausted(*_args, **_options):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(torch.autograd, "grad", exhausted)
    model.requires_grad_(False)
    with unchanged(model), pytest.raises(CalibrationError, match=r"3 GiB.*shorter samples"):
        measure_taylor(model, rows)

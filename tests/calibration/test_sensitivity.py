"""What the loss of a whole sub-block does to the output, against full forwards of the test."""

import pytest
import torch

from lit_prune.calibration import SENSITIVITIES, measure_sensitivities
from tests.models import CONFIGS, tiny_model
from tests.naive import captured, deleted, output_of, places_of, uneven_rows
from tests.state import unchanged


@torch.no_grad()
def run_rows(model, rows):
    """Log-probabilities and final states of each row, alone and unpadded."""
    found = []
    for row in rows:
        inputs = {"input_ids": row.ids[None], "use_cache": False}
        hidden = model.model(**inputs).last_hidden_state[0]
        found.append((model(**inputs).logits[0].double().log_softmax(-1), hidden.double()))
    return found


def naive(model, rows, place, constant):
    whole = run_rows(model, rows)
    with deleted(model, place, constants={place: constant}):
        less = run_rows(model, rows)
    kl = nll = change = 0.0
    scored = tokens = 0
    for row, (p, h), (q, g) in zip(rows, whole, less, strict=True):
        following = row.ids[1:]
        for t, token in enumerate(following.tolist()):
            kl += float((p[t].exp() * (p[t] - q[t])).sum())
            nll += float(p[t, token] - q[t, token])
        change += float((h - g).square().sum())
        scored, tokens = scored + len(following), tokens + len(row.ids)
    return torch.tensor([kl / scored, nll / scored, change / tokens], dtype=torch.float64)


def means_and_constants(model, rows):
    seen = captured(model, rows)["writes"]
    means = {place: x.mean(0) for place, x in seen.items()}
    constants = {}
    for place, mean in means.items():
        linear = output_of(model, *place)
        constants[place] = linear.weight.detach().double() @ mean
        if linear.bias is not None:
            constants[place] += linear.bias.detach().double()
    return means, constants


@pytest.mark.parametrize("family", [*CONFIGS, "granite"])
def test_against_full_forwards(family):
    options = {"llama": {"mlp_bias": True}, "granite": {"logits_scaling": 0.25}}.get(family, {})
    model, rows = tiny_model(family, layers=2, **options), uneven_rows(16)
    means, constants = means_and_constants(model, rows)
    chosen = rows.side("calibrate")
    found = []
    for batch_tokens in (70, 8192):  # padded batches of several sizes
        with unchanged(model):
            found.append(
                measure_sensitivities(
                    model, rows, means, max_tokens=10**6, batch_tokens=batch_tokens
                )
            )
    assert SENSITIVITIES == ("kl", "nll", "frobenius")
    for place in places_of(model):
        wanted = naive(model, chosen, place, constants[place])
        assert wanted[0] > 0.01
        for one in found:
            torch.testing.assert_close(one[place], wanted, rtol=1e-3, atol=1e-5)


def test_a_sub_block_that_writes_a_constant_is_worth_nothing():
    """Its mean stands in for it: only what depends on the token counts."""
    model, rows = tiny_model(layers=2, mlp_bias=True), uneven_rows(16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    means, _ = means_and_constants(model, rows)
    found = measure_sensitivities(model, rows, means, max_tokens=10**6)
    assert found[1, "mlp"].abs().max() < 1e-5
    assert found[0, "mlp"][0] > 0.01


def test_no_more_than_the_tokens_that_are_granted_but_one_batch():
    model, rows = tiny_model(layers=1), uneven_rows(24)
    means, constants = means_and_constants(model, rows)
    few = measure_sensitivities(model, rows, means, max_tokens=1, batch_tokens=30)
    first = next(iter(rows.batches("calibrate", 30)))
    count = len(first.input_ids)
    for place in places_of(model):
        wanted = naive(model, rows.side("calibrate")[:count], place, constants[place])
        torch.testing.assert_close(few[place], wanted, rtol=1e-3, atol=1e-5)


def test_modes_and_patches_come_back_also_after_an_error():
    model, rows = tiny_model(layers=2, attention_dropout=0.5), uneven_rows(16)
    means, _ = means_and_constants(model, rows)
    once = measure_sensitivities(model, rows, means, max_tokens=10**6)
    model.train()
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype=torch.bfloat16), unchanged(model):
        again = measure_sensitivities(model, rows, means, max_tokens=10**6)
    assert all(torch.equal(once[place], again[place]) for place in once)
    calls = []

    def boom(x):
        calls.append(1)
        if len(calls) == 3:  # while a sub-block is replaced
            raise KeyboardInterrupt
        return torch.nn.functional.silu(x)

    act = model.model.layers[1].mlp.act_fn
    with unchanged(model):
        act.forward = boom
        with pytest.raises(KeyboardInterrupt):
            measure_sensitivities(model, rows, means, max_tokens=10**6)
        del act.forward

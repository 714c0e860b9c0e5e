"""One pass over the residual stream, against rows that pass alone."""

import pytest
import torch

from lit_prune.calibration import measure_residuals
from tests.models import CONFIGS, tiny_model
from tests.naive import captured, inputs_of, places_of, uneven_rows
from tests.state import unchanged


@pytest.mark.parametrize("family", CONFIGS)
def test_against_rows_alone(family):
    """Padding, batches and their size do not matter."""
    model, rows = tiny_model(family, layers=3), uneven_rows()
    seen = captured(model, rows)
    for batch_tokens in (64, 8192):
        with unchanged(model):
            similarities, inputs = measure_residuals(model, rows, batch_tokens=batch_tokens)
        wanted = [
            torch.cosine_similarity(seen["enters"][layer], seen["leaves"][layer], dim=-1).mean()
            for layer in range(3)
        ]
        torch.testing.assert_close(similarities, torch.stack(wanted), rtol=1e-5, atol=1e-6)
        assert set(inputs) == set(places_of(model))
        for place, found in inputs.items():
            assert found.dtype == torch.float64
            mean_square = seen["reads"][place].square().mean(0)
            torch.testing.assert_close(found, mean_square, rtol=1e-4, atol=1e-9)


def test_a_block_that_writes_nothing_has_similarity_one():
    model, rows = tiny_model(layers=3), uneven_rows()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    similarities, _ = measure_residuals(model, rows)
    assert similarities[1].item() == pytest.approx(1, abs=1e-6)
    assert similarities[0] < 0.99


def test_training_mode_dropout_and_autocast_do_not_matter():
    model, rows = tiny_model(layers=2, attention_dropout=0.5), uneven_rows()
    once, _ = measure_residuals(model, rows)
    model.train()
    model.model.layers[1].eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), unchanged(model):
        again, _ = measure_residuals(model, rows)
    assert torch.equal(once, again)


def test_an_error_leaves_no_hook():
    model, rows = tiny_model(layers=2), uneven_rows()
    linear = inputs_of(model, 1, "mlp")[1]

    def boom(_x):
        raise RuntimeError("boom")

    model.train()
    with unchanged(model):
        linear.forward = boom
        with pytest.raises(RuntimeError, match="boom"):
            measure_residuals(model, rows)
        del linear.forward

"""The divergence of drafts, against the distributions written out."""

import pytest
import torch

from lit_prune.calibration import Divergence, Row, RowSet
from lit_prune.decoder import all_kept, quiet, spec_for
from lit_prune.methods import plan_of
from lit_prune.sequential import sequential_compensation
from lit_prune.surgery import masked
from tests.models import tiny_model, tiny_rows


def kl_of(model, rows, plan, compensation=None):
    """Mean over all predicted tokens, row by row, from whole distributions."""
    total = tokens = 0
    for row in rows.side("choose"):
        with torch.no_grad():
            dense = model(input_ids=row.ids[None]).logits[0, :-1].double().log_softmax(-1)
            with masked(model, plan, compensation):
                draft = model(input_ids=row.ids[None]).logits[0, :-1].double().log_softmax(-1)
        total += float((dense.exp() * (dense - draft)).sum())
        tokens += len(dense)
    return total / tokens


def test_it_is_the_kl_of_what_comes_next():
    model = tiny_model(layers=3)
    rows = RowSet.of(Row.of(row[: 8 + i % 5]) for i, row in enumerate(tiny_rows(40)))
    spec = spec_for(model)
    kept = {place: tuple(range(0, n, 2)) for place, n in all_kept(spec).items()}
    plan = plan_of(spec, kept)
    with quiet(model):
        divergence = Divergence(model, rows.batches("choose", 64))
        assert divergence() == pytest.approx(0, abs=1e-7)
        with masked(model, plan, spec=spec):
            found = divergence()
        assert divergence() == pytest.approx(0, abs=1e-7)  # the model is what it was
    assert found == pytest.approx(kl_of(model, rows, plan), rel=1e-4)
    assert found > 1e-4  # or anything would do


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_a_head_that_was_fitted_is_compared_with_the_dense_one(family, tie):
    model = tiny_model(family, layers=3, tie=tie)
    rows = RowSet.of(Row.of(row[: 8 + i % 5]) for i, row in enumerate(tiny_rows(60)))
    spec = spec_for(model)
    kept = {place: tuple(range(0, n, 2)) for place, n in all_kept(spec).items()}
    plan = plan_of(spec, kept)
    fitted = sequential_compensation(model, plan, rows)
    with quiet(model):
        divergence = Divergence(model, rows.batches("choose", 64))
        with masked(model, plan, fitted, spec=spec):
            found = divergence()
    assert found == pytest.approx(kl_of(model, rows, plan, fitted), rel=1e-3)


@pytest.mark.parametrize(("most", "at_once"), [(1, 64), (30, 64), (100, 16), (10**6, 64)])
def test_the_first_tokens_are_at_most_what_was_asked_and_at_least_a_sample(most, at_once):
    rows = RowSet.of(Row.of(row[: 8 + i % 5]) for i, row in enumerate(tiny_rows(60)))
    batches = list(rows.batches("calibrate", at_once, most))
    found = sum(int(batch.attention_mask.sum()) for batch in batches)
    lengths = [len(row.ids) for row in rows.side("calibrate")]
    assert 0 < found <= max(most, lengths[0])
    assert found + lengths[0] > most or found == sum(lengths)  # as many as fit
    assert all(batch.input_ids.numel() <= at_once for batch in batches)

"""Accuracy and cross-entropy against transformers' own logits and loss."""

import pytest
import torch

from lit_prune.calibration import collect_rows
from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.metrics import (
    classification_of,
    footprint_of,
    measure_latency,
    perplexity_of,
    quality_of,
)
from tests.models import batches_of, labelled, tiny_classifier, tiny_model, tiny_rows

ROWS = tiny_rows(14, 12, uneven=True)


def by_transformers(model, batches):
    """Accuracy and mean loss of its own forwards, one row at a time."""
    right, losses = [], []
    for batch in batches:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            keep = mask != 0
            labels = labels[keep] if labels.ndim else labels
            logits = model(input_ids=ids[keep][None]).logits[0]
            logits, labels = (x.reshape(-1, x.shape[-1]) if x is logits else x.reshape(-1)
                              for x in (logits, labels))  # fmt: skip
            there = labels != -100
            right += (logits.argmax(-1) == labels)[there].tolist()
            nll = -logits.double().log_softmax(-1)
            losses += [float(nll[i, label]) for i, label in enumerate(labels) if there[i]]
    return sum(right) / len(right), sum(losses) / len(losses), len(right)


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_quality_is_that_of_transformers(task, side, pads):
    model = tiny_classifier(task, layers=2, **({} if pads else {"pad_token_id": None}))
    batches = labelled(task, batches_of(ROWS, side=side))
    with torch.no_grad():
        accuracy, mean_nll, count = by_transformers(model, batches)
    found = quality_of(model, batches)
    assert (found.accuracy, found.mean_nll) == pytest.approx((accuracy, mean_nll), rel=1e-5)
    assert (found.num_labels, found.num_rows) == (count, len(ROWS))
    assert found.num_real_tokens == sum(map(len, ROWS))


def test_kept_rows_have_the_quality_of_their_batches():
    model = tiny_classifier("sequence", layers=2)
    batches = labelled("sequence", batches_of(ROWS[:2]))  # too few to split: every side is all
    kept, _ = collect_rows(model, batches, 10**6)
    assert quality_of(model, kept.batches("score", 64)).mean_nll == pytest.approx(
        quality_of(model, batches).mean_nll, rel=1e-6
    )


def test_a_language_model_keeps_its_perplexity():
    model, batches = tiny_model(layers=1), batches_of(ROWS)
    assert quality_of(model, batches) == perplexity_of(model, batches)


def test_what_cannot_be_measured_is_an_error():
    model = tiny_classifier("token", layers=1)
    with pytest.raises(CalibrationError, match="no label in 14 rows"):
        classification_of(model, batches_of(ROWS))
    with pytest.raises(ConfigError, match="without input_ids"):
        classification_of(model, [{"labels": torch.ones(1)}])
    model.score.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="logits of batch 0 are NaN"):
        classification_of(model, labelled("token", batches_of(ROWS)))


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_classifier_decodes_nothing(task):
    model = tiny_classifier(task, layers=1, pad_token_id=None)
    ids = torch.stack([ROWS[0][:5], ROWS[1][:5]])  # transformers takes no such batch
    found = measure_latency(model, ids, new_tokens=0)
    assert (found.new_tokens, found.decode_seconds_per_token) == (0, None)
    assert found.decode_tokens_per_second is None
    assert found.whole_seconds == found.prefill_seconds > 0
    with pytest.raises(ConfigError, match="a classifier decodes nothing"):
        measure_latency(model, ids, new_tokens=3)
    cost = footprint_of(model, peak_ids=ids)
    assert cost.head_flops_per_token == 2 * 3 * 32
    assert cost.peak_forward_bytes > 0

"""Labels of classifiers: checked, put where the head reads, kept whatever the order."""

import pytest
import torch

from lit_prune.calibration import Calibration, Observer, collect_rows, real_tokens
from lit_prune.calibration.labels import DISAGREE
from lit_prune.decoder import IGNORED_LABEL
from lit_prune.errors import CalibrationError
from tests.models import batches_of, labelled, padded_batch, tiny_classifier, tiny_rows

TASKS = ("sequence", "token")
ROWS = tiny_rows(12, 9, uneven=True)


def rows_of(model, batches):
    return collect_rows(model, batches, 10**6)[0].rows


def as_set(rows):
    return {(row.digest, *row.labels.tolist(), *row.scored.tolist()) for row in rows}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_read_where_transformers_reads_it(side):
    model = tiny_classifier("sequence", layers=1)
    batch = padded_batch(ROWS[:4], side=side, extra=2)
    batch["input_ids"][0][batch["attention_mask"][0].nonzero()[-1]] = 0  # ends with the pad token
    batch["labels"] = torch.tensor([2, 0, -100, 1])
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    wanted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = real_tokens(batch, model.config, "", task="sequence")
    assert torch.equal(model.score(hidden)[real.scored], wanted)
    for (i, columns, row), label in zip(real.rows(), batch["labels"].tolist(), strict=True):
        assert int(row.scored.sum()) == 1
        assert torch.equal(row.scored, real.scored[i][columns])
        assert row.labels[row.scored].tolist() == [label]
        assert bool((row.labels[~row.scored] == IGNORED_LABEL).all())


@pytest.mark.parametrize("task", TASKS)
def test_order_padding_and_observing_leave_no_trace(task):
    model, batches = tiny_classifier(task, layers=1), labelled(task, batches_of(ROWS, 4))
    wanted = as_set(rows_of(model, batches))
    assert len(wanted) == len(ROWS)
    assert as_set(rows_of(model, batches[::-1])) == wanted
    observer = Observer(model, max_tokens=10**6)
    observer.open()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    observer.close()
    assert as_set(observer.rows.values()) == wanted


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_labels_the_larger_counts_and_the_report_is_told(order):
    model = tiny_classifier("sequence", layers=1)
    batches = [{"input_ids": ROWS[0][None], "labels": torch.tensor([k])} for k in (1, 2, -100)]
    rows, notes = collect_rows(model, batches[::order], 10**6)
    assert [row.labels.max().item() for row in rows.rows] == [2]
    assert DISAGREE in notes
    assert collect_rows(model, batches[1:], 10**6)[1] == ()


def test_labels_are_kept_in_the_file(tmp_path):
    model = tiny_classifier("token", layers=1)
    rows, _ = collect_rows(model, labelled("token", batches_of(ROWS)), 10**6)
    Calibration("", rows, {}).save(tmp_path / "c.safetensors")
    assert as_set(Calibration.load(tmp_path / "c.safetensors").rows.rows) == as_set(rows.rows)


@pytest.mark.parametrize("task", TASKS)
def test_without_labels_the_head_is_read_all_the_same(task):
    for row in rows_of(tiny_classifier(task, layers=1), batches_of(ROWS)):
        assert row.num_scored == 0
        assert int(row.scored.sum()) == (1 if task == "sequence" else len(row.ids))


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("sequence", torch.zeros(3, dtype=torch.int64), r"labels are \[3\], expected \[4\]: one"),
        ("sequence", torch.zeros(4, 9, dtype=torch.int64), "one class for each sample"),
        ("token", torch.zeros(4, dtype=torch.int64), "one class for each token"),
        ("token", [1, 2], "labels are list, expected"),
        ("sequence", torch.tensor([0, 1, 2, 3]), "label 3 is none of the model's 3 classes"),
        ("sequence", torch.tensor([0, 1, 2, -1]), "label -1 is none"),
        ("sequence", torch.zeros(4), "labels are torch.float32, expected integers from 0 to 2"),
    ],
)
def test_labels_that_the_head_cannot_mean_are_refused(task, labels, message):
    batch = {**padded_batch(ROWS[:4]), "labels": labels}
    with pytest.raises(CalibrationError, match=message):
        rows_of(tiny_classifier(task, layers=1), [batch])


def test_padding_that_the_head_would_read_is_refused():
    batch = padded_batch(ROWS[:4], pad=7)  # the config names 0
    with pytest.raises(CalibrationError, match=r"reads row \d at token \d.*id is 7, and conf"):
        rows_of(tiny_classifier("sequence", layers=1), [batch])
    rows_of(tiny_classifier("token", layers=1), [batch])  # reads each real one


def test_packed_texts_are_refused_and_packed_tokens_are_not():
    batch = {
        "input_ids": torch.cat(ROWS[:2])[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in ROWS[:2]])[None],
    }
    with pytest.raises(CalibrationError, match="packed samples, and a head that reads one token"):
        rows_of(tiny_classifier("sequence", layers=1), [batch])
    assert len(rows_of(tiny_classifier("token", layers=1), [batch])) == 2

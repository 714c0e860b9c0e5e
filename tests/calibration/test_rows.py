import itertools

import pytest
import torch

from lit_prune.calibration import Row, RowSet, collect_rows
from lit_prune.calibration.split import SIDES, side_of
from lit_prune.errors import CalibrationError
from tests.models import batches_of, padded_batch, tiny_model, tiny_rows


def row_set(count=40, **options):
    return RowSet.of(Row.of(ids) for ids in tiny_rows(count, **options))


def same(a, b):
    return [r.digest for r in a.rows] == [r.digest for r in b.rows] and all(
        torch.equal(x.scored, y.scored) for x, y in zip(a.rows, b.rows, strict=True)
    )


def test_order_repeats_and_stride_leave_no_trace():
    rows = tiny_rows(30, uneven=True)
    wanted = RowSet.of(map(Row.of, rows))
    assert same(RowSet.of(map(Row.of, rows[::-1])), wanted)
    assert same(RowSet.of(map(Row.of, rows + rows[:7])), wanted)
    assert [len(r.ids) for r in wanted.rows] == sorted((len(r) for r in rows), reverse=True)


def test_repeats_with_other_labels_are_scored_where_one_of_them_is_in_any_order():
    ids = tiny_rows(1)[0]
    masks = [torch.arange(len(ids)) % 3 == i for i in range(2)]
    for order in itertools.permutations(masks):
        (row,) = RowSet.of(Row.of(ids, mask) for mask in order).rows
        assert torch.equal(row.scored, masks[0] | masks[1])


def test_f21_sides_are_disjoint_complete_and_of_the_stated_size():
    rows = row_set(4000, length=6)
    sides = {side: {r.digest for r in rows.side(side)} for side in SIDES}
    assert sum(map(len, sides.values())) == len(rows.rows)
    assert set.union(*sides.values()) == {r.digest for r in rows.rows}
    share = {side: len(found) / len(rows.rows) for side, found in sides.items()}
    # three standard deviations of 4000 draws
    assert share == pytest.approx({"calibrate": 0.6, "choose": 0.2, "score": 0.2}, abs=0.024)
    assert all(side_of(digest) == side for side, found in sides.items() for digest in found)


def test_a_row_forgets_the_tensor_that_it_was_made_from():
    ids = torch.tensor([5, 6, 7], dtype=torch.int32)
    row = Row.of(ids)
    digest = row.digest
    ids[:] = 0
    assert row.ids.tolist() == [5, 6, 7]
    assert row.ids.dtype == torch.int64
    assert Row.of(torch.tensor([5, 6, 7])).digest == digest


def test_too_few_samples_are_not_split_and_it_is_said():
    rows = row_set(2)
    assert not rows.split
    assert all(rows.side(side) == rows.rows for side in SIDES)
    assert "same text" in rows.describe_split()
    assert "optimistic" in rows.describe_split()
    assert "disjoint" in row_set(40).describe_split()


def test_batches_hold_every_row_once_and_keep_the_token_limit():
    rows = row_set(50, uneven=True)
    for limit in (1, 60, 10_000):
        seen = []
        batches = list(rows.batches("calibrate", limit))
        for batch in batches:
            assert batch.input_ids.numel() <= max(limit, batch.input_ids.shape[1])
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
                seen.append(Row.of(ids[mask]).digest)
                assert not ids[~mask].any()
        assert seen == [row.digest for row in rows.side("calibrate")]
        assert rows.num_batches("calibrate", limit) == len(batches)


def test_only_padded_batches_carry_a_mask():
    rows = RowSet.of([Row.of(torch.tensor([3, 4, 5])), Row.of(torch.tensor([6, 7]))])
    (both,) = rows.batches("calibrate", 100)
    assert set(both.model_inputs(torch.device("cpu"))) == {"input_ids", "attention_mask"}
    first, _ = rows.batches("calibrate", 1)
    assert set(first.model_inputs(torch.device("cpu"))) == {"input_ids"}


def test_f11_no_row_is_an_error():
    with pytest.raises(CalibrationError, match="no sample on the score side"):
        list(RowSet.of([]).batches("score", 10))


# ---- collecting from a user's loader ----


def test_f13_padding_on_either_side_is_not_part_of_a_row():
    model, rows = tiny_model(layers=1), tiny_rows(12, uneven=True)
    wanted, _ = collect_rows(model, [{"input_ids": row[None]} for row in rows], 10**6)
    for side in ("left", "right"):
        padded = batches_of(rows, 5, side=side, extra=3)
        found, notes = collect_rows(model, padded, 10**6)
        assert same(found, wanted)
        assert notes == ()


def test_f13_a_row_of_nothing_but_padding_is_no_sample():
    model, rows = tiny_model(layers=1), tiny_rows(3)
    batch = padded_batch([*rows, torch.empty(0, dtype=torch.long)])
    found, _ = collect_rows(model, [batch], 10**6)
    assert same(found, RowSet.of(map(Row.of, rows)))


def test_labels_mark_what_is_scored():
    rows = tiny_rows(4)
    batch = padded_batch(rows, extra=2)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :5] = -100
    found, _ = collect_rows(tiny_model(layers=1), [batch], 10**6)
    assert all(
        row.scored.tolist() == [False] * 5 + [True] * (len(row.ids) - 5) for row in found.rows
    )


def test_the_token_cap_cuts_at_the_same_sample_whatever_the_batch_size():
    model, rows = tiny_model(layers=1), tiny_rows(20, 10)
    for size in (1, 3, 20):
        found, notes = collect_rows(model, batches_of(rows, size), 95)
        assert {r.digest for r in found.rows} == {Row.of(r).digest for r in rows[:10]}
        assert "cut at max_calibration_tokens" in notes[0]
    repeats, notes = collect_rows(model, batches_of(rows[:9] * 3, 4), 90)
    assert len(repeats.rows) == 9  # repeats cost nothing
    assert notes == ()

from types import SimpleNamespace

import pytest
import torch

from lit_prune.calibration import collect_rows, real_tokens
from lit_prune.errors import CalibrationError
from tests.models import padded_batch, tiny_model, tiny_rows
from tests.state import unchanged

CONFIG = SimpleNamespace(vocab_size=64, max_position_embeddings=32, pad_token_id=0, eos_token_id=2)
IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))


class UserBatch:
    """A mapping that is no dict: what tokenizers return."""

    def __init__(self, inside):
        self.inside = inside

    def keys(self):
        return self.inside.keys()

    def __getitem__(self, key):
        return self.inside[key]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, r"no input_ids among .*inputs_embeds"),
        ({"input_ids": None, "x": 1}, r"no input_ids among the arguments \['x'\]"),
        ({"input_ids": [[1, 2]]}, "no input_ids among"),
        ({"input_ids": IDS[0]}, r"has shape \[8\] and dtype torch.int64, expected \[batch, tok"),
        ({"input_ids": IDS[None]}, r"shape \[1, 2, 8\] .*expected"),
        ({"input_ids": IDS.float()}, "dtype torch.float32, expected"),
        ({"input_ids": IDS.bool()}, "dtype torch.bool, expected"),
        ({"input_ids": IDS + 60}, r"run from \d+ to 1\d\d, the model's vocabulary has 64"),
        ({"input_ids": IDS - 70}, "run from -.*vocabulary has 64"),
        ({"input_ids": IDS.repeat(1, 5)}, "40 tokens a sample.*max_position_embeddings is 32"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, r"is \[2, 4\], expected \[2, 8\]"),
        ({"input_ids": IDS, "attention_mask": IDS[:, None, None]}, "is .*expected .*padding"),
        ({"input_ids": IDS, "attention_mask": "all"}, "attention_mask is str, expected"),
        ({"input_ids": IDS, "labels": IDS[:, :3]}, "labels must have the shape"),
        ({"input_ids": IDS * (IDS % 2)}, "are the pad token .*and no attention_mask"),
        (
            {"input_ids": IDS, "position_ids": IDS[:, :4]},
            r"position_ids is \[2, 4\], expected \[2, 8",
        ),
        ({"input_ids": IDS, "position_ids": 3}, "position_ids is int, expected"),
        (
            {"input_ids": IDS, "position_ids": torch.arange(5, 13)[None]},
            "of row 0 begin.* at 5; exp",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 9, 10, 11, 12, 13]])},
            "of row 0 begin, or go on, at 9; expected 0, 1, 2 and",
        ),
        (
            {
                "input_ids": IDS,
                "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
                "attention_mask": torch.ones_like(IDS),
            },
            "restart 1 times, but with an attention_mask .*see each other. Pass use_cache=False",
        ),
        (
            {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 8])},
            "packed .*without position_ids",
        ),
        (
            {"input_ids": IDS.repeat(1, 5), "position_ids": torch.arange(40)[None]},
            "40 tokens a sample",
        ),
        (
            {"input_ids": IDS.repeat(1, 5), "position_ids": (torch.arange(40) % 36)[None]},
            "36 tokens a sample",
        ),
    ],
)
def test_f12_f13_what_cannot_be_calibrated_on_is_refused_by_name(batch, message):
    with pytest.raises(CalibrationError, match=rf"batch 3: .*{message}"):
        real_tokens(batch, CONFIG, "batch 3")


def test_f13_pad_that_is_end_of_text_is_taken_for_text_and_noted():
    ids = IDS * (IDS % 2)
    for eos in (0, [0, 5]):
        config = SimpleNamespace(**{**vars(CONFIG), "eos_token_id": eos})
        found = real_tokens({"input_ids": ids}, config, "batch 0")
        assert found.mask.all()
        assert "taken for real text" in found.notes[0]


def test_f13_a_mask_is_believed_whatever_its_dtype():
    for dtype in (torch.int64, torch.bool, torch.float32):
        mask = (torch.arange(8) < 5).expand(2, 8).to(dtype)
        found = real_tokens({"input_ids": IDS, "attention_mask": mask}, CONFIG, "")
        assert found.mask.dtype == torch.bool
        assert found.mask.sum() == 10
        assert found.notes == ()


def test_a_config_without_pad_token_or_longest_context_is_fine():
    found = real_tokens({"input_ids": IDS.int() * 0}, SimpleNamespace(vocab_size=64), "")
    assert found.mask.all()
    assert found.ids.dtype == torch.int64


def test_an_empty_batch_has_no_rows():
    assert list(real_tokens({"input_ids": IDS[:0]}, CONFIG, "").rows()) == []
    assert list(real_tokens({"input_ids": IDS[:, :0]}, CONFIG, "").rows()) == []


def test_f12_a_batch_that_is_no_mapping_is_refused_with_its_shapes():
    model = tiny_model(layers=1)
    with (
        unchanged(model),
        pytest.raises(CalibrationError, match=r"batch 1 is a tuple of \[\[2, 8\], 'str'\]; expec"),
    ):
        collect_rows(model, [{"input_ids": IDS}, (IDS, "text")], 10**6)
    with pytest.raises(CalibrationError, match="batch 0 is a Tensor; expected a mapping"):
        collect_rows(model, [IDS], 10**6)


def test_any_mapping_will_do():
    batch = padded_batch(tiny_rows(3))
    found, _ = collect_rows(tiny_model(layers=1), [UserBatch(batch)], 10**6)
    assert len(found.rows) == 3


def packed(rows):
    """One row of ids without padding, and positions that restart with each sample."""
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


def test_f13_a_packed_row_is_its_segments():
    model, rows = tiny_model(layers=1), tiny_rows(12, uneven=True)
    apart, notes = collect_rows(model, [{"input_ids": row[None]} for row in rows], 10**6)
    assert notes == ()
    # 200 tokens in one row: more than the model's 128, but no sample is longer
    found, notes = collect_rows(model, [packed(rows)], 10**6)
    assert [row.digest for row in found.rows] == [row.digest for row in apart.rows]
    assert "packed rows were split where position_ids restart" in notes[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_f13_a_segment_alone_has_the_logits_that_it_has_in_a_packed_row(attention):
    model, rows = tiny_model("mistral", sliding_window=9), tiny_rows(5, uneven=True)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        together = model(**packed(rows), use_cache=False).logits[0]
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
    # the same sums in another order: float32 rounding
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counted", [True, False], ids=["from the first token", "from the padding"])
def test_f13_positions_that_count_the_real_tokens_change_nothing(side, counted):
    model, rows = tiny_model(layers=1), tiny_rows(6, uneven=True)
    batch = padded_batch(rows, side=side, extra=2)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0) if counted else torch.arange(mask.shape[1])[None]
    plain, _ = collect_rows(model, [batch], 10**6)
    found, notes = collect_rows(model, [batch | {"position_ids": positions}], 10**6)
    assert [row.digest for row in found.rows] == [row.digest for row in plain.rows]
    assert notes == ()

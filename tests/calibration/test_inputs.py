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
        assert "taken for real text" in found.note


def test_f13_a_mask_is_believed_whatever_its_dtype():
    for dtype in (torch.int64, torch.bool, torch.float32):
        mask = (torch.arange(8) < 5).expand(2, 8).to(dtype)
        found = real_tokens({"input_ids": IDS, "attention_mask": mask}, CONFIG, "")
        assert found.mask.dtype == torch.bool
        assert found.mask.sum() == 10
        assert found.note == ""


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

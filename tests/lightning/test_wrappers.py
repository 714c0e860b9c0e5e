"""A Trainer that fine-tunes a multimodal model, with the callback in it."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_prune import follow_checkpoints
from lit_prune.decoder import text_view
from lit_prune.errors import CalibrationError
from tests.lightning.modules import fit, pruner, state_digest
from tests.models import batches_of, tiny_rows
from tests.state import num_hooks
from tests.wrappers import tiny_wrapper, with_image

TEXT = batches_of(tiny_rows(40, 16, vocab=60, seed=1, uneven=True), 8)


class Sees(L.LightningModule):
    """What people write around AutoModelForImageTextToText."""

    def __init__(self):
        super().__init__()
        self.model = tiny_wrapper("llava").train()

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batches):
    return DataLoader(batches, batch_size=None)


def test_fit_prunes_the_language_model_inside(tmp_path):
    module, one = Sees(), pruner()
    images = with_image("llava", rows=3)
    options = {"train": loader([images, TEXT[0]]), "enable_checkpointing": True}
    fit(tmp_path, module, one, val=loader([images, *TEXT]), **options)
    assert abs(one.report_.achieved_ratio - 0.3) <= 0.005
    assert any(note.startswith("3 samples with an image") for note in one.report_.notes())
    # transformers has hooks of its own on the vision tower
    assert num_hooks(text_view(module.model)) == len(module.model._forward_pre_hooks) == 0
    assert module.model.pruning_record.plan == one.plan_
    loss = module.model(**images, labels=images["input_ids"]).loss
    loss.backward()
    layers = text_view(module.model).model.layers
    assert all(p.grad is not None for p in layers.parameters())
    # a fresh, dense module takes the structure of the pruned one
    (saved,) = tmp_path.rglob("pruned.ckpt")
    again = Sees()
    follow_checkpoints(again)
    again.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    assert state_digest(again) == state_digest(module)


def test_validation_of_images_alone_says_what_to_do(tmp_path):
    images = loader([with_image("llava")])
    with pytest.raises(CalibrationError, match=r"every sample had an image.*lit_prune\.prune"):
        fit(tmp_path, Sees(), pruner(), train=images, val=images)

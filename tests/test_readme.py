"""The README's Python blocks run as they stand, around tiny stand-ins for a user's objects."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from tests.models import padded_batch, tiny_model, tiny_rows

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm = tiny_model().train()

    def training_step(self, batch, batch_idx):
        return self.lm(**batch, labels=batch["input_ids"]).loss

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.lm(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class DataModule(L.LightningDataModule):
    def loader(self, count, seed):
        rows = tiny_rows(count, 24, seed=seed)
        return DataLoader(rows, batch_size=8, collate_fn=padded_batch)

    def train_dataloader(self):
        return self.loader(8, seed=1)

    def val_dataloader(self):
        return self.loader(40, seed=2)


def test_there_is_a_block_for_each_way():
    assert len(BLOCKS) == 4
    words = (".fit(", ".validate(", " prune(", "follow_checkpoints(self)")
    for block, word in zip(BLOCKS, words, strict=True):
        assert word in block


@pytest.mark.parametrize("block", BLOCKS[:3], ids=["fit", "validate", "prune"])
def test_block_runs_and_prunes(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "module": Module(),
        "datamodule": DataModule(),
        "model": tiny_model(),
        "dataloader": DataModule().val_dataloader(),
        "tokenizer": AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "python-4.8m"),
    }
    exec(compile(block, "README.md", "exec"), names)
    model = names["model"] if "result" in names else names["module"].lm
    dense = sum(p.numel() for p in tiny_model().model.layers.parameters())
    kept = sum(p.numel() for p in model.model.layers.parameters())
    assert 1 - kept / dense == pytest.approx(0.3, abs=0.005)


def test_block_of_a_module_follows_a_checkpoint():
    names = {"dense_model": tiny_model}
    exec(compile(BLOCKS[3], "README.md", "exec"), names)
    pruned = tiny_model(intermediate_size=16)
    module = names["Module"]()
    module.load_state_dict({f"model.{name}": x for name, x in pruned.state_dict().items()})
    assert module.model.model.layers[0].mlp.up_proj.out_features == 16


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_nothing_of_this_machine_is_told():
    assert not re.search(r"/(home|work|tmp|root|Users)/", README)

"""A Trainer that fine-tunes a classifier, with the callback in it."""

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_prune import load_pruned
from tests.lightning.modules import fit, pruner
from tests.models import batches_of, labelled, tiny_classifier, tiny_rows

ROWS = tiny_rows(40, 16, seed=1, uneven=True)


class Classifies(L.LightningModule):
    """What people write around AutoModelFor…Classification."""

    def __init__(self, task):
        super().__init__()
        self.lm = tiny_classifier(task).train()

    def training_step(self, batch, batch_idx):
        return self.lm(**batch).loss

    def validation_step(self, batch, batch_idx):
        output = self.lm(**batch)
        self.log("val_loss", output.loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_fit_prunes_a_classifier_and_tells_its_metric(task, tmp_path):
    module, one = Classifies(task), pruner(latency_prompt_tokens=8)
    train = DataLoader(labelled(task, batches_of(ROWS[:8])), batch_size=None)
    val = DataLoader(labelled(task, batches_of(ROWS, 8), seed=1), batch_size=None)
    trainer = fit(tmp_path, module, one, train=train, val=val, logger=True)
    report = one.report_
    assert abs(report.achieved_ratio - 0.3) <= 0.005
    row = report.row("accuracy")
    assert trainer.callback_metrics["quality/accuracy/after"] == pytest.approx(row.after)
    assert trainer.callback_metrics["quality/mean_nll/before"] > 0
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"quality/accuracy/before", "quality/accuracy/after"} <= tags
    assert not {tag for tag in tags if "perplexity" in tag or "decode_" in tag} - {
        f"cost/decoder_parameters/{when}" for when in ("before", "after", "ratio")
    }
    module.training_step(next(iter(train)), 0).backward()
    path = one.save_pruned(tmp_path / "pruned", verify=False)
    assert type(load_pruned(path)).__name__.endswith(type(module.lm).__name__[len("Llama") :])

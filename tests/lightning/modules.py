"""Small LightningModules around tiny random models, with the batch styles that users have."""

import contextlib
import hashlib
import inspect
import io
import logging
import signal

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_prune import EntropyPruningCallback
from lit_prune.metrics import measure_sub_blocks
from tests.models import padded_batch, tiny_model, tiny_rows
from tests.state import num_hooks as hooks  # noqa: F401 - for the tests beside this file

ROWS = tiny_rows(40, 24, seed=1)
TRAIN = tiny_rows(8, 24, seed=2)


class LM(L.LightningModule):
    """A language model whose loss is its own; it remembers its losses and counts validations."""

    def __init__(self, lm=None, *, lr=1e-2):
        super().__init__()
        self.lm = (tiny_model() if lm is None else lm).train()
        self.lr = lr
        self.losses = []
        self.validations = 0

    def training_step(self, batch, batch_idx):
        loss = self.lm(**batch, labels=labels_of(batch)).loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.lm(**batch, labels=labels_of(batch)).loss
        self.log("val_loss", loss)
        self.validations += 1

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def labels_of(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def loader(rows=ROWS, size=8, *, collate=None, **options):
    """A loader without shuffling; by default of dicts, padded on the right."""
    collate = collate or (lambda rows: padded_batch(rows, **options))
    return DataLoader(rows, batch_size=size, collate_fn=collate)


def pruner(ratio=0.3, **options):
    """A callback that skips latency, which a tiny model does not need measured in every test."""
    return EntropyPruningCallback(
        pruning_ratio=ratio, **{"latency_prompt_tokens": 0, "channel_multiple": 4, **options}
    )


def trainer(folder, *callbacks, **options):
    """A quiet Trainer on the CPU: one epoch, no logger, no checkpoints."""
    quiet = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(folder, module, *callbacks, train=None, val=None, **options):
    """Fit once on a new Trainer, and return it."""
    one = trainer(folder, *callbacks, **options)
    one.fit(module, loader(TRAIN) if train is None else train, loader() if val is None else val)
    return one


def state_digest(module):
    """A hash over names, shapes and bits of what any module holds, a LightningModule too."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def decoder_parameters(lm):
    return sum(p.numel() for p in lm.model.layers.parameters())


def steady_latency(*args, **options):
    """A measured latency table with times that grow with the units: those of a busy machine do not,
    and then no ratio may be reached.
    """
    measured = measure_sub_blocks(*args, **options)
    for rows in {id(rows): rows for rows in measured.seconds.values()}.values():
        rows[:, 1] = 1e-4 * (1 + rows[:, 0])
    return measured


def stop_at_call(monkeypatch, owner, name, number, error=KeyboardInterrupt):
    """Let the ``number``-th call of a function raise; return the list that its calls go to."""
    calls, real = [], getattr(owner, name)

    def act(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise error
        return real(*args, **kwargs)

    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    monkeypatch.setattr(owner, name, staticmethod(act) if static else act)
    return calls


@contextlib.contextmanager
def interrupted():
    """Expect Lightning's end of a Ctrl-C, `SystemExit`, and give the signal handler back."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stop.value.code == 1


@contextlib.contextmanager
def said(*names):
    """What Lightning's loggers print inside the ``with``."""
    # whichever root was imported last prints the messages of both
    names = names or ("lightning.pytorch", "pytorch_lightning")
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield text
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)

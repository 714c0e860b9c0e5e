"""Whatever the user's batches and validation loops look like."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import IterableDataset

from lit_prune.errors import CalibrationError, ConfigError
from tests.lightning.modules import (
    LM,
    ROWS,
    TRAIN,
    fit,
    hooks,
    labels_of,
    loader,
    pruner,
    state_digest,
    trainer,
)
from tests.models import padded_batch

OTHER = [torch.flip(row, [0]) for row in ROWS]


@dataclass
class Sample:
    tokens: torch.Tensor
    real: torch.Tensor

    def to(self, device):
        return Sample(self.tokens.to(device), self.real.to(device))


class OfTuples(LM):
    def training_step(self, batch, batch_idx):
        return self.lm(input_ids=batch[0], attention_mask=batch[1], labels=batch[0]).loss

    def validation_step(self, batch, batch_idx):
        ids, mask = batch
        self.lm(ids, mask)


class OfObjects(LM):
    def training_step(self, batch, batch_idx):
        return self.lm(batch.tokens, attention_mask=batch.real, labels=batch.tokens).loss

    def validation_step(self, batch, batch_idx):
        self.lm(input_ids=batch.tokens, attention_mask=batch.real)


class LossOutside(LM):
    def training_step(self, batch, batch_idx):
        logits = self.lm(**batch).logits[:, :-1]
        labels = labels_of(batch)[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


class Generates(LM):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        prompt = {name: x[:2, :4] for name, x in batch.items()}
        self.lm.generate(**prompt, max_new_tokens=3, do_sample=False)


def tuples(rows):
    batch = padded_batch(rows)
    return batch["input_ids"], batch["attention_mask"]


def objects(rows):
    return Sample(*tuples(rows))


@pytest.mark.parametrize(
    ("kind", "collate"),
    [
        (LM, padded_batch),
        (OfTuples, tuples),
        (OfObjects, objects),
        (LossOutside, padded_batch),
        (Generates, padded_batch),
    ],
)
def test_every_batch_style_gives_the_same_rows(tmp_path, kind, collate):
    callback = pruner()
    fit(
        tmp_path,
        kind(),
        callback,
        train=loader(TRAIN, collate=collate),
        val=loader(collate=collate),
    )
    assert {len(row.ids) for row in callback.calibration_.rows.rows} == {24}
    assert len(callback.calibration_.rows.rows) == len(ROWS)


@pytest.mark.event(
    "Runs", "several validation loaders", "all are observed, or the one of `val_dataloader_idx`"
)
@pytest.mark.parametrize(("index", "count"), [(None, 80), (0, 40), (1, 40)])
def test_several_loaders_all_or_one(tmp_path, index, count):
    callback = pruner(val_dataloader_idx=index)
    fit(tmp_path, LM(), callback, val=[loader(), loader(OTHER)])
    seen = {tuple(row.ids.tolist()) for row in callback.calibration_.rows.rows}
    assert len(seen) == count
    assert (tuple(OTHER[0].tolist()) in seen) == (index != 0)


def test_f11_loader_that_does_not_exist_is_refused_before_training(tmp_path):
    module = LM()
    with pytest.raises(ConfigError, match=r"val_dataloader_idx=2, but there are 2"):
        fit(tmp_path, module, pruner(val_dataloader_idx=2), val=[loader(), loader(OTHER)])
    assert module.losses == []
    with pytest.raises(ConfigError, match=r"val_dataloader_idx=1, but there are 1"):
        trainer(tmp_path, pruner(val_dataloader_idx=1)).validate(module, loader())


def test_token_cap_stops_observing(tmp_path):
    callback = pruner(max_calibration_tokens=20 * 24)
    fit(tmp_path, LM(), callback)
    assert len(callback.calibration_.rows.rows) == 20


def refused_before_training(folder, module, error, match, **options):
    before = state_digest(module)
    with pytest.raises(error, match=match):
        fit(folder, module, pruner(), num_sanity_val_steps=0, **options)
    assert module.losses == []
    assert state_digest(module) == before
    assert hooks(module) == 0


@pytest.mark.event("Runs", "no validation, `limit_val_batches=0`", "`CalibrationError` in `setup`")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_f11_no_validation_is_refused_in_setup(tmp_path):
    match = "validates nothing: .* Pass val_dataloaders"
    refused_before_training(tmp_path, LM(), CalibrationError, match, limit_val_batches=0)
    module = LM()
    with pytest.raises(CalibrationError, match=match):
        trainer(tmp_path, pruner()).fit(module, loader(TRAIN))
    assert module.losses == []
    with pytest.raises(CalibrationError, match=match):
        trainer(tmp_path, pruner(when="validate"), limit_val_batches=0).validate(module, loader())


@pytest.mark.event("Runs", "an empty validation loader", "`CalibrationError` before the first step")
@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
@pytest.mark.filterwarnings("ignore:.* returned 0 length")
def test_f11_empty_loader_is_refused_before_training(tmp_path):
    match = "validation loader has 0 batches .* drop_last"
    empty = loader([])
    refused_before_training(tmp_path, LM(), CalibrationError, match, val=empty)
    with pytest.raises(CalibrationError, match=match):
        trainer(tmp_path, pruner(when="validate")).validate(LM(), empty)
    match = r"validation loader 1 has 0 batches"
    with pytest.raises(CalibrationError, match=match):
        fit(tmp_path, LM(), pruner(val_dataloader_idx=1), val=[loader(), empty])


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_f11_an_empty_stream_is_refused_in_words(tmp_path):
    match = "ended after all batches of its loader, and the .* no real token. Is the loader empty?"
    with pytest.raises(CalibrationError, match=match):
        fit(tmp_path, LM(), pruner(), val=loader(Nothing()))


def test_f11_labels_that_score_nothing_are_known_at_the_first_validation(tmp_path):
    class Unscored(LM):
        def validation_step(self, batch, batch_idx):
            self.lm(**batch, labels=torch.full_like(batch["input_ids"], -100))

    module = Unscored()
    with pytest.raises(
        CalibrationError, match=r"0 of the \d+ real tokens .* labels that score som"
    ):
        fit(tmp_path, module, pruner(), max_epochs=50)
    assert len(module.losses) == 1
    assert hooks(module) == 0


def packed(rows):
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


class Packed(LM):
    """Samples in one row, each at its own positions; `caches` is what the config has it be."""

    caches = False

    def validation_step(self, batch, batch_idx):
        self.lm(**batch, use_cache=self.caches)


def test_f13_packed_samples_are_calibrated_on_as_if_apart(tmp_path):
    options = {"preset": "paper", "when": "validate"}
    callbacks = [pruner(**options), pruner(**options)]
    for callback, module, collate in zip(callbacks, (LM(), Packed()), (None, packed), strict=True):
        trainer(tmp_path, callback).validate(module, loader(collate=collate), verbose=False)
    apart, together = callbacks
    assert together.plan_.digest == apart.plan_.digest
    assert together.report_.row("perplexity") == apart.report_.row("perplexity")
    assert any("packed rows were split" in note for note in together.report_.notes())


def test_f13_packed_samples_that_see_each_other_are_refused(tmp_path):
    class Caching(Packed):
        caches = True

    with pytest.raises(
        CalibrationError, match=r"with a KV cache .* see each other. Pass use_cache"
    ):
        trainer(tmp_path, pruner()).validate(Caching(), loader(collate=packed), verbose=False)


def test_f13_what_the_model_generates_is_no_calibration_text(tmp_path):
    class Generating(LM):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.lm.generate(**batch, max_new_tokens=2, do_sample=False, use_cache=False)

    callback = pruner()
    module = Generating()
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert len(callback.calibration_.rows.rows) == len(ROWS)
    assert "generate" not in vars(module.lm)


def test_f11_too_few_tokens_is_known_at_the_first_validation(tmp_path):
    module = LM()
    with pytest.raises(CalibrationError, match=r"48 real tokens in 2 samples .* at least 128"):
        fit(tmp_path, module, pruner(), val=loader(ROWS[:2]), max_epochs=50)
    assert len(module.losses) == 1
    assert hooks(module) == 0


def test_f12_unusable_batches_are_refused_at_the_forward(tmp_path):
    class Embeds(LM):
        def validation_step(self, batch, batch_idx):
            self.lm(inputs_embeds=self.lm.get_input_embeddings()(batch["input_ids"]))

    module = Embeds()
    with pytest.raises(CalibrationError, match="no input_ids among the arguments"):
        fit(tmp_path, module, pruner())
    assert hooks(module) == 0


def test_f13_padding_without_a_mask_is_refused(tmp_path):
    class Unmasked(LM):
        def validation_step(self, batch, batch_idx):
            self.lm(input_ids=batch["input_ids"])

    module, short = Unmasked(), [row[:12] for row in ROWS[:4]]
    with pytest.raises(CalibrationError, match=r"are the pad token .* attention_mask"):
        fit(tmp_path, module, pruner(), val=loader(ROWS[:4] + short))
    assert hooks(module) == 0


def test_f15_base_model_called_alone_says_so(tmp_path):
    class Bare(LM):
        def validation_step(self, batch, batch_idx):
            self.lm.lm_head(self.lm.model(**batch).last_hidden_state)

    module = Bare()
    with pytest.raises(
        CalibrationError, match=r"after 5 batches of its .* the language model itself saw"
    ):
        fit(tmp_path, module, pruner())
    assert hooks(module) == 0

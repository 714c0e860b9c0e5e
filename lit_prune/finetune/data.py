"""Text for fine-tuning, as a DataModule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.texts import Padded, Window, read_documents, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDataModule(LightningDataModule):
    """Any text that `lit_prune.texts.read_documents` reads, tokenized, packed, batched.

    Of chats (``messages``) the last message is trained on, of ``prompt`` and ``completion`` the
    completion: the labels of all other tokens are -100.

    Args:
        train: A file, a directory, or a name of the `datasets` library.
        tokenizer: Directory or Hub name of the model, or the tokenizer itself.
        validation: As ``train``; None takes the last documents of it (the last windows, where there
            is one document).
        context_length: Tokens of a sample, at most.
        batch_size: Samples at once.
        packing: Join documents to full samples; else each is cut on its own, and padded.
        column: Where text is found in ``.jsonl`` files and data sets.
        train_split: Of a data set by name.
        validation_split: Of a data set by name.
        validation_fraction: What to take of ``train`` where there is no ``validation``.
        num_workers: Processes that make batches.

    Raises:
        ConfigError: If a number cannot be meant.

    Example::

        data = TextDataModule("train.jsonl", "my-model", validation="validation.jsonl")
        trainer.fit(CausalLMModule("my-model"), data)
    """

    def __init__(
        self,
        train: str,
        tokenizer: str | PreTrainedTokenizerBase,
        *,
        validation: str | None = None,
        context_length: int = 512,
        batch_size: int = 4,
        packing: bool = True,
        column: str = "text",
        train_split: str = "train",
        validation_split: str = "validation",
        validation_fraction: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1 sample, got {batch_size}.")
        if not 0 < validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction must lie between 0 and 1, got {validation_fraction}."
            )
        self.train, self.validation, self.tokenizer = train, validation, tokenizer
        self.context_length, self.packing = context_length, packing
        self.batch_size, self.num_workers = batch_size, num_workers
        self.column, self.splits = column, (train_split, validation_split)
        self.validation_fraction = validation_fraction
        self.windows: dict[str, list[Window]] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.windows:
            return
        if isinstance(self.tokenizer, (str, Path)):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        train = read_documents(self.train, split=self.splits[0], column=self.column)
        if self.validation is not None:
            other = read_documents(self.validation, split=self.splits[1], column=self.column)
            self.windows = {"train": self._cut(train), "validation": self._cut(other)}
            return
        count = max(1, round(len(train) * self.validation_fraction))
        if len(train) > 1:
            both = (self._cut(train[:-count]), self._cut(train[-count:]))
        else:  # one long document
            windows = self._cut(train)
            count = max(1, round(len(windows) * self.validation_fraction))
            both = (windows[:-count], windows[-count:])
        if not both[0]:
            raise CalibrationError(
                f"{self.train} fills one sample of {self.context_length} tokens only: nothing is "
                "left to validate on. Give validation=…, more text, or a smaller context_length."
            )
        self.windows = dict(zip(("train", "validation"), both, strict=True))

    def _cut(self, documents: list[dict[str, Any]]) -> list[Window]:
        return windows_of(
            documents,
            self.tokenizer,  # type: ignore[arg-type] # loaded by now
            self.context_length,
            packing=self.packing,
        )

    def _loader(self, windows: list[Window], *, shuffle: bool) -> DataLoader[Window]:
        return DataLoader(
            windows,  # type: ignore[arg-type] # a list is a data set
            self.batch_size,
            shuffle=shuffle,
            collate_fn=Padded(),
            num_workers=self.num_workers,
        )

    @override
    def train_dataloader(self) -> DataLoader[Window]:
        return self._loader(self.windows["train"], shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Window]:
        return self._loader(self.windows["validation"], shuffle=False)

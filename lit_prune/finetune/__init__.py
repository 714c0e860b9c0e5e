"""A ready LightningModule and DataModule for causal language models: to start from."""

from lit_prune.finetune.data import TextDataModule
from lit_prune.finetune.module import CausalLMModule

__all__ = ["CausalLMModule", "TextDataModule"]

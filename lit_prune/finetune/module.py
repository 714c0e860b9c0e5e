"""Fine-tuning of a causal language model, as a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

from lit_prune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLMModule(LightningModule):
    """Next-token fine-tuning of any Hugging Face causal language model; knows nothing of pruning.

    Args:
        model: A directory (of a pruned model, too), a Hub name, or the model itself.
        learning_rate: Of AdamW, at its height: linear warm-up, then linear decay to zero.
        weight_decay: Of AdamW.
        warmup: Fraction of all steps that warms up.
        lora_rank: Train adapters of this rank on every linear of the decoder, and nothing else
            (``pip install 'lit-prune[lora]'``). They are merged when the fit ends: prune then, by a
            `Trainer.validate` with ``EntropyPruningCallback(when="validate")``.
        teacher: The dense model, as ``model``: its predictions are learned, too. To recover what
            pruning has cost.
        distillation: Weight of the teacher's part of the loss, the KL divergence to its
            predictions; the rest is next-token loss.
        gradient_checkpointing: Compute activations twice, and keep few of them.

    A checkpoint holds no arguments: give them again, ``load_from_checkpoint(path, model=...)``.

    Raises:
        ConfigError: If a number cannot be meant, or peft is missing.

    Example::

        module = CausalLMModule("my-model", learning_rate=1e-5)
        pruner = EntropyPruningCallback(pruning_ratio=0.3)
        Trainer(max_epochs=1, callbacks=[pruner]).fit(module, data)
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        lora_rank: int | None = None,
        teacher: str | PreTrainedModel | None = None,
        distillation: float = 0.5,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if learning_rate < 0 or not 0 <= warmup < 1 or not 0 <= distillation <= 1:
            raise ConfigError(
                f"expected a learning_rate of at least 0, a warmup in [0, 1) and a distillation in "
                f"[0, 1]; got {learning_rate}, {warmup} and {distillation}."
            )
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.distillation = distillation
        self.model = _loaded(model).train()  # Hugging Face loads for inference
        # in a list: it is not trained, saved or pruned
        self._teacher: list[PreTrainedModel] = []
        if teacher is not None:
            self._teacher.append(_loaded(teacher).eval().requires_grad_(False))
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if lora_rank is not None:
            self.model = _with_adapters(self.model, lora_rank)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(**batch, use_cache=False)
        loss: Tensor = output.loss
        self.log("train/loss", loss, prog_bar=True)
        if self._teacher:
            loss = torch.lerp(loss, self._divergence(output.logits, batch), self.distillation)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.model(**batch, use_cache=False).loss
        tokens = int((batch["labels"][:, 1:] >= 0).sum())
        self.log("validation/loss", loss, prog_bar=True, batch_size=tokens)

    def _divergence(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return KL(teacher, model) in nats per token that is trained on."""
        teacher: Any = self._teacher[0].to(self.device)  # type: ignore[arg-type] # a device
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            wanted = teacher(**inputs, use_cache=False).logits[:, :-1].float()
        counted = batch["labels"][:, 1:] >= 0
        return F.kl_div(
            F.log_softmax(logits[:, :-1].float()[counted], -1),
            F.log_softmax(wanted[counted], -1),
            reduction="batchmean",
            log_target=True,
        )

    @override
    def on_fit_end(self) -> None:
        if hasattr(self.model, "merge_and_unload"):
            merge: Any = self.model.merge_and_unload
            self.model = merge()

    @override
    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=self.weight_decay)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        warm = round(steps * self.warmup)

        def share(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return max(steps - step, 0) / max(steps - warm, 1)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _loaded(model: str | PreTrainedModel) -> PreTrainedModel:
    if not isinstance(model, (str, Path)):
        return model
    from lit_prune.saving import load_pruned
    from lit_prune.saving.manifest import MANIFEST

    if (Path(model) / MANIFEST).is_file():
        return load_pruned(model, dtype=torch.float32)
    from transformers import AutoModelForCausalLM

    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return found


def _with_adapters(model: PreTrainedModel, rank: int) -> Any:  # noqa: ANN401 - peft's
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("lora_rank needs peft: pip install 'lit-prune[lora]'.") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)

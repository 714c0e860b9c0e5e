"""What a format makes of a model before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import DecoderParts, fingerprint
from lit_prune.saving.files import write_json
from lit_prune.saving.skeleton import as_read
from lit_prune.saving.weights import tensors_of, write_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG = "config.json"
# Of our own classes, and of the directory a model came from.
_NOT_CARRIED = {"model_type", "per_layer_config", "biases", "constants", "auto_map"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A Hugging Face directory in the making.

    Attributes:
        format: Key of the registry.
        config: Content of ``config.json``.
        tensors: The weights under their stored names.
        ties: Further name → the stored name.
        skeleton: What the config builds, without weights.
        verbatim: Whether the weights are those of the model, and the structure too. Otherwise it
            computes the same up to the order of sums.
        notes: What was done to the model, and what it costs, in sentences.
        code: Model file that travels beside it, for those without this package.
    """

    format: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ties: dict[str, str]
    skeleton: PreTrainedModel
    verbatim: bool
    notes: tuple[str, ...] = ()
    code: Path | None = None

    @property
    def class_name(self) -> str:
        """Name of the class that the directory loads as."""
        return type(self.skeleton).__name__

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says about the architecture."""
        return {
            "format": self.format,
            "class": self.class_name,
            "model_type": self.config["model_type"],
            "layers": self.config["num_hidden_layers"],
            "dtype": self.config["dtype"],
            "tied": self.ties,
            "fingerprint": fingerprint(self.skeleton),
            "notes": list(self.notes),
        }

    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """Write weights, config and model file."""
        write_weights(folder, self.tensors, max_shard_bytes)
        write_json(folder / CONFIG, self.config)
        if self.code is not None:
            shutil.copyfile(self.code, folder / self.code.name)


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the config of a model as JSON, without what belongs to one format only.

    Raises:
        ArtifactError: If it is not JSON.
    """
    raw = {
        k: v
        for k, v in model.config.to_dict().items()
        if not k.startswith("_") and k not in _NOT_CARRIED
    }
    raw |= {
        "dtype": str(model.dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(tensors_of(model)[1]),  # what is so, whatever the config says
        "num_hidden_layers": len(DecoderParts(model).layers),
    }
    return as_read(raw)

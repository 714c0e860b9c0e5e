"""What a format makes of a model before anything is written."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lit_prune.decoder import DecoderParts, auto_class, fingerprint, task_of, text_view
from lit_prune.saving.extras import write_tokenizer
from lit_prune.saving.files import write_json
from lit_prune.saving.skeleton import as_read
from lit_prune.saving.weights import digest, tensors_of, write_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
GGUF_FILE = "model.gguf"
# Of our own classes, and of the directory a model came from.
_NOT_CARRIED = {"model_type", "per_layer_config", "biases", "constants", "auto_map"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared(ABC):
    """A saved model in the making.

    Attributes:
        format: Key of the registry.
        skeleton: The structure of the model, without weights, as transformers builds it.
        tensors: The weights under their stored names.
        verbatim: Whether the weights are those of the model, and the structure too. Otherwise it
            computes the same up to the order of sums.
        notes: What was done to the model, and what it costs, in sentences.
        tokenizer: What is saved beside the weights.
        code: Model file that travels beside them, for those without this package.
        checker: The script that looks at the result in a fresh process.
        reader: Who loads it, at the start of a sentence.
        library: The same, as model hubs call it.
        keeps_buffers: Whether rotary frequencies that were rounded can travel along.
    """

    format: str
    skeleton: PreTrainedModel
    tensors: dict[str, Tensor]
    verbatim: bool
    notes: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    code: Path | None = None

    checker: ClassVar[str]
    reader: ClassVar[str]
    library: ClassVar[str]
    keeps_buffers: ClassVar[bool]

    @property
    @abstractmethod
    def class_name(self) -> str:
        """Name of the class that it loads as."""

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the manifest says about the architecture."""

    @abstractmethod
    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> Prepared:
        """Return the same with what is saved beside the weights."""

    @abstractmethod
    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """Write weights, what describes them, and the tokenizer."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what `checker` must know, as JSON."""

    @abstractmethod
    def ways(self, name: str) -> list[tuple[str, list[str]]]:
        """Return how to load the directory ``name``: words, and lines of code."""

    @abstractmethod
    def limits(self) -> list[str]:
        """Return what not to expect, in sentences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDirectory(Prepared):
    """A Hugging Face directory in the making.

    Attributes:
        config: Content of ``config.json``.
        ties: Further name → the stored name.
    """

    config: dict[str, Any]
    ties: dict[str, str]

    checker = "check.py"
    reader = "Plain transformers"
    library = "transformers"
    keeps_buffers = True

    @property
    @override
    def class_name(self) -> str:
        return type(self.skeleton).__name__

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "class": self.class_name,
            "model_type": self.config["model_type"],
            "layers": len(DecoderParts(text_view(self.skeleton)).layers),
            "dtype": self.config["dtype"],
            "tied": self.ties,
            "fingerprint": fingerprint(self.skeleton),
            "notes": list(self.notes),
        }

    @override
    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> PreparedDirectory:
        return replace(self, tokenizer=tokenizer)

    @override
    def write(self, folder: Path, max_shard_bytes: int) -> None:
        write_weights(folder, self.tensors, max_shard_bytes)
        write_json(folder / CONFIG, self.config)
        if self.code is not None:
            shutil.copyfile(self.code, folder / self.code.name)
        if self.tokenizer is not None:
            write_tokenizer(self.tokenizer, folder)

    @override
    def facts(self) -> dict[str, Any]:
        return {
            "code": self.code and self.code.name,
            "class": self.class_name,
            "auto": auto_class(self.class_name),
            "one_by_one": task_of(self.skeleton) == "sequence",
            "digest": digest(self.tensors, self.ties),
            "verbatim": self.verbatim,
        }

    @override
    def ways(self, name: str) -> list[tuple[str, list[str]]]:
        mapped = f"{auto_class(self.class_name)}.from_pretrained({name!r}"
        auto = f"from transformers import {auto_class(self.class_name)}"
        ours = ["from lit_prune import load_pruned", "", f"model = load_pruned({name!r})"]
        ours += self._tokenizer_lines(f"{name!r}")
        if self.code is None:
            plain = [auto, "", f"model = {mapped})"]
            return [("", ours), ("With plain transformers, nothing else installed:", plain)]
        return [
            ("", ours),
            (
                "With transformers, once lit_prune is imported:",
                [auto, "", "import lit_prune", "", f"model = {mapped})"],
            ),
            (
                "With transformers alone. This runs the model file of this directory "
                f"(`{self.code.name}`, its hash is in `MANIFEST.json`); read it first:",
                [
                    *(auto, "", f"model = {mapped}, trust_remote_code=True)"),
                    *self._tokenizer_lines(f"{name!r}, trust_remote_code=True"),
                ],
            ),
        ]

    def _tokenizer_lines(self, arguments: str) -> list[str]:
        if self.tokenizer is None:
            return []
        line = f"tokenizer = AutoTokenizer.from_pretrained({arguments})"
        return ["", "from transformers import AutoTokenizer", "", line]

    @override
    def limits(self) -> list[str]:
        if self.code is not None:
            return [
                "Layers differ in width (or hold biases, or lack parts) that no stock class "
                "expresses: servers that expect a stock model refuse this directory. For them, "
                "save with `format='padded'`, or prune with uniform widths and save with "
                "`format='stock'`."
            ]
        if self.format == "padded":
            return [
                "What was pruned is back as zeros: this directory is for servers that need a stock "
                "model. It is as large and as slow as its widest layer."
            ]
        return []


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
    parts = DecoderParts(model)
    raw |= {
        "dtype": str(model.dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(tensors_of(model)[1]),  # what is so, whatever the config says
    }
    raw |= parts.family.in_config({"num_hidden_layers": len(parts.layers)})
    return as_read(raw)

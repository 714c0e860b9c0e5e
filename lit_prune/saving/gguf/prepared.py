"""A GGUF file in the making: keys, tensors, and what the check needs to know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lit_prune.decoder import fingerprint, task_of
from lit_prune.errors import ConfigError, FormatError
from lit_prune.saving.body import body_of
from lit_prune.saving.extras import write_tokenizer
from lit_prune.saving.gguf.architecture import NAME, architecture_for
from lit_prune.saving.gguf.blocks import block_tensors, block_widths
from lit_prune.saving.gguf.rope import FREQUENCIES, parameters_of, write_rope
from lit_prune.saving.gguf.vocabulary import Vocabulary, vocabulary_of, write_vocabulary
from lit_prune.saving.heterogeneous import heterogeneous
from lit_prune.saving.prepared import GGUF_FILE, Prepared

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lit_prune.saving.body import Body, Widths
    from lit_prune.saving.gguf.architecture import Architecture

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
# What both sides cut into tokens, where llama.cpp is there to be asked.
_SAMPLES = (
    "Hello, world! It's 2 o'clock; I've 12345 reasons.",
    "def f(x):\n    return x + 1\n\n\tif x == 100:  # done",
    "Größe, naïve, 東京, emoji 🙂 and   spaces",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedGguf(Prepared):
    """A file for llama.cpp.

    Attributes:
        model: What is saved.
        choice: The architecture of llama.cpp.
        widths: Of each block in the file.
        vocabulary: What the file knows of the tokenizer.
    """

    model: PreTrainedModel
    choice: Architecture
    widths: tuple[Widths, ...]
    head_dim: int
    vocabulary: Vocabulary

    checker = "check_gguf.py"
    reader = "llama.cpp"
    library = "llama.cpp"
    keeps_buffers = False

    @property
    @override
    def class_name(self) -> str:
        return self.choice.name

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "class": self.choice.name,
            "layers": len(self.widths),
            "fingerprint": fingerprint(self.model),
            "notes": list(self.notes),
        }

    @override
    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> PreparedGguf:
        vocabulary = vocabulary_of(tokenizer)
        notes = self.notes
        if vocabulary.kind == "none":
            notes += (
                f"The file takes token ids only: {vocabulary.reason}. Cut text into tokens with "
                "the Hugging Face tokenizer.",
            )
        return replace(self, tokenizer=tokenizer, vocabulary=vocabulary, notes=notes)

    @override
    def write(self, folder: Path, max_shard_bytes: int) -> None:
        import numpy as np
        from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

        writer = GGUFWriter(folder / GGUF_FILE, self.choice.name)
        kinds = [_TYPES[tensor.dtype] for tensor in self.tensors.values() if tensor.ndim > 1]
        writer.add_file_type(int(LlamaFileType[_FILE_TYPES[max(kinds, key=kinds.count)]]))
        self._write_keys(writer)
        divisors = write_rope(writer, self.model, self.head_dim)
        write_vocabulary(writer, self.vocabulary, self.tokenizer, self.model)
        for name, tensor in self.tensors.items():
            raw = tensor.detach().cpu().contiguous()
            kind = GGMLQuantizationType[_TYPES[raw.dtype]]
            array: Any = raw.view(torch.uint8).numpy() if kind.name == "BF16" else raw.numpy()
            writer.add_tensor(name, array, raw_dtype=kind)
        if divisors is not None:
            writer.add_tensor(FREQUENCIES, np.asarray(divisors))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if self.tokenizer is not None:
            write_tokenizer(self.tokenizer, folder)

    def _write_keys(self, writer: Any) -> None:  # noqa: ANN401 - optional package
        config = self.model.config
        sizes = {
            "head_count": [w.kv_groups * w.queries_per_group for w in self.widths],
            "head_count_kv": [w.kv_groups for w in self.widths],
            "feed_forward_length": [w.channels for w in self.widths],
        }
        for name, found in sizes.items():
            value = found if self.choice.per_block else found[0]
            getattr(writer, f"add_{name}")(value)
        writer.add_block_count(len(self.widths))
        writer.add_context_length(int(config.max_position_embeddings))
        writer.add_embedding_length(int(self.tensors["token_embd.weight"].shape[1]))
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        if self.choice.scales:
            writer.add_embedding_scale(float(config.embedding_multiplier))
            writer.add_residual_scale(float(config.residual_multiplier))
            writer.add_attention_scale(float(config.attention_multiplier))
            writer.add_logit_scale(float(config.logits_scaling))

    @override
    def facts(self) -> dict[str, Any]:
        texts: dict[str, list[int]] = {}
        if self.tokenizer is not None and self.vocabulary.kind != "none":
            for text in _SAMPLES:
                texts[text] = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return {"file": GGUF_FILE, "digest": tensor_digest(self.tensors), "texts": texts}

    @override
    def ways(self, name: str) -> list[tuple[str, list[str]]]:
        path = f"{name}/{GGUF_FILE}"
        served = [f"llama-cli -m {path}"] if self.vocabulary.kind != "none" else []
        lines = ["from llama_cpp import Llama", "", f"model = Llama({path!r})"]
        found = [("With llama-cpp-python:", lines)]
        if served:
            found.append(("With llama.cpp itself, in a shell:", served))
        return found

    @override
    def limits(self) -> list[str]:
        return [
            "llama.cpp keeps keys and values in float16 unless told otherwise (`type_k`, "
            "`type_v`): its logits then differ a little from the measured ones.",
            "`load_pruned` and transformers do not read this file: keep a directory of format "
            "`auto` to train on.",
        ]


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """Return sha256 over names, types and bytes, as the fresh process counts them."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        whole.update(f"{name} {_TYPES[tensor.dtype]} ".encode())
        whole.update(raw)  # type: ignore[arg-type] # numpy arrays are buffers
    return whole.hexdigest()


def gguf(model: PreTrainedModel) -> PreparedGguf:
    """Prepare a file for llama.cpp.

    Layers that are alike go into their own architecture, others into one that reads the sizes of
    every block, with units of zeros where llama.cpp would be wrong without: see `block_widths`.

    Raises:
        ConfigError: If the package ``gguf`` is not installed.
        FormatError: If no architecture of llama.cpp holds the model; says why.
    """
    require_gguf()
    if task_of(model) != "next_token":
        raise FormatError(NAME, "llama.cpp writes text, and this model classifies it")
    body = body_of(model)
    choice = architecture_for(model, body)
    skeleton = heterogeneous(model).skeleton  # refuses modules that were replaced by hand
    parameters_of(model)
    widths = block_widths(choice, body)
    tensors: dict[str, Tensor] = {"token_embd.weight": body.tensors["model.embed_tokens.weight"]}
    for position, index in enumerate(body.layers):
        tensors |= block_tensors(choice, body, index, widths[index], position)
    tensors["output_norm.weight"] = body.tensors[f"{body.family.final_norm}.weight"]
    if not body.ties:
        tensors["output.weight"] = body.tensors[f"{body.family.head}.weight"]
    return PreparedGguf(
        format=NAME,
        skeleton=skeleton,
        verbatim=False,
        notes=(*body.notes, *_zeros(body, choice, widths)),
        model=model,
        choice=choice,
        widths=tuple(widths.values()),
        head_dim=body.head_dim,
        tensors={name: _stored(tensor) for name, tensor in tensors.items()},
        vocabulary=vocabulary_of(None),
    )


def _stored(tensor: Tensor) -> Tensor:
    """Return what goes into the file: norms and biases in float32, which holds every other type."""
    if tensor.dtype not in _TYPES:
        raise FormatError(NAME, f"it has {tensor.dtype} weights")
    return tensor.float() if tensor.ndim == 1 else tensor


def _zeros(body: Body, choice: Architecture, widths: dict[int, Widths]) -> list[str]:
    """Say where units of zeros stand in for what is gone."""
    notes = [f"Architecture `{choice.name}` of llama.cpp."]
    if not choice.per_block:
        return notes
    found = [
        index
        for index, layer in body.layers.items()
        if (widths[index].kv_groups and not hasattr(layer.attention, "kv_groups"))
        or not hasattr(layer.mlp, "channels")
    ]
    if found:
        notes.append(
            f"Layers {', '.join(map(str, found))} hold one head or one channel of zeros in place "
            "of what was removed: llama.cpp needs it there."
        )
    return notes


def require_gguf() -> None:
    """Ask for the package ``gguf``, before any work.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "format='gguf' needs the package gguf: pip install 'lit-prune[gguf]'."
        ) from error

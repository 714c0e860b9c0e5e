"""Multimodal models: the whole one in its own class, with the pruned text model in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import DecoderParts, text_view, whole_of
from lit_prune.decoder.wrapper import WRAPPERS
from lit_prune.errors import ArtifactError, FormatError
from lit_prune.saving.prepared import PreparedDirectory
from lit_prune.saving.skeleton import REFUSED, as_read
from lit_prune.saving.stock import stock
from lit_prune.saving.weights import DTYPES, tensors_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

_ALIKE = (
    "transformers builds the text model of a multimodal one with layers that are alike: prune with "
    "allocator='uniform_widths' (and add_biases=False, where biases are in the way)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedWhole(PreparedDirectory):
    """A multimodal model in the making."""

    keeps_buffers = False


def prepare_whole(view: PreTrainedModel, name: str) -> PreparedWhole:
    """Prepare the multimodal model that ``view`` looks into: ``stock``, or refused.

    Raises:
        FormatError: If its text model has layers that differ, or the format is another one.
    """
    if name not in ("auto", "stock"):
        raise FormatError(name, "it is multimodal", instead="stock, where layers are alike")
    try:
        text = stock(view)
    except FormatError as error:
        raise FormatError(name, f"{error.reason}; {_ALIKE}") from error
    whole = whole_of(view)
    model: Any = whole
    text_model = model.model.language_model
    place = next(name for name, module in whole.named_modules() if module is text_model)

    def renamed(path: str) -> str:
        return f"{place}.{path.removeprefix('model.')}" if path.startswith("model.") else path

    stored, ties = tensors_of(whole)
    others = {n: t for n, t in stored.items() if not n.startswith((f"{place}.", "lm_head."))}
    tensors: dict[str, Tensor] = others | {renamed(n): t for n, t in text.tensors.items()}
    text_ties = {renamed(further): renamed(first) for further, first in text.ties.items()}
    raw = _public(whole.config.to_dict())
    config = as_read(
        raw
        | {
            "architectures": [type(whole).__name__],
            "dtype": str(whole.dtype).removeprefix("torch."),
            "tie_word_embeddings": bool(ties),
            "text_config": text.config,
        }
    )
    skeleton = _built(config)
    wanted = {n: t.shape for n, t in tensors_of(skeleton)[0].items()}
    if wanted != {n: t.shape for n, t in tensors.items()} or tensors_of(skeleton)[1] != text_ties:
        raise FormatError(name, f"{type(whole).__name__}, built from its config, is another model")
    return PreparedWhole(
        format="stock",
        config=config,
        tensors=tensors,
        ties=text_ties,
        skeleton=skeleton,
        verbatim=text.verbatim,
        notes=text.notes,
    )


def is_whole(raw: dict[str, Any]) -> bool:
    """Return whether a ``config.json`` speaks of a multimodal model."""
    return raw.get("model_type") in WRAPPERS


def load_whole(
    directory: Path, raw: dict[str, Any], device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Load a multimodal model by its class of transformers; no code of the directory is run.

    Raises:
        ArtifactError: If the config wants code to be run, or describes another model.
    """
    import transformers

    auto: Any = transformers.AutoModelForImageTextToText
    if raw.get("dtype") not in DTYPES:
        raise ArtifactError(f"config.json: dtype must be one of {sorted(DTYPES)}.")
    _refuse_keys(raw)
    try:
        whole, found = auto.from_pretrained(
            directory,
            local_files_only=True,
            dtype=dtype or DTYPES[raw["dtype"]],
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers raises on a config that means nothing
        raise ArtifactError(
            f"{directory} cannot be loaded: {type(error).__name__}: {error!s:.300}"
        ) from error
    if wrong := {kind: names for kind, names in found.items() if names}:
        raise ArtifactError(f"{directory}: weights and config.json disagree: {wrong!s:.300}")
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()  # the file may be replaced while the model lives
    whole.tie_weights()
    model: PreTrainedModel = whole.eval().to(device)
    DecoderParts(text_view(model))  # a family that is known
    return model


def _built(config: dict[str, Any]) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    built = CONFIG_MAPPING[config["model_type"]].from_dict(values)
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForImageTextToText.from_config(built).eval()
    skeleton.tie_weights()
    return skeleton


def _public(raw: Any) -> Any:  # noqa: ANN401 - walks JSON
    """Drop keys that are a config's own business, however deep they lie."""
    if not isinstance(raw, dict):
        return raw
    return {key: _public(value) for key, value in raw.items() if not str(key).startswith("_")}


def _refuse_keys(raw: object) -> None:
    """Refuse keys that make transformers fetch or run code, however deep they lie."""
    if isinstance(raw, dict):
        for key in sorted(raw):
            if key in REFUSED or key.startswith("_"):
                raise ArtifactError(
                    f"config.json sets {key:.80}, which can make a library run code."
                )
        for value in raw.values():
            _refuse_keys(value)

"""What lies beside the weights: generation config and tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_prune.errors import ArtifactError
from lit_prune.saving.files import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATION = "generation_config.json"


def write_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Write ``generation_config.json``, if the model has settings.

    Raises:
        ArtifactError: If a setting is not JSON.
    """
    settings: Any = getattr(model, "generation_config", None)
    if settings is not None:
        chosen = {k: v for k, v in settings.to_dict().items() if v is not None}
        try:
            write_json(folder / GENERATION, chosen)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"the generation config is not JSON: {error}.") from error


def read_generation_config(raw: dict[str, Any]) -> Any:  # noqa: ANN401 - untyped upstream
    """Return a ``GenerationConfig`` that holds settings only.

    Raises:
        ArtifactError: If a key is a method, or transformers refuses a value.
    """
    from transformers import GenerationConfig

    internal = {"_from_model_config"}
    methods = [
        k for k in raw if k not in internal and (k.startswith("_") or hasattr(GenerationConfig, k))
    ]
    if methods:
        raise ArtifactError(f"{GENERATION} sets {methods[0]!r:.80}, which is no setting.")
    try:
        return GenerationConfig.from_dict(raw)
    except Exception as error:  # whatever transformers raises on settings that mean nothing
        raise ArtifactError(
            f"{GENERATION} cannot be used: {type(error).__name__}: {error!s:.300}"
        ) from error


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a tokenizer, chat templates included."""
    # several templates would get a folder of their own; the config holds them in one file
    several = isinstance(getattr(tokenizer, "chat_template", None), dict)
    options: dict[str, Any] = {"save_jinja_files": False} if several else {}
    tokenizer.save_pretrained(folder, **options)

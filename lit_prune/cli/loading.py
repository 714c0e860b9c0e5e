"""What a command line names, as objects: models, tokenizers, text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from lit_prune.calibration import Calibration, collect_rows
from lit_prune.cli.console import say
from lit_prune.decoder import spec_for
from lit_prune.errors import ArtifactError, ConfigError, UnsupportedModelError
from lit_prune.measuring import calibrate
from lit_prune.saving import load_pruned
from lit_prune.saving.manifest import MANIFEST
from lit_prune.texts import Padded, read_documents, windows_of

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lit_prune.config import PruningConfig

_LONGEST = 2048
Documents = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its tokenizer, None where there is none, and the dtype that it is stored in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    stored: torch.dtype | None = None

    def batches(
        self, options: Namespace, documents: Documents
    ) -> DataLoader[dict[str, torch.Tensor]]:
        """Cut documents into samples, and those into batches, as the options say.

        Raises:
            ArtifactError: If there is no tokenizer.
            CalibrationError: If they are too short.
            ConfigError: If a number cannot be meant.
        """
        if self.tokenizer is None:
            raise ArtifactError(
                f"{options.model} holds no tokenizer, and text is nothing without: save one there "
                "(tokenizer.save_pretrained)."
            )
        if options.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1 sample, got {options.batch_size}.")
        longest = getattr(self.model.config, "max_position_embeddings", None) or _LONGEST
        asked = options.context_length
        length = min(longest, _LONGEST) if asked is None else asked
        if length > longest:
            raise ConfigError(
                f"context_length {length}: the model reads at most {longest} tokens at once."
            )
        windows = windows_of(documents, self.tokenizer, length)
        say(f"{sum(len(w.ids) for w in windows):,} tokens in {len(windows)} samples")
        return DataLoader(windows, options.batch_size, collate_fn=Padded())  # type: ignore[arg-type]


def documents_of(options: Namespace) -> Documents:
    """Read the text that the options name; before the model, which takes longer to load.

    Raises:
        ArtifactError: If it cannot be read.
        CalibrationError: If it is empty.
    """
    say(f"reading {options.text}")
    return read_documents(options.text, split=options.text_split, column=options.text_column)


def source_of(options: Namespace) -> Documents | Calibration:
    """Read the text, or the calibration that was made of it.

    Raises:
        ConfigError: If both are given, or none.
        LitPruneError: If it cannot be read.
    """
    if (options.text is None) == (options.calibration is None):
        raise ConfigError("give --text, or a --calibration that was made of it: exactly one.")
    if options.text is not None:
        return documents_of(options)
    say(f"reading {options.calibration}")
    return Calibration.load(Path(options.calibration))


def load(name: str, *, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load a model, pruned or not, and its tokenizer.

    Args:
        name: A directory, or a name on the Hub.
        dtype: ``auto`` as stored, or a floating dtype of torch.
        device: ``auto``, or what torch knows.

    Raises:
        ArtifactError: If there is no such model.
        ConfigError: If there is no such device.
        UnsupportedModelError: If its family is not known.
    """
    where = _device(device)
    say(f"loading {name} ({where})")
    path, stored = Path(name).expanduser(), None
    try:
        if (path / MANIFEST).is_file():
            wanted = None if dtype == "auto" else getattr(torch, dtype)
            model = load_pruned(path, device=where, dtype=wanted)
        else:
            plain, stored = _plain(path if path.is_dir() else _hub(name, path), dtype)
            model = plain.to(where)  # type: ignore[arg-type] # a device
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{name} does not fit {where}: give --device cpu.") from error
    spec_for(model)
    if where.type == "cpu" and model.dtype != torch.float32:
        say(f"{model.dtype} on a CPU: --dtype float32 may be several times faster")
    return Loaded(model.eval(), _tokenizer(path if path.is_dir() else name), stored)


def calibration_of(
    options: Namespace, loaded: Loaded, config: PruningConfig, source: Documents | Calibration
) -> Calibration:
    """Return a calibration, or make one of the text.

    Raises:
        LitPruneError: As `Loaded.batches` and `lit_prune.measuring.calibrate`.
    """
    if isinstance(source, Calibration):
        return source
    most = config.max_calibration_tokens
    rows, notes = collect_rows(loaded.model, loaded.batches(options, source), most)
    return calibrate(loaded.model, rows, config, notes=notes)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} is not here: {first}.") from error


def _hub(name: str, path: Path) -> str:
    """Return a name that may be one of the Hub."""
    if path.exists():
        raise ArtifactError(f"{name} is a file; expected the directory of a model.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ArtifactError(f"{name}: there is no such directory.")
    return name


def _plain(source: Path | str, dtype: str) -> tuple[PreTrainedModel, torch.dtype | None]:
    """Return a model, and the dtype that its config says it is stored in."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        stored = AutoConfig.from_pretrained(source).dtype
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(source, error) from error
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto" if dtype == "auto" else getattr(torch, dtype)
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _no_model(source, error) from error
    return found, stored


def _no_model(source: Path | str, error: Exception) -> Exception:
    from safetensors import SafetensorError

    words = " ".join(str(error).split())
    if "model type" in words and "not recognize" in words:
        kind = words.split("model type")[1].split()[0].strip("`'\"")
        return UnsupportedModelError(
            f"{source} is of model type {kind!r}, which transformers does not know: see the "
            "families in the README, or install a transformers that knows it."
        )
    if words.startswith("Unrecognized configuration class"):
        kind = words.split("'")[1].rpartition(".")[2].removesuffix("Config")
        return UnsupportedModelError(
            f"{source} is a {kind} model, which transformers has no causal language model of: see "
            "the families in the README."
        )
    if isinstance(source, Path):
        if isinstance(error, SafetensorError):
            return ArtifactError(
                f"{source} could not be loaded: {words:.300}. Is a file cut short?"
            )
        if not (source / "config.json").is_file():
            return ArtifactError(f"{source} holds no config.json: it is no model directory.")
        return ArtifactError(f"{source} could not be loaded: {words:.300}")
    return ArtifactError(
        f"{source!r} is no directory here, and could not be loaded from the Hugging Face Hub (no "
        "network, HF_HUB_OFFLINE set, no such name, or not allowed): give a local directory, or "
        "download it where there is a network."
    )


def _tokenizer(source: Path | str) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        found: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found  # type: ignore[no-any-return]

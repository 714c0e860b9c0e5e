"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import docstring_parser

from lit_prune.amounts import TARGETS
from lit_prune.config import PruningConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# What people reach for; the rest is listed after them.
_FIRST = ("preset", "budget", "granularities", "compensation", "protected_layers", "add_biases")
_APART = (*TARGETS, *_FIRST, "language_model")  # a model directory holds one language model


def add_model(parser: ArgumentParser) -> None:
    """Add which model, and where it runs."""
    group = parser.add_argument_group("The model")
    group.add_argument(
        "--model",
        type=str,
        required=True,
        help="a directory, or a name on the Hugging Face Hub (opens the network)",
    )
    group.add_argument(
        "--dtype",
        type=Dtype,
        default="auto",
        help="auto: as it is stored; on a CPU float32 may be several times faster",
    )
    group.add_argument(
        "--device", type=str, default="auto", help="auto: the first GPU, else the CPU"
    )


def add_calibration(parser: ArgumentParser) -> None:
    """Add which text, or a saved calibration in its place."""
    add_text(parser, "to calibrate on", required=False)
    parser.add_argument(
        "--calibration",
        type=str | None,
        default=None,
        help="a calibration.safetensors of this model, in place of --text",
    )


def add_text(parser: ArgumentParser, purpose: str, *, required: bool = True) -> None:
    """Add which text, and how it is cut into samples."""
    group = parser.add_argument_group(f"The text {purpose}")
    group.add_argument(
        "--text",
        type=str if required else str | None,
        required=required,
        help="a text file, a .jsonl file, a directory of them, or a name of the `datasets` library "
        "as name or name:config (opens the network)",
    )
    group.add_argument("--text_split", type=str, default="train", help="of a data set by name")
    group.add_argument(
        "--text_column", type=str, default="text", help="of .jsonl files and data sets"
    )
    group.add_argument(
        "--context_length",
        type=int | None,
        default=None,
        help="tokens of a sample; by default what the model can read, at most 2048",
    )
    group.add_argument("--batch_size", type=int, default=4, help="samples at once")


def add_target_directory(parser: ArgumentParser, what: str) -> None:
    """Add where the result goes."""
    group = parser.add_argument_group("The result")
    group.add_argument("--to", type=str, required=True, help=f"new directory for {what}")
    group.add_argument(
        "--overwrite", action="store_true", help="replace what lit-prune wrote there before"
    )


def add_request(parser: ArgumentParser, *, targets: bool = True) -> None:
    """Add how much to prune, and how: the fields of `PruningConfig`.

    Args:
        parser: Of a command.
        targets: Whether "how much" is asked for.
    """
    documented = docstring_parser.parse(PruningConfig.__doc__ or "").params
    words = {
        entry.arg_name: " ".join((entry.description or "").replace("`", "").split())
        for entry in documented
    }
    hints = get_type_hints(PruningConfig)
    groups = {
        "How much: exactly one of these": TARGETS if targets else (),
        "How": _FIRST,
        "How, in detail: the defaults are good": [x for x in hints if x not in _APART],
    }
    defaults = {field.name: field.default for field in fields(PruningConfig)}
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            group.add_argument(
                f"--{name}", type=hints[name], default=defaults[name], help=words[name]
            )


def request_of(options: Namespace) -> dict[str, Any]:
    """Return what was said of `PruningConfig`, by keyword."""
    names = [field.name for field in fields(PruningConfig)]
    return {name: options[name] for name in names if name in options}

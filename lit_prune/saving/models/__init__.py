"""Model files that travel with a saved directory: self-contained, they never import lit_prune.

Two are masters, ``modeling_pruned_llama.py`` and, of mixtures of experts,
``modeling_pruned_mixtral.py``; the others are the same text under other names (Phi-3's has the
names of fused projections, and a config of its own for each attention).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lit_prune.decoder.families import PRUNED
from lit_prune.decoder.head import TASKS, Task, auto_class

# Families with a model file, so that layers may differ in a saved directory.
DENSE = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
HELD = DENSE + MIXTURES
MODEL_FILES = frozenset(f"modeling_{PRUNED}{family}.py" for family in HELD)


def model_file(family: str) -> Path:
    """Return the file that describes pruned models of a family."""
    return Path(__file__).with_name(f"modeling_{PRUNED}{family}.py")


def class_names(family: str, task: Task = "next_token") -> tuple[str, str]:
    """Return the names of config and model class in `model_file`.

    Example:
        >>> class_names("llama")
        ('PrunedLlamaConfig', 'PrunedLlamaForCausalLM')
        >>> class_names("qwen3_moe")[0]
        'PrunedQwen3MoeConfig'
    """
    stem = "".join(part.capitalize() for part in ("pruned", *family.split("_")))
    return f"{stem}Config", next(f"{stem}{end}" for end, other in TASKS.items() if other == task)


def auto_map(family: str, task: Task = "next_token") -> dict[str, str]:
    """Return the entry of ``config.json`` that leads transformers to the file beside it."""
    config, model = class_names(family, task)
    names = {"AutoConfig": config, auto_class(model): model}
    return {auto: f"{model_file(family).stem}.{name}" for auto, name in names.items()}


def pruned_classes(family: str, task: Task = "next_token") -> tuple[Any, Any]:
    """Return config and model class of pruned models of a family; imports them when first asked.

    transformers knows them afterwards.
    """
    import transformers

    module = importlib.import_module(f"{__name__}.{model_file(family).stem}")
    config_class: Any = getattr(module, class_names(family)[0])
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for known in TASKS.values():
        name = class_names(family, known)[1]
        auto: Any = getattr(transformers, auto_class(name))
        auto.register(config_class, getattr(module, name), exist_ok=True)
    return config_class, getattr(module, class_names(family, task)[1])


def register() -> None:
    """Make the model types of pruned models known to transformers.

    The classes themselves are imported when a config first asks for one: they need the modeling
    code of transformers, seconds that a user of plans alone should not wait for.
    """
    from transformers import AutoConfig, PreTrainedConfig

    for family in HELD:
        name = f"{PRUNED}{family}"
        stand_in = type(
            class_names(family)[0],
            (_StandIn, PreTrainedConfig),
            {"model_type": name, "family": family, "__module__": __name__},
        )
        AutoConfig.register(name, stand_in, exist_ok=True)


class _StandIn:
    """A config class that becomes the real one when it is first used."""

    family: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - upstream's
        return pruned_classes(cls.family)[0](*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - upstream's
        """Read a config."""
        return pruned_classes(cls.family)[0].from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - upstream's
        """Read a config from a directory."""
        return pruned_classes(cls.family)[0].from_pretrained(*args, **kwargs)

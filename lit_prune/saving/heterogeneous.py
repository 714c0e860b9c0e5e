"""Format ``heterogeneous``: every layer in the size of its own, nothing added, nothing lost.

``per_layer_config`` is the schema of transformers. transformers itself does not build from it yet:
`lit_prune.saving.models` holds the classes that do, and the one of the family travels along. The
widths beside it are 0 on purpose: a stock class, named outright, reads them and fails, instead of
dropping what it does not expect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder import task_of
from lit_prune.decoder.families import FAMILIES, PRUNED
from lit_prune.decoder.layout import layout_of
from lit_prune.errors import FormatError
from lit_prune.saving.difference import difference
from lit_prune.saving.layout_read import meaningless
from lit_prune.saving.models import HELD, auto_map, class_names, model_file
from lit_prune.saving.prepared import PreparedDirectory, plain_config
from lit_prune.saving.skeleton import as_read, build
from lit_prune.saving.weights import tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def heterogeneous(model: PreTrainedModel) -> PreparedDirectory:
    """Prepare a model whose layers may differ in every respect that pruning knows.

    Raises:
        FormatError: If the family has no model file, or the config does not lead back to this
            model.
    """
    layout = layout_of(model)
    if layout.family not in HELD:
        raise FormatError(
            "heterogeneous",
            f"lit_prune has no model file for {layout.family}, whose layers may differ (it has for "
            f"{', '.join(HELD)})",
        )
    task = task_of(model)
    head_dims = sorted({attention.head_dim for attention in layout.attentions.values()})
    config = as_read(
        plain_config(model)
        | {
            "model_type": f"{PRUNED}{layout.family}",
            "architectures": [class_names(layout.family, task)[1]],
            "auto_map": auto_map(layout.family, task),
            "head_dim": head_dims[0],
            "biases": [],
            "constants": [],
            "per_layer_config": layout.per_layer_config(),
        }
        | dict.fromkeys(meaningless(FAMILIES[layout.family]), 0)
    )
    skeleton = build(config)
    if (found := difference(skeleton, model)) is not None:
        raise FormatError(
            "heterogeneous",
            f"rebuilt from its own config it differs in {found}. Was a module replaced by hand?",
        )
    tensors, ties = tensors_of(model)
    return PreparedDirectory(
        format="heterogeneous",
        config=config,
        tensors=tensors,
        ties=ties,
        skeleton=skeleton,
        verbatim=True,
        code=model_file(layout.family),
    )

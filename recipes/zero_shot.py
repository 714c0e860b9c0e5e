"""Zero-shot accuracy of a model in memory, by EleutherAI's evaluation harness (extra ``eval``).

Run (the published tasks open the network, a folder with YAML of your own does not)::

    python recipes/zero_shot.py --model runs/demo/pruned --tasks arc_easy hellaswag
    python recipes/zero_shot.py --model pruned --tasks mine --task_folder my-tasks --limit 100

Not run offline on the published tasks, whose text lm-eval loads from the Hub. The bridge was, on a
task of local files: ``--tasks my_task --task-folder folder-with-its-yaml``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_prune  # noqa: F401 - transformers knows pruned models from now on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

# Those of the paper and of its reviews.
TASKS = (
    *("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge"),
    *("mathqa", "openbookqa", "sciq"),
)


def accuracies(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str] = TASKS,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, float]:
    """Return the accuracy of each task, 0-shot; normalised by length where the task has that.

    Args:
        model: Dense or pruned; nothing is saved or loaded.
        tokenizer: Its tokenizer.
        tasks: Names of tasks.
        batch_size: Requests at a time.
        limit: Questions of each task, for trying out.
        folder: With tasks of your own, in place of those that lm-eval knows.

    Raises:
        SystemExit: If lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SystemExit(
            f'--tasks needs lm-eval ({error}): pip install "lit-prune[eval]"'
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models in memory
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=0,
        limit=limit,
        task_manager=TaskManager(include_path=folder and str(folder), include_defaults=not folder),
        bootstrap_iters=0,
    )
    results = found["results"]
    return {task: _accuracy(results[task]) for task in tasks}


def _accuracy(result: dict[str, Any]) -> float:
    names = ("acc_norm,none", "acc,none")
    return next(float(result[name]) for name in names if name in result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory, pruned or not, or a Hub name")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--task_folder", type=Path, help="YAML of tasks of your own")
    parser.add_argument("--limit", type=int, help="questions of each task, for trying out")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = accuracies(
        model, tokenizer, options.tasks, limit=options.limit, folder=options.task_folder
    )
    for task, accuracy in found.items():
        print(f"{task:>16}: {accuracy:.4f}")


if __name__ == "__main__":
    main()

"""The table of families in the README, made of the registry and of what the contract finds.

``python -m tests.support_table`` runs `lit_prune.testing.check_family` on the usual tiny model of
every family and writes the table into the README (a quarter of a minute for each). A slow test
makes every row again, a quick one holds the rows and the registry together.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from lit_prune.decoder.families import FAMILIES
from lit_prune.saving.gguf.architecture import CHOICES as IN_GGUF
from lit_prune.testing import FamilyContract, check_family
from tests.models import tiny_model

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- support: python -m tests.support_table -->\n", "<!-- support end -->"
HEAD = (
    "| `model_type` | class of transformers | what can leave | its mean stays | `stock` | "
    "`heterogeneous` | `padded` | `gguf` |\n|---|---|---|---|---|---|---|---|\n"
)
WORDS = {
    "block": "blocks",
    "sub_block": "sub-blocks",
    "kv_group": "KV groups",
    "channel": "channels",
    "expert": "experts",
}


def row(found: FamilyContract) -> str:
    """Return the line of one family."""
    leaves = ", ".join(WORDS[name] for name in found.granularities)
    leaves += "".join(f"; not {WORDS[name]}: {why}" for name, why in found.refused.items())
    cells = (
        f"`{found.family}`",
        f"`{CLASSES[found.family]}`",
        leaves,
        _mean(found),
        _held(found.formats["stock (alike)"]),
        _held(found.formats["heterogeneous"]),
        _held(found.formats["padded"]),
        _yes(found.family in IN_GGUF),
    )
    return f"| {' | '.join(cells)} |"


def block(rows: list[str]) -> str:
    """Return what stands between the marks."""
    lines = "\n".join(sorted(rows))
    passed = f"Every one passed its contract on transformers {version('transformers')}."
    return f"{BEGIN}\n{HEAD}{lines}\n\n{passed}\n\n{END}"


def rows_of(text: str) -> dict[str, str]:
    """Return the lines of a README by family."""
    inside = text.partition(BEGIN)[2].partition(END)[0]
    lines = [
        line for line in inside.splitlines() if line.startswith("| `") and "_type`" not in line
    ]
    return {line.split("`")[1]: line for line in lines}


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _mean(found: FamilyContract) -> str:
    """Whether the mean of a removed sub-block can stay in its place."""
    if found.constants and not FAMILIES[found.family].keeps_biases:
        return "in memory"
    return _yes(found.constants)


def _held(found: str) -> str:
    words = {"held": "yes", "held with add_biases=False": "with `add_biases=False`"}
    return words.get(found, "no")


def main() -> None:
    rows = []
    for family in sorted(FAMILIES):
        rows.append(row(check_family(tiny_model(family))))
        print(rows[-1], flush=True)
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    README.write_text(f"{before}{block(rows)}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()

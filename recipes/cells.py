"""What a comparison found, as a file: one cell for each method, ratio and seed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one ratio from one calibration set.

    Attributes:
        achieved: Fraction of decoder parameters that was removed.
        nll: Summed negative log-likelihood (nats) of each document of the main text.
        tokens: Scored tokens of each.
        other_nll: The same of the other text.
        other_tokens: Its scored tokens.
        decoder_parameters: What is left in the decoder layers.
        flops_per_token: Of the decoder layers, at the context length.
        kv_cache_bytes_per_token: Keys and values that a token leaves behind.
        peak_forward_bytes: Memory of one forward over a window, weights apart.
        prefill_seconds: Median time of a prompt; ``prefill_spread`` is how far it varied.
        decode_seconds_per_token: Median time of one decoding step, and ``decode_spread``.
        dense_latency: The same four numbers of the dense model, measured in turns with this one.
        calibrate_seconds: Statistics; measured once for all ratios and methods that need the same.
        plan_seconds: Deciding and surgery.
        prune_peak_bytes: Rise of this process's resident memory in either, where it can be told.
        accuracy: Zero-shot accuracy by task, where asked for.
        notes: What else should be known about it.
    """

    achieved: float
    nll: list[float]
    tokens: list[int]
    other_nll: list[float]
    other_tokens: list[int]
    decoder_parameters: int
    flops_per_token: float
    kv_cache_bytes_per_token: float
    peak_forward_bytes: int | None
    prefill_seconds: float
    prefill_spread: float
    decode_seconds_per_token: float
    decode_spread: float
    dense_latency: dict[str, float] = field(default_factory=dict)
    calibrate_seconds: float = 0.0
    plan_seconds: float = 0.0
    prune_peak_bytes: int | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    notes: str = ""


@dataclass
class Found:
    """All cells of one comparison, and under which conditions they were made.

    Attributes:
        conditions: What must be equal for cells to stand in one table.
        asked: Methods, ratios and seeds of the last run.
        moved: Where ``method|ratio`` cannot be reached: the nearest ratio that can.
        cells: By ``method|ratio that was run|seed``; a failed one says why.
        surroundings: Machine, versions, commit.
    """

    conditions: dict[str, Any]
    asked: dict[str, list[Any]]
    moved: dict[str, float] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Found:
        stored = json.loads(path.read_text())
        return cls(**{name: stored[name] for name in cls.__dataclass_fields__})

    def store(self, path: Path, summary: list[dict[str, Any]] | None = None) -> None:
        """Write beside, then rename: an interrupted run leaves whole cells."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(self) | {"summary": summary}) + "\n")
        beside.replace(path)

    def take(self, path: Path) -> None:
        """Take over the cells of another run of the same comparison; what is here already stays.

        Raises:
            SystemExit: If those are of other conditions.
        """
        other = Found.read(path)
        if other.conditions != self.conditions:
            raise SystemExit(
                f"{path} holds cells of other conditions:\n{other.conditions}\n"
                f"asked for:\n{self.conditions}\nChoose other files, or another --out."
            )
        self.cells = other.cells | self.cells
        self.moved = other.moved | self.moved

    @property
    def first(self) -> str:
        """The method that the others are compared with."""
        return self.asked["methods"][0]

    @property
    def dense(self) -> dict[str, Any]:
        return self.cells[DENSE]

    def run_at(self, method: str, ratio: float) -> float:
        """Return the ratio at which a method stands in the column of ``ratio``."""
        return self.moved.get(f"{method}|{ratio:g}", ratio)

    def moved_ratios(self, ratio: float) -> list[float]:
        """Return the other ratios at which methods stand in the column of ``ratio``."""
        places = (self.run_at(method, ratio) for method in self.asked["methods"])
        return sorted({place for place in places if place != ratio})

    def of(self, method: str, ratio: float) -> list[dict[str, Any]]:
        """Return a method's cells over seeds at the ratio that was run; none if one is missing."""
        keys = [f"{method}|{ratio:g}|{seed}" for seed in self.asked["seeds"]]
        cells = [self.cells.get(key, {}) for key in keys]
        return cells if all("nll" in cell for cell in cells) else []

    def refused(self, method: str, ratio: float) -> dict[str, str]:
        """Return why a method that was run has no pruned model at a ratio; else empty."""
        keys = [f"{method}|{self.run_at(method, ratio):g}|{seed}" for seed in self.asked["seeds"]]
        cells = [self.cells.get(key, {}) for key in keys]
        return next((cell for cell in cells if cell and "nll" not in cell), {})

    def column(self, method: str, ratio: float) -> list[dict[str, Any]]:
        """Return a method's cells in the column of ``ratio``, wherever it had to be run."""
        return self.of(method, self.run_at(method, ratio))

    def fair(self, method: str, ratio: float) -> list[dict[str, Any]]:
        """Return the first method's cells at the ratio at which ``method`` stands there."""
        return self.of(self.first, self.run_at(method, ratio))

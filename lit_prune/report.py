"""Before and after, as a value: to text, Markdown and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lit_prune.config import RESOURCES, Resource
from lit_prune.errors import ArtifactError

Unit = Literal["count", "bytes", "seconds", "tokens_per_second", "nats", "perplexity", "accuracy"]
Verdict = Literal["better", "worse", "same", "unknown"]
# What is noted on a time that noise explains.
INSIDE_SPREAD = "inside the spread"
DOUBTFUL = "doubtful"
_SAME = 0.005
# Of these more is better.
_MORE: tuple[Unit, ...] = ("tokens_per_second", "accuracy")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRow:
    """One quantity before and after.

    Attributes:
        key: Stable machine name, the last part of the TensorBoard tag.
        label: Words for people.
        unit: What the numbers are.
        before: Of the dense model; None where it was not measured.
        after: Of the pruned model; None in a dry run.
        note: What a reader must know, e.g. that a difference lies inside the spread.
    """

    key: str
    label: str
    unit: Unit
    before: float | None
    after: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """After divided by before."""
        if self.before is None or self.after is None or not self.before:
            return None
        return self.after / self.before

    @property
    def verdict(self) -> Verdict:
        """Whether ``after`` is better than ``before``; ``same`` where no difference may be claimed.

        Example:
            >>> ReportRow(key="x", label="x", unit="bytes", before=4, after=3).verdict
            'better'
        """
        if self.ratio is None or not math.isfinite(self.ratio):
            return "unknown"
        if abs(self.ratio - 1) < _SAME or INSIDE_SPREAD in self.note:
            return "same"
        return "better" if (self.ratio > 1) == (self.unit in _MORE) else "worse"


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningReport:
    """What was asked, what was achieved, what it cost. JSON-able throughout.

    Attributes:
        requested_ratio: Fraction of the decoder layers' ``budget`` that was to be removed.
        achieved_ratio: Fraction that was removed, from a recount of the modules (in a dry run, and
            of latency: planned).
        total_ratio: Fraction of *all* parameters, embeddings and head included.
        preset: Method.
        plan_digest: Digest of the plan.
        dry_run: True where nothing was changed.
        rows: The table.
        budget: What the two ratios are fractions of: decoder parameters, FLOPs, cache bytes, weight
            bytes, or latency as the measured table predicts it.
        parameter_ratio: Fraction of the decoder parameters that was removed, where ``budget`` is
            something else.
        target: What was asked for in place of a ratio: ``name``, ``value``, ``predicted``,
            ``achieved`` (None in a dry run), and all of it in ``words``; empty where it was a
            ratio.
        calibration: Text behind it: samples, tokens a side, digest, split in words.
        search: What the method did: ratios, clusters, search nodes, optimality.
        compensation: How each sub-block was compensated: damping, bound on the condition number of
            what was solved, steps of the fit inside.
        config: The whole request.
        conditions: How quality and latency were measured.
        warnings: Plain words for what fell back, or what a reader should not conclude.
        versions: Of the packages that took part.
    """

    requested_ratio: float
    achieved_ratio: float
    total_ratio: float
    preset: str
    plan_digest: str
    dry_run: bool
    rows: tuple[ReportRow, ...]
    budget: Resource = "parameters"
    parameter_ratio: float | None = None
    target: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    compensation: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def row(self, key: str) -> ReportRow:
        """Return the row with this key.

        Raises:
            KeyError: If there is none (not measured).
        """
        for row in self.rows:
            if row.key == key:
                return row
        raise KeyError(f"{key!r} is not in the report; it has {[row.key for row in self.rows]}")

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Return the table as text cells: quantity, before, after, ratio, note."""
        return [
            (
                row.label,
                format_value(row.before, row.unit),
                format_value(row.after, row.unit),
                "–" if row.ratio is None else f"{row.ratio:.3f}",
                row.note,
            )
            for row in self.rows
        ]

    def headline(self) -> str:
        """Return one sentence: what was asked and what was achieved."""
        verb = "would remove" if self.dry_run else "removed"
        return f"{self.preset}: {verb} {self.ratios()}; plan {self.plan_digest[:12]}"

    def in_short(self) -> str:
        """Return in a line what it cost and whether it is faster; empty where nobody measured it.

        Example:
            >>> def row(key, label, unit, before, after):
            ...     return ReportRow(key=key, label=label, unit=unit, before=before, after=after)
            >>> report = PruningReport(
            ...     requested_ratio=0.3, achieved_ratio=0.3, total_ratio=0.2, preset="paper",
            ...     plan_digest="", dry_run=False, rows=(
            ...         row("perplexity", "perplexity", "perplexity", 20, 22),
            ...         row("decode", "decode throughput", "tokens_per_second", 10, 13)))
            >>> report.in_short()
            'perplexity 20.000 → 22.000 (+10.0%); faster: decode throughput 1.30x'
        """
        known = [row for row in self.rows if row.verdict != "unknown" and row.ratio is not None]
        said = [
            f"{row.label} {format_value(row.before, row.unit)} → "
            f"{format_value(row.after, row.unit)} ({row.ratio - 1:+.1%})"  # type: ignore[operator] # known
            for row in known
            if row.unit in ("perplexity", "accuracy")
        ]
        times = [row for row in known if row.unit == "tokens_per_second"]
        for verdict, words in (("better", "faster"), ("worse", "slower")):
            found = [
                f"{row.label} {row.ratio:.2f}x{' (doubtful)' if row.note == DOUBTFUL else ''}"
                for row in times
                if row.verdict == verdict
            ]
            said += [f"{words}: {', '.join(found)}"] if found else []
        same = [row.label for row in times if row.verdict == "same"]
        if same:
            where = "speed" if len(same) == len(times) else ", ".join(same)
            said.append(f"no measurable difference in {where}")
        return "; ".join(said)

    def ratios(self) -> str:
        """Return what was removed of what, and what was asked."""
        own = ""
        if self.parameter_ratio is not None:
            own = f" {self.parameter_ratio:.2%} of the decoder parameters,"
        return (
            f"{self.achieved_ratio:.2%} of the {RESOURCES[self.budget]} (asked "
            f"{self.requested_ratio:.2%}),{own} {self.total_ratio:.2%} of all parameters"
        )

    def __str__(self) -> str:
        """Return the report as people read it on a terminal."""
        header = ("", "before", "after", "ratio", "")
        cells = [header, *self.table()]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = [*self._top(), ""]
        for row in cells:
            first, *numbers = row[:4]
            padded = [
                first.ljust(widths[0]),
                *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)),
            ]
            lines.append("  ".join([*padded, row[4]]).rstrip())
        lines += ["", *(f"note: {text}" for text in self.notes())]
        return "\n".join(lines).rstrip()

    def _top(self) -> list[str]:
        return [line for line in (self.headline(), self.in_short()) if line]

    def notes(self) -> list[str]:
        """Return what is said in words: target, how text was split, conditions, warnings."""
        split = [self.calibration["split"]] if "split" in self.calibration else []
        target = [self.target["words"]] if "words" in self.target else []
        return [
            *target,
            *split,
            *(str(x) for x in self.conditions.get("words", [])),
            *self._searched(),
            *self._solved(),
            *self.warnings,
        ]

    def _searched(self) -> list[str]:
        said = ("proven", "tried", "settled")
        return [f"search: {self.search[name]}" for name in said if name in self.search]

    def _solved(self) -> list[str]:
        solved = {
            name: facts
            for name, facts in self.compensation.items()
            if None not in (facts.get("condition_number_at_most"), facts.get("damping"))
        }
        if not solved:
            return []
        conditions = {name: facts["condition_number_at_most"] for name, facts in solved.items()}
        worst = max(conditions, key=lambda name: conditions[name])
        dampings = [facts["damping"] for facts in solved.values()]
        return [
            f"compensation: {len(solved)} systems solved, dampings {min(dampings):g} to "
            f"{max(dampings):g} of the mean variance, condition numbers at most "
            f"{conditions[worst]:.2g} ({worst})"
        ]

    def to_markdown(self) -> str:
        """Return headline, table and notes as Markdown."""
        lines = [
            *"\n\n".join(self._top()).split("\n"),  # two paragraphs
            "",
            "| | before | after | after / before | |",
            "|---|---:|---:|---:|---|",
        ]
        lines += ["| " + " | ".join(cells) + " |" for cells in self.table()]
        lines += ["", *(f"- {text}" for text in self.notes())]
        return "\n".join(lines).rstrip() + "\n"

    def to_json(self) -> str:
        """Return the report as JSON text; an infinite number becomes null."""
        return json.dumps(_finite(asdict(self)), indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: If the text is something else.
        """
        try:
            raw = json.loads(text)
            rows = tuple(ReportRow(**row) for row in raw.pop("rows"))
            RESOURCES[raw.get("budget", "parameters")]  # a KeyError where it names nothing
            raw["compensation"] = {k: dict(v) for k, v in raw.get("compensation", {}).items()}
            return cls(**{**raw, "rows": rows, "warnings": tuple(raw["warnings"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"not a lit_prune report: {error!r}.") from error


def format_value(value: float | None, unit: Unit) -> str:
    """Format a number for people.

    Example:
        >>> format_value(2_500_000, "bytes"), format_value(0.0123, "seconds")
        ('2.50 MB', '12.30 ms')
    """
    if value is None:
        return "–"
    if unit == "seconds":
        return f"{value * 1e3:.2f} ms"
    if unit == "accuracy":
        return f"{value:.2%}"
    if unit in ("perplexity", "nats"):
        return f"{value:.4f}" if unit == "nats" else f"{value:.3f}"
    suffix = {"bytes": "B", "tokens_per_second": "tok/s"}.get(unit, "")
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {letter}{suffix}".rstrip()
    return f"{value:.4g} {suffix}".rstrip()


def _finite(value: Any) -> Any:  # noqa: ANN401 - walks JSON
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value

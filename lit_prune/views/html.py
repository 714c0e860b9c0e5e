"""``report.html``: one file that tells a stranger what was cut, what it cost, whether it is faster.

It needs no network, no server, no script and no other file, and its bytes follow from plan and
report alone. Whatever it shows was in them: nothing is measured here.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from lit_prune.errors import PlanMismatchError
from lit_prune.views.page.answers import answers
from lit_prune.views.page.closing import (
    before_and_after,
    calibration,
    loading,
    reproduction,
    warnings,
)
from lit_prune.views.page.cut_map import cut_map
from lit_prune.views.page.elements import html_of, tag
from lit_prune.views.page.latency import latency
from lit_prune.views.page.outline import Outline
from lit_prune.views.page.prices import prices
from lit_prune.views.page.times import times_of
from lit_prune.views.page.trade_off import trade_off_of
from lit_prune.whole_file import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lit_prune.plan import PruningPlan
    from lit_prune.report import PruningReport
    from lit_prune.sweep import SweepPoint

REPORT_PAGE = "report.html"
# Nothing may be fetched or run, whatever a hostile name might smuggle in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page_of(
    report: PruningReport,
    plan: PruningPlan,
    *,
    name: str = "",
    sweep: Sequence[SweepPoint] = (),
    load: Sequence[tuple[str, Sequence[str]]] = (),
) -> str:
    """Return the page.

    Args:
        report: Before and after.
        plan: What stayed.
        name: Of the model, for the heading.
        sweep: Where a sweep was run, its points; one of ratio 0, measured, shows the others as
            excess over it.
        load: How to load the model: words, and lines of code, for each way.

    Raises:
        PlanMismatchError: If the report is about another plan.

    Example:
        >>> from lit_prune import PruningPlan, PruningReport
        >>> from lit_prune.plan import LayerPlan
        >>> plan = PruningPlan("abc", (LayerPlan(0, (0, 2), (0, 1, 5)),))
        >>> report = PruningReport(
        ...     requested_ratio=0.3, achieved_ratio=0.3, total_ratio=0.2, preset="paper",
        ...     plan_digest=plan.digest, dry_run=False, rows=())
        >>> page = page_of(report, plan, name="<my model>")
        >>> "&lt;my model&gt;" in page, "30 % of the decoder parameters" in page
        (True, True)
    """
    if report.plan_digest != plan.digest:
        raise PlanMismatchError(
            f"the report is about plan {report.plan_digest[:12]}…, this is plan "
            f"{plan.digest[:12]}…: they were not made together."
        )
    report = type(report).from_json(report.to_json())  # no more than report.json can say
    outline, times = Outline.of(plan), times_of(report)
    title = (
        f"{name or 'A model'}, pruned by lit_prune"
        if not report.dry_run
        else (f"{name or 'A model'}: what lit_prune would cut")
    )
    sections = (
        answers(report, outline, times),
        before_and_after(report),
        cut_map(outline, dry_run=report.dry_run),
        prices(report, plan, outline),
        trade_off_of(sweep),
        latency(times),
        calibration(report),
        warnings(report),
        loading(load),
        reproduction(report, plan),
    )
    style = files("lit_prune.views.page").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    body = tag("body", tag("main", tag("h1", title), *sections))
    return "<!DOCTYPE html>\n" + html_of(tag("html", head, body, lang="en")) + "\n"


def write_html(
    report: PruningReport,
    plan: PruningPlan,
    path: Path,
    *,
    name: str = "",
    sweep: Sequence[SweepPoint] = (),
    load: Sequence[tuple[str, Sequence[str]]] = (),
) -> None:
    """Write the page, whole or not at all; arguments as in `page_of`.

    Raises:
        PlanMismatchError: If the report is about another plan.
        ArtifactError: If the file cannot be written; one that was there before is whole.
    """
    write_text(path, page_of(report, plan, name=name, sweep=sweep, load=load))

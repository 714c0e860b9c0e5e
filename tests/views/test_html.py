"""The page of a pruning: what it answers, that it is whole, safe, and readable by machines."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lit_prune.errors import ArtifactError, PlanMismatchError
from lit_prune.plan import PruningPlan
from lit_prune.report import PruningReport
from lit_prune.sweep import SweepPoint
from lit_prune.views.html import page_of, write_html
from tests.views.pages import HOSTILE, made_plan, made_report, predicted, row, timed, transfer

VOID = {"meta", "link", "br", "hr", "img", "input"}
WAYS = [("With <this>:", ["import lit_prune", "x = 1 < 2"])]
SWEEP = (
    SweepPoint(0.0, 0.0, mean_nll=2.0, dense_nll=2.0),
    SweepPoint(0.2, 0.2, predicted_damage=0.01, mean_nll=2.1, dense_nll=2.0),
    SweepPoint(0.9, note="cannot be reached"),
)
FASTER = {"prefill_seconds": 0.5, "decode_seconds_per_token": 0.05}


class Page(HTMLParser):
    """Reads a page, and fails where a browser would have to guess."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.titles = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.tags.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.text.append(text)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def all(self, tag):
        return [attributes for name, attributes, _ in self.tags if name == tag]


def card(text, question):
    """Answer and facts below a question."""
    found = re.search(rf"<h3>{re.escape(question)}</h3>(.*?)</div>", text, flags=re.DOTALL)
    return Page(found[1]).words


def kinds_of_page():
    plan = made_plan(prices=predicted(), source="somebody, 2026")
    yield (
        "conditional",
        page_of(
            made_report(plan, latency=[timed(1, {"decode": "why not"}), timed(8, **FASTER)]),
            plan,
            name="mine",
            sweep=SWEEP,
            load=WAYS,
        ),
    )
    plan = made_plan(prices=transfer())
    yield "paper", page_of(made_report(plan, preset="paper", dry_run=True), plan)
    plan = made_plan(sizes=False)
    steps = [{"removed": ["layer 3 attention"], "mean_nll_on_calibrate_text": 2.5}]
    yield "sleb", page_of(made_report(plan, search={"steps": steps}), plan)
    search = {"block_influence": [0.3, None, 0.1, 0.2]}
    yield "shortgpt", page_of(made_report(plan, rows=(), warnings=(), search=search), plan)
    plan = made_plan([(tuple(range(i % 5)), tuple(range(i % 65))) for i in range(80)])
    yield "deep", page_of(made_report(plan), plan)


@pytest.fixture(scope="module", params=[name for name, _ in kinds_of_page()])
def page(request):
    return dict(kinds_of_page())[request.param]


def test_a_page_is_well_formed_and_every_name_is_there_once(page):
    read = Page(page)
    ids = [attributes["id"] for _, attributes, _ in read.tags if "id" in attributes]
    assert len(set(ids)) == len(ids) > 7
    labels = {a["aria-labelledby"] for _, a, _ in read.tags if "aria-labelledby" in a}
    assert labels == set(ids)
    (root,) = read.all("html")
    assert root["lang"] == "en"
    assert page.startswith("<!DOCTYPE html>\n")


def test_a_page_can_be_read_aloud(page):
    read = Page(page)
    assert len(read.all("caption")) == len(read.all("table")) > 3
    assert all(attributes.get("scope") in ("col", "row") for attributes in read.all("th"))
    for attributes in read.all("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes["role"] == "img"
    pictures = re.findall(r'<svg[^>]*role="img"[^>]*>(<\w+>)', page)
    assert all(first == "<title>" for first in pictures)
    heads = [name for name, _, _ in read.tags if re.fullmatch(r"h\d", name)]
    assert heads[0] == "h1"
    assert heads.count("h1") == 1


def test_a_page_needs_nothing_but_itself(page):
    read = Page(page)
    assert not {name for name, _, _ in read.tags} & {"script", "link", "img", "iframe", "object"}
    for _, attributes, _ in read.tags:
        assert not {"src", "href", "srcset", "data", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_the_three_answers_of_a_plain_success():
    plan = made_plan()
    page = page_of(made_report(plan, latency=[timed(1, **FASTER), timed(8, **FASTER)]), plan)
    cut = card(page, "What was cut?")
    assert cut.startswith("30.1 % of the decoder parameters asked for 30 %")
    assert "25 % of all parameters, embeddings and head included: 2.00 M → 1.50 M" in cut
    assert "10 of 16 attention KV groups 96 of 256 MLP channels" in cut
    assert cut.endswith("whole layers: 3 the whole attention of layers: 2")
    cost = card(page, "What did it cost?")
    assert cost.startswith("Perplexity 10.00 → 11.00 +10 %: higher, which is worse")
    faster = card(page, "Is it faster?")
    assert faster.startswith("Yes reading the prompt (prefill): 2.00× faster at batch 1, 2.00×")
    assert "on cpu (2 threads), float32" in faster
    assert "see Latency" not in faster


@pytest.mark.parametrize(
    ("disjoint", "words"), [(True, "on which nothing was decided"), (False, "optimistic")]
)
def test_what_the_cost_was_measured_on_is_said_as_it_is(disjoint, words):
    plan = made_plan()
    calibration = {"split": "in words", "disjoint_sides": disjoint}
    conditions = {"perplexity": {"num_tokens": 1397}, "words": []}
    report = made_report(plan, calibration=calibration, conditions=conditions)
    found = card(page_of(report, plan), "What did it cost?")
    assert "measured on 1,397 tokens" in found
    assert words in found


@pytest.mark.parametrize(
    ("times", "answer"),
    [
        ([timed()], "No gain to count on"),
        ([timed(**FASTER | {"prefill_seconds": 1.0})], "In part"),
        ([timed(), timed(8, **FASTER)], "In part"),
        ([timed(prefill_seconds=2.0)], "No, slower"),
        ([timed(prefill_seconds=2.0, decode_seconds_per_token=0.05)], "In part, and in part sl"),
        ([timed(reasons={"prefill": "odd", "decode": "odd"}, **FASTER)], "No gain to count on"),
        ([timed(reasons={"prefill": "odd"}, **FASTER)], "In part"),
        ([timed(prefill_spread=0.9, decode_spread=0.2, **FASTER)], "No gain to count on"),
        ([], "Not measured"),
    ],
)
def test_is_it_faster_in_words(times, answer):
    plan = made_plan()
    found = card(page_of(made_report(plan, latency=times), plan), "Is it faster?")
    assert found.startswith(answer)
    assert ("why" in found) == bool(times)


def test_latency_is_stated_with_its_spread_conditions_and_reasons():
    plan, reason = made_plan(), {"prefill": "it is short of work"}
    report = made_report(plan, latency=[timed(1, reason), timed(8, reason, **FASTER)])
    words = Page(page_of(report, plan)).words
    assert "prefill, batch 1 1,000 ± 10 ms 1,000 ± 10 ms 1.00× ± 2 % no meas" in words
    assert "decode, batch 8 100 ± 1 ms 50.00 ± 1.00 ms 2.00× ± 4 % faster" in words
    assert "On cpu (2 threads), float32; prompts of 64 tokens, 8 new ones, greedy" in words
    assert "median of 7 runs after 2 thrown away" in words
    assert "prefill at batch 1 and 8: it is short of work." in words


def test_a_dry_run_promises_nothing():
    plan = made_plan()
    search = {"predicted_damage": 0.1234, "sensitivity": "kl"}
    times = [{"before": timed()["before"]}]
    rows = (row("perplexity", "perplexity", 10.0, None),)
    page = page_of(made_report(plan, rows=rows, dry_run=True, search=search, latency=times), plan)
    assert card(page, "What would it cost?").startswith("0.123 nats per token, predicted")
    assert card(page, "Is it faster?").startswith("Not known: nothing was cut")
    page = page_of(made_report(plan, rows=rows, dry_run=True, search={"sensitivity": "none"}), plan)
    assert card(page, "What would it cost?").startswith("Not known")
    page = page_of(made_report(plan, dry_run=True), plan)  # measured, and put back
    assert card(page, "What would it cost?").startswith("Perplexity 10.00 → 11.00")


def test_numbers_that_are_none():
    plan = made_plan()
    rows = (
        row("perplexity", "perplexity", 2.0, math.inf),
        row("mean_nll", "nats", math.nan, None),
        row("total_parameters", "count", None, None),
    )
    report = made_report(plan, rows=rows)
    again = PruningReport.from_json(report.to_json())  # infinite and NaN become null
    for one in (report, again):
        assert card(page_of(one, plan), "What did it cost?").startswith(
            "Perplexity is not a finite number any more"
        )
    without = made_report(plan, rows=())
    assert card(page_of(without, plan), "What did it cost?").startswith("Not measured")


def test_the_map_names_every_layer():
    plan = made_plan()
    words = Page(page_of(made_report(plan), plan)).words
    assert "0 4 of 4 64 of 64 1 2 of 4 32 of 64 2 removed whole 64 of 64 3 removed " in words
    page = page_of(made_report(plan), plan)
    # two in layer 1, and all of what went whole
    assert page.count('title="KV group 1: cut"') == page.count('title="KV group 3: cut"') == 3
    assert page.count('title="KV group 0: cut"') == 2
    assert page.count('title="KV group 0: kept"') == 2


def test_a_plan_without_sizes_says_so_and_claims_no_totals():
    plan = made_plan(sizes=False)
    page = page_of(made_report(plan), plan)
    assert "does not say how many units there were" in Page(page).words
    assert "KV groups" not in card(page, "What was cut?")
    for broken in ({"attention": [4]}, {"attention": [1] * 4, "mlp": [64] * 4}, "x", None):
        wrong = replace(plan, provenance={"sizes": broken})
        assert page_of(made_report(wrong), wrong) == page


@pytest.mark.parametrize(("prices", "said"), [(predicted(), "damage"), (transfer(), "transfer")])
def test_prices_are_drawn_and_told_as_numbers(prices, said):
    plan = made_plan(prices=prices)
    page = page_of(made_report(plan), plan)
    assert f"{said}" in Page(page).words
    assert page.count('role="img"') == (3 if "curves" in prices else 1)
    assert "attention of layer 3" in page
    assert "removed whole</title>" in page
    assert "sum" in Page(page).words or "cut" not in prices


def test_prices_of_another_kind_are_left_out():
    for prices in (3, {"whole": 3}, {"whole": {"mlp": ["x", True, None]}}, {"curves": {}}):
        plan = made_plan(prices=prices)
        assert "puts no price on whole parts" in page_of(made_report(plan), plan)


def test_a_sweep_is_drawn_with_the_excess_over_what_was_not_cut():
    plan = made_plan()
    words = Page(page_of(made_report(plan), plan, sweep=SWEEP)).words
    assert "20 % 20 % 0.01 0.1" in words
    assert "90 % – – – cannot be reached" in words
    assert "The trade-off" not in page_of(made_report(plan), plan)
    unmeasured = (SweepPoint(0.2, 0.2), SweepPoint(0.9, note="no"))
    assert "The trade-off" in page_of(made_report(plan), plan, sweep=unmeasured)


def test_nothing_that_others_have_written_becomes_markup():
    plan = made_plan(source=HOSTILE, prices={**predicted(), "measure": HOSTILE, "unit": HOSTILE})
    report = made_report(
        plan,
        preset=HOSTILE,
        rows=(row(HOSTILE, "bytes", 1.0, 2.0, HOSTILE),),
        calibration={"split": HOSTILE, "data_digest": HOSTILE, "statistics_from": HOSTILE},
        config={"preset": HOSTILE},
        conditions={
            "words": [f"perplexity {HOSTILE}"],
            "latency": [timed(1, {"prefill": HOSTILE})],
        },
        warnings=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        search={"steps": [{"removed": [HOSTILE]}]},
    )
    sweep = (SweepPoint(0.1, note=HOSTILE),)
    page = page_of(report, plan, name=HOSTILE, sweep=sweep, load=[(HOSTILE, [HOSTILE])])
    page.encode()
    assert "<script" not in page
    assert "<b>`" not in page
    assert "\u202e" not in page
    assert page.count("&lt;script&gt;") > 15
    assert not {name for name, _, _ in Page(page).tags} & {"script", "iframe"}


def test_equal_plans_and_reports_make_equal_bytes(tmp_path):
    plan = made_plan(prices=predicted())
    report = made_report(plan, latency=[timed(1, **FASTER)])
    first, second = tmp_path / "a.html", tmp_path / "b.html"
    write_html(report, plan, first, name="x")
    read = PruningReport.from_json(report.to_json())
    write_html(read, PruningPlan.from_json(plan.to_json()), second, name="x")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_report_of_another_plan_and_a_target_that_cannot_be_are_refused(tmp_path):
    plan = made_plan()
    with pytest.raises(PlanMismatchError, match="were not made together"):
        page_of(made_report(plan, plan_digest="0" * 64), plan)
    with pytest.raises(ArtifactError, match=r"none/x\.html could not be written"):
        write_html(made_report(plan), plan, tmp_path / "none" / "x.html")

import json
import math

import pytest

from lit_prune.errors import ArtifactError
from lit_prune.report import PruningReport, ReportRow, format_value


def make_report(**changes):
    rows = (
        ReportRow(key="total_parameters", label="all", unit="count", before=200, after=150),
        ReportRow(key="perplexity", label="ppl", unit="perplexity", before=3.0, after=math.inf),
        ReportRow(
            key="prefill_seconds",
            label="prefill",
            unit="seconds",
            before=0.01,
            after=None,
            note="inside the spread",
        ),
    )
    return PruningReport(
        **{
            "requested_ratio": 0.3,
            "achieved_ratio": 0.301,
            "total_ratio": 0.25,
            "preset": "paper",
            "plan_digest": "abcdef0123456789",
            "dry_run": False,
            "rows": rows,
            "calibration": {"split": "disjoint samples"},
            "conditions": {"words": ["scored once"]},
            "warnings": ("only 3 tokens",),
        }
        | changes
    )


def test_everything_that_is_said_is_in_text_and_markdown():
    report = make_report()
    for text in (str(report), report.to_markdown()):
        for words in (
            "removed 30.10% of the decoder parameters (asked 30.00%)",
            "25.00% of all parameters; plan abcdef012345",
            "0.750",
            "inside the spread",
            "disjoint samples",
            "scored once",
            "only 3 tokens",
        ):
            assert words in text
    assert "would remove" in make_report(dry_run=True).headline()


def test_in_short_says_what_it_cost_and_whether_it_is_faster():
    def speed(key, before, after, note=""):
        unit = "tokens_per_second"
        return ReportRow(key=key, label=key, unit=unit, before=before, after=after, note=note)

    quality = ReportRow(key="perplexity", label="ppl", unit="perplexity", before=10.0, after=12.0)
    whole = make_report(rows=(quality, speed("prefill", 100, 150), speed("decode", 9, 5)))
    assert (
        whole.in_short()
        == "ppl 10.000 → 12.000 (+20.0%); faster: prefill 1.50x; slower: decode 0.56x"
    )
    assert whole.in_short() in str(whole).splitlines()[1]
    assert f"\n\n{whole.in_short()}\n\n" in whole.to_markdown()
    noisy = speed("decode", 9, 5, "inside the spread")
    assert make_report(rows=(noisy,)).in_short() == "no measurable difference in speed"
    words = "faster: prefill 1.50x; no measurable difference in decode"
    assert make_report(rows=(speed("prefill", 100, 150), noisy)).in_short() == words
    doubted = speed("prefill", 100, 400, "doubtful")
    assert make_report(rows=(doubted,)).in_short() == "faster: prefill 4.00x (doubtful)"
    assert make_report().in_short() == ""  # infinite, and not measured


def test_a_report_fits_a_terminal_of_80_columns():
    row = ReportRow(
        key="prefill_tokens_per_second_batch_8",
        label="prefill throughput, batch 8",
        unit="tokens_per_second",
        before=1_370,
        after=1_700,
        note="inside the spread",
    )
    decoder = ReportRow(
        key="x", label="parameters in decoder layers", unit="count", before=4e6, after=3e6
    )
    table = str(make_report(rows=(decoder, row))).splitlines()
    assert max(len(line) for line in table[2:-4]) <= 80


def test_rows_by_key():
    report = make_report()
    assert report.row("total_parameters").ratio == 0.75
    assert report.row("prefill_seconds").ratio is None
    with pytest.raises(KeyError, match=r"'speed' is not in the report; it has \['total_param"):
        report.row("speed")
    zero = ReportRow(key="x", label="x", unit="bytes", before=0, after=0)
    assert zero.ratio is None


def test_json_round_trip_with_what_json_cannot_hold():
    report = make_report()
    text = report.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    again = PruningReport.from_json(text)
    assert again.row("perplexity").after is None  # infinite
    finite = make_report(rows=report.rows[:1])
    assert PruningReport.from_json(finite.to_json()) == finite


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"rows": 3}', '{"rows": [{}]}', '{"rows": [3], "warnings": []}'],
)
def test_f38_text_that_is_no_report_is_refused(text):
    with pytest.raises(ArtifactError, match="not a lit_prune report"):
        PruningReport.from_json(text)


def test_an_unknown_field_is_refused():
    raw = json.loads(make_report().to_json()) | {"extra": 1}
    with pytest.raises(ArtifactError, match="not a lit_prune report"):
        PruningReport.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "count", "–"),
        (999, "count", "999"),
        (1000, "count", "1.00 k"),
        (2_500_000, "bytes", "2.50 MB"),
        (12, "bytes", "12 B"),
        (1234.5, "tokens_per_second", "1.23 ktok/s"),
        (0.00001, "seconds", "0.01 ms"),
        (1.23456, "nats", "1.2346"),
        (math.inf, "perplexity", "inf"),
        (0, "count", "0"),
    ],
)
def test_numbers_for_people(value, unit, text):
    assert format_value(value, unit) == text

"""Why there is no gain, from constructed measurements: each reason where its facts are."""

from dataclasses import replace

import pytest

from lit_prune.errors import ConfigError
from lit_prune.measurement import Measurement, report_rows
from lit_prune.metrics import FootprintResult, footprint_of, gain_words, gains
from tests.measured import latency
from tests.models import tiny_model

DENSE = FootprintResult(
    decoder_parameters=1000,
    total_parameters=2000,
    flops_per_token=2000,
    head_flops_per_token=1000,
    context_length=64,
    kv_cache_bytes_per_token=8,
    decoder_weight_bytes=60_000_000,
    weight_bytes=100_000_000,
    head_weight_bytes=40_000_000,
    num_layers=10,
)
PRUNED = replace(DENSE, flops_per_token=1400, decoder_weight_bytes=40_000_000)


def gain(pruned=PRUNED, before=None, **after):
    """One batch size, before and after."""
    before = latency() if before is None else before
    return gains([before], [replace(before, **after)], DENSE, pruned)[0]


def test_a_plain_gain_needs_no_reason():
    found = gain(prefill_seconds=0.75, decode_seconds_per_token=0.085)
    assert found.comparison.claim
    assert (found.prefill_reason, found.decode_reason) == ("", "")
    assert gain_words([found])[0] == "batch 1, prefill: faster: 1.33x, outside the spread of ±2.7 %"


def test_bytes_that_stay_are_named_with_the_most_that_they_leave_to_gain():
    reason = gain().decode_reason
    assert reason.startswith(
        "A step reads 80.00 MB of weights in place of 100.00 MB, 50% of them the head"
    )
    assert ": 1.25x faster at most; the time did not follow" in reason
    assert "starting the operations of 10 layers as before" in reason
    fewer = gain(replace(PRUNED, num_layers=8)).decode_reason
    assert "8 layers in place of 10" in fewer


def test_a_spread_wider_than_all_there_is_to_gain_is_said_and_nothing_else():
    found = gain(before=latency(decode_spread=0.02, prefill_spread=0.3))
    for reason in (found.decode_reason, found.prefill_reason):
        assert "which is less than the spread: more repetitions" in reason
        assert "did not follow" not in reason
    assert "A prompt takes 30% fewer operations: 1.42x faster at most" in found.prefill_reason


def test_a_machine_that_did_other_work_is_the_reason():
    found = gain(prefill_seconds=4.0, decode_seconds_per_token=0.4, waited=1.5)
    assert "no measurable difference: 0.25x" in gain_words([found])[0]
    assert found.prefill_reason == found.decode_reason
    assert "0% of the time before and 150% after" in found.prefill_reason
    idle = gain(waited=0.02)  # as threads wait on an idle machine, too
    assert "Threads waited" not in idle.decode_reason
    changed = gain(
        before=latency(yardstick_seconds=0.002), prefill_seconds=1.3, yardstick_seconds=0.003
    )
    assert changed.prefill_reason.startswith(
        "The time of a fixed piece of work beside both changed by 33%: the machine itself got"
    )
    plain = gain(prefill_seconds=0.5, decode_seconds_per_token=0.05, waited=0.1)
    assert plain.comparison.claim
    assert "Threads waited" not in plain.prefill_reason


def test_slower_outside_the_spread_has_a_reason_too():
    found = gain(decode_seconds_per_token=0.2)
    assert "decode: slower: 0.50x" in gain_words([found])[1]
    assert "the time did not follow" in found.decode_reason


def test_more_than_was_removed_is_doubted():
    found = gain(prefill_seconds=0.4, decode_seconds_per_token=0.04)
    assert found.comparison.claim
    assert "more than the 1.42x that fewer operations can save" in found.prefill_reason
    # 2,000 -> 1,400 operations: more than the bytes, and still too little for 2.5x
    assert "more than the 1.43x that fewer weights" in found.decode_reason


def test_a_row_says_what_is_doubted_or_lies_inside_the_spread():
    before = latency()
    faster = {"prefill_seconds": 0.4, "decode_seconds_per_token": 0.085}
    rows = report_rows(
        Measurement(DENSE, None, (before,)),
        Measurement(PRUNED, None, (replace(before, **faster),)),
    )
    notes = {row.key: row.note for row in rows if row.unit in ("seconds", "tokens_per_second")}
    assert notes == {
        "prefill_seconds": "doubtful",  # more than was removed
        "prefill_tokens_per_second": "doubtful",
        "decode_seconds_per_token": "",
        "decode_tokens_per_second": "",
    }
    same = report_rows(Measurement(DENSE, None, (before,)), Measurement(PRUNED, None, (before,)))
    assert {row.note for row in same if row.key in notes} == {"inside the spread"}


def test_where_nothing_was_removed_nothing_is_explained_away():
    found = gain(DENSE)
    assert found.decode_reason == "Nothing that a decoding step reads was removed"
    assert found.prefill_reason == "Nothing that a prefill computes was removed"


@pytest.mark.parametrize(("seconds", "flat"), [(0.13, True), (0.7, False)])
def test_a_larger_batch_tells_whether_a_step_waits_or_computes(seconds, flat):
    one, eight = latency(), latency(batch_size=8, decode_seconds_per_token=seconds)
    first, second = gains([one, eight], [one, eight], DENSE, PRUNED)
    assert ("8 sequences takes 1.3 times as long as one for 1" in first.larger_batch) == flat
    assert second.larger_batch == ""
    assert gain_words([first, second])[4].startswith("prefill at batch 1 and 8: ")
    assert gain_words([first, second])[5].startswith("decode at batch 1 and 8: ")


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        ("cuda:0 (x)", "bfloat16", True),
        ("cuda:0 (x)", "float32", False),
        ("cpu", "bfloat16", False),
    ],
)
def test_odd_sizes_are_named_where_they_cost(device, dtype, said):
    odd = replace(PRUNED, odd_sizes=(100, 2731))
    before = latency(device=device, dtype=dtype)
    found = gains([before], [before], replace(DENSE, odd_sizes=(100,)), odd)[0]
    # 100 was there before
    assert ("no multiple of 64 (2,731)" in found.decode_reason) == said


def test_other_conditions_are_refused():
    with pytest.raises(ConfigError, match="different dtype"):
        gain(dtype="bfloat16")


def test_the_facts_are_counted_from_the_model():
    model = tiny_model(layers=2)
    size = footprint_of(model)
    assert size.num_layers == 2
    assert size.head_weight_bytes == 64 * 32 * 4
    assert size.step_weight_bytes(1) == size.decoder_weight_bytes + size.head_weight_bytes
    assert size.odd_sizes == (16, 32, 48)
    assert footprint_of(
        tiny_model(hidden_size=64, intermediate_size=128, head_dim=16)
    ).odd_sizes == (32,)


def test_a_step_reads_the_experts_that_its_tokens_meet():
    size = footprint_of(tiny_model("mixtral"))
    read = [size.step_weight_bytes(sequences) for sequences in (1, 2, 99)]
    assert size.experts == ((size.experts[0][0], 6, 2),) * 4
    apart = sum(each[0] for each in size.experts)
    assert read[2] == size.decoder_weight_bytes + size.head_weight_bytes
    assert read[2] - read[0] == apart * 4 // 6
    assert read[2] - read[1] == apart * 2 // 6


def test_experts_that_go_leave_a_step_for_one_sequence_as_it_is():
    dense = replace(DENSE, experts=((30_000_000, 6, 2),))
    fewer = replace(DENSE, decoder_weight_bytes=50_000_000, experts=((20_000_000, 4, 2),))
    found = gains([latency()], [latency()], dense, fewer)
    assert found[0].decode_reason == "Nothing that a decoding step reads was removed"

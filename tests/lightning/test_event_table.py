"""What the README says of Lightning's events is what the tests show."""

from tests.lightning.event_table import BEGIN, GROUPS, README, events, with_table


def test_the_table_in_the_readme_is_made_of_the_tests():
    text = README.read_text(encoding="utf-8")
    assert BEGIN in text
    assert text == with_table(text), "run: python -m tests.lightning.event_table"


def test_every_group_has_events_and_no_event_is_told_twice():
    found = events()
    assert {event.group for event in found} == set(GROUPS)
    told = [event.event for event in found]
    assert len(set(told)) == len(told)

import pytest

from lit_prune.allocation import uniform_counts
from lit_prune.errors import ConfigError


def test_equals_a_search_over_all_counts():
    for units in (1, 7, 8, 100, 704):
        for multiple in (1, 8, 64):
            for least in (0, 1, 64):
                for percent in range(0, 101, 7):
                    allowed = [
                        k
                        for k in range(units + 1)
                        if k == units or (k % multiple == 0 and k >= least)
                    ]
                    gap = min(abs(100 * k - units * (100 - percent)) for k in allowed)
                    best = [k for k in allowed if abs(100 * k - units * (100 - percent)) == gap]
                    kept = uniform_counts(
                        units, percent / 100, minimum_kept=least, multiple=multiple
                    )
                    assert kept == max(best), (units, multiple, least, percent)


@pytest.mark.parametrize(
    "change", [{"ratio": 1.2}, {"ratio": float("nan")}, {"multiple": 0}, {"minimum_kept": -1}]
)
def test_arguments_out_of_range_are_refused(change):
    arguments = {"num_units": 8, "ratio": 0.5, "minimum_kept": 1, "multiple": 1, **change}
    with pytest.raises(ConfigError):
        uniform_counts(**arguments)

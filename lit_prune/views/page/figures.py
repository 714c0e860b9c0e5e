"""Numbers in words, the same everywhere on the page."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """Return a share of one in percent.

    Example:
        >>> percent(0.301), percent(0.0004), percent(1)
        ('30.1 %', '0.04 %', '100 %')
    """
    value = 100 * share
    digits = 1 if abs(value) >= 0.1 or not value else 2
    return f"{value:.{digits}f}".removesuffix(".0") + " %"


def change(ratio: float | None) -> str:
    """Return after / before as a signed change.

    Example:
        >>> change(0.8), change(1.25), change(3.5), change(None)
        ('−20 %', '+25 %', '× 3.50', '–')
    """
    if ratio is None or not math.isfinite(ratio):
        return "–"
    if ratio >= 3:
        return f"× {ratio:,.2f}"
    if abs(ratio - 1) < 5e-5:
        return "0 %"
    return ("+" if ratio > 1 else "−") + percent(abs(ratio - 1))


def short(value: float | None) -> str:
    """Return three significant digits.

    Example:
        >>> short(0.01234), short(12345.0), short(None)
        ('0.0123', '12,300', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        rounded = round(value, 2 - math.floor(math.log10(abs(value))))
        return f"{rounded:,.0f}" if abs(value) < 1e9 else f"{value:.2e}"
    return f"{value:.3g}"


def enumerated(numbers: list[int]) -> str:
    """Return layer numbers, runs of three or more as a range.

    Example:
        >>> enumerated([3]), enumerated([1, 2, 3, 7]), enumerated([0, 2])
        ('3', '1–3, 7', '0, 2')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)

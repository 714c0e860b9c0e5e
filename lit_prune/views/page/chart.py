"""A small chart as inline SVG: linear or logarithmic axes, points, lines, words on all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lit_prune.views.page.elements import tag
from lit_prune.views.page.figures import short

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from xml.etree.ElementTree import Element

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44
_DECADES = 1.5  # values that span more go on a logarithmic axis
_LEAST_SHARE = 1e-6  # of the highest value: what is lower lies on the axis


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to places.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Place in the picture.
        end: Place in the picture.
        logarithmic: Whether decades are equally wide.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value; what lies outside goes to the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values, at most some seven."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            step = max(1, -(-(last - first) // 6))
            return [10.0**power for power in range(first, last + 1, step)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step_size = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
        first_tick = math.ceil(self.low / step_size - 1e-9)
        last_tick = math.floor(self.high / step_size + 1e-9)
        return [round(i * step_size, 12) for i in range(first_tick, last_tick + 1)]


def height_axis(values: Sequence[float]) -> Axis:
    """Return an upright axis for values, logarithmic where they span decades.

    Example:
        >>> height_axis([0.001, 1.0]).logarithmic, height_axis([1.0, 2.0]).logarithmic
        (True, False)
    """
    top = max(values, default=0.0)
    low = min(values, default=0.0)
    positive = [value for value in values if value > max(top, 0.0) * _LEAST_SHARE]
    start, end = HEIGHT - _BOTTOM, _TOP
    if low >= 0 and positive and math.log10(top / min(positive)) > _DECADES:
        return Axis(min(positive) / 1.5, top * 1.5, start, end, logarithmic=True)
    low, top = min(low, 0.0), max(top, 0.0)
    if top == low:
        top = low + 1
    return Axis(low * 1.08, top * 1.08, start, end)


def width_axis(low: float, high: float) -> Axis:
    """Return the axis from left to right."""
    return Axis(low, high if high > low else low + 1, _LEFT, WIDTH - _RIGHT)


@dataclass(slots=True)
class Chart:
    """A picture in the making.

    Attributes:
        x: Axis to the right.
        y: Axis upwards.
        title: What a screen reader says first.
        drawn: What is in it.
    """

    x: Axis
    y: Axis
    title: str
    drawn: list[Element] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """Draw a line through points."""
        path = " ".join(f"{self.x.at(x):.1f},{self.y.at(y):.1f}" for x, y in points)
        self.drawn.append(tag("polyline", points=path, class_=class_))

    def mark(self, x: float, y: float, shape: str, words: str) -> None:
        """Draw a point; ``shape`` is ``dot``, ``stop``, ``triangle``, ``square``, ``ring``."""
        at_x, at_y = self.x.at(x), self.y.at(y)
        label = tag("title", words)
        if shape == "triangle":
            path = f"M{at_x - 4.5:.1f},{at_y + 4:.1f} h9 l-4.5,-8.5 z"
            self.drawn.append(tag("path", label, d=path, class_=shape))
        elif shape == "square":
            place = {"x": f"{at_x - 3.5:.1f}", "y": f"{at_y - 3.5:.1f}"}
            self.drawn.append(tag("rect", label, **place, width=7, height=7, class_=shape))
        else:
            radius = 7.5 if shape == "ring" else 4
            place = {"cx": f"{at_x:.1f}", "cy": f"{at_y:.1f}"}
            self.drawn.append(tag("circle", label, **place, r=radius, class_=shape))

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        """Write words at a place of the picture."""
        self.drawn.append(tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor))

    def svg(
        self,
        x_words: str,
        y_words: str,
        *,
        x_name: Callable[[float], str] = short,
        x_ticks: Sequence[float] | None = None,
    ) -> Element:
        """Return the picture with its axes.

        Args:
            x_words: What the axis to the right shows.
            y_words: What the upright axis shows.
            x_name: Names a tick of the axis to the right.
            x_ticks: Its ticks, where round numbers will not do.
        """
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        frame = []
        for value in self.y.ticks():
            at = f"{self.y.at(value):.1f}"
            frame.append(tag("line", x1=_LEFT, x2=right, y1=at, y2=at, class_="grid"))
            y = f"{self.y.at(value) + 4:.1f}"
            frame.append(tag("text", short(value), x=_LEFT - 6, y=y, text_anchor="end"))
        for value in self.x.ticks() if x_ticks is None else x_ticks:
            place = f"{self.x.at(value):.1f}"
            frame.append(tag("line", x1=place, x2=place, y1=bottom, y2=bottom + 4, class_="axis"))
            name = x_name(value)
            frame.append(tag("text", name, x=place, y=bottom + 17, text_anchor="middle"))
        frame.append(tag("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
        middle = (_LEFT + right) / 2
        frame.append(tag("text", x_words, x=middle, y=HEIGHT - 8, text_anchor="middle"))
        turned = f"rotate(-90 12 {(_TOP + bottom) / 2})"
        at_y = (_TOP + bottom) / 2
        frame.append(tag("text", y_words, x=12, y=at_y, text_anchor="middle", transform=turned))
        box = f"0 0 {WIDTH} {HEIGHT}"
        said = tag("title", self.title)
        return tag("svg", said, *frame, *self.drawn, viewBox=box, role="img", class_="chart")


def figure(picture: Element, caption: str, entries: Sequence[tuple[str, str]] = ()) -> Element:
    """Return a picture under its caption and legend.

    Args:
        picture: `Chart.svg`.
        caption: What it shows.
        entries: Of the legend: shape (as in `Chart.mark`, or the class of a line) and words.
    """
    return tag("figure", tag("figcaption", caption, _legend(entries)), picture)


def _legend(entries: Sequence[tuple[str, str]]) -> Element:
    shown = []
    for shape, words in entries:
        box = Chart(Axis(0, 1, 8, 8), Axis(0, 1, 8, 8), "")
        if shape in ("dot", "triangle", "square", "ring", "stop"):
            box.mark(0, 0, shape, words)
        else:
            box.drawn.append(tag("line", x1=0, x2=16, y1=8, y2=8, class_=shape))
        sign = tag("svg", *box.drawn, viewBox="0 0 16 16", class_="sign chart", aria_hidden="true")
        shown.append(tag("span", sign, f" {words}"))
    return tag("span", *shown, class_="legend")

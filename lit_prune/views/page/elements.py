"""Elements of a page: trees, so that whatever text they hold is escaped when they are written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, tostring

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Child = Element | str | None


def tag(kind: str, /, *children: Child, **attributes: object) -> Element:
    """Return an element.

    Args:
        kind: Of the element.
        *children: Elements and text in order; None is left out.
        **attributes: Names lose a trailing ``_``, and other ``_`` become ``-``; None is left out.

    Example:
        >>> html_of(tag("a", "R&D", tag("b", "<x>"), class_="k"))
        '<a class="k">R&amp;D<b>&lt;x&gt;</b></a>'
    """
    element = Element(kind)
    for key, value in attributes.items():
        if value is not None:
            element.set(key.rstrip("_").replace("_", "-"), plain(str(value)))
    last: Element | None = None
    for child in children:
        if isinstance(child, str):
            if last is None:
                element.text = (element.text or "") + plain(child)
            else:
                last.tail = (last.tail or "") + plain(child)
        elif child is not None:
            element.append(child)
            last = child
    return element


def html_of(element: Element) -> str:
    """Return the element as HTML."""
    return tostring(element, encoding="unicode", method="html")


def plain(text: str) -> str:
    """Show what cannot be seen: controls, lone surrogates, marks that turn the direction of text.

    Example:
        >>> plain("a" + chr(0x202E) + "b") == "a" + chr(0xFFFD) + "b"
        True
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def section(name: str, title: str, *children: Child) -> Element:
    """Return a part of the page under its own heading; ``name`` is what a link calls it."""
    heading = tag("h2", title, id=name)
    return tag("section", heading, *children, aria_labelledby=name)


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    numbers: Sequence[int] = (),
    class_: str | None = None,
) -> Element:
    """Return a table whose first cell of each row is the row's heading.

    Args:
        caption: What the table shows.
        header: One heading for each column.
        rows: Their cells.
        numbers: Columns that are right-aligned.
        class_: For the style sheet.
    """

    def number(column: int) -> str | None:
        return "number" if column in numbers else None

    heads = [tag("th", text, scope="col", class_=number(i)) for i, text in enumerate(header)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=number(i)) for i, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    ]
    whole = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        class_=class_,
    )
    return tag("div", whole, class_="scroll")


def code(lines: Iterable[str]) -> Element:
    """Return lines of code, as they stand."""
    return tag("pre", tag("code", "\n".join(lines)), tabindex="0")


def words(text: str) -> list[Child]:
    """Return a sentence in which `` `…` `` marks code.

    Example:
        >>> html_of(tag("p", *words("see `a<b` there")))
        '<p>see <code>a&lt;b</code> there</p>'
    """
    parts = re.split(r"`([^`]+)`", text)
    return [tag("code", part) if i % 2 else part for i, part in enumerate(parts) if part]


def listed(items: Iterable[str], class_: str | None = None) -> Element | None:
    """Return sentences as a list; None where there is none."""
    found = [tag("li", *words(text)) for text in items]
    return tag("ul", *found, class_=class_) if found else None

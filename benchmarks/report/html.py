"""A few lines to write HTML with: text is escaped, elements are closed, nothing is forgotten."""

from __future__ import annotations

import html
from collections.abc import Iterable

#: Elements without content, which are not closed.
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "wbr"})


class Html(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


#: What an element may hold: HTML, text, nothing, or a sequence of these.
Content = str | None | Iterable["Content"]


def text(content: Content) -> Html:
    """``content`` as HTML: what is not :class:`Html` yet is escaped, None is left out."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(content, quote=False))
    return Html("".join(text(part) for part in content))


def tag(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Html:
    """An element.

    Args:
        name: of the element.
        content: what it holds.
        attributes: a trailing underscore is dropped (``class_``), others become hyphens
            (``aria_label``); None and False leave an attribute out, True gives it no value.
    """
    opening = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        opening.append(
            attribute if value is True else f'{attribute}="{html.escape(str(value), quote=True)}"'
        )
    start = f"<{' '.join(opening)}>"
    if name in _VOID:
        return Html(start)
    return Html(f"{start}{text(content)}</{name}>")


def value(number: float, shown: str) -> Html:
    """A figure for people that carries the exact number of the record."""
    return tag("data", shown, value=repr(number))


def table(
    header: Iterable[Content],
    rows: Iterable[Iterable[Content]],
    *,
    numbers: int = 0,
    caption: Content = None,
    sortable: bool = False,
) -> Html:
    """A table whose last ``numbers`` columns are figures, in a box that scrolls where it is wide.

    The first cell of a row is its heading.
    """
    return grouped_table(
        header, [(None, rows)], numbers=numbers, caption=caption, sortable=sortable
    )


def grouped_table(
    header: Iterable[Content],
    groups: Iterable[tuple[Content, Iterable[Iterable[Content]]]],
    *,
    numbers: int = 0,
    caption: Content = None,
    sortable: bool = False,
) -> Html:
    """The same with headings between the rows: each of ``groups`` is a heading and its rows."""
    header = list(header)
    texts = len(header) - numbers

    def kind(column: int) -> str | None:
        return "number" if column >= texts else None

    head = [tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(header)]
    bodies = []
    for heading, rows in groups:
        body = []
        if heading is not None:
            whole = tag("th", heading, colspan=len(header), scope="rowgroup")
            body.append(tag("tr", whole, class_="group"))
        for row in rows:
            first, *others = row
            cells = [tag("th", first, scope="row")]
            cells += [tag("td", cell, class_=kind(i)) for i, cell in enumerate(others, start=1)]
            body.append(tag("tr", cells))
        bodies.append(tag("tbody", body))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", tag("tr", head)),
            bodies,
            class_="sortable" if sortable else None,
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption if isinstance(caption, str) else "table",
    )

"""Pieces of an HTML page. Every text is escaped unless it already is `Html`.

The page needs nothing but itself: its style is inline, its pictures are data URIs, and it runs no
script.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .wording import columns_of, folded, is_scalar, is_table, number

_WIDTH_PX = 1080
STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #e4e4e0; --accent: #3b6ea5; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1128px; padding: 24px; color: var(--ink); background: #fff;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 10px;
  padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 6px 0; } .soft, figcaption, caption { color: var(--soft); font-size: 13px; }
.status { display: inline-block; padding: 1px 9px; border-radius: 10px; font-size: 13px;
  background: #e5f0e5; color: #2c5f2d; } .status.failed { background: #f8e1dc; color: #96281b; }
.status.going { background: #f5eed6; color: #725a10; }
.error { color: #96281b; font-weight: 600; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; min-width: 108px; }
.tile b { display: block; font-size: 22px; line-height: 1.2; }
.tile span { display: block; color: var(--soft); font-size: 12px; }
figure { margin: 0 0 16px; } figure img { display: block; max-width: 100%;
  image-rendering: pixelated; border: 1px solid var(--line); }
.row { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.row > * { min-width: 0; } .row > table + table { flex: 1 1 400px; margin-left: 24px; }
.columns h3 { margin-top: 0; padding-top: 6px; }
.charts { display: flex; flex-wrap: wrap; gap: 12px 18px; align-items: flex-end; }
.charts > * { width: calc(50% - 9px); } .charts > .narrow { width: calc(33.3% - 12px); }
.charts svg { width: 100%; height: auto; display: block; break-inside: avoid; }
svg text { font-family: inherit !important; }
.columns { columns: 2 420px; column-gap: 32px; } .columns > * { break-inside: avoid; }
table { border-collapse: collapse; font-size: 13.5px; margin: 4px 0 12px; }
caption { text-align: left; padding-bottom: 4px; }
th, td { text-align: left; padding: 3px 14px 3px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; } th { font-weight: 600; color: var(--soft); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
td.best { font-weight: 700; } td figure { margin: 4px 0; }
.bar { display: inline-block; vertical-align: middle; width: 120px; height: 9px;
  background: #f0f0ec; margin-right: 8px; }
td.share { white-space: nowrap; } td.share .bar { width: 56px; }
.bar i { display: block; height: 100%; background: var(--accent); }
pre { font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; background: #f7f7f4;
  padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 760px) { .charts > *, .charts > .narrow { width: 100%; } }
@media print { body { font-size: 11px; padding: 0; } h2 { break-after: avoid; }
  .bar i, .status { print-color-adjust: exact; } figure, tr { break-inside: avoid; } }
"""


class Html(str):
    """Text that is markup already."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element; `class_` names a class, and an attribute that is None is left out."""
    stated = "".join(
        f' {key.rstrip("_")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{stated}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children))


def document(title: str, *body: Any) -> Html:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    return Html(
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{join(body)}</body></html>\n'
    )


def section(title: str, *children: Any) -> Html:
    """A headed part of the page, or nothing where it would be empty."""
    content = join(children)
    return join([tag("h2", title), content, "\n"]) if content else Html()


def cell(value: Any, name: str = "td", class_: str | None = None) -> Html:
    """A table's cell; numbers are set flush right."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    classes = " ".join(filter(None, ["number" if is_number else "", class_])) or None
    return tag(name, value if isinstance(value, Html) else number(value), class_=classes)


def facts(values: Mapping[str, Any], caption: str | None = None) -> Html:
    """A table of labels and values; values may be nested."""
    if not values:
        return Html()
    rows = [
        tag("tr", tag("th", key), tag("td", show(value))) for key, value in folded(values).items()
    ]
    return tag("table", *([tag("caption", caption)] if caption else []), *rows)


def rows_table(rows: Sequence[Mapping[str, Any]], bars: Sequence[str] = ()) -> Html:
    """A table of flat mappings; columns named in `bars` hold shares in [0, 1] and get a bar."""
    columns = columns_of(rows)
    head = []
    for column in columns:
        values = [row.get(column) for row in rows]
        numeric = all(isinstance(v, int | float) for v in values) and column not in bars
        head.append(tag("th", _breakable(column), class_="number" if numeric else None))
    body = [
        tag("tr", *(_with_bar(row.get(c)) if c in bars else cell(row.get(c)) for c in columns))
        for row in rows
    ]
    return tag("table", tag("tr", *head), *body)


def _with_bar(value: Any) -> Html:
    if isinstance(value, int | float) and 0 <= value <= 1:
        return tag("td", bar(value), f"{100 * value:.0f} %", class_="share")
    return cell(value)


def _breakable(name: str) -> Html:
    """A name that may go on in the next line after each underscore."""
    return Html(html.escape(name).replace("_", "_<wbr>"))


def bar(share: float) -> Html:
    return tag("span", tag("i", style=f"width:{100 * share:.1f}%"), class_="bar")


def show(value: Any) -> Html:
    """Any JSON value: nested mappings as tables in tables."""
    if isinstance(value, Html):
        return value
    if is_scalar(value):
        return join([number(value)])
    if isinstance(value, Mapping):
        return facts(value)
    if is_table(value):
        return rows_table(value)
    if all(map(is_scalar, value)):
        return join([", ".join(map(number, value)) or "-"])
    return facts({str(position): each for position, each in enumerate(value)})


def picture(path: Path, caption: str = "", width_px: int = _WIDTH_PX) -> Html:
    """A PNG as part of the page, small ones enlarged by a whole factor; or why it is not there."""
    try:
        with Image.open(path) as image:
            image.load()  # a picture cut off half-way must not look like a bad sample
            own_px = image.width
    except (OSError, SyntaxError, ValueError) as error:
        return tag("p", f"{path.name} cannot be shown: {error}", class_="soft")
    factor = max(1, min(4, width_px // own_px))
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    shown = Html(
        f'<img src="{source}" alt="{html.escape(caption or path.stem)}" '
        f'width="{min(width_px, own_px * factor)}">'
    )
    return tag("figure", shown, *([tag("figcaption", caption)] if caption else []))

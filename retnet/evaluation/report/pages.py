"""A report as Markdown with pictures beside it, and as one HTML file that holds everything.

What models, files and texts are called is escaped in both: it may say anything.
"""

import base64
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retnet.evaluation.report.pictures import Picture
from retnet.terminal import harmless, in_one_line

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
       max-width: 60rem; padding: 1rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.9rem; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Table:
    """A title, rows of which the first is the head, and perhaps a line below."""

    title: str
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What a report shows, in this order."""

    title: str
    about: Sequence[str]  # lines: text, machine, versions, command
    summary: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]


def to_markdown(page: Page) -> str:
    """Pictures are files beside it."""
    return "\n".join(_markdown(page)) + "\n"


def _markdown(page: Page) -> Iterator[str]:
    yield f"# {_md(page.title)}\n"
    yield from (f"{_md(line)}  " for line in page.about)
    yield "\n## In short\n"
    yield from (f"- {_md(sentence)}" for sentence in page.summary)
    for table in page.tables:
        head, *rows = table.rows
        yield f"\n## {_md(table.title)}\n"
        yield _row([_md(cell) for cell in head])
        yield _row(["---", *["---:"] * (len(head) - 1)])
        yield from (_row([_md(cell) for cell in row]) for row in rows)
        if table.note:
            yield f"\n{_md(table.note)}"
    for picture in page.pictures:
        yield f"\n## {_md(picture.title)}\n"
        yield f"![{_md(picture.caption)}]({picture.name}.png)\n"
        yield _md(picture.caption)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&$!])", r"\\\1", harmless(in_one_line(text)))


def to_html(page: Page) -> str:
    """One file without anything outside of it."""
    return "\n".join(_html(page)) + "\n"


def _html(page: Page) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{_text(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield f"<h1>{_text(page.title)}</h1>"
    yield f'<p class="note">{"<br>".join(_text(line) for line in page.about)}</p>'
    yield "<h2>In short</h2>\n<ul>"
    yield from (f"<li>{_text(sentence)}</li>" for sentence in page.summary)
    yield "</ul>"
    for table in page.tables:
        yield f'<h2>{_text(table.title)}</h2>\n<div class="wide"><table>'
        head, *rows = table.rows
        yield f"<thead>{_cells(head, 'th')}</thead>\n<tbody>"
        yield from (_cells(row, "td") for row in rows)
        yield "</tbody></table></div>"
        if table.note:
            yield f'<p class="note">{_text(table.note)}</p>'
    for picture in page.pictures:
        data = base64.b64encode(picture.png).decode()
        yield f"<h2>{_text(picture.title)}</h2>\n<figure>"
        yield f'<img src="data:image/png;base64,{data}" alt="{_text(picture.caption)}">'
        yield f"<figcaption>{_text(picture.caption)}</figcaption>\n</figure>"
    yield "</body>\n</html>"


def _cells(cells: Sequence[str], kind: str) -> str:
    return f"<tr>{''.join(f'<{kind}>{_text(cell)}</{kind}>' for cell in cells)}</tr>"


def _text(text: str) -> str:
    return html.escape(harmless(in_one_line(text)))

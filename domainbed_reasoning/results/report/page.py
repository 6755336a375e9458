"""The report as one HTML page that holds everything, loads nothing and runs no script.

All texts may come from strangers: they are escaped, what is not visible in them is shown by its number, and the page's
own policy forbids whatever would get through.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from domainbed_reasoning import __version__
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.results.report.blocks import (
    Block,
    Code,
    Example,
    Examples,
    Figure,
    Fold,
    Report,
    Section,
    Text,
)
from domainbed_reasoning.results.tables import Table

_CODE = re.compile("`([^`]+)`")
# Control characters, direction marks, halves of pairs, unassigned and private ones; line breaks and tabs are harmless.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_HARMLESS = "\n\t"
_SMALL_PICTURE = 112  # pixels: shown larger than it is, so without smoothing


def write_page(path: Path, report: Report) -> int:
    """Write the page, atomically, and return its size in bytes.

    Args:
        path: of the page.
        report: what it says.
    """
    text = render_page(report).encode("utf-8")
    with replacing(path) as file:
        file.write(text)
    return len(text)


def render_page(report: Report) -> str:
    """Return the page."""
    style = _part("page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    contents = "\n".join(f'<li><a href="#{s.anchor}">{shown(s.title)}</a></li>' for s in report.sections)
    fields = {
        "policy": html.escape(
            f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        ),
        "title": shown(report.title, marked=False),
        "style": style,
        "lead": shown(report.lead),
        "contents": contents,
        "sections": "\n".join(map(_section, report.sections)),
        "made": f"Made by domainbed-reasoning {html.escape(__version__)}, <code>domainbed-reasoning report</code>.",
    }
    return _filled(_part("page.html"), fields)


def _part(name: str) -> str:
    return resources.files("domainbed_reasoning.results.report").joinpath(name).read_text("utf-8").strip()


def _filled(template: str, fields: Mapping[str, str]) -> str:
    """Fill all places at once, so that a text which looks like a place stays a text."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found.group(1)], template) + "\n"


def shown(text: str, marked: bool = True) -> str:
    """Return a text as HTML that shows all of it.

    Args:
        text: whatever it holds.
        marked: show what cannot be seen by its number, in a frame; else by a replacement character.
    """
    return "".join(_char(char, marked) for char in text)


@functools.lru_cache(maxsize=4096)
def _char(char: str, marked: bool) -> str:
    if unicodedata.category(char) in _UNSEEN and char not in _HARMLESS:
        return f'<span class="odd">U+{ord(char):04X}</span>' if marked else "\N{REPLACEMENT CHARACTER}"
    return html.escape(char)


def _prose(text: str) -> str:
    """Return a text of ours as HTML; what stands between backticks is code."""
    return _CODE.sub(r"<code>\1</code>", shown(text))


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">\n' + (
        f'<h2 id="{section.anchor}-title">{shown(section.title)}</h2>\n{blocks}\n</section>'
    )


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_prose(block.text)}</p>"
    if isinstance(block, Code):
        return f'<h3>{_prose(block.caption)}</h3>\n<pre tabindex="0"><code>{shown(block.text)}</code></pre>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Examples):
        cards = "\n".join(map(_example, block.shown))
        return f'<h3>{shown(block.caption)}</h3>\n<div class="examples">\n{cards}\n</div>'
    return _fold(block)


def _fold(fold: Fold) -> str:
    blocks = "\n".join(map(_block, fold.blocks))
    return f"<details{' open' if fold.opened else ''}>\n<summary>{shown(fold.title)}</summary>\n{blocks}\n</details>"


def _table(table: Table) -> str:
    kinds = [_kind(table, column) for column in range(len(table.head))]
    head = "".join(f'<th scope="col"{kind}>{shown(text)}</th>' for text, kind in zip(table.head, kinds, strict=True))
    rows = "\n".join(_row(row, kinds) for row in table.rows)
    name = shown(table.caption, marked=False)
    note = f'\n<p class="note">{_prose(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" role="region" aria-label="{name}" tabindex="0">\n<table>\n'
        f"<caption><span>{shown(table.caption)}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>{note}"
    )


def _kind(table: Table, column: int) -> str:
    if table.is_number(column) and column:
        return ' class="number"'
    return ' class="long"' if table.is_long(column) else ""


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    first = f'<th scope="row"{kinds[0]}>{_prose(row[0])}</th>'
    cells = (f"<td{kind}>{_prose(text)}</td>" for text, kind in zip(row[1:], kinds[1:], strict=True))
    return f"<tr>{first}{''.join(cells)}</tr>"


def _figure(figure: Figure) -> str:
    alt = shown(f"{figure.caption} {figure.described}", marked=False)
    bitmap = ' class="bitmap"' if figure.kind == "image/png" else ""
    return (
        f'<figure>\n<div class="wide"><img{bitmap} alt="{alt}" src="{_data(figure.kind, figure.data)}"></div>\n'
        f"<figcaption>{shown(figure.caption)}</figcaption>\n</figure>"
    )


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _example(example: Example) -> str:
    name = shown(example.image, marked=False)
    if example.picture is None:
        picture = '<div class="gone">image not found</div>'
    else:
        picture = f'<img class="pixels" alt="{name}" src="{_data("image/webp", example.picture)}">'
    answer = "names no class" if example.chain_answer is None else f"chain: {shown(example.chain_answer)}"
    kind = {"right": "right", "wrong": "wrong", "no class": "none"}[example.verdict]
    chips = [f'<span class="chip {kind}">{answer}</span>']
    if example.label_answer is not None:
        by_label = "right" if example.label_answer == example.label else "wrong"
        chips.append(f'<span class="chip {by_label}">class name: {shown(example.label_answer)}</span>')
    if example.stages:
        stages = "".join(f"<dt>{stage}</dt><dd>{shown(text)}</dd>" for stage, text in example.stages.items())
        chain = f"<dl>{stages}</dl>"
    else:
        chain = f'<p class="raw">{shown(example.chain)}</p>'
    return (
        f'<article aria-label="{name}">\n<div>{picture}<p class="of">{shown(example.image)}</p></div>\n'
        f"<div><h4>True class: {shown(example.label)}</h4>{''.join(chips)}{chain}</div>\n</article>"
    )

"""The report as one self-contained HTML page that loads no resources and runs no scripts.

Texts may come from untrusted files. The template (``page.html``) escapes every value, invisible characters are shown as
code points, and the page's Content-Security-Policy blocks scripts and requests.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import unicodedata
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup, escape

from domainbed_reasoning import __version__
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.results.report.blocks import Report
from domainbed_reasoning.results.report.templates import environment, split_code
from domainbed_reasoning.terminal import HIDDEN

_TEMPLATE, _STYLE = "page.html", "page.css"


def write_page(path: Path, report: Report) -> int:
    """Write the page atomically and return its size in bytes.

    Args:
        path: of the page.
        report: its content.
    """
    text = render_page(report).encode("utf-8")
    with replacing(path) as file:
        file.write(text)
    return len(text)


def render_page(report: Report) -> str:
    """Return the page as HTML; equal reports give equal pages."""
    return _environment().get_template(_TEMPLATE).render(report=report, version=__version__)


@functools.cache
def _environment() -> Environment:
    env = environment(_visible)
    assert env.loader is not None
    style = env.loader.get_source(env, _STYLE)[0].strip()
    env.filters |= {"attribute": _attribute, "prose": _prose, "base64": _base64}
    env.globals |= {"style": Markup(style), "style_sha256": _base64(hashlib.sha256(style.encode()).digest())}
    return env


def _visible(text: str) -> Markup:
    """Return a text as HTML; each invisible character becomes its framed code point."""
    shown = str(escape(text))
    if not text.isprintable():
        shown = "".join(f'<span class="odd">U+{ord(c):04X}</span>' if _is_invisible(c) else c for c in shown)
    return Markup(shown)


def _attribute(text: str) -> Markup:
    """Return a text as the value of an attribute; each invisible character becomes U+FFFD."""
    return escape("".join("\N{REPLACEMENT CHARACTER}" if _is_invisible(char) else char for char in text))


def _prose(text: str) -> Markup:
    """Return a sentence as HTML; text between backticks is set as code."""
    parts = ((is_code, _visible(part)) for is_code, part in split_code(text))
    return Markup("").join(Markup("<code>{}</code>").format(part) if is_code else part for is_code, part in parts)


def _is_invisible(char: str) -> bool:
    return not char.isprintable() and char not in "\n\t" and unicodedata.category(char) in HIDDEN


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

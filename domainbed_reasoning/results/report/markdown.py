"""The report in Markdown (``page.md``): the page's content without the pictures."""

from __future__ import annotations

import functools
import re

from jinja2 import Environment
from markupsafe import Markup

from domainbed_reasoning.results import render
from domainbed_reasoning.results.report.blocks import Code, Report
from domainbed_reasoning.results.report.templates import environment, split_code
from domainbed_reasoning.results.tables import Table
from domainbed_reasoning.terminal import printable


def render_markdown(report: Report) -> str:
    """Return the report in GitHub's Markdown; plots and images are replaced by their descriptions."""
    return _environment().get_template("page.md").render(report=report)


@functools.cache
def _environment() -> Environment:
    env = environment(lambda text: Markup(render.markdown_text(text)))
    env.filters |= {"prose": _prose, "fenced": _fenced, "table": _table}
    return env


def _prose(text: str) -> Markup:
    parts = split_code(text)
    return Markup("".join(f"`{printable(part)}`" if code else render.markdown_text(part) for code, part in parts))


def _fenced(code: Code) -> Markup:
    longest = max(map(len, re.findall("`+", code.text)), default=0)
    fence = "`" * max(3, 1 + longest)
    return Markup(f"{fence}{code.language}\n{code.text}\n{fence}")


def _table(table: Table) -> Markup:
    return Markup(render.markdown(table).strip("\n"))

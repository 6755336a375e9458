"""The jinja2 environment of the report's templates: every value is escaped unless a template marks it as safe."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from domainbed_reasoning.results.report import blocks
from domainbed_reasoning.results.tables import Table

_CODE = re.compile("`([^`]+)`")


def environment(escape: Callable[[str], Markup]) -> Environment:
    """Return an environment whose templates output every value through ``escape``.

    Templates distinguish blocks by the tests `text`, `code`, `figure`, `table`, `examples` and `details`.

    Args:
        escape: of the template's language; `Markup` values are not escaped again.
    """

    def finalize(value: Any) -> Markup:
        return value if isinstance(value, Markup) else escape(str(value))

    env = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for kind in (blocks.Text, blocks.Code, blocks.Figure, Table, blocks.Examples, blocks.Details):
        env.tests[kind.__name__.lower()] = lambda value, kind=kind: isinstance(value, kind)
    return env


def split_code(text: str) -> list[tuple[bool, str]]:
    """Return the parts of a text in order, each with whether it is code (between backticks)."""
    return [(number % 2 == 1, part) for number, part in enumerate(_CODE.split(text)) if part]

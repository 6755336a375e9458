"""Tables as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_reasoning.results.tables import Table
from domainbed_reasoning.terminal import printable

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "–": "--", "`": r"\textasciigrave{}", "\n": " ", "\r": " ",
}  # fmt: skip
_MARKDOWN = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]<>|#!~$"} | {"\n": " ", "\r": " "})


def markdown(table: Table) -> str:
    """Return the table in GitHub's Markdown, escaped, its caption as a heading."""
    align = ["---:" if table.is_number(column) else "---" for column in range(len(table.head))]
    rows = [_row(table.head), "| " + " | ".join(align) + " |"]
    for place, row in enumerate(table.rows):
        texts = (
            f"**{markdown_text(text)}**" if (place, column) in table.best else markdown_text(text)
            for column, text in enumerate(row)
        )
        rows.append("| " + " | ".join(texts) + " |")
    parts = [f"### {markdown_text(table.caption)}", "\n".join(rows)]
    return "\n\n".join([*parts, markdown_text(table.note)] if table.note else parts) + "\n"


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_text, texts)) + " |"


def markdown_text(text: str) -> str:
    """Return a text escaped for Markdown."""
    return printable(text).translate(_MARKDOWN)


def latex(table: Table) -> str:
    r"""Return the table as a LaTeX ``tabular`` to ``\input``, for the package booktabs; its caption is a comment."""
    columns = "".join(_latex_column(table, column) for column in range(len(table.head)))
    head = " & ".join(rf"\textbf{{{latex_text(text)}}}" for text in table.head)
    rows = [" & ".join(map(latex_text, row)) + r" \\" for row in table.rows]
    lines = [*latex_comments(table.caption, table.note), rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head + r" \\"]
    return "\n".join([*lines, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_column(table: Table, column: int) -> str:
    if table.is_long(column):
        return "p{5cm}"
    return "r" if table.is_number(column) else "l"


def latex_comments(*texts: str) -> list[str]:
    """Return texts as LaTeX comments, line by line; empty ones are skipped."""
    return [f"% {line}" for text in texts for line in text.splitlines()]


def latex_text(text: str) -> str:
    """Return a text escaped for LaTeX."""
    return "".join(_LATEX.get(char, char) for char in printable(text))

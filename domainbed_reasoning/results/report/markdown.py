"""The report in Markdown: everything but the pictures."""

from __future__ import annotations

from collections.abc import Iterator

from domainbed_reasoning.results import render
from domainbed_reasoning.results.report.blocks import Block, Code, Example, Examples, Figure, Fold, Report, Text
from domainbed_reasoning.results.tables import Table


def render_markdown(report: Report) -> str:
    """Return the report in GitHub's Markdown. Plots and images are in the page alone; their descriptions are here."""
    parts = [f"# {render.markdown_text(report.title)}", render.markdown_text(report.lead)]
    for section in report.sections:
        parts.append(f"## {render.markdown_text(section.title)}")
        parts += [part for block in section.blocks for part in _block(block)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        yield block.text
    elif isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, _runs_of_backticks(block.text)), default=0))
        yield render.markdown_text(block.caption)
        yield f"{fence}{block.language}\n{block.text}\n{fence}"
    elif isinstance(block, Table):
        yield render.markdown(block)
    elif isinstance(block, Figure):
        yield f"*Plot in the page:* {render.markdown_text(f'{block.caption} {block.described}')}"
    elif isinstance(block, Examples):
        yield f"### {render.markdown_text(block.caption)}"
        yield from map(_example, block.shown)
    elif isinstance(block, Fold):
        yield f"**{render.markdown_text(block.title)}**"
        for inner in block.blocks:
            yield from _block(inner)


def _runs_of_backticks(text: str) -> list[str]:
    return "".join(char if char == "`" else " " for char in text).split()


def _example(example: Example) -> str:
    label = "" if example.label_answer is None else f"; class name {example.label_answer}"
    chain = "chain names no class" if example.chain_answer is None else f"chain concludes {example.chain_answer}"
    head = render.markdown_text(f"{example.image}: true class {example.label}{label}; {chain}")
    stages = [f"{stage}: {text}" for stage, text in example.stages.items()] or [example.chain]
    return "\n".join([f"- {head}", *(f"  - {render.markdown_text(stage)}" for stage in stages)])

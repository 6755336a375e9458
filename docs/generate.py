"""Writes the pages in reference/ from the code when the site is built.

`mkdocs build` calls `on_files`. `pages` needs no mkdocs.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import domainbed_reasoning
from domainbed_reasoning import registry
from domainbed_reasoning.commands.arguments import PROGRAM, Parser
from domainbed_reasoning.commands.verbs import GROUPS, VERBS, add_command, make_parser
from domainbed_reasoning.registry import Hparam

# The classes below subclass DomainBed's. If it is not installed, the stand-in of the tests is enough to import them.
if importlib.util.find_spec("domainbed") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "standin"))

# What public functions return, documented with them.
RETURNED = ("jobs.predict.Predictor", "jobs.predict.Prediction", "jobs.predict.SampleLoss", "chains.rules.Verdict")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site's files."""
    from mkdocs.structure.files import File

    for path, page in pages().items():
        files.append(File.generated(config, path, content=page))
    return files


def pages() -> dict[str, str]:
    """Return the generated pages: path below docs/ → Markdown."""
    return {
        "reference/commands.md": commands_page(),
        "reference/hparams.md": hparams_page(),
        "reference/algorithms.md": algorithms_page(),
        "reference/datasets.md": datasets_page(),
        "reference/api.md": api_page(),
    }


def commands_page() -> str:
    """Return a section per verb with its options, by the verb's own parser, and its examples."""
    lines = ["# Commands", ""]
    lines += [f"The verbs of `{PROGRAM}`. `{PROGRAM} VERB --help` prints the same options and examples."]
    lines += ["Options can be spelled `--data-dir` or, as DomainBed does, `--data_dir`.", ""]
    for title, verbs in GROUPS.items():
        lines += [f"**{title.capitalize()}**: " + ", ".join(f"[{verb}](#{verb})" for verb in verbs) + "  "]
    lines += ["", "| Option of the program | Description |", "|---|---|", *_rows(make_parser()), ""]
    for verb in VERBS:
        parser = Parser()
        examples = add_command(parser, verb).EXAMPLES
        lines += [f"## {verb}", "", VERBS[verb].replace("\n", "  \n"), ""]
        named = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        lines += _table(parser) if not named else []
        for name, one in ((name, one) for action in named for name, one in action.choices.items()):
            lines += [f"### {verb} {name}", "", f"{_text(one.description or '')}.", "", *_table(one)]
        lines += ["```text", examples.rstrip("\n"), "```", ""]
    return "\n".join(lines)


def _table(parser: argparse.ArgumentParser) -> list[str]:
    return ["| Argument | Description |", "|---|---|", *_rows(parser), ""]


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        formatter = argparse.HelpFormatter(parser.prog)
        described = formatter._expand_help(action) if action.help else ""
        value, facts = formatter._format_args(action, action.dest.upper()), [described]
        if action.choices:
            value, facts = "", [*facts, f"one of {', '.join(map(str, action.choices))}"]
        options = action.option_strings
        names = [f"{option} {value}".strip() for option in options] or [action.metavar or action.dest]
        described = "; ".join(filter(None, ["required" if options and action.required else "", *facts]))
        yield f"| {', '.join(f'`{_text(str(name))}`' for name in names)} | {_text(described)} |"


def hparams_page() -> str:
    """Return a table of every hyper-parameter, in sections by which algorithms or datasets have it."""
    groups: dict[tuple[str, ...], dict[str, Hparam]] = defaultdict(dict)
    for name, row, owners in hparam_rows():
        groups[owners][name] = row
    datasets = ", ".join(sorted(registry.EMBEDDED_DATASETS))
    lines = [
        "# Hyper-parameters\n",
        "Pass them as JSON: `--hparams '{\"sarr_rounds\": 1}'`. A misspelled name or a value that is not allowed is an",
        f"error before training starts. *Embedded* is the default on the embedded datasets ({datasets}) with the tiny",
        "models; *searched* means that random search (`--n_hparams` above 1) draws it.\n",
    ]
    for owners in sorted(groups, key=lambda owners: (owners[0] not in registry.ALGORITHMS, -len(owners))):
        lines += [f"## {_heading(owners)}", ""]
        lines += ["| Name | Default | Values | Source of the default |", "|---|---|---|---|"]
        for name, row in groups[owners].items():
            default = f"`{_text(json.dumps(row.default))}`"
            if row.embedded is not None:
                embedded = {json.dumps(row.default_on(dataset)): None for dataset in registry.EMBEDDED_MODELS}
                default += f"; embedded: {' or '.join(f'`{_text(value)}`' for value in embedded)}"
            values = _text(row.allowed.words.replace("2147483647", "2³¹ - 1"))
            values += "; searched" if row.sample is not None else ""
            lines += [f"| `{name}` | {default} | {values} | {_text(row.source)} |"]
        lines += [""]
    return "\n".join(lines)


def _heading(owners: tuple[str, ...]) -> str:
    if owners == tuple(registry.ALGORITHMS):
        return "All algorithms"
    modules = {registry.DATASETS.get(owner, "").partition(":")[0] for owner in owners}
    folders = len(owners) > 1 and modules == {"domainbed_reasoning.datasets.image_folders"}
    return "Image-folder datasets" if folders else ", ".join(owners)


def hparam_rows() -> Iterator[tuple[str, Hparam, tuple[str, ...]]]:
    """Yield each hyper-parameter with the algorithms or datasets whose row is the same."""
    for table in (registry.ALGORITHMS, registry.DATASETS):
        owners: dict[tuple[str, int], list[str]] = defaultdict(list)
        rows: dict[tuple[str, int], Hparam] = {}
        for owner, target in table.items():
            for name, row in registry.load(target).HPARAMS.items():
                owners[name, id(row)].append(owner)
                rows[name, id(row)] = row
        for (name, identity), row in rows.items():
            yield name, row, tuple(owners[name, identity])
    for dataset, baseline_rows in registry.BASELINE_HPARAMS.items():
        for name, row in baseline_rows.items():
            yield name, row, (f"Baselines on {dataset}",)


def algorithms_page() -> str:
    """Return a page with the docstring of every algorithm's module, which has the equation, and of its class."""
    lines = ["# Algorithms", ""]
    for name, target in registry.ALGORITHMS.items():
        module = target.partition(":")[0]
        parts = _parts(importlib.import_module(module).__doc__)
        lines += [f"## {name}", "", *(_fenced(part) if re.match(r"L\S* = ", part) else part + "\n" for part in parts)]
        lines += [f"::: {module}.{name}", "    options:", "      heading_level: 2", "      show_root_heading: false"]
        lines += ["      show_root_toc_entry: false", "      members: false", ""]
    return "\n".join(lines)


def datasets_page() -> str:
    """Return a page with the data sheet, which is the docstring, of every dataset."""
    lines = ["# Datasets", ""]
    for name, target in registry.DATASETS.items():
        lines += [f"## {name}", ""]
        for part in _parts(registry.load(target).__doc__):
            facts = re.sub(r"^(Input|Label|Domains|Website|License|Chains): ", r"- **\1**: ", part, flags=re.MULTILINE)
            facts = re.sub(r"(https?://\S+)", r"<\1>", facts)
            facts = re.sub(r"see\s+(also )?the module's docstring", r"see \1[Chains](../guides/chains.md)", facts)
            lines += [_fenced(part, "bibtex") if part.startswith("@") else facts + "\n"]
    return "\n".join(lines)


def api_page() -> str:
    """Return a page with every public name of the package."""
    lines = ["# Python API", ""]
    lines += ["`from domainbed_reasoning import …`: these names and what they do are stable. Each is"]
    lines += ["imported when it is first used, so that `import domainbed_reasoning` does not load torch.", ""]
    for name in domainbed_reasoning.__all__:
        value = getattr(domainbed_reasoning, name)
        unseen = value.__module__.startswith("domainbed_reasoning.datasets.")
        lines += _class(value) if unseen else [f"::: domainbed_reasoning.{name}\n"]
    lines += ["## What they return", ""]
    lines += [f"::: domainbed_reasoning.{name}\n    options:\n      heading_level: 3\n" for name in RETURNED]
    return "\n".join(lines)


def _class(cls: type) -> list[str]:
    """Return a class as mkdocstrings would, which does not see `datasets/`: the folder has no ``__init__.py``."""
    lines = [f"## {cls.__name__}", "", _fenced(f"class {cls.__name__}({cls.__base__.__name__})", "python")]
    for part in _parts(cls.__doc__):
        title, _, rest = part.partition("\n")
        listed = re.sub(r"^ {4}(\w+): ", r"- **`\1`**: ", rest, flags=re.MULTILINE)
        lines += [f"**{title}**\n\n{listed}\n" if title.endswith(":") and rest else part + "\n"]
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            lines += [f"### {name}", "", _fenced(f"{name}{inspect.signature(method)}", "python")]
            lines += [*_parts(method.__doc__), ""]
    return lines


def _parts(docstring: str | None) -> list[str]:
    return inspect.cleandoc(docstring or "").split("\n\n")


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```\n"


def _text(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")

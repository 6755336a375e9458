"""`domainbed-reasoning completion`: completion of verbs, options and paths in a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.commands.arguments import PROGRAM, Parser
from domainbed_reasoning.commands.verbs import VERBS, add_command, make_parser

EXAMPLES = """\
  eval "$(domainbed-reasoning completion bash)"                     # in ~/.bashrc
  domainbed-reasoning completion zsh > ~/.zfunc/_domainbed-reasoning # with ~/.zfunc in $fpath, before compinit

Requires shtab: pip install 'domainbed-reasoning[completion]'.
"""
_FOLDERS = ("data_dir", "output_dir", "job")


def add_arguments(parser: Parser) -> None:
    """Add the name of the shell."""
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    parser = make_parser()
    verbs = parser.add_subparsers()
    for verb, text in VERBS.items():
        command = verbs.add_parser(verb, help=text)  # shtab skips verbs without help
        add_command(command, verb)
        _complete_paths(command, shtab.FILE, shtab.DIRECTORY)
    parser.prog = PROGRAM
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _complete_paths(child, file, folder)
        elif action.dest in _FOLDERS:
            action.complete = folder  # type: ignore[attr-defined]
        elif action.type is Path or action.dest == "images":
            action.complete = file  # type: ignore[attr-defined]

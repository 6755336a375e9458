"""The command `domainbed-reasoning VERB`. Each verb is a module in `commands/`, imported when it is called."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from domainbed_reasoning import registry
from domainbed_reasoning.bridge import plugins, upstream
from domainbed_reasoning.commands.arguments import PROGRAM, Parser, UsageError
from domainbed_reasoning.commands.verbs import FORMER_VERBS, VERBS, add_command, make_parser
from domainbed_reasoning.images.catalog import STOCK
from domainbed_reasoning.terminal import logs_on_stderr, one_line, printable_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the verb and its arguments (default: those of the process).

    Returns:
        The exit code: 0; 1 for a negative finding or a failure; 130 for Ctrl-C. `annotate` also returns 3.

    Raises:
        SystemExit: with code 2 for wrong usage, with 0 after ``--help`` and ``--version``.
    """
    with printable_streams():
        try:
            code = _run(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except ModuleNotFoundError as error:
            message = f"{error}. Run `{PROGRAM} doctor` to see what is missing."
        except (ValueError, OSError, ImportError) as error:
            message = str(error)
        except SystemExit as ended:
            if not isinstance(ended.code, str):
                raise
            print(ended.code, file=sys.stderr)  # Python itself would print control characters unescaped
            return 1
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return 130
        print(one_line(message.replace("\n", " ")), file=sys.stderr)
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    parser.add_argument("verb", metavar="VERB", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    verb = FORMER_VERBS.get(parsed.verb, parsed.verb)
    if verb not in VERBS:
        parser.error(str(registry.unknown("verb", verb, VERBS)))
    if any(not word.strip() or re.fullmatch(r"--[\w-]+=\s*", word) for word in parsed.arguments):
        parser.error(f"{verb}: an argument is empty (an unset shell variable?): {parsed.arguments}")
    upstream.use_domainbed()
    parser = Parser()
    command = add_command(parser, verb)
    args = parser.parse_args(parsed.arguments)
    args.command_line = shlex.join([PROGRAM, verb, *parsed.arguments])
    if _may_name_a_plugin(args):
        for plugin, cause in plugins.discover().items():
            print(one_line(f"{PROGRAM}: the plug-in {plugin} is left out: {cause}."), file=sys.stderr)
    try:
        with logs_on_stderr() if getattr(args, "json", False) else nullcontext():
            return int(command.run(args))
    except UsageError as error:
        parser.error(str(error))


def _may_name_a_plugin(args: argparse.Namespace) -> bool:
    """Return whether the verb gets a dataset or an algorithm that this package does not have; plug-ins load torch."""
    known = ("dataset", {*STOCK, *registry.DATASETS}), ("algorithm", registry.ALGORITHMS)
    return any(name in vars(args) and vars(args)[name] not in names for name, names in known)


if __name__ == "__main__":
    sys.exit(main())

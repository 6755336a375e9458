"""The command `domainbed-reasoning <verb>`: a file a verb in `verbs/`, imported when it is called."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from domainbed_reasoning import __version__, registry
from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.terminal import printable_streams

# verb -> (one line of help, "module:function"); the function takes the arguments after the verb, returns the exit code.
VERBS = {
    "doctor": (
        "say what is installed, used and registered, each fault with its cure",
        "domainbed_reasoning.commands.doctor:main",
    ),
    "export": (
        "write chains in the formats of others; with --job a trained model, for the Hugging Face libraries",
        "domainbed_reasoning.commands.export:main",
    ),
    "plan": (
        "memory and hours of a job and of a sweep, before it starts",
        "domainbed_reasoning.commands.plan:main",
    ),
    "analyse": (
        "token shift, entropy, domain divergence, SARR's rounds, faithfulness: numbers and plots",
        "domainbed_reasoning.commands.analyse:main",
    ),
    "study": (
        "reproduce a table of the paper: its stock commands, hours and claim; or run them",
        "domainbed_reasoning.commands.study:main",
    ),
    "predict": (
        "ask a trained model about images: class, scores, chain",
        "domainbed_reasoning.commands.predict:main",
    ),
    "unfinished": (
        "list the training jobs that go on when started again, and clear what they keep",
        "domainbed_reasoning.commands.unfinished:main",
    ),
    "collect": (
        "a sweep's results as tables, CSV, Markdown, LaTeX; what does not count is named",
        "domainbed_reasoning.commands.collect:main",
    ),
    "report": (
        "one page about a sweep: tables beside the paper's, plots, example chains, commands to rerun it",
        "domainbed_reasoning.commands.report:main",
    ),
    "get-domainbed": (
        "clone the pinned DomainBed into the cache folder",
        "domainbed_reasoning.commands.get_domainbed:main",
    ),
    "check": ("compare a dataset and its chains with what should be there", "domainbed_reasoning.commands.check:main"),
    "annotate": (
        "get five-stage chains from a teacher, the label withheld",
        "domainbed_reasoning.commands.annotate:main",
    ),
    "stats": ("count chains: coverage, acceptance, lengths, tokens, cost", "domainbed_reasoning.commands.stats:main"),
    "card": ("write the datasheet of a chain file as a dataset card", "domainbed_reasoning.commands.card:main"),
    "browse": ("make one HTML page to look through images and chains", "domainbed_reasoning.commands.browse:main"),
    "import": ("take chains over from other formats", "domainbed_reasoning.commands.import_:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; what it prints is text that no terminal obeys or lacks."""
    with printable_streams():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    verbs = "\n".join(f"  {verb:<15} {help_line}" for verb, (help_line, _) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="domainbed-reasoning",
        description="RD-MLDG as a plug-in of stock DomainBed.",
        epilog=f"verbs:\n{verbs}\n\n`domainbed-reasoning <verb> --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("verb", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the verb's own arguments")
    given = parser.parse_args(argv)
    if given.verb not in VERBS:
        parser.error(str(registry.unknown("verb", given.verb, VERBS)))
    if any(not text.strip() or re.fullmatch(r"--[\w-]+=\s*", text) for text in given.arguments):
        parser.error(f"{given.verb}: an argument is empty (an unset variable of the shell?): {given.arguments}")
    try:
        upstream.use_domainbed()
        code = int(registry.load(VERBS[given.verb][1])(given.arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as ended:
        if isinstance(ended.code, str):  # a message, which Python would print as it is
            print(ended.code, file=sys.stderr)
            return 1
        raise
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())

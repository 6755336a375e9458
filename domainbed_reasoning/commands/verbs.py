"""The verbs of the command line in groups, and their parsers."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from domainbed_reasoning import __version__
from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.commands.arguments import PROGRAM, Parser

# The verbs in the order of use, with one line of help each.
GROUPS = {
    "data": {
        "get-data": "Write a dataset's folders from the Hub, a folder or an archive.",
        "check": "Check a dataset's folders, images and chains.",
        "annotate": "Generate five-stage chains with a teacher that does not see the label.",
        "stats": "Count chains: coverage, acceptance, lengths, tokens, cost.",
        "card": "Write a dataset card for a chain file.",
        "browse": "Write an HTML page for browsing images and chains.",
        "import": "Import chains from other formats.",
        "export": "Export chains to other formats.",
    },
    "model": {
        "predict": "Classify images with a trained model.",
        "export": "With --job: export a trained model for PEFT and transformers.",
    },
    "hub": {
        "push": "Upload an export to the Hugging Face Hub, private by default.",
        "pull": "Download an export from the Hugging Face Hub.",
    },
    "sweep": {
        "plan": "Estimate memory and hours of a job and of a sweep.",
        "study": "Print or run the DomainBed commands for a table of the paper.",
        "collect": "Collect a sweep's results as Markdown, LaTeX or CSV.",
        "report": "Write an HTML report of a sweep beside the paper's numbers.",
    },
    "jobs": {
        "jobs": "List or clear the saved progress of interrupted training jobs.",
        "analyze": "Run the paper's analyses on trained models and jobs.",
    },
    "setup": {
        "doctor": "Check your installation and suggest fixes.",
        "get-domainbed": f"Clone DomainBed at commit {upstream.COMMIT[:7]} into the cache folder.",
        "completion": "Print a shell completion script.",
    },
}
# verb -> its lines of help
VERBS = {
    verb: "\n".join(verbs[verb] for verbs in GROUPS.values() if verb in verbs)
    for group in GROUPS.values()
    for verb in group
}
FORMER_VERBS = {"analyse": "analyze", "unfinished": "jobs"}


def make_parser() -> Parser:
    """Return the parser of the program, whose help lists the verbs."""
    lines = []
    for title, verbs in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {verb:<15} {text}" for verb, text in verbs.items())]
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--help] [--version] VERB ...",
        description="\n".join(["RD-MLDG as a plug-in of stock DomainBed.", *lines]),
        epilog=f"Run `{PROGRAM} VERB --help` for the options and examples of a verb.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def load_command(verb: str) -> ModuleType:
    """Import a verb's module, which has ``EXAMPLES``, ``add_arguments(parser)`` and ``run(args)``."""
    name = {"import": "import_"}.get(verb, verb.replace("-", "_"))
    return import_module(f"domainbed_reasoning.commands.{name}")


def add_command(parser: Parser, verb: str) -> ModuleType:
    """Add a verb's help and arguments to ``parser`` and return the verb's module."""
    command = load_command(verb)
    parser.prog = f"{PROGRAM} {verb}"
    parser.description = VERBS[verb]
    parser.epilog = f"examples:\n{command.EXAMPLES}"
    command.add_arguments(parser)
    return command

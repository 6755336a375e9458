"""`domainbed-reasoning analyse`: the paper's analyses, and one beyond it, of models and jobs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from domainbed_reasoning import registry
from domainbed_reasoning.commands import arguments

_EXAMPLES = """\
  domainbed-reasoning analyse token-shift --after sweep/1a2b3c --targets teacher
  domainbed-reasoning analyse token-shift --before sweep/4d5e6f --after sweep/1a2b3c --targets chains.jsonl
  domainbed-reasoning analyse token-shift --before sweep/1a2b3c/model_step20.pkl --after sweep/1a2b3c --targets own
  domainbed-reasoning analyse entropy --after sweep/1a2b3c --after-own sweep/7a8b9c
  domainbed-reasoning analyse divergence --dataset PACSReasoning --data_dir ~/data
  domainbed-reasoning analyse divergence --dataset ShapesReasoning --encoder tiny
  domainbed-reasoning analyse sarr-rounds sweep/1a2b3c sweep/4d5e6f --images 200
  domainbed-reasoning analyse faithfulness sweep/1a2b3c sweep/7a8b9c --images 200

A job is a folder that DomainBed's train or sweep wrote with an MLLM algorithm; in its place a checkpoint can be named
that --save_model_every_checkpoint left in it. Each analysis leaves its numbers as CSV, what they say beside the paper's
with the command as text, and a plot (pip install 'domainbed-reasoning[plots]') in --output, which is the folder
`analysis` beside the (first) job by default: `report` looks there. Their names say what was looked at, and another
command's files are not written over. `analyse NAME --help` says more.
"""

_BEFORE = "job, checkpoint, model folder, hub id or `tiny` (default: the base of --after)"


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Run one analysis; return the exit code."""
    parser = arguments.make_parser("analyse", __doc__ or "", _EXAMPLES)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (said, add, _) in _ANALYSES.items():
        one = names.add_parser(name, help=said, description=said)
        add(one)
        one.add_argument("--data_dir", "--data-dir", help="where the data lie (default: where the job found them)")
        one.add_argument("--model", help="the base model, where it is not where the job found it")
        one.add_argument("--output", type=Path, help="folder to write (default: `analysis` beside the job, or here)")
    given = parser.parse_args(argv)
    given.command = shlex.join(["domainbed-reasoning", "analyse", *(sys.argv[1:] if argv is None else argv)])
    try:
        registry.load(_ANALYSES[given.name][2])(given)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: `domainbed-reasoning doctor` says what is missing.") from error
    return 0


def _add_token_shift(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help=_BEFORE)
    parser.add_argument("--after", required=True, help="the job to look at, or a checkpoint of it")
    parser.add_argument(
        "--targets",
        default="teacher",
        help="label, teacher, own (chains that --before writes and SARR, as --after has it, keeps) or a chain file "
        "(default: teacher)",
    )
    _add_images(parser, 200, "sources")


def _add_entropy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help=_BEFORE)
    parser.add_argument("--after", required=True, help="the job for teacher chains")
    parser.add_argument("--after-own", help="the job for self-generated chains (default: --after)")
    _add_images(parser, 200, "sources")


def _add_divergence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="PACSReasoning, ShapesReasoning, …")
    parser.add_argument("--chains", help="chain file (default: the dataset's)")
    parser.add_argument("--hparams", default="{}", help='JSON for the dataset, such as \'{"teacher": "other"}\'')
    parser.add_argument("--encoder", help="a CLIP or an MLLM, `tiny` for the embedded one (default: CLIP ViT-B/16)")
    parser.add_argument("--kernel", default="linear", choices=("linear", "rbf"), help="default: %(default)s")
    parser.add_argument("--images", type=int, default=200, help="images a domain, 0 for all (default: %(default)s)")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="+", help="jobs of SARR or RDMLDG")
    _add_images(parser, 0, "target", "images to ask the saved checkpoints about, 0 for none (default: %(default)s)")


def _add_faithfulness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="+", help="jobs, or checkpoints of jobs")
    _add_images(parser, 200, "target")


def _add_images(parser: argparse.ArgumentParser, count: int, domains: str, said: str = "") -> None:
    parser.add_argument("--images", type=int, default=count, help=said or "0 for all (default: %(default)s)")
    parser.add_argument(
        "--domains", nargs="+", default=[domains], help="names, numbers, sources, target or all (default: %(default)s)"
    )


_Add = Callable[[argparse.ArgumentParser], None]
_TOKENS, _DOMAINS, _JOBS = (f"domainbed_reasoning.commands.analyse_{name}" for name in ("tokens", "divergence", "jobs"))

# name -> (one line of help, its arguments, "module:function" of what it does)
_ANALYSES: dict[str, tuple[str, _Add, str]] = {
    "token-shift": (
        "probability of given answers' tokens under two models",
        _add_token_shift,
        f"{_TOKENS}:run_token_shift",
    ),
    "entropy": (
        "tokens whose entropy training reduces most: teacher's chains, own chains",
        _add_entropy,
        f"{_TOKENS}:run_entropy",
    ),
    "divergence": ("MMD² between domains, of images against chains", _add_divergence, f"{_DOMAINS}:run"),
    "sarr-rounds": (
        "accepted share, length, agreement and accuracy by SARR's rounds",
        _add_rounds,
        f"{_JOBS}:run_rounds",
    ),
    "faithfulness": (
        "does the conclusion follow the chain, the image or a cue",
        _add_faithfulness,
        f"{_JOBS}:run_faithfulness",
    ),
}

"""`domainbed-reasoning analyze`: the paper's analyses, and an additional one, of trained models and jobs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from domainbed_reasoning import registry
from domainbed_reasoning.commands.arguments import (
    Parser,
    add_chains_argument,
    add_json,
    add_trust_argument,
    json_object,
    non_negative,
)

EXAMPLES = """\
  domainbed-reasoning analyze token-shift --after sweep/1a2b3c --targets teacher
  domainbed-reasoning analyze token-shift --before sweep/4d5e6f --after sweep/1a2b3c --targets chains.jsonl
  domainbed-reasoning analyze token-shift --before sweep/1a2b3c/model_step20.pkl --after sweep/1a2b3c --targets own
  domainbed-reasoning analyze entropy --after sweep/1a2b3c --after-own sweep/7a8b9c
  domainbed-reasoning analyze divergence --dataset PACSReasoning --data-dir ~/data
  domainbed-reasoning analyze divergence --dataset ShapesReasoning --encoder tiny
  domainbed-reasoning analyze sarr-rounds sweep/1a2b3c sweep/4d5e6f --images 200
  domainbed-reasoning analyze faithfulness sweep/1a2b3c sweep/7a8b9c --images 200

A job is an output folder of DomainBed's train or sweep with an MLLM algorithm; a checkpoint in it, written with
--save_model_every_checkpoint, can be named instead. Each analysis writes its numbers (CSV), a summary with the paper's
numbers and the command (text) and a plot (requires matplotlib: pip install 'domainbed-reasoning[plots]') to --output.
The default is the folder `analysis` beside the first job, which `report` includes. Files of other commands are never
overwritten. Run `analyze NAME --help` for the options of an analysis.
"""

_BEFORE = "job, checkpoint, model folder, hub id or `tiny` (default: the base model of --after)"


def add_arguments(parser: Parser) -> None:
    """Add a subcommand for each analysis."""
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (text, add, _) in _ANALYSES.items():
        one = names.add_parser(name, help=text, description=text, prog=f"{parser.prog} {name}")
        add(one)
        one.add_argument("--data-dir", help="folder that contains the dataset's folder (default: as in the job)")
        one.add_argument("--model", help="base model, if the job's path no longer exists")
        add_json(one)
        add_trust_argument(one)
        one.add_argument("--output", type=Path, help="folder to write (default: `analysis` beside the job, or here)")


def run(args: argparse.Namespace) -> int:
    """Run one analysis."""
    registry.load(_ANALYSES[args.name][2])(args)
    return 0


def _add_token_shift(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help=_BEFORE)
    parser.add_argument("--after", required=True, help="job or checkpoint to analyze")
    parser.add_argument(
        "--targets",
        default="teacher",
        help="label, teacher, own (chains written by --before and kept by SARR with the settings of --after) or a "
        "chain file, or bundled (default: teacher)",
    )
    _add_images(parser, 200, "sources")


def _add_entropy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help=_BEFORE)
    parser.add_argument("--after", required=True, help="job or checkpoint evaluated on teacher chains")
    parser.add_argument("--after-own", help="job or checkpoint evaluated on self-generated chains (default: --after)")
    _add_images(parser, 200, "sources")


def _add_divergence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="PACSReasoning, ShapesReasoning, …")
    add_chains_argument(parser, "the dataset's")
    parser.add_argument(
        "--hparams", type=json_object, default="{}", help='JSON for the dataset, such as \'{"teacher": "other"}\''
    )
    parser.add_argument("--encoder", help="CLIP model or MLLM, `tiny` for the embedded one (default: CLIP ViT-B/16)")
    parser.add_argument("--kernel", default="linear", choices=("linear", "rbf"), help="default: %(default)s")
    parser.add_argument("--images", type=non_negative(int), default=200, help="per domain, 0 for all (default: 200)")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="+", help="jobs of SARR or RDMLDG")
    _add_images(parser, 0, "target", "images for the saved checkpoints to answer, 0 for none (default: %(default)s)")


def _add_faithfulness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="+", help="jobs, or checkpoints of jobs")
    _add_images(parser, 200, "target")


def _add_images(parser: argparse.ArgumentParser, count: int, domains: str, text: str = "") -> None:
    text = text or "0 for all (default: %(default)s)"
    parser.add_argument("--images", type=non_negative(int), default=count, help=text)
    parser.add_argument(
        "--domains", nargs="+", default=[domains], help=f"names, indices, sources, target or all (default: {domains})"
    )


_Add = Callable[[argparse.ArgumentParser], None]
_TOKENS, _DOMAINS, _JOBS = (f"domainbed_reasoning.commands.analyze_{name}" for name in ("tokens", "divergence", "jobs"))

# name -> (one line of help, what adds its arguments, "module:function" that runs it)
_ANALYSES: dict[str, tuple[str, _Add, str]] = {
    "token-shift": (
        "probability of target tokens before and after training",
        _add_token_shift,
        f"{_TOKENS}:run_token_shift",
    ),
    "entropy": (
        "tokens whose entropy training reduces most, in teacher and self-generated chains",
        _add_entropy,
        f"{_TOKENS}:run_entropy",
    ),
    "divergence": ("MMD² between domains, for images and for chains", _add_divergence, f"{_DOMAINS}:run"),
    "sarr-rounds": (
        "acceptance rate, length, agreement and accuracy per SARR round",
        _add_rounds,
        f"{_JOBS}:run_rounds",
    ),
    "faithfulness": (
        "whether the conclusion follows the chain, the image or a cue",
        _add_faithfulness,
        f"{_JOBS}:run_faithfulness",
    ),
}

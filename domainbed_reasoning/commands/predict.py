"""`domainbed-reasoning predict`: class, scores and chain of images, by a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from domainbed_reasoning.commands.arguments import Parser, add_trust_argument
from domainbed_reasoning.terminal import counted, json_line, one_line

EXAMPLES = """\
  domainbed-reasoning predict --job sweep/1a2b3c... cat.jpg dog.jpg
  domainbed-reasoning predict --job sweep/1a2b3c... --answer both --json photos/*.jpg > answers.jsonl
  domainbed-reasoning predict --job exported --model ~/models/InternVL3-8B-hf cat.jpg
  domainbed-reasoning predict --job sweep/1a2b3c... --class-names "lynx,red fox,badger" photos/*.jpg

The job is an output folder of DomainBed's train or sweep with an MLLM algorithm, or of `domainbed-reasoning export`.
Unreadable images are reported on standard error, and the exit code is then 1.
In Python: domainbed_reasoning.load_job(folder).predict(images).
"""


def add_arguments(parser: Parser) -> None:
    """Add the job, the images and the form of the answers."""
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--job", required=True, help="folder of the trained model")
    parser.add_argument("--answer", choices=("chain", "label", "both"), help="default: as in the job")
    parser.add_argument(
        "--class-names",
        type=lambda names: [name.strip() for name in names.split(",")],
        metavar="NAME,NAME...",
        help="classes that the questions offer, also others than the job's; default: the job's",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, with scores and chain")
    parser.add_argument("--model", help="base model, if the job's path no longer exists")
    parser.add_argument("--quantize", choices=("none", "nf4", "int8"), help="default: as in the job")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print one answer per image; return 1 if an image could not be read."""
    from domainbed_reasoning.jobs.predict import Predictor  # imports torch

    unreadable = 0

    def report(error: ValueError) -> None:
        nonlocal unreadable
        unreadable += 1
        print(one_line(str(error).replace("\n", " ")), file=sys.stderr, flush=True)

    predictor = Predictor(
        args.job,
        args.answer,
        args.model,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
        class_names=args.class_names,
    )
    for prediction in predictor.answers(args.images, report):
        if args.json:
            print(json_line(dataclasses.asdict(prediction), sys.stdout), flush=True)
            continue
        score = prediction.scores[prediction.class_name]
        unparsed = prediction.chain is not None and prediction.chain_class is None
        note = "\t(from the class-name path: the chain names no class)" if unparsed else ""
        names = f"{one_line(prediction.image)}\t{one_line(prediction.class_name)}"
        print(f"{names}\t{score:.3f}{note}", flush=True)
        if prediction.chain is not None:
            print("\n".join(f"    {line}" for line in prediction.chain.splitlines()), flush=True)
    if unreadable:
        print(f"{unreadable} of {counted(len(args.images), 'image')} could not be read.", file=sys.stderr)
    return 1 if unreadable else 0

"""`domainbed-reasoning predict`: ask a trained model about images."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from domainbed_reasoning.commands.arguments import counted
from domainbed_reasoning.terminal import json_line, one_line

_EXAMPLES = """examples:
  domainbed-reasoning predict --job sweep/1a2b3c... cat.jpg dog.jpg
  domainbed-reasoning predict --job sweep/1a2b3c... --answer both --json photos/*.jpg > answers.jsonl
  domainbed-reasoning predict --job exported --model ~/models/InternVL3-8B-hf cat.jpg

The job is a folder that DomainBed's train or sweep wrote with an MLLM algorithm, or that
`domainbed-reasoning export` wrote.
An image that cannot be read is named on standard error, the others are answered, and the exit code is 1.
From Python: domainbed_reasoning.jobs.predict.Predictor(folder)(images).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, an image a line; return the exit code: 1 if an image could not be read."""
    parser = argparse.ArgumentParser(
        prog="domainbed-reasoning predict",
        description="Class, scores and chain of images, by a trained model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--job", required=True, help="folder of the trained model")
    parser.add_argument("--answer", choices=("chain", "label", "both"), help="default: the job's own")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, with scores and chain")
    parser.add_argument("--model", help="the base model, where it is not where the job found it")
    parser.add_argument("--quantize", choices=("none", "nf4", "int8"), help="default: the job's own")
    given = parser.parse_args(argv)

    from domainbed_reasoning.jobs.predict import Predictor  # torch loads when it is needed

    unreadable = 0

    def name_it(error: ValueError) -> None:
        nonlocal unreadable
        unreadable += 1
        print(one_line(str(error).replace("\n", " ")), file=sys.stderr, flush=True)

    try:
        predictor = Predictor(given.job, given.answer, given.model, quantize=given.quantize)
        for prediction in predictor.answers(given.images, name_it):
            if given.json:
                print(json_line(dataclasses.asdict(prediction), sys.stdout), flush=True)
                continue
            score = prediction.scores[prediction.class_name]
            unsaid = prediction.chain is not None and prediction.chain_class is None
            whence = "\t(the chain names no class; by the class-name path)" if unsaid else ""
            names = f"{one_line(prediction.image)}\t{one_line(prediction.class_name)}"
            print(f"{names}\t{score:.3f}{whence}", flush=True)
            if prediction.chain is not None:
                print("\n".join(f"    {line}" for line in prediction.chain.splitlines()), flush=True)
    except (ValueError, OSError) as error:
        print(one_line(str(error).replace("\n", " ")), file=sys.stderr)
        return 1
    if unreadable:
        total = len(given.images)
        others = "; the others are answered" if unreadable < total else ""
        print(f"{unreadable} of {counted(total, 'image')} could not be read{others}.", file=sys.stderr)
    return 1 if unreadable else 0

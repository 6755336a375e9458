"""Measures the premises of the two regimes on the base model, before any training on them.

    python -m domainbed_reasoning.sweeps.miniature.premises [--model FOLDER] [--output premises.json]

InternVL3 knows OfficeHome's names, with a zero-shot accuracy of 80 to 90%, and a fifth to a third of a teacher's tokens
are unlikely to it; on TerraIncognita its zero-shot accuracy is about 50%, as animals are hard to see.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms.functional import pil_to_tensor

from domainbed_reasoning.chains.chain import conclusion_of, match_class
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.images import creatures
from domainbed_reasoning.mllm import load_mllm

UNLIKELY = 0.25  # the paper's bound on a token's probability
SUBJECT = "creature"


@torch.no_grad()
def measure(model: str, per_class: int) -> dict[str, Any]:
    """Return the premises by regime and domain.

    Args:
        model: a name or folder.
        per_class: images of each class and domain.

    Returns:
        by regime and domain: ``label`` and ``chain``, zero-shot accuracy in [0, 1]; ``label_nats``, mean loss of the
        true name among all; ``chain_nats``, mean loss a token of the teacher's chain; ``unlikely``, share of its tokens
        below `UNLIKELY`.
    """
    mllm = load_mllm(model)
    mllm.eval()
    names = creatures.CLASS_NAMES
    asked = q_cls(names, SUBJECT), q_reason(names, SUBJECT)
    found: dict[str, Any] = {}
    for regime in creatures.REGIMES:
        found[regime] = {}
        for domain, style in enumerate(creatures.DOMAINS):
            count = per_class * len(names)
            images = torch.stack([pil_to_tensor(creatures.render(regime, domain, index)) for index in range(count)])
            labels = torch.tensor([creatures.label(index) for index in range(count)])
            scores = mllm.class_scores(images, asked[0], names)
            written = mllm.generate(images, asked[1], 112)
            answers = [match_class(conclusion_of(text), names) for text in written]
            teacher = [creatures.chain(regime, domain, index) for index in range(count)]
            values, mask = mllm.log_likelihoods(mllm.encode(images), asked[1], teacher)
            found[regime][style] = {
                "label": float((scores.argmax(1) == labels).float().mean()),
                "chain": statistics.fmean(
                    answer == label for answer, label in zip(answers, labels.tolist(), strict=True)
                ),
                "label_nats": float(torch.nn.functional.cross_entropy(scores, labels)),
                "chain_nats": float(-values[mask].mean()),
                "unlikely": float((values[mask].exp() < UNLIKELY).float().mean()),
            }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and with ``--output`` write the premises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-creatures", help="default: %(default)s")
    parser.add_argument("--per-class", type=int, default=20, help="images of each class and domain")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    args = parser.parse_args(argv)
    found = measure(args.model, args.per_class)
    for regime, domains in found.items():
        for domain, values in domains.items():
            print(f"{regime:<12} {domain:<9} " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
        means = {name: statistics.fmean(each[name] for each in domains.values()) for name in values}
        print(f"{regime:<12} {'mean':<9} " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
    if args.output:
        replace_text(args.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

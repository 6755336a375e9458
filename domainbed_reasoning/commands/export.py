"""`domainbed-reasoning export`: a dataset's chains or, with ``--job``, a trained model, in other formats."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.chains.formats import FORMATS
from domainbed_reasoning.commands.arguments import Parser, UsageError, add_dataset_arguments

EXAMPLES = """\
  domainbed-reasoning export pacs.parquet --format messages --dataset PACS --data-dir DATA --embed-images
  domainbed-reasoning export pacs_internvl.jsonl --format internvl --dataset PACS --data-dir DATA
  domainbed-reasoning export pacs.json --format llava --dataset PACS --data-dir DATA --domains photo cartoon
  domainbed-reasoning export backup.parquet --format parquet --all --dataset PACS --data-dir DATA
  domainbed-reasoning export --job sweep/1a2b3c...
  domainbed-reasoning export --job sweep/1a2b3c... --output rd-mldg-pacs-sketch --merge

formats: jsonl and parquet (this package's own), internvl (JSON lines), llava (JSON array), sharegpt (JSON array, for
LLaMA-Factory), messages (Parquet, for Hugging Face datasets and TRL). `import` reads all of them without loss. Chains
of images that are not in the dataset are excluded.

With --job, the output is adapter_config.json, adapter_model.safetensors and a model card, for
PeftModel.from_pretrained; with --merge, a model and processor for AutoModelForImageTextToText.from_pretrained.
`predict --job` accepts both.
"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments for chains and those for models."""
    chains = parser.add_argument_group("chains")
    chains.add_argument("file", nargs="?", type=Path, help="file to write")
    chains.add_argument("--format", choices=tuple(FORMATS), help="required; see below")
    add_dataset_arguments(chains, required=False)
    chains.add_argument("--all", action="store_true", help="include rejected candidates (default: accepted chains)")
    chains.add_argument("--domains", nargs="+", help="only these domain folders, for example without the target domain")
    chains.add_argument("--embed-images", action="store_true", help="store the images in a messages file")
    model = parser.add_argument_group("trained model")
    model.add_argument("--job", help="output folder of DomainBed's train or sweep")
    model.add_argument("--output", type=Path, help="folder to write (default: JOB/adapter or JOB/merged)")
    model.add_argument("--merge", action="store_true", help="export the whole model with the adapters merged")
    model.add_argument("--model", help="base model, if the job's path no longer exists")
    model.add_argument("--base-model-id", help="public name of the base model, such as OpenGVLab/InternVL3-8B-hf")


def run(args: argparse.Namespace) -> int:
    """Export chains or a model."""
    of_chains = ("file", "format", "dataset", "data_dir")
    for_chains = (*of_chains, "chains", "all", "domains", "embed_images")
    if args.job:
        if unused := [name for name in for_chains if getattr(args, name)]:
            raise UsageError(f"cannot be combined with --job: {', '.join(map(_option, unused))}")
        from domainbed_reasoning.commands import export_model

        return export_model.run(args)
    if missing := [name for name in of_chains if not getattr(args, name)]:
        raise UsageError(f"required: {', '.join(map(_option, missing))} (or --job to export a model)")
    if unused := [name for name in ("output", "merge", "model", "base_model_id") if getattr(args, name)]:
        raise UsageError(f"requires --job: {', '.join(map(_option, unused))}")
    from domainbed_reasoning.commands import export_chains

    return export_chains.run(args)


def _option(name: str) -> str:
    return "FILE" if name == "file" else f"--{name.replace('_', '-')}"

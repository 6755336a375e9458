"""`domainbed-reasoning export --job`: a trained model as a PEFT adapter folder or as a merged model."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Export the model and print the folder."""
    from domainbed_reasoning.jobs.export import export_adapters, export_merged  # imports torch

    output = args.output or Path(args.job, "merged" if args.merge else "adapter")
    export = export_merged if args.merge else export_adapters
    name = export(args.job, output, args.model, args.base_model_id)
    print(f"Wrote the {'merged model' if args.merge else 'adapters'} to {output}")
    if not args.base_model_id:
        print(f"The base model is recorded as {name!r}; set another name with --base-model-id.")
    return 0

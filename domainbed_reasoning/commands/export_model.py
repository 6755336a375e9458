"""`domainbed-reasoning export --job`: a trained job as a PEFT adapter folder, or as a merged model."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from domainbed_reasoning.terminal import one_line

_EXAMPLES = """examples:
  domainbed-reasoning export --job sweep/1a2b3c...
  domainbed-reasoning export --job sweep/1a2b3c... --output rd-mldg-pacs-sketch --merge

Without --merge: adapter_config.json, adapter_model.safetensors and a model card, for PeftModel.from_pretrained.
With it: a model and processor for AutoModelForImageTextToText.from_pretrained. Both are --job folders of `predict`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and say where; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="domainbed-reasoning export",
        description="Write what a job trained in the formats of the Hugging Face libraries.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--job", required=True, help="folder that DomainBed's train or sweep wrote")
    parser.add_argument("--output", help="folder to write (default: JOB/adapter or JOB/merged)")
    parser.add_argument("--merge", action="store_true", help="the whole model with the adapters merged into it")
    parser.add_argument("--model", help="the base model, where it is not where the job found it")
    parser.add_argument("--base-model-id", help="what others know the base model by, as in OpenGVLab/InternVL3-8B-hf")
    given = parser.parse_args(argv)

    from domainbed_reasoning.jobs.export import export_adapters, export_merged  # torch loads when it is needed

    output = pathlib.Path(given.output or pathlib.Path(given.job, "merged" if given.merge else "adapter"))
    try:
        export = export_merged if given.merge else export_adapters
        name = export(given.job, output, given.model, given.base_model_id)
    except (ValueError, OSError) as error:
        print(one_line(str(error).replace("\n", " ")), file=sys.stderr)
        return 1
    print(f"{'The merged model is' if given.merge else 'The adapters are'} in {output}")
    if not given.base_model_id:
        print(f"Their base model is {name!r} there; --base-model-id gives it another name.")
    return 0

"""`domainbed-reasoning pull`: an export from the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.commands import hub_repository
from domainbed_reasoning.commands.arguments import Parser

EXAMPLES = """\
  domainbed-reasoning pull me/rdmldg-pacs-sketch --output rdmldg-pacs-sketch
  domainbed-reasoning predict --job rdmldg-pacs-sketch photo.jpg
  domainbed-reasoning pull datasets/me/PACS-Reasoning --output pacs_reasoning
  domainbed-reasoning import pacs_reasoning/chains.parquet --dataset PACS --data-dir DATA

Only the files of an export are downloaded: safetensors, JSON, Parquet and the card, never pickles or code. Sizes and
digests are checked. Rerun the command to resume an interrupted download.
"""


def add_arguments(parser: Parser) -> None:
    """Add the repository and the folder."""
    parser.add_argument("repository", type=hub_repository.typed_repo_id, help="me/model or datasets/me/name")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="list the files and stop")


def run(args: argparse.Namespace) -> int:
    """List the files, and download them."""
    from domainbed_reasoning.hub import fetch  # imports huggingface_hub

    repo_type, repo_id = args.repository
    with hub_repository.without_token():
        remote = fetch.list_export(repo_id, repo_type, args.revision)
        print(f"{repo_id} at {remote.commit[:12]} → {args.output}")
        hub_repository.print_files({file.name: file.size for file in remote.files})
        if args.dry_run:
            print("Dry run: nothing was downloaded.")
            return 0
        fetch.download(remote, args.output)
    print(f"Downloaded to {args.output}")
    return 0

"""`domainbed-reasoning push`: an exported model or dataset of chains to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.commands import hub_repository
from domainbed_reasoning.commands.arguments import Parser

EXAMPLES = """\
  domainbed-reasoning push sweep/1a2b3c.../adapter me/rdmldg-pacs-sketch --dry-run
  domainbed-reasoning push sweep/1a2b3c.../adapter me/rdmldg-pacs-sketch
  domainbed-reasoning push pacs_reasoning me/PACS-Reasoning --public

The folder is what `export --job` or `export --format dataset` wrote. Its files are listed first; files of other names
are not uploaded, and an export that contains a local path or an access token is refused. A new repository is private
unless --public is set; chains without a license in their README.md cannot be public. The token is HF_TOKEN or that of
`hf auth login`.
"""


def add_arguments(parser: Parser) -> None:
    """Add the folder and the repository."""
    parser.add_argument("folder", type=Path, help="folder that `export` wrote")
    parser.add_argument("repository", type=hub_repository.repo_id, help="user or organization, and name: me/name")
    parser.add_argument("--public", action="store_true", help="create a public repository, or upload to one")
    parser.add_argument("--dry-run", action="store_true", help="list the files and stop, without a connection")


def run(args: argparse.Namespace) -> int:
    """List the files, and upload them."""
    from domainbed_reasoning.hub import publish  # imports huggingface_hub

    upload = publish.prepare(args.folder)
    if args.public and (problem := upload.license_problem()):
        raise publish.HubError(problem)
    visibility = "public" if args.public else "private"
    print(f"{upload.folder} → {args.repository} ({upload.repo_type}, {visibility})")
    hub_repository.print_files(upload.sizes())
    for name in upload.left:
        print(f"  not uploaded: {name}")
    if args.dry_run:
        print("Dry run: nothing was uploaded.")
        return 0
    with hub_repository.without_token():
        url = publish.push(upload, args.repository, args.public)
    print(f"Uploaded: {url}")
    return 0

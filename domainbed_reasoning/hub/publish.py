"""What `push` uploads: the files of an export that are known, each listed before anything is sent.

Three kinds of folder are known: adapters and merged models, as ``export --job`` writes them, and a dataset of chains,
as ``export --format dataset`` does. Pickles, logs, links and files of any other name stay where they are.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError

from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files.plain import MAX_DESCRIPTION_BYTES, read_plain_text

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# By type of repository: a file that marks a folder as an export, and the files that are transferred.
MARKS = {"model": ("adapter_config.json", "config.json"), "dataset": ("chains.parquet",)}
FILES = {
    "model": (
        "README.md", "task.json", "adapter_config.json", "adapter_model.safetensors", "config.json",
        "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
        "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    ),
    "dataset": ("README.md", "chains.parquet"),
}  # fmt: skip
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{20,}")
_UNKNOWN_LICENSES = (None, "", "other", "unknown")


class HubError(ValueError):
    """A folder or repository that cannot be transferred."""


@dataclass(frozen=True)
class Upload:
    """What is sent of a folder.

    Attributes:
        folder: the export.
        repo_type: ``model`` or ``dataset``.
        contents: file name → its path, or the bytes that are sent in its place.
        left: names of the folder's other entries.
    """

    folder: Path
    repo_type: str
    contents: Mapping[str, Path | bytes]
    left: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.contents.items()
        }

    def license_problem(self) -> str:
        """Return why a dataset must not be public; empty for a model, whose base model has a license."""
        if self.repo_type != "dataset":
            return ""
        card = huggingface_hub.DatasetCard.load(self.folder / "README.md").data
        name = card.get("license_name") or card.license
        if name in _UNKNOWN_LICENSES:
            return (
                f"{self.folder / 'README.md'} names no license for the chains (license: {name}). Export again with "
                "--license, such as cc-by-4.0, or omit --public."
            )
        return ""


def prepare(folder: Path) -> Upload:
    """Return what is sent of an export.

    Raises:
        HubError: the folder is no export, or a file would publish a local path or an access token.
        OSError: it cannot be read.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder. Pass what `domainbed-reasoning export` wrote.")
    entries = {path.name: path for path in sorted(folder.iterdir())}
    kinds = [kind for kind, marks in MARKS.items() if any(mark in entries for mark in marks)]
    if len(kinds) != 1 or "README.md" not in entries:
        raise HubError(
            f"{folder} is not an export: it needs README.md and one of adapter_config.json, config.json and "
            "chains.parquet. Run `domainbed-reasoning export --job JOB`, or `export FOLDER --format dataset`."
        )
    (kind,) = kinds
    chosen = {name: path for name, path in entries.items() if is_transferred(kind, name) and _is_plain(path)}
    contents: dict[str, Path | bytes] = dict(chosen)
    if "task.json" in chosen:
        contents["task.json"] = _public_task(chosen["task.json"], _base_model(folder))
    for name, content in contents.items():
        if name.endswith((".json", ".md", ".jinja")) and name not in ("tokenizer.json", "vocab.json"):
            text = content.decode() if isinstance(content, bytes) else read_plain_text(content)
            _check_text(folder / name, text)
    return Upload(folder, kind, contents, tuple(name for name in entries if name not in contents))


def is_transferred(kind: str, name: str) -> bool:
    """Return whether a file of that name belongs to a repository of the kind."""
    return any(fnmatchcase(name, pattern) for pattern in FILES[kind])


def push(upload: Upload, repo_id: str, public: bool) -> str:
    """Upload in one commit to a repository that exists or is created, and return the commit's URL.

    Args:
        upload: what is sent.
        repo_id: user or organization, and name.
        public: whether the repository may be public, and is if it is created.

    Raises:
        HubError: without a token; the repository is public and ``public`` is false.
        OSError: the Hub refuses or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    if not huggingface_hub.get_token():
        raise HubError("No access token for the Hub. Set HF_TOKEN, or run `hf auth login`.")
    try:
        private = api.repo_info(repo_id, repo_type=upload.repo_type).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public, repo_type=upload.repo_type)
        private = not public
    if not private and not public:
        raise HubError(f"{repo_id} is a public repository. Pass --public to upload to it, or choose another name.")
    operations = [
        huggingface_hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.contents.items()
    ]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload with domainbed-reasoning", repo_type=upload.repo_type
    )
    return str(commit.commit_url)


def _is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _base_model(folder: Path) -> str | None:
    """Return the base model's name in an adapter folder; None for a merged model.

    Raises:
        HubError: it is a path of this machine.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    name = parse_json(read_plain_text(file)).get("base_model_name_or_path")
    if not isinstance(name, str) or Path(name).expanduser().is_absolute():
        raise HubError(
            f"{file}: base_model_name_or_path is {name!r:.200}, which other machines do not have. Export again with "
            "--base-model-id."
        )
    return name


def _public_task(path: Path, base_model: str | None) -> bytes:
    """Return task.json with the base model's public name, and with names in place of local paths."""
    from domainbed_reasoning.jobs.model_card import public_settings  # imports torch

    task: dict[str, Any] = parse_json(read_plain_text(path))
    hparams = public_settings(task["hparams"])
    if base_model is not None:
        hparams["model"] = base_model
    return (json.dumps({**task, "hparams": hparams}, ensure_ascii=False, indent=1) + "\n").encode()


def _check_text(path: Path, text: str) -> None:
    if len(text) > MAX_DESCRIPTION_BYTES:
        raise HubError(f"{path} is larger than {MAX_DESCRIPTION_BYTES:,} bytes. Shorten it.")
    if _SECRET.search(text):
        raise HubError(f"{path} contains what looks like an access token. Remove it.")
    for local in {str(Path.home()), str(path.parent.absolute())} - {"/"}:
        if f"{local}/" in text or f'{local}"' in text:
            raise HubError(f"{path} contains the local path {local}. Remove it, or export again.")

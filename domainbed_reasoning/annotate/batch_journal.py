"""The requests that are in batches of a provider, on disk, so that a killed run neither loses nor repeats them.

A batch is written here before it is submitted, under a token that it carries as metadata: a run that was killed while
it submitted finds by the token whether the provider has the batch. It is removed when its results are in the chain
file.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.files.plain import read_plain_text

_VERSION = 1
_MAX_BYTES = 256 << 20


class JournalError(ValueError):
    """The journal is damaged, or holds another teacher's batches; the message says what to do."""


@dataclass(frozen=True)
class Asked:
    """One request of a batch: image, number of the attempt, seed, and the SHA-256 of the image's file."""

    image: str
    attempt: int
    seed: int
    sha256: str


@dataclass
class OpenBatch:
    """A batch whose results are not in the chain file yet.

    Attributes:
        teacher: its name.
        endpoint: URL of the provider.
        prompt_version: of the prompt.
        sampling: temperature, top_p and max_tokens of every request.
        omitted: settings that were not sent.
        sent: settings that were sent, by the provider's names.
        requests: in the order of the file; ``custom_id`` is ``token-index``.
        token: that the batch carries.
        created: seconds since the epoch.
        batch_id: the provider's; "" until it is known.
    """

    teacher: str
    endpoint: str
    prompt_version: str
    sampling: dict[str, Any]
    omitted: list[str]
    requests: list[Asked]
    sent: list[str] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(12))
    created: float = field(default_factory=time.time)
    batch_id: str = ""


class Journal:
    """The open batches of a chain file, in ``<chain file>.batches.json``; the chain file's lock protects it too.

    Args:
        chains: the chain file.

    Raises:
        JournalError: it cannot be read.
    """

    def __init__(self, chains: Path):
        self.path = journal_path(chains)
        self.batches: list[OpenBatch] = []
        try:
            content = parse_json(read_plain_text(self.path, _MAX_BYTES))
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']!r:.20} is not {_VERSION}")
            for one in content["batches"]:
                requests = [Asked(**asked) for asked in one.pop("requests")]
                self.batches.append(OpenBatch(requests=requests, **one))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{self.path} cannot be read ({str(error):.200}). It lists requests that are paid for; restore it, or "
                "delete it to ask for those images again."
            ) from error

    @property
    def images(self) -> set[str]:
        """Images with a request in an open batch."""
        return {asked.image for batch in self.batches for asked in batch.requests}

    def require(self, teacher: str, endpoint: str, prompt_version: str) -> None:
        """Refuse batches of another teacher, provider or prompt.

        Raises:
            JournalError: naming it.
        """
        for batch in self.batches:
            if (batch.teacher, batch.endpoint, batch.prompt_version) != (teacher, endpoint, prompt_version):
                raise JournalError(
                    f"{self.path}: {len(batch.requests):,} requests to {batch.teacher} at {batch.endpoint} with prompt "
                    f"{batch.prompt_version} are open. Rerun with that --teacher, --base-url and --prompt to collect "
                    "them, or delete the file to forget them."
                )

    def save(self) -> None:
        """Write the journal to the disk; without batches it is removed.

        Raises:
            OSError: it cannot be written.
        """
        if not self.batches:
            self.path.unlink(missing_ok=True)
            return
        content = {"version": _VERSION, "batches": [dataclasses.asdict(batch) for batch in self.batches]}
        with replacing(self.path, durable=True) as file:
            file.write(json.dumps(content, ensure_ascii=False).encode())


def journal_path(chains: Path) -> Path:
    """Return the path of a chain file's journal."""
    return chains.with_name(f"{chains.name}.batches.json")

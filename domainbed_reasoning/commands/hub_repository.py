"""What the verbs that use the Hub share: names of repositories, lists of files, errors without the token."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from domainbed_reasoning.annotate.redaction import redact
from domainbed_reasoning.terminal import counted

_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def repo_id(text: str) -> str:
    """Return the name of a repository; an argument type."""
    if not _REPO_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be USER/NAME; got {text!r}")
    return text


def typed_repo_id(text: str) -> tuple[str, str]:
    """Return type and name of a repository, a model's unless it starts with ``datasets/``; an argument type."""
    is_dataset = text.startswith("datasets/") and text.count("/") == 2
    return ("dataset", repo_id(text.removeprefix("datasets/"))) if is_dataset else ("model", repo_id(text))


def print_files(sizes: Mapping[str, int]) -> None:
    """Print names and sizes in bytes."""
    for name, size in sizes.items():
        print(f"  {size:>15,}  {name}")
    print(f"{counted(len(sizes), 'file')}, {sum(sizes.values()):,} bytes.")


@contextmanager
def without_token() -> Iterator[None]:
    """Raise errors of the Hub as one line without the access token.

    Raises:
        OSError: any error of the Hub's client; others pass.
    """
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    except Exception as error:  # its client raises those of its HTTP library, among others
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        shown = redact(message, huggingface_hub.get_token() or "")
        if shown == message and not type(error).__module__.startswith(("huggingface_hub.", "http")):
            raise
        unreachable = f". Check the connection to {huggingface_hub.constants.ENDPOINT} and rerun the command."
        hint = unreachable if type(error).__name__ in ("ConnectError", "ConnectTimeout") else ""
        raise OSError(f"The Hub: {shown[:600]}{hint}") from None

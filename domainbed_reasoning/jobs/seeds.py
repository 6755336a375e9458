"""Random streams that depend only on the seed and their purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Use a separate stream of torch's random numbers inside, and restore the global one afterwards.

    A step's dropout and sampling then do not depend on earlier draws, which a resumed job need not repeat, and
    DomainBed's loaders, which use the global stream, draw the same samples for every algorithm.

    Args:
        seed: of the job.
        purpose: identifies the stream, e.g. by the kind and number of a step.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield

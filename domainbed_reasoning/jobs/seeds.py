"""Random numbers that depend on nothing but the seed and what they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Draw torch's random numbers inside from a stream of their own, and leave the global one as it was.

    A step's dropout and sampling are then the same whatever was drawn before, so that a resumed job need not draw it
    again; and DomainBed's loaders, which draw from the global stream, meet the same samples whatever the algorithm.

    Args:
        seed: of the job.
        purpose: what tells this stream from others, as the kind and number of a step.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield

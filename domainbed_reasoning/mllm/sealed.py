"""Prevents transformers, peft and bitsandbytes from downloading and running anything on their own."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from domainbed_reasoning.terminal import is_terminal


def without_hub_kernels() -> None:
    """Disable kernels from the hub in this process: third-party compiled code that a model's config can request."""
    from transformers.integrations import hub_kernels

    module: Any = hub_kernels
    module._kernels_enabled = False
    module.get_kernel_hub = _refuse


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise ValueError(f"{name!r} is a kernel from the hub; code from the hub is never run")


@contextlib.contextmanager
def without_package(name: str) -> Iterator[None]:
    """Make imports of a package fail within the block."""
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if installed, without the kernel that it would download for 4-bit products on a CPU."""
    # It warns about the missing kernel, and in int8 of a cast to float16, for each layer in each forward pass.
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with without_package("kernels"), contextlib.suppress(Exception):  # importing it where it is needed raises the error
        import bitsandbytes  # noqa: F401


@contextlib.contextmanager
def peft_without_bitsandbytes() -> Iterator[None]:
    """Keep PEFT from importing bitsandbytes within the block: it takes seconds, and only quantized models need it.

    If PEFT itself is first imported here, its `helpers` stay without bitsandbytes; nothing here uses them.
    """
    with without_package("bitsandbytes"):
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        checks = (is_bnb_available, is_bnb_4bit_available)
        for check in checks:
            check.cache_clear()
        try:
            yield
        finally:
            for check in checks:
                check.cache_clear()


def import_peft(quantized: bool = False) -> Any:
    """Return PEFT, with bitsandbytes if it is for a quantized model."""
    if quantized:
        import_bitsandbytes()
        import peft
    else:
        with peft_without_bitsandbytes():
            import peft
    return peft


@contextlib.contextmanager
def sealed(offline: bool) -> Iterator[None]:
    """Load a model without kernels from the hub, without progress bars in log files and, for a folder, without network.

    Args:
        offline: whether downloads are disabled.
    """
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    without_hub_kernels()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    hide_bars = transformers_logging.is_progress_bar_enabled() and not is_terminal(sys.stderr)
    if hide_bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide_bars:
            transformers_logging.enable_progress_bar()
        constants.HF_HUB_OFFLINE = before

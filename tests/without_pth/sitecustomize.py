"""Replaces the `.pth` file in environments where the package is not installed."""

import _domainbed_reasoning_hook  # noqa: F401

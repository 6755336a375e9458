"""Does what the `.pth` file does, for tests in an environment where the package is not installed."""

import _domainbed_reasoning_hook  # noqa: F401

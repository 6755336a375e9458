"""What all plots share: whether matplotlib is installed, and the style of the n-th series."""

from __future__ import annotations

from importlib.util import find_spec

# Okabe and Ito's colors, which color-blind readers can distinguish, on light and dark backgrounds.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999933")
# One more than colors: the pairs of the first 72 series differ, and those of neighbors differ in both.
_MARKERS = "osD^vPX*p"
_DASHES = ("-", "--", ":", "-.")


def has_matplotlib() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def series(number: int) -> tuple[str, str, str]:
    """Return color, marker and line style of series ``number``, from 0; they repeat after 288 series."""
    pairs = len(COLORS) * len(_MARKERS)
    return (
        COLORS[number % len(COLORS)],
        _MARKERS[number % len(_MARKERS)],
        _DASHES[number // pairs % len(_DASHES)],
    )

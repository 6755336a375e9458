"""How the n-th series of a plot looks: colour and marker."""

from __future__ import annotations

# Okabe and Ito's colours, which colour-blind readers can tell apart, on light and on dark paper.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999933")
# One more than colours: the pair is another one for each of the first 72 series, and each neighbour differs in both.
_MARKERS = "osD^vPX*p"
_DASHES = ("-", "--", ":", "-.")


def series(number: int) -> tuple[str, str, str]:
    """Return colour, marker and line style of series ``number``, from 0: all three are alike only after 288."""
    pairs = len(COLORS) * len(_MARKERS)
    return (
        COLORS[number % len(COLORS)],
        _MARKERS[number % len(_MARKERS)],
        _DASHES[number // pairs % len(_DASHES)],
    )

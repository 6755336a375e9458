"""Results of an analysis as CSV files, and confidence intervals of shares."""

from __future__ import annotations

import csv
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from domainbed_reasoning.files.atomic import replace_text


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to ``path`` atomically; floats have six digits, missing keys are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as aligned columns; floats have three decimals."""
    if not rows:
        return "(nothing)"
    cells = [list(rows[0])] + [[_shown(value) for value in row.values()] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share, in [0, 1].

    Wilson, JASA 1927: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.
    """
    if count == 0:
        return 0.0, 1.0
    z, share = 1.959964, hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / (1 + z * z / count)), min(1.0, (middle + half) / (1 + z * z / count))


def share_row(name: str, hits: Sequence[bool]) -> dict[str, Any]:
    """Return the row of a share: its name, n, the share in [0, 1] (None if n is 0) and its 95% interval."""
    low, high = wilson(sum(hits), len(hits))
    return {"what": name, "n": len(hits), "share": sum(hits) / len(hits) if hits else None, "low": low, "high": high}

"""Reading numbers from JSON and formatting them, the same everywhere."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"


def number(value: Any) -> float | None:
    """A finite or infinite float; None for NaN and values that are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def format_number(value: Any) -> str:
    """A number as text: three decimals, an exponent when tiny, one decimal when large, then none.

    Example:
        >>> [format_number(v) for v in (0.12345, 3.905e-22, -99.46, 4095.6, 0, None)]
        ['0.123', '3.9e-22', '-99.5', '4,096', '0', '–']
    """
    v = number(value)
    if v is None:
        return MISSING
    if isinstance(value, int) or v == 0 or math.isinf(v):
        return f"{value:,}" if isinstance(value, int) else f"{v:.0f}"
    if abs(v) < 1e-3:
        return f"{v:.1e}"
    if abs(v) >= 999.95:
        return f"{v:,.0f}"
    return f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}"

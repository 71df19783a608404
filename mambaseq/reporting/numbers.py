"""Numbers as people read them: those of one quantity with one number of decimals."""

from __future__ import annotations

import math
from collections.abc import Iterable


def decimals(values: Iterable[object]) -> int | None:
    """How many decimals numbers of one quantity have, by the largest of them; None where they are too small for any.

    >>> decimals([4.8195, 5.1]), decimals([62.76, 130.5]), decimals([13987.2]), decimals([3e-4, 6e-3])
    (3, 1, 0, None)
    """
    finite = [abs(value) for value in values if isinstance(value, int | float) and math.isfinite(value) and value]
    largest = max(finite, default=0.0)
    if 0 < largest < 0.0095:
        return None
    return 3 if largest < 100 else 1 if largest < 10_000 else 0


def number(value: float, places: int | None = -1) -> str:
    """A number with thousands separated, as text. places: its decimals; None: three digits and a power of ten; -1: by
    its size.

    >>> number(328005), number(4.8195), number(0.0006), number(5.1, 3), number(float("nan"))
    ('328,005', '4.819', '6e-04', '5.100', 'nan')
    """
    if isinstance(value, int):
        return f"{value:,}"
    if places == -1:
        places = decimals([value])
    if not math.isfinite(value):
        return str(value)
    if places is None:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{power}" if value else "0"
    return f"{value:,.{places}f}"


def short(value: float) -> str:
    """A number of an axis: as few digits as tell it.

    >>> [short(v) for v in (0, 0.25, 2.0, 1500, 20000, 7372800, 2.5e9)]
    ['0', '0.25', '2', '1,500', '20 k', '7.37 M', '2.5 G']
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (1e4 if unit == "k" else size):
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42.4), duration(100), duration(9000)
    ('42 s', '1 min 40 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

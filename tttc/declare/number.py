"""What counts as a number: Python's own, NumPy's, and tensors and arrays without axes."""

from __future__ import annotations

from typing import Any


def number(x: Any) -> float | int | None:
    """`x` as a Python number; None for what is no number, a bool or a tensor that is trained."""
    if isinstance(x, bool):
        return None
    if isinstance(x, int | float):
        return int(x) if isinstance(x, int) else float(x)
    if not hasattr(type(x), "item") or not hasattr(type(x), "dtype"):
        return None
    if x.ndim != 0 or getattr(x, "requires_grad", False):
        return None
    found = x.item()
    return None if isinstance(found, bool) or not isinstance(found, int | float) else found


def whole(x: Any) -> int | None:
    """`x` as an int; None for what is no whole number, a float such as 4.0 included."""
    found = number(x)
    return found if isinstance(found, int) else None

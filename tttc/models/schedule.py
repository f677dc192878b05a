"""The inner rate over the steps of the outer loop."""

from __future__ import annotations


def inner_rate(step: int, steps: int, start: float = 0.1, warmup: float = 0.1) -> float:
    """What scales the learning rates of the inner loop at outer step `step` of `steps`, counted from 0.

    It rises from `start` to 1 along a line, over the first `warmup` of the steps, and stays there: before a network is
    trained, steps of the full rate only destroy what its fast weights begin with.

    Example:
        out = model(tokens, rate=inner_rate(step, steps))
    """
    warm = warmup * steps
    return 1.0 if step >= warm else start + (1.0 - start) * step / warm

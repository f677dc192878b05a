"""The names that a printed program uses: with these in scope, its text runs on NumPy.

from tttc.ir.numerics import *
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import numpy as np

from tttc.ir.scalars import numpy_names

pi = np.pi
inf = np.inf
nan = np.nan
einsum = np.einsum
outer = np.outer
tril = np.tril
triu = np.triu
transpose = np.transpose
broadcast_to = np.broadcast_to
sum = np.sum
mean = np.mean
max = np.max
cumprod = np.cumprod
globals().update(numpy_names())


def chunks(tokens: int | range, length: int) -> list[range]:
    """Consecutive ranges of at most `length` tokens: chunks(5, 2) is [0, 1], [2, 3], [4]."""
    whole = tokens if isinstance(tokens, range) else range(tokens)
    return [whole[i : i + length] for i in range(0, len(whole), length)] if length > 0 else []


def empty(*shape: int) -> np.ndarray:
    """A sequence to be filled; NaN until it is."""
    return np.full(shape, np.nan)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape)


def stop_gradient(x: Any) -> Any:
    return x


def last(x: Any, axis: int) -> Any:
    """The entry of the last token."""
    return np.take(x, -1, axis=axis)


def put_last(x: Any, length: int) -> Any:
    """`x` at the last of `length` tokens, zero at the others."""
    result = np.zeros((length, *np.shape(x)))
    result[-1] = x
    return result


def segprod(x: Any) -> Any:
    """P[t, s] = x[s + 1] * ... * x[t] for s <= t, else 0: a row from the one before, so nothing can overflow."""
    result = np.zeros((len(x), *np.shape(x)))
    for t in range(len(x)):
        result[t] = result[t - 1] * x[t] if t else 0.0
        result[t, t] = 1.0
    return result


def shift(x: Any, fill: float) -> Any:
    """Every token gets the entry of the one before it, the first one `fill`."""
    return np.concatenate([np.full((1, *np.shape(x)[1:]), float(fill)), x[:-1]])


def shift_back(x: Any) -> Any:
    """Every token gets the entry of the one after it, the last one 0."""
    return np.concatenate([x[1:], np.zeros((1, *np.shape(x)[1:]))])


def solve_lower(matrix: Any, right: Any, upper: bool = False, along: tuple[int, ...] = ()) -> Any:
    """x with x[t] + sum over s < t of matrix[t, s] * x[s] = right[t], by substitution; s > t if `upper`.

    The further dimensions of `matrix` go with the dimensions `along` of `right`.
    """
    shape = [n if i == 0 or i in along else 1 for i, n in enumerate(np.shape(right))]
    result = np.zeros_like(right)
    order = list(builtins.range(len(right)))
    for i, t in enumerate(order := order[::-1] if upper else order):
        result[t] = right[t]
        for s in order[:i]:
            result[t] = result[t] - np.reshape(matrix[t, s], shape[1:]) * result[s]
    return result


def layer_norm(x: Any, gamma: Any, beta: Any, eps: float, axis: int = -1) -> Any:
    centred = x - np.mean(x, axis=axis, keepdims=True)
    return gamma * (centred / np.sqrt(np.mean(centred * centred, axis=axis, keepdims=True) + eps)) + beta


def rms_norm(x: Any, gamma: Any, eps: float, axis: int = -1) -> Any:
    return gamma * (x / np.sqrt(np.mean(x * x, axis=axis, keepdims=True) + eps))


def l2_norm(x: Any, eps: float, axis: int = -1) -> Any:
    return x / np.sqrt(np.sum(x * x, axis=axis, keepdims=True) + eps)


def softmax(x: Any, axis: int = -1) -> Any:
    raised = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return raised / np.sum(raised, axis=axis, keepdims=True)


def names() -> Iterator[str]:
    """Every public name of this module: those that a program's variables must not take."""
    return (name for name in globals() if not name.startswith("_"))

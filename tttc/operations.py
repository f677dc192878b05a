"""The operations of a declaration: `tttc.gelu(x)`, `tttc.layer_norm(z, gamma, beta, eps=1e-6)`, ...

Each runs on torch tensors, where it is the definition of correct, and on traced values, where it adds a node to the IR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from tttc.number import number
from tttc.trace import Traced, apply_formula, axis_size, trace


def _dispatch(name: str, meaning: Callable[..., Any], doc: str) -> Callable[..., Any]:
    def operation(*operands: Any, **settings: Any) -> Any:
        if any(isinstance(x, Traced) for x in operands):
            return trace(name, operands, settings)
        return meaning(*map(_as_tensor, operands), **settings)

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = doc
    return operation


def _as_tensor(x: Any) -> Any:
    plain = None if isinstance(x, torch.Tensor) else number(x)
    return x if plain is None else torch.tensor(plain, dtype=torch.float64)


def _reduced(reduce: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def meaning(x: torch.Tensor, axis: int | None = None) -> torch.Tensor:
        return reduce(x) if axis is None else reduce(x, axis)

    return meaning


def _normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)


def _layer_norm(x: Any, gamma: Any, beta: Any, *, eps: float) -> torch.Tensor:
    return gamma * _normalized(x, eps) + beta


def _rms_norm(x: Any, gamma: Any, *, eps: float) -> torch.Tensor:
    return gamma * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def _l2_norm(x: Any, *, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def _huber(x: Any, delta: Any) -> torch.Tensor:
    return torch.where(x.abs() <= delta, 0.5 * x * x, delta * (x.abs() - 0.5 * delta))


def _where(condition: Any, x: Any, y: Any) -> torch.Tensor:
    return torch.where(condition if condition.dtype == torch.bool else condition > 0.5, x, y)


sum = _dispatch("sum", _reduced(torch.sum), "Sum over `axis`, or over all axes.")
mean = _dispatch("mean", _reduced(torch.mean), "Mean over `axis`, or over all axes.")
exp = _dispatch("exp", torch.exp, "e**x, elementwise.")
log = _dispatch("log", torch.log, "Natural logarithm, elementwise.")
sqrt = _dispatch("sqrt", torch.sqrt, "Square root, elementwise.")
rsqrt = _dispatch("rsqrt", torch.rsqrt, "1 / sqrt(x), elementwise.")
abs = _dispatch("abs", torch.abs, "Absolute value; its derivative at 0 is 0.")
sign = _dispatch("sign", torch.sign, "-1, 0 or 1; its derivative is 0.")
tanh = _dispatch("tanh", torch.tanh, "Hyperbolic tangent.")
sigmoid = _dispatch("sigmoid", torch.sigmoid, "1 / (1 + exp(-x)), stable at any x.")
silu = _dispatch("silu", F.silu, "x * sigmoid(x).")
gelu = _dispatch(
    "gelu", lambda x: F.gelu(x, approximate="tanh"), "GELU, tanh form (Hendrycks and Gimpel, arXiv:1606.08415)."
)
relu = _dispatch("relu", F.relu, "max(x, 0); its derivative at 0 is 0.")
softplus = _dispatch("softplus", lambda x: F.softplus(x, threshold=1e4), "log(1 + exp(x)), stable at any x.")
softmax = _dispatch("softmax", lambda x: torch.softmax(x, -1), "exp(x) / sum(exp(x)) over the last axis.")
layer_norm = _dispatch(
    "layer_norm",
    _layer_norm,
    "layer_norm(x, gamma, beta, eps=...): gamma * (x - mean) / sqrt(var + eps) + beta over the last axis, "
    "with the biased variance.",
)
rms_norm = _dispatch(
    "rms_norm", _rms_norm, "rms_norm(x, gamma, eps=...): gamma * x / sqrt(mean(x**2) + eps) over the last axis."
)
l2_norm = _dispatch("l2_norm", _l2_norm, "l2_norm(x, eps=...): x / sqrt(sum(x**2) + eps) over the last axis.")
dot = _dispatch("dot", lambda x, y: (x * y).sum(-1), "Inner product over the last axis.")
where = _dispatch(
    "where",
    _where,
    "where(condition, x, y): x where the condition holds, otherwise y. The condition is a comparison, or a value of "
    "zeros and ones, which holds above one half.",
)
huber = _dispatch("huber", _huber, "huber(x, delta): x**2 / 2 where |x| <= delta, otherwise delta * (|x| - delta / 2).")


div = _dispatch("div", torch.div, "x / y, where x may be a number.")
stop_gradient = _dispatch(
    "stop_gradient", lambda x: x.detach(), "The same value, a constant to every derivative, inner and outer."
)


def size(x: Any, axis: int = -1) -> int:
    """The length of an axis: an int, also while a declaration is traced."""
    return axis_size(x, axis) if isinstance(x, Traced) else int(x.shape[axis])


def along(x: Any, y: Any, *, axis: int = 0) -> Any:
    """x * y, where y has one value for every vector of x along `axis`: it lacks that axis."""
    return trace("along", (x, y), {"axis": axis}) if isinstance(x, Traced) else x * y.unsqueeze(axis)


def einsum(spec: str, x: Any, y: Any) -> Any:
    """The sum of products of two operands in Einstein's notation: `tttc.einsum("np,npo->no", x, W)`, blocks of a
    block-diagonal W. Letters of axes that are kept, and of sums; none twice in one operand.
    """
    if isinstance(x, Traced) or isinstance(y, Traced):
        return trace("einsum", (x, y), {"spec": spec})
    return torch.einsum(spec, _as_tensor(x), _as_tensor(y))


def elementwise(expression: sympy.Expr) -> Callable[..., Any]:
    """A scalar function of the user's own, applied elementwise: `elementwise(x / (1 + sympy.Abs(x)))`.

    Its arguments are the free symbols of `expression` in alphabetical order. Its derivatives are taken by SymPy.
    """
    expression = sympy.sympify(expression)
    symbols = sorted(expression.free_symbols, key=lambda s: s.name)
    meaning = sympy.lambdify(symbols, expression, modules=[_TORCH_NAMES, "numpy"], cse=True)

    def operation(*operands: Any) -> Any:
        if len(operands) != len(symbols):
            named = ", ".join(s.name for s in symbols)
            raise TypeError(f"elementwise({expression}) takes {len(symbols)} operands ({named}), got {len(operands)}")
        if any(isinstance(x, Traced) for x in operands):
            return apply_formula(expression, symbols, operands)
        return meaning(*map(_as_tensor, operands))

    operation.__doc__ = f"{expression}, elementwise."
    return operation


def _select(conditions: list[Any], values: list[Any], default: float = float("nan")) -> Any:
    """`numpy.select` on tensors and numbers: what SymPy prints a Piecewise as."""
    like = next((x for x in values if isinstance(x, torch.Tensor)), None)
    if like is None:
        like = next(c for c in conditions if isinstance(c, torch.Tensor)).double()
    result = torch.as_tensor(default, dtype=like.dtype)
    for condition, value in zip(reversed(conditions), reversed(values), strict=True):
        value = torch.as_tensor(value, dtype=like.dtype)
        result = torch.where(torch.as_tensor(condition), value, result)
    return result


def _extreme(pick: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """`numpy.amax((x, y), axis=0)` on tensors and numbers: what SymPy prints Max and Min as."""

    def meaning(operands: tuple[Any, ...], axis: int = 0) -> Any:
        like = next(x for x in operands if isinstance(x, torch.Tensor))
        result, *rest = (torch.as_tensor(x, dtype=like.dtype) for x in operands)
        for x in rest:
            result = pick(result, x)
        return result

    return meaning


_TORCH_NAMES: dict[str, Any] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("exp", "log", "sqrt", "tanh", "sin", "cos", "tan", "sinh", "cosh", "erf", "sign", "sigmoid", "abs"),
            *("less", "less_equal", "greater", "greater_equal"),
        )
    },
    "amax": _extreme(torch.maximum),
    "amin": _extreme(torch.minimum),
    "select": _select,
}


OPERATIONS = (
    *("sum", "mean", "exp", "log", "sqrt", "rsqrt", "abs", "sign", "tanh", "sigmoid", "silu", "gelu", "relu"),
    *("softplus", "softmax", "layer_norm", "rms_norm", "l2_norm", "dot", "where", "huber", "div", "stop_gradient"),
    *("size", "along", "einsum", "elementwise"),
)

"""The operations of a declaration: `tttc.gelu(x)`, `tttc.layer_norm(z, gamma, beta, eps=1e-6)`, ...

Each runs on torch tensors, where it is the definition of correct, and on traced values, where it adds a node to the IR.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from tttc.backends.torch.ops import function_of
from tttc.declare.declared import Declared, no_value
from tttc.declare.number import number
from tttc.declare.sizes import axis_size
from tttc.declare.suggest import OPERATIONS
from tttc.declare.traced_functions import apply_formula, trace
from tttc.declare.tracer import Traced, unsupported
from tttc.declare.upstream import from_above
from tttc.errors import ShapeError
from tttc.ir.formulas import formula_of
from tttc.ir.scalars import Formula


def _dispatch(name: str, meaning: Callable[..., Any], doc: str) -> Callable[..., Any]:
    def operation(*operands: Any, **settings: Any) -> Any:
        if any(isinstance(x, Traced) for x in operands):
            return trace(name, operands, settings)
        for x in operands:
            if isinstance(x, Declared):
                raise no_value(x)
        return meaning(*map(_as_tensor, operands), **settings)

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = doc
    OPERATIONS.append(name)
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
    return axis_size(x.axes, axis) if isinstance(x, Traced) else int(x.shape[axis])


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


def upstream(z: Any) -> Any:
    """In `loss`: the loss is whatever a network makes of z, of which it gives the derivative u = dL / dz.

    That is sum(z * u), where u is the v of the call, `layer(q, k, u)`, with the axes of z: the gradients of the states
    are then the vector-Jacobian product of what made z. `loss` may leave v out:

    >>> def loss(self, k):
    ...     return tttc.upstream(self.learner(k))

    Raises:
        TTTCError: outside of `loss`, where nothing comes from above.
        ShapeError: where z has other axes than v, which `v = tttc.token(...)` declares.
    """
    u = from_above()
    if u is None:
        raise unsupported("tttc.upstream outside of `loss`", "Nothing comes from above there: read a token, self.u.")
    if isinstance(z, Traced) or isinstance(u, Traced):
        return trace("upstream", (z, u), {})
    z = _as_tensor(z)
    if z.shape != u.shape:
        raise ShapeError(f"tttc.upstream of {list(z.shape)}, and v is {list(u.shape)}.")
    return torch.sum(z * u)


def elementwise(expression: sympy.Expr) -> Callable[..., Any]:
    """A scalar function of the user's own, applied elementwise: `elementwise(x / (1 + sympy.Abs(x)))`.

    Its arguments are the free symbols of `expression` in alphabetical order. Its derivatives are taken by SymPy; where
    it has a kink they are those of `tttc.where` and `tttc.relu`.

    Raises:
        TTTCError: where a function has no form on tensors and in kernels, with those that have.
    """
    formula = _adopted(expression)
    symbols = sorted(sympy.sympify(expression).free_symbols, key=lambda s: s.name)
    meaning = cache(lambda: function_of(formula))

    def operation(*operands: Any) -> Any:
        if len(operands) != len(symbols):
            named = ", ".join(s.name for s in symbols)
            raise TypeError(f"elementwise({expression}) takes {len(symbols)} operands ({named}), got {len(operands)}")
        if any(isinstance(x, Traced) for x in operands):
            return apply_formula(formula, operands)
        tensors = [_as_tensor(x) for x in operands]
        if formula.body.is_number:  # a constant, whatever it is a function of
            like = torch.broadcast_tensors(*tensors)[0] if tensors else torch.zeros((), dtype=torch.float64)
            return torch.full_like(like, float(formula.body))
        return meaning()(*tensors)

    operation.__doc__ = f"{expression}, elementwise."
    return operation


def _adopted(expression: Any) -> Formula:
    """The formula, or the error that says why it is none."""
    try:
        if isinstance(expression, str):  # SymPy runs it as code
            raise ValueError("it is a text: make it of sympy.symbols")
        formula = sympy.sympify(expression)
        if not isinstance(formula, sympy.Expr):
            raise ValueError(f"it is a {type(expression).__name__}, and no formula of SymPy")
        return formula_of(formula, sorted(formula.free_symbols, key=lambda s: s.name))
    except (ValueError, sympy.SympifyError) as reason:
        said = str(reason).splitlines()[0].rstrip(".")
        raise unsupported(f"elementwise({expression})", f"{said}.") from None

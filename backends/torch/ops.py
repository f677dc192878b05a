"""How each operation of the IR is written in PyTorch, and each composite that PyTorch has whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from tttc.backends.generated import module
from tttc.backends.rows import INFIX, PRINTED, calls
from tttc.ir.formulas import FormulaPrinter, formula_text
from tttc.ir.scalars import Formula

# Every form can be differentiated again and again, in reverse and in forward mode, and mapped over: torch.heaviside has
# no derivative, not even the one that is zero.
ELEMENTWISE = {
    **calls("torch.", "exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf", "abs", "sign", "relu", "sigmoid"),
    **calls("", "silu", "less_equal", "select", "huber"),
    "softplus": "F.softplus({0}, threshold=1e4)",
    "gelu": 'F.gelu({0}, approximate="tanh")',
    "step": "torch.relu(torch.sign({0}))",
}

# Methods of the printer (printer.py).
STRUCTURE = {
    **PRINTED,
    "contract": "_contract",
    "rename": "rename",
    **dict.fromkeys(("sum", "mean", "max"), "_reduction"),
    **dict.fromkeys(("softmax", "layer_norm", "rms_norm", "l2_norm"), "_composite"),
}

ROWS = {**INFIX, **ELEMENTWISE, **STRUCTURE}

# the derivative of a function and its product with a cotangent, where PyTorch has them as one operation that can itself
# be differentiated (aten.silu_backward cannot)
FUSED_DERIVATIVES = {"dgelu": 'aten.gelu_backward({g}, {x}, approximate="tanh")'}

HELPERS = {
    "silu": '''
def silu(x):
    """x * sigmoid(x); in forward mode as just that, for the derivative of F.silu carries no tangents."""
    return F.silu(x) if torch.autograd.forward_ad._current_level < 0 else x * torch.sigmoid(x)
''',
    "less_equal": '''
def less_equal(x, y):
    """1 where x <= y, else 0, in the dtype of x."""
    x = x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=y.dtype, device=y.device)
    return (x <= y).to(x.dtype)
''',
    "select": '''
def select(condition, x, y):
    """x where the condition is 1, y where it is 0."""
    kind = {"dtype": condition.dtype, "device": condition.device}
    return torch.where(condition > 0.5, torch.as_tensor(x, **kind), torch.as_tensor(y, **kind))
''',
    "huber": '''
def huber(x, delta):
    """x**2 / 2 where |x| <= delta, otherwise delta * (|x| - delta / 2)."""
    return torch.where(x.abs() <= delta, 0.5 * x * x, delta * (x.abs() - 0.5 * delta))
''',
    "segprod": '''
def segprod(x):
    """P[t, s] = x[s + 1] * ... * x[t] for s <= t, else 0."""
    C = x.shape[1]
    later = torch.ones((C, C), dtype=torch.bool, device=x.device).tril(-1).view(1, C, C, *[1] * (x.dim() - 2))
    products = torch.where(later, x.unsqueeze(2), 1.0).cumprod(1)
    return products * torch.ones((C, C), dtype=x.dtype, device=x.device).tril().view(later.shape)
''',
    "shift": '''
def shift(x, fill):
    """Every token gets the entry of the one before it, the first one `fill`."""
    return torch.cat([torch.full_like(x[:, :1], fill), x[:, :-1]], 1)
''',
    "shift_back": '''
def shift_back(x):
    """Every token gets the entry of the one after it, the last one 0."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
''',
    "solve": '''
def solve_lower(matrix, right, upper=False, along=()):
    """x with x[t] + sum over s < t of matrix[t, s] * x[s] = right[t]; s > t if `upper`.

    The further dimensions of `matrix` go with the dimensions `along` of `right`.
    """
    if along:
        rest = [i for i in range(1, right.dim() - 1) if i not in along]
        order = [0, *(i + 1 for i in along), 1, *(i + 1 for i in rest)]
        moved = right.permute(order)
        system = matrix.permute(0, *range(3, matrix.dim()), 1, 2)
        columns = moved.reshape(*moved.shape[: len(along) + 2], -1)
        found = torch.linalg.solve_triangular(system, columns, upper=upper, unitriangular=True)
        return found.reshape(moved.shape).permute([order.index(i) for i in range(len(order))])
    columns = right.reshape(*right.shape[:2], -1)
    return torch.linalg.solve_triangular(matrix, columns, upper=upper, unitriangular=True).reshape(right.shape)
''',
}


class TorchFormulas(FormulaPrinter):
    """A SymPy formula as PyTorch text."""

    def _print_Function(self, expr: sympy.Function) -> str:
        return ROWS[type(expr).__name__].format(*(self._print(a) for a in expr.args))


def formula(body: sympy.Expr) -> str:
    return str(TorchFormulas().doprint(body))


def function_of(made: Formula) -> Callable[..., Any]:
    """A formula as a function of tensors: the text that a program has of it."""
    used = {f.func.__name__ for f in made.body.atoms(sympy.Function)}
    helpers = [text for name, text in HELPERS.items() if name in used]
    text = "\n".join(["import torch", "import torch.nn.functional as F", *helpers, formula_text(made, formula)])
    found: Callable[..., Any] = getattr(module(text, made.name, f"<{made.name}>"), made.name)
    return found

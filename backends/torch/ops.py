"""How each elementwise operation of the IR is written in PyTorch, and each composite that PyTorch has whole."""

from __future__ import annotations

import sympy
from sympy.printing.str import StrPrinter

ELEMENTWISE = {
    "exp": "torch.exp({0})",
    "log": "torch.log({0})",
    "sqrt": "torch.sqrt({0})",
    "rsqrt": "torch.rsqrt({0})",
    "tanh": "torch.tanh({0})",
    "sin": "torch.sin({0})",
    "cos": "torch.cos({0})",
    "erf": "torch.erf({0})",
    "abs": "torch.abs({0})",
    "sign": "torch.sign({0})",
    "relu": "torch.relu({0})",
    "sigmoid": "torch.sigmoid({0})",
    "softplus": "F.softplus({0}, threshold=1e4)",
    "silu": "F.silu({0})",
    "gelu": 'F.gelu({0}, approximate="tanh")',
    "step": "torch.heaviside({0}, torch.zeros_like({0}))",
    "less_equal": "less_equal({0}, {1})",
    "select": "select({0}, {1}, {2})",
    "huber": "huber({0}, {1})",
}

# the derivative of a function and its product with a cotangent, where PyTorch has them as one operation that can itself
# be differentiated (aten.silu_backward cannot)
FUSED_DERIVATIVES = {"dgelu": 'aten.gelu_backward({g}, {x}, approximate="tanh")'}

HELPERS = '''
def less_equal(x, y):
    """1 where x <= y, else 0, in the dtype of x."""
    x = x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=y.dtype, device=y.device)
    return (x <= y).to(x.dtype)


def select(condition, x, y):
    """x where the condition is 1, y where it is 0."""
    kind = {"dtype": condition.dtype, "device": condition.device}
    return torch.where(condition > 0.5, torch.as_tensor(x, **kind), torch.as_tensor(y, **kind))


def huber(x, delta):
    """x**2 / 2 where |x| <= delta, otherwise delta * (|x| - delta / 2)."""
    return torch.where(x.abs() <= delta, 0.5 * x * x, delta * (x.abs() - 0.5 * delta))
'''


class FormulaPrinter(StrPrinter):
    """A SymPy formula as PyTorch text."""

    def _print_Function(self, expr: sympy.Function) -> str:
        return ELEMENTWISE[type(expr).__name__].format(*(self._print(a) for a in expr.args))


def formula(body: sympy.Expr) -> str:
    return str(FormulaPrinter().doprint(body))

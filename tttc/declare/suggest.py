"""What exists, for a name that does not: `tttc.sin`, `torch.tanh(x)`, `x.sum()` in a declaration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tttc.ir.formulas import function_names

OWN = "A scalar function of your own is tttc.elementwise(formula), a formula of SymPy."

SPELLED = {  # names of other libraries: what is written here
    **dict.fromkeys(("square", "pow", "power"), "x ** 2"),
    **dict.fromkeys(("matmul", "mm", "mv", "bmm", "linear", "Linear"), "x @ W"),
    **dict.fromkeys(
        ("add", "sub", "mul", "multiply", "subtract", "divide", "true_divide"), "x + y, x - y, x * y, x / y"
    ),
    **dict.fromkeys(("neg", "negative"), "-x"),
    **dict.fromkeys(("transpose", "permute", "mT", "t"), "x.T, or tttc.einsum"),
    **dict.fromkeys(("outer", "tensordot", "inner", "bilinear"), 'tttc.einsum("i,j->ij", x, y) or tttc.dot'),
    **dict.fromkeys(("mse", "mse_loss"), "tttc.mean((x - y) ** 2)"),
    **dict.fromkeys(("l1", "l1_loss"), "tttc.mean(tttc.abs(x - y))"),
    **dict.fromkeys(("huber_loss", "smooth_l1_loss"), "tttc.mean(tttc.huber(x - y, 1.0))"),
    **dict.fromkeys(("maximum", "max", "amax"), "tttc.where(x < y, y, x), elementwise"),
    **dict.fromkeys(("minimum", "min", "amin"), "tttc.where(x < y, x, y), elementwise"),
    **dict.fromkeys(("clamp", "clip", "relu6", "hardtanh"), "tttc.where(x < most, x, most)"),
    "leaky_relu": "tttc.where(x > 0, x, 0.01 * x)",
    "elu": "tttc.where(x > 0, x, tttc.exp(x) - 1)",
    "swish": "tttc.silu(x)",
    "logsigmoid": "-tttc.softplus(-x)",
    "norm": "tttc.sqrt(tttc.sum(x * x) + eps)",
    "normalize": "tttc.l2_norm(x, eps=...)",
    "reciprocal": "1 / x",
    "detach": "tttc.stop_gradient(x)",
    "equal": "x == y",
    **dict.fromkeys(("shape", "dim", "numel", "len"), "tttc.size(x)"),
}


OPERATIONS = ["size", "along", "einsum", "elementwise", "upstream"]
"""The operations of a declaration; tttc/declare/functions.py adds the others as it makes them."""


def near(name: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The known name that this one is most like, if any is."""
    found = difflib.get_close_matches(name, list(known), 1, cutoff)
    return found[0] if found else None


def instead(name: str, among: Iterable[str] = ()) -> str:
    """What to write for an operation of this name, from wherever it is; `among` are further names that there are."""
    if name in OPERATIONS:
        return f"Use tttc.{name}."
    if name in SPELLED:
        return f"Write {SPELLED[name]}."
    if name in function_names():
        return f'Write tttc.elementwise(sympy.{name}(x))(...), with x = sympy.Symbol("x").'
    close = near(name, [*OPERATIONS, *among])
    return f"Is it tttc.{close}? {OWN}" if close in OPERATIONS else f"Is it tttc.{close}?" if close else OWN

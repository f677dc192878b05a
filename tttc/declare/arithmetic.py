"""Numbers that a declaration gives as text, "0.1 / sqrt(D)": calculated, never run as code, for the text may have come
from a file.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class NotArithmetic(ValueError):
    """Something else than numbers, dims, `+ - * / // % **` and sqrt."""


def calculated(text: str, dims: Mapping[str, int]) -> float:
    """The value of an expression of the dims; whatever is in it, nothing is run, and nothing takes long.

    Raises `NotArithmetic`, and what Python's arithmetic of floats raises.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, dims)
    except (SyntaxError, RecursionError, MemoryError):
        raise NotArithmetic("it is no expression") from None


def _value(node: ast.expr, dims: Mapping[str, int]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id=name) if name in dims:
            return float(dims[name])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return BINARY[type(op)](_value(left, dims), _value(right, dims))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](_value(operand, dims))
        case ast.Call(func=ast.Name(id="sqrt"), args=[operand], keywords=[]):
            return math.sqrt(_value(operand, dims))
        case ast.Name(id=name):
            raise NotArithmetic(f"there is no dim {name}")
    raise NotArithmetic(f"`{ast.unparse(node)}` is no number, no dim, and not made of them by + - * / // % ** and sqrt")

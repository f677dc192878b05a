"""Tracing: the user's own functions, run on `Traced` values, build the IR.

The user's surface is positional, as in NumPy; axes get their names here. `state("D", "D")` has the axes D and D1;
elementwise operations align by position and rename. A value that the user bound to a name keeps it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tttc.declare.locations import note
from tttc.declare.number import number
from tttc.declare.sizes import axis_size
from tttc.declare.suggest import instead
from tttc.errors import ShapeError, TTTCError, users_line
from tttc.ir import build as b
from tttc.ir.expr import Axes, Axis, Expr, const, leaves
from tttc.ir.names import as_declared


class Traced:
    """A value of the user's functions while they are traced: an expression, and its axes in the order of its
    dimensions.

    A comparison is a `truth`, 0 or 1, as on tensors: what torch does not do with one is refused here too.
    """

    __array_priority__ = 1000

    def __init__(self, expr: Expr, axes: Axes | None = None, *, truth: bool = False) -> None:
        self.expr = expr
        self.axes = expr.axes if axes is None else axes
        self.truth = truth
        self.viewed = False  # whether another value shares its memory where these are tensors
        note(expr)

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(a.size for a in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis_size(self.axes, i) for i in range(self.ndim))

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def T(self) -> Traced:
        self.viewed = True
        turned = Traced(self.expr, self.axes[::-1], truth=self.truth)
        turned.viewed = True
        return turned

    def __repr__(self) -> str:
        return f"Traced[{', '.join(self.dims)}]"

    def __format__(self, spec: str) -> str:
        return repr(self) if not spec else format(float(self), spec)

    def __add__(self, other: Any) -> Traced:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Traced:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Traced:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Traced:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Traced:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Traced:
        return _binary("mul", other, self)

    def __truediv__(self, other: Any) -> Traced:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Traced:
        return _binary("div", other, self)

    def __neg__(self) -> Traced:
        refuse_truths("negate", (self,))
        return Traced(b.neg(self.expr), self.axes)

    def __pos__(self) -> Traced:
        return Traced(self.expr, self.axes)

    def __abs__(self) -> Traced:
        return Traced(b.apply("abs", self.expr), self.axes)

    def __pow__(self, exponent: Any) -> Traced:
        if (n := number(exponent)) is not None:
            return Traced(b.power(self.expr, float(n)), self.axes)
        return _exp(_binary("mul", Traced(b.apply("log", self.expr), self.axes), exponent))

    def __rpow__(self, base: Any) -> Traced:
        if (n := number(base)) is None or n <= 0:
            raise unsupported(f"a power of {base!r}", "A value is an exponent of positive numbers: 2.0 ** x.")
        return _exp(_binary("mul", self, math.log(n)))

    def __matmul__(self, other: Any) -> Traced:
        return _matmul(self, other)

    def __rmatmul__(self, other: Any) -> Traced:
        return _matmul(other, self)

    def __le__(self, other: Any) -> Traced:
        return _truth(_binary("less_equal", self, other))

    def __ge__(self, other: Any) -> Traced:
        return _truth(_binary("less_equal", other, self))

    def __lt__(self, other: Any) -> Traced:
        return ~(self >= other)

    def __gt__(self, other: Any) -> Traced:
        return ~(self <= other)

    def __eq__(self, other: Any) -> Traced:  # type: ignore[override]
        return (self <= other) & (self >= other)

    def __ne__(self, other: Any) -> Traced:  # type: ignore[override]
        return ~(self == other)

    def __invert__(self) -> Traced:
        return _truth(_binary("sub", 1.0, _as_number(self)))

    def __and__(self, other: Any) -> Traced:
        return _truth(_binary("mul", _as_number(self), _as_number(other)))

    def __or__(self, other: Any) -> Traced:
        return ~(~self & ~_as_truth(other))

    __rand__, __ror__ = __and__, __or__

    def __iadd__(self, other: Any) -> Traced:
        return self._become(self + other)

    def __isub__(self, other: Any) -> Traced:
        return self._become(self - other)

    def __imul__(self, other: Any) -> Traced:
        return self._become(self * other)

    def __itruediv__(self, other: Any) -> Traced:
        return self._become(self / other)

    def __ipow__(self, other: Any) -> Traced:
        return self._become(self**other)

    def _become(self, new: Traced) -> Traced:
        """Written in place, as on tensors: whatever else has this value then has the new one."""
        if self.viewed or self.expr.op == "leaf" or self.dims != new.dims or self.truth:
            raise unsupported(
                "an in-place operation on an argument, a declared value or one that is seen in two ways",
                "Make a new value: x = x + y instead of x += y.",
            )
        self.expr, self.axes = new.expr, new.axes
        return self

    def __hash__(self) -> int:
        raise unsupported("a value as the key of a dict or in a set", "Values are known only when the layer runs.")

    def __bool__(self) -> bool:
        raise unsupported("a Python `if`, `and`, `or` or `not` on a value", "Use tttc.where(condition, x, y).")

    def __len__(self) -> int:
        if not self.axes:
            raise unsupported("the length of a value without axes", "tttc.size gives the length of an axis.")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        raise unsupported("iterating over a value", "Write the operation on the whole vector, or contract it with `@`.")

    def __contains__(self, x: Any) -> bool:
        raise unsupported("`in` on a value", "Compare elementwise: tttc.where(x == y, ..., ...).")

    def __getitem__(self, index: Any) -> Traced:
        raise unsupported("indexing a value", "Declare the parts as states, params or tokens of their own.")

    def __setitem__(self, index: Any, value: Any) -> None:
        self[index]

    def __float__(self) -> float:
        raise unsupported("turning a value into a number", "Keep it as a value; the length of an axis is tttc.size(x).")

    __int__ = __index__ = __complex__ = __round__ = __trunc__ = __floor__ = __ceil__ = __float__

    def __mod__(self, other: Any) -> Traced:
        raise unsupported("`%`, `//` or divmod on a value", "Its derivative is that of x, or 0, and jumps: use `/`.")

    __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = __rdivmod__ = __mod__

    def __array__(self, *arguments: Any, **settings: Any) -> Any:
        raise unsupported("an array of NumPy made of a value", "Use operations of tttc on it as it is.")

    def __array_ufunc__(self, ufunc: Any, method: str, *operands: Any, **settings: Any) -> Any:
        plain = method == "__call__" and not settings
        return _of_library("numpy", ufunc.__name__, operands if plain else ())

    def __array_function__(self, function: Any, types: Any, operands: Any, settings: Any) -> Any:
        return _of_library("numpy", function.__name__, ())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, operands: Any = (), settings: Any = None) -> Any:
        return _of_library("torch", getattr(function, "__name__", "a function"), () if settings else operands)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise unsupported(f"`.{name}` on a value", instead(name))


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    **dict.fromkeys(("sub", "subtract"), operator.sub),
    **dict.fromkeys(("mul", "multiply"), operator.mul),
    **dict.fromkeys(("div", "divide", "true_divide"), operator.truediv),
    **dict.fromkeys(("pow", "power"), operator.pow),
    "matmul": operator.matmul,
    **dict.fromkeys(("lt", "less"), operator.lt),
    **dict.fromkeys(("le", "less_equal"), operator.le),
    **dict.fromkeys(("gt", "greater"), operator.gt),
    **dict.fromkeys(("ge", "greater_equal"), operator.ge),
    **dict.fromkeys(("eq", "equal"), operator.eq),
    **dict.fromkeys(("ne", "not_equal"), operator.ne),
}


def _of_library(library: str, name: str, operands: Sequence[Any]) -> Traced:
    """What NumPy or torch was asked to do with a value: an operator, one side of which is a number of theirs, or no
    operation of a declaration.
    """
    if name in _OPERATORS and len(operands) == 2:
        left, right = (x if (n := number(x)) is None else n for x in operands)
        return _OPERATORS[name](left if number(left) is not None else lift(left), right)
    raise unsupported(f"{library}.{name} on a value", instead(name))


def unsupported(what: str, remedy: str) -> TTTCError:
    line = users_line()
    place = f"\n{line.shown()}" if line else ""
    return TTTCError(f"{what} is not an operation of a declaration.{place}\n  {remedy}")


def _exp(x: Traced) -> Traced:
    return Traced(b.apply("exp", x.expr), x.axes)


def _truth(x: Traced) -> Traced:
    return Traced(x.expr, x.axes, truth=True)


def _as_truth(x: Any) -> Traced:
    if not (isinstance(x, Traced) and x.truth):
        raise unsupported("`&`, `|` or `~` on what is no comparison", "Combine comparisons: (x > 0) & (y > 0).")
    return x


def _as_number(x: Any) -> Traced:
    """A comparison as the number 0 or 1."""
    return Traced(_as_truth(x).expr, x.axes)


def refuse_truths(verb: str, operands: Sequence[Traced]) -> None:
    """torch neither subtracts nor negates the results of comparisons, and adds them as `or`."""
    if any(x.truth for x in operands):
        remedy = "Make numbers of it: tttc.where(condition, 1.0, 0.0); or combine with `&`, `|` and `~`."
        raise unsupported(f"to {verb} the result of a comparison", remedy)


# -- values ------------------------------------------------------------------------------------------------------------


def lift(x: Any) -> Traced:
    """A traced value; numbers, of NumPy and torch too, become constants."""
    if isinstance(x, Traced):
        return x
    if (n := number(x)) is None:
        kind = "a tensor that is trained" if getattr(x, "requires_grad", False) else f"a {type(x).__name__}"
        remedy = "Operands are traced values and numbers."
        if hasattr(x, "ndim"):
            remedy += " Declare it: tttc.param(..., init=...) for weights, tttc.token(...) for what comes with a token."
        raise unsupported(f"{kind} among the operands", remedy)
    return Traced(const(float(n)))


def leaf_axes(dims: Sequence[str]) -> Axes:
    """Axes for declared dims, each with a name of its own: ("D", "D") -> D, D1."""
    axes: list[Axis] = []
    for dim in dims:
        axes.append(b.fresh(Axis(dim, dim), axes))
    return tuple(axes)


def aligned(operands: Sequence[Traced], what: str) -> tuple[list[Expr], Axes]:
    """Rename axes so that positions agree from the last dimension backwards, as NumPy broadcasts; the axes of the
    result.
    """
    widest = max(operands, key=lambda o: len(o.axes))
    renamed = []
    for operand in operands:
        own = widest.axes[len(widest.axes) - len(operand.axes) :]
        if any(a.size != t.size for a, t in zip(operand.axes, own, strict=True)):
            pair = [o for o in operands if o is operand or o is widest]
            raise shape_error(
                f"cannot {what}", pair, "Declare both alike, or contract the axis that is too many with `@`."
            )
        renamed.append(b.rename(operand.expr, dict(zip(operand.axes, own, strict=True))))
    return renamed, widest.axes


_VERBS = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "less_equal": "compare"}


def _binary(op: str, left: Any, right: Any) -> Traced:
    lifted = [lift(left), lift(right)]
    if op == "sub" or (op == "add" and all(x.truth for x in lifted)):
        refuse_truths(_VERBS[op], lifted)
    operands, axes = aligned(lifted, _VERBS[op])
    return Traced(b.apply(op, *operands), axes)


def _matmul(left: Any, right: Any) -> Traced:
    a, c = lift(left), lift(right)
    refuse_truths("contract", (a, c))
    what = "cannot contract with `@`"
    if not a.axes or not c.axes:
        raise shape_error(what, (a, c), "A number multiplies with `*`.")
    if a.ndim > 2 or c.ndim > 2:
        raise shape_error(what, (a, c), "`@` takes vectors and matrices.")
    summed, other = a.axes[-1], c.axes[0]
    if summed.size != other.size:
        remedy = f"The last axis of the left side must be the first of the right: {summed.size} is not {other.size}."
        raise shape_error(what, (a, c), remedy)
    moved, kept = {other: summed}, list(a.axes)
    for axis in c.axes[1:]:
        moved[axis] = axis if axis not in kept else b.fresh(axis, [*kept, *c.axes])
        kept.append(moved[axis])
    kept.remove(summed)
    return Traced(b.contract((a.expr, b.rename(c.expr, moved)), (summed,)), tuple(kept))


def shape_error(what: str, operands: Sequence[Traced], remedy: str) -> ShapeError:
    shapes = " and ".join("[" + ", ".join(o.dims) + "]" for o in operands)
    line = users_line()
    place = f"\n{line.shown()}" if line else ""
    origins = {dim: origin for o in operands for dim in o.dims if (origin := _origin(o.expr, dim))}
    whence = "; ".join(f"{dim} comes from {origin}" for dim, origin in origins.items())
    return ShapeError(f"{what} {shapes}.{place}" + (f"\n    {whence}" if whence else "") + f"\n  {remedy}")


def _origin(e: Expr, dim: str) -> str:
    """The declared value that brought a dim into an expression."""
    found = [x.variable for x in leaves([e]) if dim in (a.size for a in x.axes)]
    return f"{found[-1].role} {as_declared(found[-1].name)}" if found else ""

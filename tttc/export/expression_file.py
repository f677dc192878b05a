"""Expressions as JSON: a list of nodes, each after its operands, which it names by their place in the list.

    [["leaf", [], ["k", "token", [["D", "D"]]]],
     ["leaf", [], ["W", "state", [["D", "D"], ["D:1", "D"]]]],
     ["contract", [0, 1], [["D", "D"]]]]                           k @ W

Reading runs nothing: an operation is a row of the table of operations, its operands and its argument are of the kind
that the row takes, and its type rule has the last word. A formula of the user's own is such a list too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy

from tttc.export.json_checks import LARGEST_INTEGER, Malformed, fail, integer, items, name, number, one_of, shown, table
from tttc.ir.expr import OPS, Axis, Expr, Leaf, postorder
from tttc.ir.formulas import ELEMENTARY, formula_name
from tttc.ir.scalars import SCALARS, Formula
from tttc.ir.spec import OF_ONE_TOKEN

MOST_NODES = 20_000
LARGEST_FORMULA = 10_000  # nodes, what is shared counted as often as it stands there
LARGEST_POWER = 64  # of a number; of an expression it may be any number
LEAF_ROLES = ("state", "param", "token", "gate", "output", "end", "memory")
Read = Callable[[Any, str], Any]


# -- arguments ---------------------------------------------------------------------------------------------------------


def axis(x: Any, where: str) -> Axis:
    called, size = items(x, where, 2)
    return Axis(name(called, f"{where}, the name of an axis"), name(size, f"{where}, the size of an axis"))


def axes(x: Any, where: str) -> tuple[Axis, ...]:
    found = tuple(axis(a, where) for a in items(x, where))
    if len(set(found)) != len(found):
        fail(f"{where} has an axis twice")
    return found


def _leaf(x: Any, where: str) -> tuple[Leaf, tuple[Axis, ...]]:
    called, role, own = items(x, where, 3)
    return Leaf(name(called, where), one_of(role, f"{where}, the role of a leaf", LEAF_ROLES)), axes(own, where)


def _renamed(x: Any, where: str) -> tuple[tuple[Axis, Axis], ...]:
    pairs = [items(pair, where, 2) for pair in items(x, where)]
    found = tuple((axis(old, where), axis(new, where)) for old, new in pairs)
    if any(old.size != new.size for old, new in found):
        fail(f"{where} gives an axis another size")
    return found


def _normalized(x: Any, where: str) -> tuple[Axis, float]:
    along, eps = items(x, where, 2)
    return axis(along, where), number(eps, where)


def _nothing(x: Any, where: str) -> None:
    if x is not None:
        fail(f"{where} has the argument {shown(x)}, and takes none")


ARGUMENTS: dict[str, Read] = {
    "leaf": _leaf,
    "const": number,
    "size": axis,
    "pow": number,
    "contract": axes,
    "sum": axes,
    "mean": axes,
    "max": axes,
    "softmax": axes,
    "broadcast": axes,
    "rename": _renamed,
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "l2_norm": _normalized,
}
"""How the argument of an operation is read; the others have none."""

ARITY = {"leaf": 0, "const": 0, "size": 0, "layer_norm": 3, "rms_norm": 2} | {n: r.arity for n, r in SCALARS.items()}
"""How many operands an operation has; a contraction has any, a formula those of its symbols, the others one."""


def _plain(x: Any) -> Any:
    """An argument as JSON."""
    if isinstance(x, Formula):
        return written_formula(x)
    if isinstance(x, Leaf):
        return [x.name, x.role]
    return [_plain(y) for y in x] if isinstance(x, tuple) else x


def _argument(e: Expr) -> Any:
    if e.op == "leaf":
        return [e.name, e.role, _plain(e.axes)]
    return _plain(e.arg)


# -- nodes -------------------------------------------------------------------------------------------------------------


def written_nodes(roots: Iterable[Expr]) -> tuple[list[Any], dict[Expr, int]]:
    """The nodes of some expressions, and where each stands."""
    places: dict[Expr, int] = {}
    lines: list[Any] = []
    for e in postorder(roots):
        places[e] = len(lines)
        lines.append([e.op, [places[s] for s in e.src], _argument(e)])
    return lines, places


def read_nodes(x: Any) -> list[Expr]:
    """The expressions of a list; raises `Malformed`."""
    lines = items(x, "nodes")
    if len(lines) > MOST_NODES:
        fail(f"there are {len(lines)} nodes, more than {MOST_NODES}")
    found: list[Expr] = []
    for i, line in enumerate(lines):
        found.append(_node(items(line, f"node {i}", 3), f"node {i}", found))
    return found


def _node(line: Sequence[Any], where: str, known: Sequence[Expr]) -> Expr:
    op, operands, argument = line
    if not isinstance(op, str) or op not in OF_ONE_TOKEN:
        fail(f"{where} is {shown(op)}, which is no operation on one token")
    places = [integer(p, f"{where}, an operand,", 0, len(known) - 1) for p in items(operands, where)]
    where = f"{where}, {op},"
    arg = read_formula(argument, where) if op == "map" else ARGUMENTS.get(op, _nothing)(argument, where)
    wanted = len(arg.symbols) if op == "map" else ARITY.get(op, 1)
    if len(places) != wanted and not (op == "contract" and places):
        fail(f"{where} has {len(places)} operands, it takes {wanted}")
    try:
        made = Expr(op, tuple(known[p] for p in places), arg)
    except Exception as error:  # a type rule says in its own way what it does not take
        raise Malformed(f"{where} has no type: {error}") from None
    if OPS[op].make is not None and len(set(made.axes)) != len(made.axes):
        fail(f"{where} has an axis twice")
    return made


# -- formulas ----------------------------------------------------------------------------------------------------------

CONSTANTS = {"pi": sympy.pi, "e": sympy.E}
OF_NUMBERS: dict[str, Any] = {
    f"{f.__name__} of a number": f
    for f in (sympy.exp, sympy.log, sympy.sin, sympy.cos, sympy.tan, sympy.sinh, sympy.cosh, sympy.tanh, sympy.erf)
}
"""SymPy's own functions, which stay where a formula has a number of theirs."""
SUMS = {"add": sympy.Add, "mul": sympy.Mul}


def written_formula(formula: Formula) -> dict[str, Any]:
    """A formula by its parts, its symbols first."""
    lines: list[Any] = [["symbol", s.name] for s in formula.symbols]
    places: dict[Any, int] = {s: i for i, s in enumerate(formula.symbols)}
    for part in sympy.postorder_traversal(formula.body):
        if part not in places:
            places[part] = len(lines)
            lines.append(_written_part(part, [places[a] for a in part.args]))
    return {"name": formula.name, "parts": lines, "body": places[formula.body]}


def _written_part(part: Any, operands: list[int]) -> list[Any]:
    for kind, constant in CONSTANTS.items():
        if part == constant:
            return [kind]
    if part.is_Rational:
        return ["ratio", int(part.p), int(part.q)]
    if part.is_Float:
        sign, mantissa, exponent, _ = part._mpf_
        return ["float", -int(mantissa) if sign else int(mantissa), int(exponent), int(part._prec)]
    if part.is_Pow and type(part).__name__ == "Pow":
        return ["power", *operands]
    for kind, made_by in (SUMS | ELEMENTARY | OF_NUMBERS).items():
        if type(part) is made_by:
            return [kind, *operands]
    fail(f"a formula has {type(part).__name__}, for which files have no word")


def read_formula(x: Any, where: str) -> Formula:
    """A formula, made of the functions that formulas have; raises `Malformed`."""
    given = table(x, where, ("name", "parts", "body"))
    found: list[Any] = []
    sizes: list[int] = []
    for i, line in enumerate(items(given["parts"], where)):
        place = f"{where} part {i} of its formula"
        operands = _operands(items(line, place), place, len(found))
        sizes.append(1 + sum(sizes[p] for p in operands))
        if sizes[-1] > LARGEST_FORMULA or i > LARGEST_FORMULA:
            fail(f"{place} is larger than any formula")
        found.append(_part(line, [found[p] for p in operands], place))
    body = found[integer(given["body"], f"{where} the body of its formula", 0, len(found) - 1)]
    symbols = tuple(s for s in found if s.is_Symbol)
    if len(set(symbols)) != len(symbols) or not symbols or not body.free_symbols <= set(symbols):
        fail(f"{where} its formula has not its own symbols")
    if given["name"] != formula_name(body):
        fail(f"{where} its formula is called {shown(given['name'])}, it is {formula_name(body)}")
    return Formula(given["name"], symbols, body)


def _operands(line: list[Any], where: str, count: int) -> list[int]:
    if not line or not isinstance(line[0], str):
        fail(f"{where} is {shown(line)}")
    if line[0] in ("symbol", "ratio", "float", *CONSTANTS):
        return []
    return [integer(p, f"{where}, an operand,", 0, count - 1) for p in line[1:]]


def _part(line: list[Any], operands: list[Any], where: str) -> Any:
    kind, *rest = line
    if kind in CONSTANTS and not rest:
        return CONSTANTS[kind]
    if kind == "symbol" and len(rest) == 1:
        return sympy.Symbol(name(rest[0], where), real=True)
    if kind == "ratio" and len(rest) == 2:
        return sympy.Rational(integer(rest[0], where, -LARGEST_INTEGER), integer(rest[1], where))
    if kind == "float" and len(rest) == 3:
        return _float(rest, where)
    if kind == "power" and len(rest) == 2:
        made = _power(operands[0], operands[1], where)
    elif kind in SUMS and len(rest) > 1:
        made = SUMS[kind](*operands)
    elif kind in ELEMENTARY and len(rest) in ELEMENTARY[kind].nargs:
        made = ELEMENTARY[kind](*operands)
    elif kind in OF_NUMBERS and len(rest) == 1 and operands[0].is_number:
        made = OF_NUMBERS[kind](*operands)
    else:
        fail(f"{where} is {shown(line)}")
    if made.is_Rational:
        fail(f"{where} is a number in other words")
    return made


def _float(rest: Sequence[Any], where: str) -> Any:
    mantissa, exponent, digits = rest
    size = abs(integer(mantissa, where, -(2**256), 2**256))
    exponent, precision = integer(exponent, where, -2000, 2000), integer(digits, where, 1, 256)
    return sympy.Float((int(mantissa < 0), size, exponent, size.bit_length()), precision=precision)


def _power(base: Any, exponent: Any, where: str) -> Any:
    small = exponent.is_Rational and abs(exponent) <= LARGEST_POWER
    if base.is_number and not (base.is_Atom and small):
        fail(f"{where} is a power of a number that no formula has")
    if exponent.is_number and not exponent.is_comparable:
        fail(f"{where} has an exponent that is no real number")
    return base**exponent

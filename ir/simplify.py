"""Simplification: algebra that leaves a value alone and makes it shorter.

0.5 * (2 * (k @ W - v)) * 1  ->  k @ W - v
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from tttc.ir import build as b
from tttc.ir.contraction import layout
from tttc.ir.expr import OPS, Axis, Expr, const, is_const
from tttc.ir.program import Assign, Block, For, Program, Statement
from tttc.ir.rewrite import Rule, rewrite, rule
from tttc.ir.scalars import SCALARS

P = TypeVar("P", bound=Program)


def _scalar(e: Expr) -> bool:
    return not e.axes


def _spread(e: Expr, like: Expr) -> Expr:
    """`e` with every axis of `like`: what replaces a node must have its axes."""
    return b.broadcast(e, like.axes)


def _orders(e: Expr) -> tuple[tuple[Expr, ...], ...]:
    """The two operands of a node, in each order that gives its value."""
    return (e.src, e.src[::-1]) if e.op in ("add", "mul") else (e.src,)


@rule("f(2, 3) -> its value")
def fold_constants(e: Expr) -> Expr | None:
    if e.src and all(s.op == "const" for s in e.src) and (e.op in SCALARS or e.op in ("pow", "map")):
        with np.errstate(all="ignore"):  # 1 / 0 is infinite, as in floating point
            return const(float(OPS[e.op].numpy(e, {}, *(np.float64(s.arg) for s in e.src))))  # type: ignore[misc]
    return None


@rule("x / 0 -> x * inf", "div")
def divide_by_zero(e: Expr) -> Expr | None:
    """The same number, NaN where x is 0, and no language's constant division by zero."""
    match e:
        case Expr("div", (x, zero)) if is_const(zero, 0):
            return b.mul(x, const(math.copysign(math.inf, zero.arg)))
    return None


@rule("x * 1 -> x", "mul", "div")
def multiply_by_one(e: Expr) -> Expr | None:
    return next((x for x, one in _orders(e) if is_const(one, 1)), None)


@rule("x + 0 -> x", "add", "sub")
def add_zero(e: Expr) -> Expr | None:
    for x, zero in _orders(e):
        if is_const(zero, 0):
            return x
    return b.neg(e.src[1]) if e.op == "sub" and is_const(e.src[0], 0) else None


@rule("x * 0 -> 0", "mul", "contract", "sum", "mean", "mask", "last", "put_last", "neg")
def multiply_by_zero(e: Expr) -> Expr | None:
    if any(s.op == "const" and not math.isfinite(s.arg) for s in map(_value, e.src)):
        return None  # infinity times 0 is NaN
    match e:
        case Expr("mul" | "contract", src) if any(is_const(_value(s), 0) for s in src):
            return _spread(const(0), e)
        case Expr("sum" | "mean" | "mask" | "last" | "put_last" | "neg", (x,)) if is_const(_value(x), 0):
            return _spread(const(0), e)
    return None


def _value(e: Expr) -> Expr:
    """What a broadcast repeats."""
    while e.op in ("broadcast", "rename"):
        e = e.src[0]
    return e


@rule("f(broadcast(x), y) -> f(x, y)", "add", "sub", "mul", "div")
def drop_broadcast(e: Expr) -> Expr | None:
    """Elementwise operations broadcast by themselves."""
    for i, s in enumerate(e.src):
        if s.op == "broadcast":
            src = (*e.src[:i], s.src[0], *e.src[i + 1 :])
            result = Expr(e.op, src)
            if set(result.axes) == set(e.axes):
                return result
    return None


@rule("--x -> x", "neg")
def double_negation(e: Expr) -> Expr | None:
    match e:
        case Expr("neg", (Expr("neg", (x,)),)):
            return x
    return None


@rule("x + -y -> x - y", "add", "sub")
def add_negative(e: Expr) -> Expr | None:
    match e:
        case Expr("add", (x, Expr("neg", (y,))) | (Expr("neg", (y,)), x)):
            return b.sub(x, y)
        case Expr("sub", (x, Expr("neg", (y,)))):
            return b.add(x, y)
        case Expr("sub", (Expr("neg", (x,)), y)):
            return b.neg(b.add(x, y))
    return None


@rule("x * -1 -> -x", "mul")
def multiply_by_minus_one(e: Expr) -> Expr | None:
    return next((b.neg(x) for x, c in _orders(e) if is_const(c, -1)), None)


@rule("a * -b -> -(a * b)", "mul", "div", "contract", "sum", "mean", "mask", "rename", "last", "put_last")
def pull_sign(e: Expr) -> Expr | None:
    match e:
        case Expr("mul" | "div", (Expr("neg", (x,)), y)):
            return b.neg(Expr(e.op, (x, y)))
        case Expr("mul" | "div", (x, Expr("neg", (y,)))):
            return b.neg(Expr(e.op, (x, y)))
        case Expr("contract", src, over) if any(s.op == "neg" for s in src):
            signs = sum(s.op == "neg" for s in src)
            product = b.contract([s.src[0] if s.op == "neg" else s for s in src], over)
            return b.neg(product) if signs % 2 else product
        case Expr("sum" | "mean" | "mask" | "rename" | "last" | "put_last", (Expr("neg", (x,)),), arg):
            return b.neg(b.rename(x, dict(arg)) if e.op == "rename" else Expr(e.op, (x,), arg))
    return None


def _number(e: Expr) -> bool:
    """Whether the value is known when the program is compiled: made of constants and sizes alone."""
    return e.op in ("const", "size") or (e.op in ("mul", "div") and all(map(_number, e.src)))


@rule("x * c -> c * x", "mul", "div")
def number_first(e: Expr) -> Expr | None:
    match e:
        case Expr("mul", (x, c)) if _number(c) and not _number(x):
            return b.mul(c, x)
        case Expr("div", (Expr("mul", (c, x)), y)) if _number(c) and not _number(y) and not _number(x):
            return b.mul(c, b.div(x, y))
    return None


@rule("a * (b * x) -> (a * b) * x", "mul", "neg")
def merge_numbers(e: Expr) -> Expr | None:
    match e:
        case Expr("mul", (a, Expr("mul", (c, x)))) if _number(a) and _number(c):
            return b.mul(b.mul(a, c), x)
        case Expr("mul", (Expr("mul", (c, x)), y)) if _number(c) and not _number(x):
            return b.mul(c, b.mul(x, y))
        case Expr("mul", (y, Expr("mul", (c, x)))) if _number(c) and not _number(y):
            return b.mul(c, b.mul(y, x))
        case Expr("mul", (a, Expr("div", (c, n))) | (Expr("div", (c, n)), a)) if is_const(a) and is_const(c):
            return b.div(const(a.arg * c.arg), n)
        case Expr("neg", (Expr("mul", (c, x)),)) if is_const(c):
            return b.mul(const(-c.arg), x)
    return None


@rule("x ** 1 -> x, x ** 0 -> 1", "pow")
def trivial_power(e: Expr) -> Expr | None:
    match e:
        case Expr("pow", (x,), 1):
            return x
        case Expr("pow", (x,), 0):
            return _spread(const(1), e)
    return None


@rule("sum over no axis -> x", "sum", "mean", "contract")
def empty_sum(e: Expr) -> Expr | None:
    match e:
        case Expr("sum" | "mean" | "contract", (x,), ()):
            return x
    return None


@rule("contraction with a number -> number * contraction", "contract")
def pull_scalar(e: Expr) -> Expr | None:
    """Numbers and values without axes leave a contraction over the others."""
    match e:
        case Expr("contract", src, over):
            outside = [s for s in src if is_const(s)]
            if outside and len(src) - len(outside) >= 1:
                rest = b.contract([s for s in src if s not in outside], over)
                if set(rest.axes) != set(e.axes):
                    return None
                for s in outside:
                    rest = b.mul(s, rest)
                return rest
    return None


@rule("contraction of c * x -> c * contraction of x", "contract", "sum", "mean")
def pull_constant(e: Expr) -> Expr | None:
    match e:
        case Expr("contract", src, over):
            for i, s in enumerate(src):
                if s.op == "mul" and _number(s.src[0]):
                    return b.mul(s.src[0], b.contract((*src[:i], s.src[1], *src[i + 1 :]), over))
        case Expr("sum" | "mean", (Expr("mul", (c, x)),), over) if _number(c):
            return b.mul(c, Expr(e.op, (x,), over))
    return None


@rule("rename(rename(x)) -> rename(x)", "rename")
def merge_renames(e: Expr) -> Expr | None:
    """Push a renaming onto leaves, through broadcasts of numbers, and onto another renaming."""
    match e:
        case Expr("rename", (x,), arg) if x.op in ("leaf", "rename", "const"):
            return b.rename(x, dict(arg))
        case Expr("rename", (Expr("broadcast", (x,), axes),), arg):
            to = dict(arg)
            return b.broadcast(b.rename(x, to), tuple(to.get(a, a) for a in axes))
    return None


@rule("broadcast(x) -> x where x has the axes", "broadcast")
def trivial_broadcast(e: Expr) -> Expr | None:
    match e:
        case Expr("broadcast", (x,), axes) if set(axes) <= set(x.axes):
            return x
        case Expr("broadcast", (Expr("broadcast", (x,)),)):
            return b.broadcast(x, e.axes)
    return None


@rule("product of values without axes to the smaller side", "mul")
def scalar_factor(e: Expr) -> Expr | None:
    """(a * x) * y -> x * (a * y) where a and y have fewer axes than x: the large array is multiplied once."""
    match e:
        case Expr("mul", (Expr("mul", (a, x)), y)) if len(a.axes) < len(x.axes) and len(y.axes) < len(x.axes):
            if set(y.axes) <= set(a.axes) or set(a.axes) <= set(y.axes):
                return b.mul(b.mul(a, y), x)
    return None


@rule("x + x -> 2 * x", "add")
def double(e: Expr) -> Expr | None:
    match e:
        case Expr("add", (x, y)) if x is y:
            return b.mul(const(2), x)
        case Expr("add", (Expr("mul", (c, x)), y)) if is_const(c) and x is y:
            return b.mul(const(c.arg + 1), x)
    return None


@rule("sum(x) / n -> mean(x)", "div")
def mean_from_sum(e: Expr) -> Expr | None:
    match e:
        case Expr("div", (x, Expr("size", (), axis))):
            return _mean_inside(x, axis)
    return None


def _mean_inside(x: Expr, axis: Axis) -> Expr | None:
    """x / size(axis) where a factor of x is a sum over that axis."""
    match x:
        case Expr("sum", (y,), over) if over == (axis,):
            return b.mean(y, over)
        case Expr("contract", (y, z), over) if over == (axis,) and (layout(x).kind == "dot" or not x.axes):
            return b.mean(b.mul(y, z), over)
        case Expr("mul", (y, z)):
            if (found := _mean_inside(y, axis)) is not None:
                return b.mul(found, z)
            if (found := _mean_inside(z, axis)) is not None:
                return b.mul(y, found)
        case Expr("neg", (y,)):
            found = _mean_inside(y, axis)
            return None if found is None else b.neg(found)
    return None


@rule("(a * x) / n -> a * (x / n) where x is the smaller", "div")
def divide_smaller(e: Expr) -> Expr | None:
    match e:
        case Expr("div", (Expr("mul", (a, x)), n)) if not n.axes and len(x.axes) < len(a.axes):
            return b.mul(a, b.div(x, n))
        case Expr("div", (Expr("mul", (x, a)), n)) if not n.axes and len(x.axes) < len(a.axes):
            return b.mul(b.div(x, n), a)
    return None


@rule("g @ x + ... + h @ x -> (g + h) @ x + ...", "add", "sub")
def factor_contraction(e: Expr) -> Expr | None:
    """Contractions in a sum that share an operand: one product instead of two. Here a bias becomes the +1 of a Gram
    matrix.
    """
    terms = _sum_terms(e)
    for i, (sign, x) in enumerate(terms):
        for k in range(i + 1, len(terms)):
            joined = _joined(x, terms[k][1], sign * terms[k][0])
            if joined is not None:
                return _sum([*terms[:i], *terms[i + 1 : k], (sign, joined), *terms[k + 1 :]])
    return None


MOST_TERMS = 48  # of a sum that are searched for common factors: the search is quadratic


def _sum_terms(e: Expr) -> list[tuple[int, Expr]]:
    """The terms of a sum with their signs, in order; what is beyond the limit stays one term."""
    terms, i = [(1, e)], 0
    while i < len(terms) and len(terms) < MOST_TERMS:
        sign, x = terms[i]
        match x:
            case Expr("add" | "sub", (y, z)):
                terms[i : i + 1] = [(sign, y), (sign if x.op == "add" else -sign, z)]
            case Expr("neg", (y,)):
                terms[i] = (-sign, y)
            case _:
                i += 1
    return terms


def _sum(terms: list[tuple[int, Expr]]) -> Expr:
    terms = sorted(terms, key=lambda t: -t[0])  # what is added comes first
    sign, result = terms[0]
    result = result if sign > 0 else b.neg(result)
    for sign, x in terms[1:]:
        result = (b.add if sign > 0 else b.sub)(result, x)
    return result


def _joined(x: Expr, y: Expr, sign: int) -> Expr | None:
    """x + sign * y as one contraction, where they share an operand and have the same axes."""
    match x, y:
        case (Expr("contract", (a, g), over), Expr("contract", (c, h), over2)) if set(over) == set(over2):
            if set(x.axes) != set(y.axes):
                return None
            combine = b.add if sign > 0 else b.sub
            if g is h and set(a.axes) == set(c.axes):
                return b.contract((combine(a, c), g), over)
            if a is c and set(g.axes) == set(h.axes):
                return b.contract((a, combine(g, h)), over)
    return None


@rule("a * m + a -> a * (m + 1)", "add")
def factor_product(e: Expr) -> Expr | None:
    for product, c in _orders(e):
        for a, m in _orders(product) if product.op == "mul" else ():
            if a is c and len(a.axes) >= len(m.axes):
                return b.mul(a, b.add(m, const(1)))
    return None


@rule("mask(1) * x -> mask(x)", "mul")
def mask_of_ones(e: Expr) -> Expr | None:
    for mask, x in _orders(e):
        if mask.op == "mask" and _value(mask.src[0]).op == "const" and set(x.axes) == set(e.axes):
            rows, columns, strict = mask.arg
            return b.mask(b.mul(_value(mask.src[0]), x), rows, columns, strict=strict)
    return None


@rule("a[t] * (product of a before t) -> product of a up to t", "mul")
def extend_product(e: Expr) -> Expr | None:
    """Of `segprod`, which holds a one where t = s, that leaves what lies below."""
    for factor, shifted in _orders(e):
        match shifted:
            case Expr("shift", (Expr("cumprod", (x,), axis) as product,), (along, fill)):
                if axis == along and fill == 1 and factor in (x, _value(x)):
                    return product
            case Expr("shift", (Expr("segprod", (x,), (rows, columns)) as product,), (along, fill)):
                if rows == along and fill == 0 and factor in (x, _value(x)):
                    return b.mask(product, rows, columns, strict=True)
    return None


RULES: tuple[Rule, ...] = tuple(found for found in vars().values() if isinstance(found, Rule))
"""All of the above, in their order."""


@rule("c * (a * x) -> (c * a) * x where a is the smaller", "mul")
def number_to_smallest(e: Expr) -> Expr | None:
    match e:
        case Expr("mul", (c, Expr("mul", (a, x)))) if _number(c) and not _number(a):
            if len(a.axes) < len(x.axes):
                return b.mul(b.mul(c, a), x)
            if len(x.axes) < len(a.axes):
                return b.mul(a, b.mul(c, x))
    return None


FINISHING: tuple[Rule, ...] = (number_to_smallest,)


def simplify(roots: Iterable[Expr], moved: dict[Expr, Expr] | None = None) -> list[Expr]:
    """The shortest form that the rules reach; every root keeps its set of axes.

    Numbers are first gathered in front, so that they meet, and then put where they cost least.
    """
    gathered = rewrite(roots, RULES, moved)
    return rewrite(gathered, FINISHING, moved)


def renamed_hints(hints: Mapping[Expr, str], moved: Mapping[Expr, Expr]) -> dict[Expr, str]:
    """The user's names, moved along with the values that they belong to."""
    result: dict[Expr, str] = {}
    for e, name in hints.items():
        result.setdefault(moved.get(e, e), name)
    return result


def simplify_assigns(
    assigns: Sequence[Assign], names: Mapping[Expr, str]
) -> tuple[tuple[Assign, ...], dict[Expr, str], dict[Expr, Expr]]:
    """Simplify assignments together, so that what they share stays one node; names follow their values."""
    moved: dict[Expr, Expr] = {}
    values = simplify([a.value for a in assigns], moved)
    done = tuple(Assign(a.target, v) for a, v in zip(assigns, values, strict=True))
    return done, {**names, **renamed_hints(names, moved)}, moved


def simplify_program(program: P) -> P:
    """Every block of a program simplified, the values of one together."""
    names = dict(program.names)

    def statement(s: Statement) -> Statement:
        if isinstance(s, For):
            return replace(s, body=tuple(statement(x) for x in s.body))
        if not isinstance(s, Block):
            return s
        done, _, moved = simplify_assigns(s.assigns, {})
        names.update(renamed_hints(program.names, moved))
        return Block(done)

    functions = tuple(replace(f, body=tuple(statement(s) for s in f.body)) for f in program.functions)
    return replace(program, functions=functions, names=names)

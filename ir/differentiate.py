"""Reverse-mode differentiation of expressions: one engine for the inner gradient and for the outer backward.

loss: f64 = 0.5 * sum((k @ W + b - v) ** 2)
->
r: f64[E] = k @ W + b - v
dW = outer(k, r)                  a contraction over nothing: never multiplied out, so the dual form can take it apart
db = r
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tttc.ir import build as b
from tttc.ir.expr import OPS, Expr, const, depends_on, leaf, leaves, postorder, transform
from tttc.ir.expr import rebuild as rebuilt
from tttc.ir.names import differential
from tttc.ir.program import Assign, Block, Function, GradientProgram, TokenProgram, blocks


class NoGradient(Exception):
    """The loss depends on none of the states."""


class NoAdjoint(Exception):
    """Internal: an op without a derivative was reached."""


def differentiate(program: TokenProgram) -> GradientProgram:
    """loss -> gradient: the derivative of the loss with respect to every state, kept as products."""
    states = program.update.states
    (block,) = blocks(program["loss"].body)
    (loss,) = lower_composites([block.assigns[0].value], states)
    read = [e for e in leaves([loss]) if e.role == "state"]
    found, named = vjp([(loss, const(1))], read, program.names, prefix="g_")
    if all(g is None for g in found):
        raise NoGradient(", ".join(w.name for w in states))
    assigns = []
    for w in states:
        total = collected(w, zip(read, found, strict=True))
        value = b.broadcast(const(0) if total is None else total, w.axes)
        assigns.append(Assign(leaf(differential(w.name), "gradient", w.axes), value))
    used = {e.name for e in leaves(a.value for a in assigns)}
    params = tuple(p for p in program["loss"].params if p.name in used)
    gradient = Function("gradient", params, (Block(tuple(assigns)),), tuple(a.target for a in assigns))
    names = {**program.names, **named}
    functions = (gradient, program["output"])
    return GradientProgram.of(program, "differentiate", functions=functions, names=names, loss=program["loss"])


def collected(variable: Expr, found: Iterable[tuple[Expr, Expr | None]]) -> Expr | None:
    """The cotangent of a variable: leaves that read it under other axis names are added up."""
    total: Expr | None = None
    for e, g in found:
        if e.variable == variable.variable and g is not None:
            aligned = b.rename(g, dict(zip(e.axes, variable.axes, strict=True)))
            total = aligned if total is None else b.add(total, aligned)
    return total


def lower_composites(roots: Iterable[Expr], of: Iterable[Expr]) -> list[Expr]:
    """Replace the composite ops that depend on the nodes `of` by simpler ones; the others stay whole."""
    roots = list(roots)
    active = depends_on(roots, of)

    def visit(node: Expr, src: tuple[Expr, ...]) -> Expr:
        lower = OPS[node.op].lower
        new = rebuilt(node, src)
        return lower(new) if lower and node in active else new

    return transform(roots, visit)


def vjp(
    outputs: Sequence[tuple[Expr, Expr]],
    wrt: Sequence[Expr],
    names: Mapping[Expr, str] | None = None,
    prefix: str = "d",
) -> tuple[list[Expr | None], dict[Expr, str]]:
    """The cotangents of the nodes `wrt`, given (output, its cotangent) pairs; None where there is no dependence.

    Composite ops on the way must have been lowered. A cotangent lacks the axes along which it is constant. The second
    result names the cotangents of named values: z -> dz.
    """
    active = depends_on([y for y, _ in outputs], wrt)
    cotangent: dict[Expr, Expr] = {}
    named: dict[Expr, str] = {}

    def accumulate(node: Expr, g: Expr) -> None:
        cotangent[node] = b.add(cotangent[node], g) if node in cotangent else g

    for y, g in outputs:
        if y in active:
            accumulate(y, g)
    for node in reversed(postorder(y for y, _ in outputs)):
        if node not in cotangent or node not in active or node in wrt:
            continue
        g = cotangent[node]
        if names and node in names:
            named.setdefault(g, prefix + names[node])
        adjoint = OPS[node.op].adjoint
        if adjoint is None:
            raise NoAdjoint(node.op)
        for operand, contribution in zip(node.src, adjoint(g, node, *node.src), strict=True):
            if contribution is not None and operand in active:
                accumulate(operand, contribution)
    return [cotangent.get(x) for x in wrt], named

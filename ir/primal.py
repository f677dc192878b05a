"""The primal program: the definition, a loop over tokens in which every gradient is taken at the mini-batch's start.

gradient(k, v, W) -> dW,  output(q, W) -> z
->
for m in chunks(T, 16):
    W_start = W
    S_W = 0
    for t in m:
        S_W = S_W + lr[t] * dW                W = W_start - tau[t] * S_W                z[t] = output(q[t]; W)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tttc.ir import build as b
from tttc.ir.expr import Expr, Leaf, const, leaf, rebuild, transform
from tttc.ir.program import Allocate, Assign, Block, For, Function, Program, Statement, Update, blocks
from tttc.ir.simplify import renamed_hints, simplify_program


def token_loop(program: Program) -> Program:
    """Put the per-token functions `gradient` and `output` into the loops of the update rule."""
    program = replace(program, per_token=program.functions)
    update = _update(program)
    gradients, z = per_token(program)
    start = {_name(w): leaf(f"{_name(w)}_start", "state", w.axes) for w in update.states}
    total = {_name(w): leaf(f"S_{_name(w)}", "sum", w.axes) for w in update.states}
    moved: dict[Expr, Expr] = {}

    def placed(e: Expr, weights: Mapping[str, Expr]) -> Expr:
        return at_token(e, {w: weights[_name(w)] for w in update.states}, moved)

    grown = {
        name: b.add(s, b.mul(at_token(update.lr[name], {}, moved), placed(gradients[name], start)))
        for name, s in total.items()
    }

    def weights_after(sums: Mapping[str, Expr]) -> dict[str, Expr]:
        return {name: b.sub(start[name], _scaled(update.tau[name], s, moved)) for name, s in sums.items()}

    read = {"after": weights_after(grown), "before": weights_after(total), "start": start, "end": weights_after(total)}[
        update.read
    ]
    write_z = Assign(_at(z.target, "t"), placed(z.value, read))
    write_s = tuple(Assign(total[name], value) for name, value in grown.items())
    write_w = tuple(Assign(w, weights_after(grown)[_name(w)]) for w in update.states)
    together = (write_z,) if update.read != "end" else ()
    inner: list[Statement] = [For("t", "m", None, (Block((*together, *write_s, *write_w)),))]
    if update.read == "end":
        inner.append(For("t", "m", None, (Block((write_z,)),)))
    opening = Block(
        tuple(Assign(start[_name(w)], w) for w in update.states)
        + tuple(Assign(s, b.broadcast(const(0), s.axes)) for s in total.values())
    )
    step = "T" if update.mini_batch == "all" else update.mini_batch
    body = (Allocate(_at(z.target, "t")), For("m", "T", step, (opening, *inner)))
    params = tuple(_at(p, "t") if p.arg[0].role in ("token", "gate") else p for p in loop_params(program))
    function = Function(program.name, params, body, (z.target, *update.states))
    return simplify_program(
        replace(
            program,
            stage="primal",
            functions=(function,),
            names={**program.names, **renamed_hints(program.names, moved)},
        )
    )


def loop_params(program: Program) -> tuple[Expr, ...]:
    """States, params, then tokens and gates of the per-token functions, each once."""
    found: dict[str, Expr] = {_name(w): w for w in _update(program).states}
    for role in ("param", "token", "gate"):
        for function in program.per_token:
            for p in function.params:
                if p.arg[0].role == role:
                    found.setdefault(p.arg[0].name, p)
        for rate in (*_update(program).lr.values(), *_update(program).tau.values()):
            if rate is not None and rate.op == "leaf" and rate.arg[0].role == role:
                found.setdefault(rate.arg[0].name, rate)
    tokens = [n for n in ("q", "k", "v") if n in found]
    order = [n for n in found if found[n].arg[0].role in ("state", "param")]
    order += tokens + [n for n in found if n not in order and n not in tokens]
    return tuple(found[n] for n in order)


def per_token(program: Program) -> tuple[dict[str, Expr], Assign]:
    """The gradient of each state, and the output, of one token."""
    states = {"d" + _name(w): _name(w) for w in _update(program).states}
    functions = {f.name: f for f in program.per_token}
    (gradient,) = blocks(functions["gradient"].body)
    (output,) = blocks(functions["output"].body)
    return {states[a.leaf.name]: a.value for a in gradient.assigns}, output.assigns[0]


def at_token(e: Expr, weights: Mapping[Expr, Expr], moved: dict[Expr, Expr]) -> Expr:
    """A per-token expression inside the token loop: k -> k[t]; the states stand for what is given."""
    by_name = {_name(w): (w, value) for w, value in weights.items()}

    def visit(node: Expr, src: tuple[Expr, ...]) -> Expr:
        if node.op != "leaf":
            return rebuild(node, src)
        name, role, _ = node.arg[0]
        if role in ("token", "gate"):
            return _at(node, "t")
        if name in by_name:
            declared, value = by_name[name]
            return b.rename(value, dict(zip(declared.axes, node.axes, strict=True)))
        return node

    return transform([e], visit, moved)[0]


def _scaled(tau: Expr | None, s: Expr, moved: dict[Expr, Expr]) -> Expr:
    return s if tau is None else b.mul(at_token(tau, {}, moved), s)


def _at(e: Expr, at: str) -> Expr:
    found, axes = e.arg
    return Expr("leaf", (), (Leaf(found.name, found.role, at), axes))


def _name(e: Expr) -> str:
    return e.arg[0].name


def _update(program: Program) -> Update:
    assert program.update is not None
    return program.update

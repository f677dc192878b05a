"""The schedule: which tokens make a chunk, and what is carried from one to the next.

A chunk is one mini-batch where that is short. A longer mini-batch is cut into tiles that carry the sum of its
gradients, and so is a mini-batch that a call leaves open: three scans cover every length and every split of a sequence
into calls.

    whole:  W -> W            a chunk that is one mini-batch, from its first token to its last
    open:   S -> S            a tile of a mini-batch that began at the weights W and has summed S so far
    close:  W, S -> W         the weights that the mini-batch hands on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tttc.ir import build as b
from tttc.ir.dualize import (
    DEFAULT_CHUNK,
    ChunkForm,
    at_chunk,
    chunk_form,
    closed_weights,
    finished,
    grown_sum,
)
from tttc.ir.expr import Expr, Leaf, const, leaf, substitute
from tttc.ir.linearity import Dependence, dependence
from tttc.ir.primal import loop_params, per_token
from tttc.ir.program import T_AXIS, Allocate, Assign, Block, For, Function, Plan, Program, Scan
from tttc.ir.simplify import renamed_hints

LONGEST_CHUNK = 128  # a longer mini-batch is tiled: the Gram matrices of a chunk grow with its square


def schedule(program: Program, chunk: int | None = None) -> Program:
    """Choose the chunk, and lay the mini-batch out as scans."""
    plan = choose_plan(program, chunk)
    sizes = {**program.dims, "C": plan.chunk if isinstance(plan.chunk, int) else DEFAULT_CHUNK}
    scans, names = [], dict(program.names)
    if not plan.tiled:
        scans.append(_whole(program, plan, sizes, names))
    if not plan.free:
        scans.append(_open(program, plan, sizes, names))
        scans.append(_close(program, names))
    main = _tiled_function(program, plan, scans) if plan.tiled else scans[0].function()
    functions = (main, *(s.function() for s in scans if s.name != program.name))
    return replace(program, stage="schedule", functions=functions, names=names, scans=tuple(scans), plan=plan)


def choose_plan(program: Program, chunk: int | None) -> Plan:
    """The chunk: free where no gradient depends on the weights, otherwise the mini-batch or a tile of it."""
    update = program.update
    assert update is not None
    b_ = update.mini_batch
    gradients, _ = per_token(program)
    found = max((dependence(g, update.states) for g in gradients.values()), key=lambda f: f.dependence)
    untied = all(tau is None or tau.op == "const" for tau in update.tau.values())
    if found.dependence == Dependence.CONSTANT and untied and update.read in ("after", "before"):
        return Plan(chunk or DEFAULT_CHUNK, None, "the gradients do not depend on the weights: the chunk is free")
    if update.read == "end":
        length: int | str = "T" if b_ == "all" else int(b_)
        return Plan(
            length, length, 'read="end": every token reads the end of its mini-batch, so the chunk is the mini-batch'
        )
    if b_ == "all":
        return Plan(chunk or DEFAULT_CHUNK, "T", "the mini-batch is the whole sequence: it is cut into tiles")
    wanted = chunk or (int(b_) if int(b_) <= LONGEST_CHUNK else DEFAULT_CHUNK)
    if wanted >= int(b_):
        return Plan(int(b_), int(b_), "gradients are taken at the mini-batch's start: the chunk is the mini-batch")
    return Plan(wanted, int(b_), f"the mini-batch of {b_} tokens is cut into tiles")


def _whole(program: Program, plan: Plan, sizes: Mapping[str, int], names: dict[Expr, str]) -> Scan:
    update = program.update
    assert update is not None
    form = chunk_form(program, sizes, sums=None)
    closed = [Assign(w, closed_weights(update, w, form.growth[_name(w)], sizes)) for w in update.states]
    params = loop_params(program)
    return _scan(program, program.name, form, closed, update.states, params, plan, names, "Whole mini-batches.")


def _open(program: Program, plan: Plan, sizes: Mapping[str, int], names: dict[Expr, str]) -> Scan:
    update = program.update
    assert update is not None
    sums = {_name(w): sum_leaf(w) for w in update.states}
    form = chunk_form(program, sizes, sums)
    grown = [Assign(s, grown_sum(s, form.growth[n], sizes)) for n, s in sums.items()]
    doc = "Tiles of one open mini-batch: W are the weights at its start, S what it has summed."
    params = (*sums.values(), *loop_params(program))
    return _scan(program, f"{program.name}_open", form, grown, tuple(sums.values()), params, plan, names, doc)


def _scan(
    program: Program,
    name: str,
    form: ChunkForm,
    updates: list[Assign],
    carry: tuple[Expr, ...],
    params: tuple[Expr, ...],
    plan: Plan,
    names: dict[Expr, str],
    doc: str,
) -> Scan:
    assigns, named, _ = finished([form.z, *updates], renamed_hints(program.names, form.moved))
    names.update(named)
    sequence = tuple(at_chunk(p, T_AXIS) for p in params if p.arg[0].role in ("token", "gate"))
    fixed = tuple(p for p in params if p.arg[0].role not in ("token", "gate") and p not in carry)
    return Scan(name, fixed, carry, sequence, assigns[:1], assigns[1:], plan.chunk, doc=doc)


def _close(program: Program, names: dict[Expr, str]) -> Scan:
    """W - tau * S, with tau of the last token that was read."""
    update = program.update
    assert update is not None
    sums = tuple(sum_leaf(w) for w in update.states)
    assigns, gates = [], {}
    for w, s in zip(update.states, sums, strict=True):
        tau = update.tau[_name(w)]
        if tau is not None and tau.op == "leaf" and tau.arg[0].role == "gate":
            gates[_name(tau)] = tau
        assigns.append(Assign(w, b.sub(w, s if tau is None else b.mul(tau, s))))
    done, named, _ = finished(assigns, {})
    names.update(named)
    params = [t for t in update.tau.values() if t is not None and t.op == "leaf" and t.arg[0].role == "param"]
    fixed = (*sums, *dict.fromkeys(params), *gates.values())
    doc = "The weights that a mini-batch hands on; gates are those of its last token."
    return Scan(f"{program.name}_close", fixed, update.states, (), (), done, 1, loops=False, doc=doc)


def _tiled_function(program: Program, plan: Plan, scans: list[Scan]) -> Function:
    """The nested loops over mini-batches and their tiles, as one function to be read and run."""
    update = program.update
    assert update is not None
    tile, close = scans
    opening = Block(tuple(Assign(s, b.broadcast(const(0), s.axes)) for s in tile.carry))
    at_end = {p: _last_of_mini_batch(p) for p in close.fixed if p.arg[0].role == "gate"}
    closing = Block(tuple(Assign(a.target, *substitute([a.value], at_end)) for a in close.updates))
    inner = For("c", "m", plan.chunk, (tile.block,))
    step = plan.mini_batch
    assert step is not None
    body = (Allocate(tile.outputs[0].target), For("m", "T", step, (opening, inner, closing)))
    params = tuple(at_chunk(p, T_AXIS) for p in loop_params(program))
    return Function(program.name, params, body, (tile.outputs[0].target, *update.states))


def _last_of_mini_batch(gate: Expr) -> Expr:
    found, axes = gate.arg
    whole = Expr("leaf", (), (Leaf(found.name, found.role, "m"), (T_AXIS, *axes)))
    return b.last(whole, T_AXIS)


def sum_leaf(w: Expr) -> Expr:
    """The variable that holds the learning-rate weighted gradients of the open mini-batch."""
    return leaf(f"S_{_name(w)}", "sum", w.axes)


def _name(e: Expr) -> str:
    return str(e.arg[0].name)

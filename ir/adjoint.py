"""The adjoint: the vector-Jacobian product of every scan, by the engine that differentiated the loss.

for c in chunks(T, 16):                     for c in chunks(T, 16):              forward, keeping what is needed
    z[c] = f(W, k[c])                           x = ...;  saved.append((x,));  W = g(W, x)
    W = g(W, k[c])               ->         for c in reversed(chunks(T, 16)):
                                                (x,) = saved.pop()
                                                dk[c] = ...;  dW = ...           from dz[c] and dW
"""

from __future__ import annotations

from collections.abc import Mapping

from tttc.ir import build as b
from tttc.ir.differentiate import collected, lower_composites, vjp
from tttc.ir.expr import Expr, const, depends_on, leaf, leaves, postorder, substitute
from tttc.ir.names import differential, differentiated, prefixed, spelled, suffixed
from tttc.ir.program import (
    SEQUENCE,
    AdjointProgram,
    Allocate,
    Assign,
    Block,
    For,
    Function,
    Program,
    Restore,
    Save,
    Scan,
    ScanAdjoint,
    ScanKind,
    ScanProgram,
    Statement,
    cotangent,
)
from tttc.ir.simplify import simplify_assigns
from tttc.ir.text import Namer, core


def adjoint(program: ScanProgram) -> AdjointProgram:
    """Differentiate every scan; the functions of the stage are the reverse sweeps. Of a scan that reads weights which
    stay, the backward is one more scan, and is differentiated too.
    """
    names = dict(program.names)
    adjoints = [scan_adjoint(scan, program, names) for scan in program.scans if scan.differentiated]
    pulls = [pull_scan(a) for a in adjoints if a.scan.kind is ScanKind.READ]
    adjoints += [scan_adjoint(scan, program, names) for scan in pulls]
    functions = tuple(adjoint_function(a) for a in adjoints)
    scans = (*program.scans, *pulls)
    return AdjointProgram.of(
        program, "adjoint", functions=functions, names=names, scans=scans, adjoints=tuple(adjoints)
    )


def scan_adjoint(scan: Scan, program: Program, names: dict[Expr, str]) -> ScanAdjoint:
    """Derive the backward chunk, and cut it from the forward chunk at the values that it needs."""
    results = scan.block.assigns
    inputs = leaves(a.value for a in results)
    lowered = lower_composites([a.value for a in results], inputs)
    incoming = [cotangent(a.target) for a in results]
    found, named = vjp(list(zip(lowered, incoming, strict=True)), inputs, names, prefix="d_")
    backward = _collect(scan, dict(zip(inputs, found, strict=True)))
    forward = [Assign(a.target, v) for a, v in zip(results, lowered, strict=True)]
    done, all_names, _ = simplify_assigns([*forward, *backward], {**names, **named})
    names.update(all_names)
    forward, backward = list(done[: len(forward)]), list(done[len(forward) :])
    return _cut(scan, program, names, forward, backward)


def _collect(scan: Scan, found: Mapping[Expr, Expr | None]) -> list[Assign]:
    """One assignment per input variable: leaves that read the same variable under other axis names are added up."""
    assigns = []
    for p in (*scan.sequence, *scan.carry, *scan.fixed):
        total = collected(p, found.items())
        value = b.broadcast(const(0) if total is None else total, p.axes)
        target = cotangent(p)
        if p in scan.fixed:
            value = b.add(target, value)
        assigns.append(Assign(target, value))
    return assigns


def _cut(
    scan: Scan, program: Program, names: dict[Expr, str], forward: list[Assign], backward: list[Assign]
) -> ScanAdjoint:
    """Split at the forward values that the backward chunk reads: those are saved."""
    roots = [a.value for a in forward]
    computed = {core(e) for e in depends_on(roots, leaves(roots)) if e.op != "leaf"}
    carried = {p.name for p in scan.carry} if scan.loops else set()
    roots = [a.value for a in backward]
    found = [e for e in leaves(roots) if e.name in carried]  # the carry as the chunk found it
    starts = [p for p in scan.carry if scan.loops and any(e.variable == p.variable for e in found)]
    needed = [*starts, *_frontier(roots, computed)]
    known = {p.name for p in scan.params} | {a.leaf.name for a in forward}
    known |= set(map(differential, known))
    taken = {*map(spelled, (*known, *program.dims)), "T", "c"}
    hints = {e: spelled(suffixed(e.name, "in")) for e in starts}
    namer = Namer(taken, {**names, **hints})
    residuals = tuple((e, leaf(namer(e), "saved", e.axes)) for e in needed)
    stand_in = dict(residuals)
    for e in found:  # the same variable, perhaps under other axis names
        (kept,) = (variable for p, variable in residuals if p.op == "leaf" and p.variable == e.variable)
        stand_in[e] = leaf(kept.name, "saved", e.axes)
    values = substitute([a.value for a in backward], stand_in)
    carry = [a for a in forward if a.leaf.at is None]
    saved = [Assign(variable, e) for e, variable in residuals]
    return ScanAdjoint(
        scan,
        tuple(variable for _, variable in residuals),
        tuple(a for a in forward if a.leaf.at is not None),
        Block((*saved, *carry)),
        Block(tuple(Assign(a.target, v) for a, v in zip(backward, values, strict=True))),
        tuple(cotangent(p) for p in scan.fixed),
    )


def _frontier(roots: list[Expr], computed: set[Expr]) -> list[Expr]:
    """The first values of the forward chunk met on the way down from the backward roots, in the order of need."""
    found: dict[Expr, None] = {}
    seen: set[Expr] = set()
    stack = list(reversed(roots))
    while stack:
        node = core(stack.pop())
        if node in seen:
            continue
        seen.add(node)
        if node in computed:
            found[node] = None
        else:
            stack.extend(reversed(node.src))
    return [e for e in postorder(found) if e in found]


def backward_block(a: ScanAdjoint) -> list[Assign]:
    """The backward chunk with the forward values that it reads in their place: made again, nothing is saved."""
    kept = {x.leaf.name: x for x in a.forward.assigns if x.target in a.residuals}
    stand_in = {}
    for e in leaves(x.value for x in a.backward.assigns):
        if e.role == "saved":
            found = kept[e.name]
            stand_in[e] = b.rename(found.value, dict(zip(found.target.axes, e.axes, strict=True)))
    replaced = substitute([x.value for x in a.backward.assigns], stand_in)
    return [Assign(x.target, v) for x, v in zip(a.backward.assigns, replaced, strict=True)]


def pull_scan(a: ScanAdjoint) -> Scan:
    """The backward of a scan that carries nothing as a scan of its own: it carries the cotangents of what stays."""
    given = {e: _renamed(e, "U") for e in a.cotangents}  # its own cotangents have the names that these had
    made = {x.target: _renamed(x.target, "G") for x in a.backward.assigns}
    block = backward_block(a)
    values = substitute([x.value for x in block], given | made)
    assigns = [Assign(made[x.target], v) for x, v in zip(block, values, strict=True)]
    stores, sums = (tuple(x for x in assigns if bool(x.leaf.at) is along) for along in (True, False))
    carry, sequence = tuple(made[e] for e in a.accumulated), (*a.scan.sequence, *given.values())
    doc = "The cotangents of every token, and those of the weights, summed."
    name = f"{a.scan.name}_pull"
    return Scan(name, ScanKind.PULL, a.scan.fixed, carry, sequence, stores, sums, a.scan.chunk, doc=doc)


def _renamed(e: Expr, prefix: str) -> Expr:
    """dW -> G_W."""
    return leaf(prefixed(prefix, differentiated(e.name)), e.role, e.axes, e.at)


def adjoint_function(a: ScanAdjoint) -> Function:
    """The adjoint of a scan as one function: the forward sweep that saves, then the reverse sweep."""
    scan = a.scan
    name = f"{scan.name}_adjoint"
    params = (*scan.params, *a.cotangents)
    zero = Block(tuple(Assign(g, b.broadcast(const(0), g.axes)) for g in a.accumulated))
    returned = tuple(cotangent(p) for p in scan.params)
    sweep: tuple[Statement, ...] = (a.forward, Save(a.residuals))
    back: tuple[Statement, ...] = (Restore(a.residuals), a.backward)
    if not scan.loops:  # the carry stays as it came: the backward may read it
        kept = tuple(x for x in a.forward.assigns if x.target in a.residuals)
        return Function(name, params, (zero, *((Block(kept),) if kept else ()), a.backward), returned)
    allocate = tuple(Allocate(cotangent(p)) for p in scan.sequence)
    body: tuple[Statement, ...] = (
        *allocate,
        zero,
        For("c", SEQUENCE, scan.chunk, sweep),
        For("c", SEQUENCE, scan.chunk, back, reverse=True),
    )
    return Function(name, params, body, returned, "The transpose of the derivative, applied to the cotangents.")

"""The useful floating-point operations of a layer: what `benchmarks.cpu` divides by the seconds.

Only matrix products count: contractions in which each of two operands brings an axis of its own. Everything
elementwise, norms, sums and products of a matrix and a vector count as nothing, so that what they cost shows as lost
efficiency. A matrix whose half above the diagonal is zero, or is never needed, counts for half:

    TTT-Linear, a mini-batch of C tokens, width D:
    k @ W    2 C D D      q @ k.T, causal    C C D
    q @ W    2 C D D      A @ g, A causal    C C D
    k.T @ g  2 C D D                                      6 C D D + 2 C C D

A triangular solve counts as C C E, the product by its inverse, likewise half. Products of nothing but tokens, the
coefficients of momentum, count as nothing. The count is that of the dual form at the chunk which the compiler took:
where the chunk is free, another one would need other work for the same result.

A forward and backward counts as three forwards: every product has two in its derivative, and what is computed again
counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from tttc.ir import cost
from tttc.ir.expr import TOKENS, Axis, Expr, postorder
from tttc.ir.program import Scan, ScanProgram, number_of
from tttc.runtime.layer import Layer

Pair = frozenset[Axis]
_ALIKE = frozenset(("neg", "mask", "mul", "contract"))  # zero wherever any operand is, unless they sum
_PASSING = frozenset(("neg", "add", "sub", "mul"))  # an element of the result needs no other element of the operand


def useful_flops(layer: Layer, batch: int, heads: int, tokens: int, *, backward: bool = False) -> float | None:
    """Those of a whole call on whole mini-batches; None where the program has pieces that are not counted here."""
    program = layer.stages.program
    plan = program.plan
    if plan is None or plan.tiled or plan.substitution:
        return None
    forward = batch * heads * sum(_of_scan(s, program, tokens) for s in _run(program))
    return 3 * forward if backward else forward


def _run(program: ScanProgram) -> list[Scan]:
    """The scans that a sequence of whole mini-batches runs."""
    return [s for s in program.scans if s.name in (program.name, f"{program.name}_begin")]


def _of_scan(scan: Scan, program: ScanProgram, tokens: int) -> float:
    chunk = number_of(scan.chunk, tokens)
    flops = products([a.value for a in scan.block.assigns], {**program.dims, TOKENS: chunk})
    return flops * (tokens / chunk if scan.loops else 1)


def products(roots: Iterable[Expr], sizes: dict[str, int]) -> float:
    """The FLOPs of the matrix products in these expressions, each shared one once."""
    roots = list(roots)
    nodes = postorder(roots)
    zero = _zero_above(nodes)
    needed = _needed_below(nodes, roots, zero)
    return sum(_product(e, zero, needed) * float(cost.evaluate(cost.node_work(e).contraction, sizes)) for e in nodes)


def _product(e: Expr, zero: dict[Expr, set[Pair]], needed: dict[Expr, set[Pair]]) -> float:
    """Which part of the FLOPs of a full product count."""
    if e.op == "solve":
        return 1.0  # the cost model counts the half
    if e.op != "contract" or not e.arg or all(a.size == TOKENS for s in e.src for a in s.axes):
        return 0.0
    others = [{a for j, o in enumerate(e.src) if j != i for a in o.axes} for i in range(len(e.src))]
    own = [set(s.axes) - other for s, other in zip(e.src, others, strict=True)]
    if sum(map(bool, own)) < 2:
        return 0.0
    return 0.5 if needed[e] or any(zero[s] for s in e.src) else 1.0


def _zero_above(nodes: Iterable[Expr]) -> dict[Expr, set[Pair]]:
    """For each value: the pairs of token axes above whose diagonal it is zero."""
    found: dict[Expr, set[Pair]] = {}
    for e in nodes:
        pairs: set[Pair] = set()
        if e.op in _ALIKE and not (e.op == "contract" and e.arg):
            pairs = {p for s in e.src for p in found[s]}
        elif e.op in ("add", "sub") and all(set(s.axes) == set(e.axes) for s in e.src):
            pairs = set.intersection(*(found[s] for s in e.src))
        if e.op == "mask" or e.op == "segprod":
            pairs = pairs | {frozenset(e.arg[:2])}
        found[e] = pairs
    return found


def _needed_below(nodes: list[Expr], roots: list[Expr], zero: dict[Expr, set[Pair]]) -> dict[Expr, set[Pair]]:
    """For each value: the pairs of token axes of which only what is below the diagonal is ever needed."""
    uses: dict[Expr, list[set[Pair]]] = {e: [] for e in nodes}
    for root in roots:
        uses[root].append(set())
    found: dict[Expr, set[Pair]] = {}
    for e in reversed(nodes):
        found[e] = set.intersection(*uses[e])
        for position, s in enumerate(e.src):
            uses[s].append({p for p in _below(e, position, zero, found) if p <= set(s.axes)})
    return found


def _below(e: Expr, position: int, zero: dict[Expr, set[Pair]], needed: dict[Expr, set[Pair]]) -> set[Pair]:
    """The pairs below whose diagonal `e` needs its operand."""
    if e.op == "mask":
        return needed[e] | {frozenset(e.arg[:2])}
    if e.op == "solve" and position == 0:
        return {frozenset(e.arg)}
    if e.op == "mul" or (e.op == "contract" and not e.arg):
        return needed[e] | {p for i, s in enumerate(e.src) if i != position for p in zero[s]}
    return needed[e] if e.op in _PASSING else set()

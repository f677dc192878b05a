"""Costs as formulas in the dims, for one batch element and head, so that they can be read, compared and evaluated.

    z1: f32[C, F] = k[c] @ W1 + b1    ->    2*C*D*F FLOPs in contractions, C*F elementwise
    W1 = W1 - k[c].T @ g1             ->    2*C*D*F, and one dependent contraction from one W1 to the next

What is counted:
- a contraction: 2 FLOPs for each combination of all its axes. A masked Gram matrix is counted in full: the
  half above the diagonal is computed and then set to zero;
- an elementwise operation or a product without a sum: 1 for each element of its result. A named function
  (gelu, rsqrt, a formula of the user's) counts as 1, whatever it takes to evaluate it. LayerNorm and its like
  count as what they consist of;
- a reduction: 1 for each element that goes in;
- the products of segments of tokens: 1 for each of their C * C entries, a row being the one before times a decay;
  the running product: 1 for each of its C entries. Both once for each channel;
- a triangular solve: 2 FLOPs for each pair of tokens s < t and each column, and 1 for the diagonal: C * C * E. It
  counts as a contraction, of which it is made;
- nothing for masks, transposes, broadcasts, shifts and the choice of a token: they move values and compute none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import sympy

from tttc.ir.expr import OPS, Axes, Expr, depends_on, leaves, postorder, rebuild, transform
from tttc.ir.names import is_declared, own, spelled
from tttc.ir.program import SEQUENCE, Block, For, Function, Length, Scan, ScanAdjoint, Statement, Tokens, cotangent

Formula: TypeAlias = sympy.Expr


def dim(name: str) -> sympy.Symbol:
    """The symbol of a dim: D, F, ..., and of what is no dim: T tokens, C chunk."""
    if is_declared(name):
        return sympy.Symbol(name, positive=True, integer=True)
    return _Counted(spelled(name), positive=True, integer=True)


class _Counted(sympy.Symbol):
    """The symbol of something that is no dim, unlike that of a dim which is called so."""

    __slots__ = ()

    @classmethod
    def class_key(cls) -> tuple[int, int, str]:
        return sympy.Symbol.class_key()  # it stands where the symbol of a dim would


TOKENS, CHUNK = dim(own("T")), dim(own("C"))
MINI_BATCH = dim(own("b"))
EVERY = dim(own("n"))  # chunks between two states that are kept for the backward

ITEM_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}

_MOVES = frozenset(("leaf", "const", "size", "rename", "broadcast", "stop_gradient")) | frozenset(
    ("last", "put_last", "mask", "shift", "shift_back")
)
_REDUCTIONS = frozenset(("sum", "mean", "max"))
_ADDITIONS = frozenset(("add", "sub", "neg", "rename", "broadcast"))


@dataclass(frozen=True)
class Work:
    """FLOPs, those of contractions apart: matrix units run them, everything else is elementwise."""

    contraction: Formula = sympy.S.Zero
    elementwise: Formula = sympy.S.Zero

    @property
    def flops(self) -> Formula:
        return sympy.expand(self.contraction + self.elementwise)

    def __add__(self, other: Work) -> Work:
        return Work(self.contraction + other.contraction, self.elementwise + other.elementwise)

    def times(self, factor: Formula) -> Work:
        return Work(sympy.expand(self.contraction * factor), sympy.expand(self.elementwise * factor))


@dataclass(frozen=True)
class ChunkCost:
    """One chunk of one head. Sizes are in elements."""

    work: Work
    read: Formula
    """Elements of sequences that the chunk reads, each once: q, k, v, gates; in a backward also the cotangents of z."""
    written: Formula
    """Elements of sequences that it writes: z; in a backward the cotangents of what the forward read."""
    carry: Formula
    """Elements that go from one chunk to the next."""
    fixed: Formula
    """Elements that every chunk reads and none changes: params, the weights at the start of an open mini-batch."""
    largest: Formula
    """Elements of the largest value computed; sums that end in a new carry are made in place and not counted."""
    depth: Formula
    """Contractions that each chunk adds to the longest chain of contractions that need one another's results."""
    sequential: Work
    """The work that lies between the carry that comes in and the one that goes out: chunks cannot share it."""

    def critical_path(self) -> Formula:
        """Dependent contractions from the first chunk of a call to the last."""
        return sympy.expand(self.depth * TOKENS / CHUNK)

    def traffic(self, carry_in_memory: bool) -> Formula:
        """Elements that a chunk moves: its sequences, and carry and fixed values unless they stay on the chip."""
        state = 2 * self.carry + self.fixed if carry_in_memory else sympy.S.Zero
        return sympy.expand(self.read + self.written + state)


@dataclass(frozen=True)
class AdjointCost:
    """The reverse of a scan: its forward chunk that keeps values, its backward chunk, and the elements kept by each."""

    forward: Work
    backward: ChunkCost
    residuals: Formula
    carry: Formula

    def memory(self, every: Formula = EVERY) -> Formula:
        """Elements per head that a backward needs: a carry for every `every` chunks, and the values of one such group.

        With `every` 0 nothing is recomputed, and the values of all chunks are kept.
        """
        if every == 0:
            return sympy.expand(TOKENS / CHUNK * self.residuals)
        return TOKENS / (CHUNK * every) * self.carry + every * self.residuals


# -- nodes and blocks ----------------------------------------------------------------------------------------


def elements(axes: Axes) -> Formula:
    return sympy.Mul(*(dim(a.size) for a in axes))


def node_work(e: Expr) -> Work:
    """The work of one operation, its operands being there."""
    if e.op in _MOVES:
        return Work()
    if e.op in _REDUCTIONS:
        return Work(elementwise=elements(e.src[0].axes))
    if e.op == "contract":
        every = elements(tuple(dict.fromkeys(a for s in e.src for a in s.axes)))
        return Work(contraction=len(e.src) * every) if e.arg else Work(elementwise=(len(e.src) - 1) * every)
    if e.op == "solve":
        known, _ = e.arg
        return Work(contraction=dim(known.size) * elements(e.axes))
    return Work(elementwise=elements(e.axes))


def is_contraction(e: Expr) -> bool:
    """Whether the result waits for sums over all of an axis. A solve counts as one: its matrix can be inverted before
    the right side is known.
    """
    return (e.op == "contract" and bool(e.arg)) or e.op == "solve"


def work(roots: Iterable[Expr]) -> Work:
    """The work of expressions together: what they share is computed once."""
    return _summed(postorder(_lowered(roots)))


def _summed(nodes: Iterable[Expr]) -> Work:
    counted = [node_work(e) for e in nodes]
    return Work(sympy.Add(*(w.contraction for w in counted)), sympy.Add(*(w.elementwise for w in counted)))


def _lowered(roots: Iterable[Expr]) -> list[Expr]:
    """LayerNorm and its like as the operations that they consist of."""

    def visit(node: Expr, src: tuple[Expr, ...]) -> Expr:
        new, lower = rebuild(node, src), OPS[node.op].lower
        return lower(new) if lower else new

    return transform(roots, visit)


def chunk_cost(block: Block, carry: Iterable[Expr], accumulated: Iterable[Expr] = ()) -> ChunkCost:
    """The cost of a block that is run for every chunk; `carry` are the leaves that it hands to the next.

    `accumulated` are handed on as well, but only ever added to: no chunk waits for them.
    """
    carry, accumulated = tuple(carry), tuple(accumulated)
    names = {e.name for e in (*carry, *accumulated)}
    values = _lowered(a.value for a in block.assigns)
    by_name = dict(zip((a.leaf.name for a in block.assigns), values, strict=True))
    handed_on = {e.name: by_name[e.name] for e in carry}
    starts = [e for e in leaves(handed_on.values()) if e.name in handed_on]
    moving = depends_on(handed_on.values(), starts)
    read = {e.name: e for e in leaves(values)}
    fixed = [e for n, e in read.items() if e.at is None and n not in names and e.role != "saved"]
    return ChunkCost(
        work=_summed(postorder(values)),
        read=total_elements(e for e in read.values() if e.at is not None),
        written=total_elements(a.target for a in block.assigns if a.leaf.at is not None),
        carry=total_elements((*carry, *accumulated)),
        fixed=total_elements(fixed),
        largest=_largest(values, [by_name[n] for n in names]),
        depth=chain_growth(handed_on),
        sequential=_summed(e for e in postorder(handed_on.values()) if e in moving),
    )


def total_elements(values: Iterable[Expr]) -> Formula:
    return sympy.Add(*(elements(e.axes) for e in values))


def _largest(roots: Iterable[Expr], handed_on: Iterable[Expr]) -> Formula:
    in_place: set[Expr] = set()
    stack = list(handed_on)
    while stack:
        node = stack.pop()
        in_place.add(node)
        stack += node.src if node.op in _ADDITIONS else ()
    sizes = {elements(e.axes) for e in postorder(roots) if e.op != "leaf" and e not in in_place}
    return sympy.Max(*sizes) if sizes else sympy.S.Zero


Turn = Mapping[str, Mapping[str, int]]
"""For each variable, and each new value that depends on it: the most contractions on a way from one to the other."""


def turn_of(handed_on: Mapping[str, Expr], kept: Iterable[str] = (), read: Iterable[str] = ()) -> Turn:
    """One turn of a loop whose turns share variables: `handed_on` has the new values, those of `kept` stay, and those
    of `read` are only read.
    """
    kept = set(kept)
    variables = dict.fromkeys((*handed_on, *sorted(kept), *read))
    return {n: _depths_from(n, handed_on) | ({n: 0} if n in kept else {}) for n in variables}


def after(first: Turn, then: Turn) -> Turn:
    """Two turns, one after the other, as one."""
    return {n: _continued(ends, then) for n, ends in first.items()}


def growth(turn: Turn) -> Formula:
    """How many contractions one more turn adds to the longest chain of dependent ones.

    One turn may lead from any variable to any other, so this is the largest mean over the cycles: a variable that
    nothing leads back to lengthens the chain once, not every turn.
    """
    chains, longest = turn, sympy.S.Zero
    for turns in range(1, len(turn) + 1):
        closed = [sympy.Rational(ends[n], turns) for n, ends in chains.items() if n in ends]
        longest = max([longest, *closed])
        chains = after(chains, turn)
    return longest


def chain_growth(handed_on: Mapping[str, Expr]) -> Formula:
    """The growth of a loop of a single kind of turn."""
    return growth(turn_of(handed_on))


def _depths_from(name: str, handed_on: Mapping[str, Expr]) -> dict[str, int]:
    """For each new value that depends on the variable `name`: the most contractions on a way to it."""
    depths: dict[Expr, int] = {}
    for node in postorder(handed_on.values()):
        below = [depths[s] for s in node.src if s in depths]
        if node.op == "leaf" and node.name == name:
            depths[node] = 0
        elif below:
            depths[node] = max(below) + is_contraction(node)
    return {n: depths[value] for n, value in handed_on.items() if value in depths}


def _continued(ends: Mapping[str, int], turn: Turn) -> dict[str, int]:
    """Chains that end at the variables `ends`, made longer by one turn."""
    longer: dict[str, int] = {}
    for middle, depth in ends.items():
        for end, more in turn.get(middle, {}).items():
            longer[end] = max(longer.get(end, 0), depth + more)
    return longer


# -- scans, functions ----------------------------------------------------------------------------------------


def scan_cost(scan: Scan) -> ChunkCost:
    """One chunk of a scan; of one without a loop, its only run."""
    return chunk_cost(scan.block, scan.carry)


def adjoint_cost(adjoint: ScanAdjoint) -> AdjointCost:
    """One chunk of the two sweeps of an adjoint."""
    scan = adjoint.scan
    return AdjointCost(
        forward=work(a.value for a in (*adjoint.outputs, *adjoint.forward.assigns)),
        backward=chunk_cost(adjoint.backward, [cotangent(e) for e in scan.carry], adjoint.accumulated),
        residuals=total_elements(adjoint.residuals),
        carry=total_elements(scan.carry),
    )


def pieces_depth(piece: Scan, end: Scan) -> tuple[Formula, Formula]:
    """Of pieces that hand on what they make, and an end that takes it: the contractions that one piece and the end
    add to the longest chain of dependent ones, and those that every further piece adds. Pieces are the tiles of a
    mini-batch, or the tokens of a chunk.
    """
    made, ended = ({a.leaf.name: a.value for a in b.assigns} for b in (piece.block, end.block))
    ended = {n: e for n, e in ended.items() if n in {x.name for x in end.carry}}
    passing = [a.leaf.name for a in piece.block.assigns if a.leaf.role == "sum" or a.leaf.at is not None]
    first = turn_of(made, [n for n in ended if n not in made])
    then = turn_of(ended, [n for n in made if n not in ended and n not in passing], passing)
    whole = {n: ends for n, ends in after(first, then).items() if n not in passing}
    return growth(whole), growth(turn_of(made))


def function_work(function: Function) -> Work:
    """The work of a whole call of a function on T tokens, T a multiple of the mini-batch and of the chunk."""
    return _statements_work(function.body, {SEQUENCE: TOKENS})


def _statements_work(body: tuple[Statement, ...], lengths: Mapping[str | Length, Formula]) -> Work:
    total = Work()
    for statement in body:
        if isinstance(statement, Block):
            total += work(a.value for a in statement.assigns)
        elif isinstance(statement, For):
            length = _length(statement)
            trips = lengths[statement.over] / length
            total += _statements_work(statement.body, {**lengths, statement.var: length}).times(trips)
    return total


def _length(loop: For) -> Formula:
    """Tokens of one turn of a loop: a mini-batch if further loops run over it, otherwise a chunk or a token."""
    if loop.step is None:
        return sympy.S.One
    return MINI_BATCH if any(isinstance(s, For) for s in loop.body) else CHUNK


def lengths_of(function: Function) -> dict[sympy.Symbol, Formula]:
    """What the mini-batch b and the chunk C of a function's loops are."""
    found: dict[sympy.Symbol, Formula] = {}

    def visit(body: tuple[Statement, ...]) -> None:
        for statement in body:
            if isinstance(statement, For):
                if statement.step is not None:
                    found[_length(statement)] = tokens(statement.step)
                visit(statement.body)

    visit(function.body)
    return found


def tokens(step: Tokens) -> Formula:
    """A number of tokens as a formula."""
    return TOKENS if step is SEQUENCE else sympy.Integer(step)


def evaluate(
    formula: Formula, sizes: Mapping[str, int], lengths: Mapping[sympy.Symbol, Formula] | None = None
) -> Formula:
    """A formula with sizes for its dims, and for mini-batch and chunk; what has none stays a symbol."""
    values = {dim(name): size for name, size in sizes.items()} | dict(lengths or {})
    return sympy.expand(sympy.sympify(formula).subs(values))

"""What a layer costs, as data: FLOPs, bytes, and the longest chain of contractions that wait for one another.

Formulas are in the dims, the chunk C, the mini-batch b and the tokens T of a call; values for the dims of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from tttc.backends.interface import EmittedProgram
from tttc.ir import cost, substitution
from tttc.ir.cost import CHUNK, MINI_BATCH, TOKENS, Formula, Work
from tttc.ir.expr import Expr
from tttc.ir.names import spelled
from tttc.ir.program import (
    SEQUENCE,
    AdjointProgram,
    Block,
    For,
    LoopProgram,
    Program,
    Scan,
    ScanKind,
    ScanProgram,
    Statement,
)
from tttc.ir.update import memories, openings

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer

PAST_TOKENS = cost.dim(substitution.PAST.size)  # the tokens of a chunk as one of them sees them (ir/substitution.py)


@dataclass(frozen=True)
class StageCost:
    """What one function of a stage costs for one head, as formulas and for the dims of the layer."""

    stage: str
    function: str
    unit: str
    """What the cost is for: "token", "mini-batch" (what is done where one ends) or "sequence" (where one begins)."""
    work: Work
    """Formulas in the dims, the chunk C and the mini-batch b."""
    lengths: Mapping[sympy.Symbol, Formula]
    dims: Mapping[str, int]

    @property
    def contraction(self) -> Formula:
        """FLOPs of contractions; a number unless a chunk is the whole sequence, then a formula in T."""
        return cost.evaluate(self.work.contraction, self.dims, self.lengths)

    @property
    def elementwise(self) -> Formula:
        return cost.evaluate(self.work.elementwise, self.dims, self.lengths)

    @property
    def flops(self) -> Formula:
        return sympy.expand(self.contraction + self.elementwise)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs for one head, with its dims: FLOPs per token, sizes in bytes, formulas where T stays open."""

    primal: Work
    forward: Work
    recomputed: Work
    """The forward chunk once more, with the values that its backward needs: unless all of them were kept."""
    backward: Work
    state_bytes: Formula
    """What a sequence carries from one mini-batch to the next: the weights, and what the rule carries beside them."""
    open_bytes: Formula
    """What it carries inside a mini-batch, from call to call: when decoding token by token."""
    primal_bytes: Formula
    """What every token of the primal reads and writes: the weights, momentum and averages."""
    sequence_bytes: Formula
    """Read and written in a forward, per token."""
    chunk_bytes: Formula
    """State and fixed values read and written by a chunk that finds them in memory, per token."""
    largest: Formula
    """Elements of the largest intermediate value of a forward chunk."""
    primal_largest: Formula
    """The same of one token of the primal."""
    critical_path: Formula
    """Dependent contractions in a call on T tokens."""
    sequential: Formula
    """FLOPs per token of the forward that lie between the carry coming in and going out."""
    memory: Formula
    """Bytes that a backward keeps, with a state every n chunks."""
    memory_whole: Formula
    """The same where every value is kept."""

    @property
    def intensity(self) -> tuple[Formula, Formula]:
        """FLOPs of the forward per byte: state in memory, state on the chip."""
        on_chip = self.forward.flops / self.sequence_bytes
        return self.forward.flops / (self.sequence_bytes + self.chunk_bytes), on_chip


def program_costs(program: Program) -> Iterator[StageCost]:
    """The cost of every function of a stage, in their order; the two sweeps of an adjoint apart."""
    if isinstance(program, EmittedProgram):
        return
    if isinstance(program, AdjointProgram):
        yield from _sweeps(program)
        return
    scans = {s.name: s for s in program.scans[1:]} if isinstance(program, ScanProgram) else {}
    for function in program.functions:
        scan, loops = scans.get(function.name), cost.lengths_of(function)
        work = cost.function_work(function)
        work = work.times(1 / TOKENS) if loops else work
        lengths = _lengths(scan, program) if scan is not None and isinstance(program, ScanProgram) else loops
        unit = "token" if scan is None else _unit(scan)
        yield StageCost(program.stage, function.name, unit, work, lengths, program.dims)


_UNITS = {ScanKind.BEGIN: "sequence", ScanKind.CLOSE: "mini-batch", ScanKind.COEFFICIENTS: "chunk"}


def _unit(scan: Scan) -> str:
    """What a scan is run for: each token, or once for each chunk, mini-batch or sequence."""
    return _UNITS.get(scan.kind, "token")


def _lengths(scan: Scan, program: ScanProgram) -> dict[sympy.Symbol, Formula]:
    """The chunk of a scan; with a substitution also that of the scan which it makes coefficients or rows for."""
    chunk = cost.tokens(program.plan.chunk)
    if not scan.loops:
        return {CHUNK: chunk} if _unit(scan) == "chunk" else {}
    past = {PAST_TOKENS: chunk} if scan.kind is ScanKind.ROWS else {}
    return {CHUNK: cost.tokens(scan.chunk), **past}


def _sweeps(program: AdjointProgram) -> Iterator[StageCost]:
    for a in program.adjoints:
        costs, lengths = cost.adjoint_cost(a), _lengths(a.scan, program)
        share = 1 / CHUNK if a.scan.loops else sympy.S.One
        for sweep, work in (("forward, keeping values", costs.forward), ("backward", costs.backward.work)):
            name = f"{a.scan.name}, {sweep}"
            yield StageCost(program.stage, name, _unit(a.scan), work.times(share), lengths, program.dims)


def layer_cost(layer: Layer) -> LayerCost:
    """The cost of the scheduled program: of the scans that a sequence of whole mini-batches runs."""
    program = layer.stages.program
    scan, lengths = program.scans[0], plan_lengths(program)
    scheduled, primal = layer.stages.of(ScanProgram), layer.stages.of(LoopProgram)
    adjoints = {a.scan.kind: cost.adjoint_cost(a) for a in program.adjoints}
    tile = adjoints[scan.kind]
    chunk, carried = cost.scan_cost(scan), kept(layer)
    item = cost.ITEM_BYTES[program.dtype]
    (token_loop,) = primal.functions

    def value(formula: Formula) -> Formula:
        return cost.evaluate(formula, program.dims, lengths)

    def valued(work: Work) -> Work:
        return Work(value(work.contraction), value(work.elementwise))

    return LayerCost(
        primal=valued(cost.function_work(token_loop).times(1 / TOKENS)),
        forward=valued(_per_token({s.kind: cost.scan_cost(s).work for s in scheduled.scans}, program)),
        recomputed=valued(_per_token({n: a.forward for n, a in adjoints.items()}, program)),
        backward=valued(_per_token({n: a.backward.work for n, a in adjoints.items()}, program)),
        state_bytes=value(item * sympy.Add(*(k.elements for k in carried if not k.inside))),
        open_bytes=value(item * sympy.Add(*(k.elements for k in carried))),
        primal_bytes=value(2 * item * sympy.Add(*(k.elements for k in carried if k.each_token))),
        sequence_bytes=value(item * (chunk.read + chunk.written) / CHUNK),
        chunk_bytes=value(item * (chunk.traffic(True) - chunk.traffic(False)) / CHUNK),
        largest=value(chunk.largest),
        primal_largest=value(sympy.Max(*(cost.chunk_cost(block, ()).largest for block in _of_tokens(token_loop.body)))),
        critical_path=value(_critical_path(program)),
        sequential=value(chunk.sequential.flops / CHUNK),
        memory=value(item * tile.memory()),
        memory_whole=value(item * tile.memory(sympy.S.Zero)),
    )


def plan_lengths(program: ScanProgram) -> dict[sympy.Symbol, Formula]:
    """The chunk and the mini-batch of a scheduled program."""
    plan = program.plan
    lengths = {CHUNK: cost.tokens(plan.chunk)}
    return lengths if plan.mini_batch is None else {**lengths, MINI_BATCH: cost.tokens(plan.mini_batch)}


def shares(program: ScanProgram) -> dict[ScanKind, Formula]:
    """How often per token a sequence of whole mini-batches runs each scan; those for what a call leaves open not."""
    plan = program.plan
    found = {program.scans[0].kind: 1 / CHUNK, ScanKind.BEGIN: 1 / TOKENS}
    if plan.tiled:
        found[ScanKind.CLOSE] = 1 / MINI_BATCH
    if plan.substitution:
        found |= {ScanKind.COEFFICIENTS: 1 / CHUNK, ScanKind.ROWS: sympy.S.One}
    return {s.kind: found[s.kind] for s in program.scans if s.kind in found}


def _per_token(works: Mapping[ScanKind, Work], program: ScanProgram) -> Work:
    """The work of scans by their shares."""
    total = Work()
    for kind, share in shares(program).items():
        work = works[kind].times(share)
        if kind is ScanKind.ROWS:  # its chunk is one token, which reads the rows of all of C
            one = {CHUNK: sympy.S.One}
            work = Work(*(f.subs(one).subs(PAST_TOKENS, CHUNK) for f in (work.contraction, work.elementwise)))
        total += work
    return total


def _of_tokens(body: tuple[Statement, ...], inside: bool = False) -> Iterator[Block]:
    """The blocks that run once for each token."""
    for statement in body:
        if isinstance(statement, For):
            yield from _of_tokens(statement.body, statement.step is None)
        elif isinstance(statement, Block) and inside:
            yield statement


def _critical_path(program: ScanProgram) -> Formula:
    """Dependent contractions of a call: what waits inside a chunk or a mini-batch, and for the weights of the last."""
    plan, pieces = program.plan, pieces_depth(program)
    if pieces is None:
        return cost.scan_cost(program.scans[0]).critical_path()
    first, further = pieces
    if plan.substitution:
        return sympy.expand((first + further * (CHUNK - 1)) * TOKENS / CHUNK)
    return sympy.expand((first + further * (MINI_BATCH / CHUNK - 1)) * TOKENS / MINI_BATCH)


def pieces_depth(program: ScanProgram) -> tuple[Formula, Formula] | None:
    """Where a mini-batch has tiles, or a chunk goes through its tokens: the contractions of one such piece and what
    follows, and those that each further piece adds.
    """
    plan, scans = program.plan, {s.kind: s for s in program.scans}
    if plan.substitution:
        return cost.pieces_depth(scans[ScanKind.ROWS], program.scans[0])
    return cost.pieces_depth(program.scans[0], scans[ScanKind.CLOSE]) if plan.tiled else None


@dataclass(frozen=True)
class Kept:
    """Variables of a kind that a sequence carries from call to call, with their elements for one head."""

    names: tuple[str, ...]
    what: str
    elements: Formula
    inside: bool = False
    """Only inside a mini-batch."""
    each_token: bool = False
    """Every token changes it."""

    def __str__(self) -> str:
        return f"{', '.join(self.names)} ({self.what})"


_LETTERS = {
    "M": "momentum S",
    "V": "the average V",
    "A": "the accumulator A",
    "N": "kept for the ends of mini-batches",
    "S": "what it has added",
    "a": "the product of its decays",
    "m": "sums of rates",
    "n": "the number of its tokens",
}
"""What the first letter of a variable of the rule stands for (ir/update.py)."""


def kept(layer: Layer) -> list[Kept]:
    """Everything that a sequence carries from call to call."""
    return [*_kept_always(layer), *_kept_inside(layer)]


def _kept_always(layer: Layer) -> Iterator[Kept]:
    update = layer.stages.program.update
    yield Kept(update.names, "the weights", cost.total_elements(update.states), each_token=True)
    for letter, found in _by_letter(m.variable for m in memories(update)).items():
        yield _of_letter(letter, found, each_token=letter == "V" or (letter == "M" and update.per == "token"))
    for name, spec in layer.signature.tokens.items():
        if spec.window is not None:
            before = cost.dim(spec.window) - 1
            yield Kept((name,), "the tokens before the next one", before * _product(spec.given))


def _kept_inside(layer: Layer) -> Iterator[Kept]:
    """What there is only in a mini-batch that a call left open."""
    plan, update = layer.stages.program.plan, layer.stages.program.update
    if plan.free or plan.mini_batch == 1 or plan.mini_batch is None:
        return
    yield Kept(update.names, "the weights at its start", cost.total_elements(update.states), inside=True)
    if layer.decode == "rows":
        declared = layer.signature
        rows = [(n, t.dims) for n, t in declared.tokens.items()] + [(n, g.dims) for n, g in declared.gates.items()]
        length = TOKENS if plan.mini_batch is SEQUENCE else cost.tokens(plan.mini_batch) - 1
        elements = length * sympy.Add(*(_product(dims) for _, dims in rows))
        yield Kept(tuple(n for n, _ in rows), "its tokens", elements, inside=True)
        return
    for letter, found in _by_letter(o.variable for o in openings(update)).items():
        yield _of_letter(letter, found, inside=True)


def _product(dims: Iterable[str]) -> Formula:
    return sympy.Mul(*(cost.dim(d) for d in dims))


def _by_letter(variables: Iterable[Expr]) -> dict[str, list[Expr]]:
    found: dict[str, list[Expr]] = {}
    for e in variables:
        found.setdefault(spelled(e.name)[0], []).append(e)
    return found


def _of_letter(letter: str, found: list[Expr], *, inside: bool = False, each_token: bool = False) -> Kept:
    names = tuple(spelled(e.name) for e in found)
    return Kept(names, _LETTERS[letter], cost.total_elements(found), inside, each_token)

"""A program: functions made of loops over tokens and of blocks of simultaneous assignments.

    program   ::= function ...                                    function ::= name(params): statement ... return names
    statement ::= Block(assign, ...) | For(var, over, step, statement ...) | Allocate(name) | Save(names) |
    Restore(names) assign    ::= name = expression | name[var] = expression

The expressions of a block are evaluated together, before any of its assignments takes effect; what they share is one
node. `ir/program_text.py` prints a program as Python that runs, `ir/interpret.py` runs it directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, Self, TypeVar

from tttc.ir.expr import PRINTERS, TOKENS, Axis, Expr, Leaf, leaf
from tttc.ir.linearity import Finding
from tttc.ir.names import differential, own, prefixed

T_AXIS = Axis(own("t"), TOKENS)  # the reading tokens of a chunk
S_AXIS = Axis(own("s"), TOKENS)  # the source tokens of a chunk
EACH = leaf(own("each"), "token")  # a number for each token, of which only how many there are is read


class Length(Enum):
    """A number of tokens that only a call knows."""

    SEQUENCE = "T"

    def __str__(self) -> str:
        return self.value


SEQUENCE: Final = Length.SEQUENCE  # all tokens of a call, as many as there are
Tokens = int | Length
Count = TypeVar("Count")


def number_of(length: Tokens, tokens: Count) -> int | Count:
    """How many tokens a length is in a sequence of so many."""
    return tokens if length is SEQUENCE else length


@dataclass(frozen=True)
class Assign:
    """target = value; a target that is a leaf with `at` is stored into the sequence of that name."""

    target: Expr
    value: Expr

    @property
    def leaf(self) -> Leaf:
        return self.target.variable


@dataclass(frozen=True)
class Block:
    """Assignments that happen together: every value is that before the block."""

    assigns: tuple[Assign, ...]


@dataclass(frozen=True)
class For:
    """A loop over `chunks(over, step)`, or over the tokens of the chunk `over` when there is no step.

    `over` is the sequence, or the variable of a loop around this one.
    """

    var: str
    over: str | Length
    step: Tokens | None
    body: tuple[Statement, ...]
    reverse: bool = False


@dataclass(frozen=True)
class Allocate:
    """A sequence of T tokens to be filled: z = empty(T, D)."""

    target: Expr


@dataclass(frozen=True)
class Save:
    """Push variables for the backward sweep: saved.append((x, g))."""

    values: tuple[Expr, ...]


@dataclass(frozen=True)
class Restore:
    """Pop what the matching `Save` pushed: x, g = saved.pop()."""

    targets: tuple[Expr, ...]


Statement = Block | For | Allocate | Save | Restore


@dataclass(frozen=True)
class Function:
    """A function of leaves; `returns` are the variables that it hands back."""

    name: str
    params: tuple[Expr, ...]
    body: tuple[Statement, ...]
    returns: tuple[Expr, ...]
    doc: str = ""


Rates = Mapping[str, Expr | None]


@dataclass(frozen=True)
class EndStage:
    """What acts where a mini-batch ends, as expressions over leaves: `values[W]` is a function of `end_leaf(W)` (the
    update, the weights, or for on="view" the accumulator) and of the memory `kept[W]`, which starts at `begins[W]` and
    stays; a view's accumulator starts there instead.
    """

    on: str
    values: Mapping[str, Expr]
    begins: Mapping[str, Expr]
    kept: Mapping[str, Expr]
    label: str = ""


def end_leaf(w: Expr) -> Expr:
    """The leaf that stands, in an `EndStage`, for what the stage is given for the state `w`."""
    return leaf(prefixed("in", w.name), "end", w.axes)


@dataclass(frozen=True)
class Update:
    """The update rule, free of any variant; ir/update.py says what it means.

    `lr`, `tau`, `momentum`, `decay` and `average` hold a per-token expression for each state, with one axis of the
    state or none; None where the rule has no such part.
    """

    states: tuple[Expr, ...]
    lr: Mapping[str, Expr]
    tau: Rates
    mini_batch: Tokens
    read: str
    momentum: Rates = field(default_factory=dict)
    decay: Rates = field(default_factory=dict)
    average: Rates = field(default_factory=dict)
    nesterov: bool = False
    ema: bool = False
    decay_first: bool = False
    clip: float | None = None
    per: str = "token"
    anchor: str = "mini_batch"
    steps: int = 1
    at_end: tuple[EndStage, ...] = ()

    @property
    def rates(self) -> tuple[Expr, ...]:
        """Every rate that is given, each once."""
        groups = (self.lr, self.tau, self.momentum, self.decay, self.average)
        return tuple(dict.fromkeys(r for g in groups for r in g.values() if r is not None))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(w.name for w in self.states)


@dataclass(frozen=True)
class Plan:
    """How a mini-batch is cut into chunks, and why. `mini_batch` is None where its boundaries cannot be observed."""

    chunk: Tokens
    mini_batch: Tokens | None
    reason: str
    rows: bool = False
    """An open mini-batch keeps its tokens: what it adds is known only when it is whole."""

    substitution: bool = False
    """The rows of a chunk's gradients come one after the other, before the chunk."""

    @property
    def free(self) -> bool:
        """Any chunk gives the same result."""
        return self.mini_batch is None

    @property
    def tiled(self) -> bool:
        """A mini-batch takes several chunks."""
        return not self.free and self.chunk != self.mini_batch


class ScanKind(Enum):
    """What a scan of a program is for; ir/schedule.py says what each reads and makes, ir/frozen.py of the last two."""

    WHOLE = "whole"
    OPEN = "open"
    CLOSE = "close"
    COEFFICIENTS = "coefficients"
    ROWS = "rows"
    TOKEN = "token"
    BEGIN = "begin"
    READ = "read"
    PULL = "pull"


@dataclass(frozen=True)
class Scan:
    """A loop over chunks, ready to be run: what stays, what is carried, what each chunk reads and makes.

    `fixed` and `carry` are leaves without a token axis, `sequence` leaves read at "c". `outputs` store into sequences,
    `updates` give the new values of the carry. With `loops` false it is a single block, run once.

    A loop reads a sequence, and what has an axis over tokens is given one: `EACH` where the declaration reads none. So
    batch, heads and tokens are those of the parameters, also where every value is a number.
    """

    name: str
    kind: ScanKind
    fixed: tuple[Expr, ...]
    carry: tuple[Expr, ...]
    sequence: tuple[Expr, ...]
    outputs: tuple[Assign, ...]
    updates: tuple[Assign, ...]
    chunk: Tokens
    loops: bool = True
    doc: str = ""
    differentiated: bool = True
    """Whether it has an adjoint; where it has not, other scans make the same result."""

    @property
    def params(self) -> tuple[Expr, ...]:
        return (*self.carry, *self.fixed, *self.sequence)

    @property
    def block(self) -> Block:
        return Block((*self.outputs, *self.updates))

    @property
    def results(self) -> tuple[Expr, ...]:
        return tuple(a.target for a in self.block.assigns)

    def function(self) -> Function:
        """The scan as a function with a plain loop."""
        body: tuple[Statement, ...] = (self.block,)
        if self.loops:
            allocate = tuple(Allocate(a.target) for a in self.outputs)
            body = (*allocate, For("c", SEQUENCE, self.chunk, (self.block,)))
        return Function(self.name, self.params, body, self.results, self.doc)


@dataclass(frozen=True)
class ScanAdjoint:
    """The reverse of a scan: a forward chunk that also keeps `residuals`, and a backward chunk that takes them.

    `outputs` are those of the scan in the ops of the adjoint, `forward` assigns the residuals and the carry. `backward`
    reads the residuals, the cotangents of outputs and carry, and assigns the cotangents of the sequences (stores), of
    the carry (replaced) and of the fixed leaves (accumulated).
    """

    scan: Scan
    residuals: tuple[Expr, ...]
    outputs: tuple[Assign, ...]
    forward: Block
    backward: Block
    accumulated: tuple[Expr, ...]

    @property
    def cotangents(self) -> tuple[Expr, ...]:
        """The leaves of the cotangents that come in: of the outputs, then of the carry."""
        return tuple(cotangent(a.target) for a in (*self.scan.outputs, *self.scan.updates))


def cotangent(e: Expr) -> Expr:
    """The leaf that holds the cotangent of a leaf: z[c] -> dz[c]."""
    return leaf(differential(e.name), "cotangent", e.axes, e.at)


@dataclass(frozen=True)
class Program:
    """What a stage makes: its functions, the sizes of its dims, and the names that the user gave to values.

    Every stage that makes more than functions has a type of its own, which adds what it makes to that of the stage
    before: no part of a program is ever empty until some later stage fills it.
    """

    name: str
    stage: str
    functions: tuple[Function, ...]
    dims: Mapping[str, int]
    dtype: str = "f64"
    names: Mapping[Expr, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, program: Program, stage: str, **made: Any) -> Self:
        """What a stage makes of the program of the stage before: the same, but for the parts `made`."""
        known = {f.name: getattr(program, f.name) for f in fields(program)}
        return cls(**(known | {"stage": stage} | made))

    def __getitem__(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)

    def __str__(self) -> str:
        return PRINTERS[Program](self)


@dataclass(frozen=True, kw_only=True)
class TokenProgram(Program):
    """The functions `loss` and `output` of one token, as declared, and the update rule."""

    update: Update
    title: str
    """The name of the declaration, for messages."""
    telemetry: bool = False
    """Whether chunks report what the inner loop does: the loss before and after, and the norms of its steps."""


@dataclass(frozen=True, kw_only=True)
class GradientProgram(TokenProgram):
    """The functions `gradient` and `output` of one token."""

    loss: Function


@dataclass(frozen=True, kw_only=True)
class LoopProgram(GradientProgram):
    """The loops of the update rule."""

    gradient: Function
    output: Function

    @property
    def per_token(self) -> tuple[Function, Function]:
        """The functions of one token, which the loops are made of."""
        return self.gradient, self.output


@dataclass(frozen=True)
class GradientClass:
    """How the gradients of a chunk are found: `kind` is "constant" (the weights do not matter), "frozen" (at the
    mini-batch's start), "affine" (online, by a triangular system) or "sequential" (online, token by token).
    """

    kind: str
    finding: Finding
    why: str

    @property
    def sequential(self) -> bool:
        return self.kind == "sequential"


@dataclass(frozen=True, kw_only=True)
class DualProgram(LoopProgram):
    """The dual form, or the loop again where that is the form."""

    gradients: GradientClass


@dataclass(frozen=True, kw_only=True)
class ScanProgram(DualProgram):
    """The scans that cover every length and every split of a sequence; the first makes the outputs."""

    scans: tuple[Scan, ...]
    plan: Plan

    def scan(self, kind: ScanKind) -> Scan | None:
        """The scan of a kind, where there is one."""
        return next((s for s in self.scans if s.kind is kind), None)


@dataclass(frozen=True, kw_only=True)
class AdjointProgram(ScanProgram):
    """Scans with their adjoints: what a backend makes kernels of."""

    adjoints: tuple[ScanAdjoint, ...]

    def adjoint_of(self, scan: Scan) -> ScanAdjoint:
        """The adjoint of one of the scans that have one."""
        return next(a for a in self.adjoints if a.scan is scan)


def blocks(statements: tuple[Statement, ...]) -> Iterator[Block]:
    """Every block of a function body, in order."""
    for statement in statements:
        if isinstance(statement, Block):
            yield statement
        elif isinstance(statement, For):
            yield from blocks(statement.body)


def values(block: Block) -> list[Expr]:
    return [a.value for a in block.assigns]

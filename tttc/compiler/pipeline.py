"""The compiler: a tuple of stages, and a history that checks itself.

Reading `PIPELINE` is reading what happens to a declaration.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from tttc.backends.garbage import gc_paused
from tttc.backends.interface import HOST, Backend, EmittedProgram, Placement, Settings
from tttc.backends.rows import spelled_out
from tttc.compiler.stage_check import blamed, check_meaning, checking
from tttc.declare.checks import no_exact_form, no_gradient
from tttc.declare.lower import declare
from tttc.declare.variant import Signature
from tttc.errors import NotDifferentiable, PassChangedMeaning, SourceLine, problems_text, refusal
from tttc.ir.adjoint import adjoint
from tttc.ir.differentiate import NoGradient, differentiate
from tttc.ir.dualize import dualize
from tttc.ir.frozen import frozen
from tttc.ir.primal import token_loop
from tttc.ir.program import (
    SEQUENCE,
    AdjointProgram,
    DualProgram,
    GradientProgram,
    LoopProgram,
    Program,
    ScanProgram,
    TokenProgram,
)
from tttc.ir.reading import NoExactForm
from tttc.ir.rewrite import counted
from tttc.ir.schedule import schedule
from tttc.ir.simplify import simplify_program
from tttc.ir.verify import verify


@dataclass(frozen=True)
class Options:
    """What a user may choose beside the declaration, and whom the program is for; every stage is given them."""

    dims: Mapping[str, int]
    dtype: str = "f32"
    chunk: int | None = None
    telemetry: bool = False
    tuned: Callable[[DualProgram], int | None] | None = None
    """What tuning has found for the chunk of a program, asked before it is scheduled; it has the last word."""
    backend: Backend | None = None
    """Who makes the kernels; what it prefers is asked where nothing else has chosen a free chunk."""
    settings: Settings | None = None
    place: Placement = HOST
    frozen: bool = False
    """Whether only the output is asked for, at weights that stay."""


@dataclass(frozen=True)
class Stage:
    """One step of the compiler: its name, and what makes its program of that of the stage before."""

    name: str
    run: Callable[[Any, Options], Program]


@dataclass(frozen=True)
class HistoryEntry:
    """A stage of the history: the program that it made, how long that took, and the rules of rewriting that fired."""

    name: str
    number: int
    program: Program
    milliseconds: float
    fired: Mapping[str, int]
    where: SourceLine | None = None

    def __str__(self) -> str:
        origin = f" - from {self.where}" if self.where else ""
        head = f"# stage {self.number} of {len(PIPELINE)}: {self.name} - {self.milliseconds:.1f} ms{origin}\n"
        return head + self.text

    @property
    def text(self) -> str:
        """The program, or where it has become one, the source."""
        return str(self.program)


P = TypeVar("P", bound=Program)


class History:
    """The stages that a declaration went through, verified as they were added. `history["dualize"]` is one of them."""

    def __init__(self, declared: Signature, entries: Sequence[HistoryEntry] = ()) -> None:
        self.declared, self.entries = declared, list(entries)

    def __iter__(self) -> Iterator[HistoryEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> HistoryEntry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no stage {name!r}; the stages are {', '.join(e.name for e in self.entries)}")

    def of(self, kind: type[P]) -> P:
        """The last program of just this type: `of(LoopProgram)` is what the stage `primal` made."""
        return next(e.program for e in reversed(self.entries) if type(e.program) is kind)

    @property
    def program(self) -> AdjointProgram:
        """What a backend is given."""
        return self.of(AdjointProgram)

    def append(self, entry: HistoryEntry) -> None:
        """Add a stage: its types, scopes and spec are verified, with `TTTC_CHECK=1` its meaning too."""
        verify(entry.program)
        if checking() and self.entries:
            check_meaning(self.declared, self.entries[-1].program, entry.program)
        self.entries.append(entry)
        _debug(entry)

    def diff(self, one: str, other: str) -> str:
        """A unified diff of two stages as text."""
        before, after = (str(self[name]).splitlines(keepends=True) for name in (one, other))
        return "".join(difflib.unified_diff(before, after, fromfile=one, tofile=other))


def _debug(entry: HistoryEntry) -> None:
    level = int(os.environ.get("TTTC_DEBUG", "0") or 0)
    if level >= 1:
        print(f"tttc: {entry.name:<14}{entry.milliseconds:8.1f} ms", file=sys.stderr)
    if level >= 2:
        print("".join(f"{n:20}  {title}\n" for title, n in entry.fired.items()), end="", file=sys.stderr)
    if level >= 3:
        print(entry, file=sys.stderr)


# -- the pipeline ------------------------------------------------------------------------------------------------------


def traced(declared: Signature, options: Options) -> TokenProgram:
    """The declaration as per-token functions."""
    return replace(declare(declared, options.dims, options.dtype), telemetry=options.telemetry)


def derived(program: TokenProgram, _: Options) -> GradientProgram:
    """The derivative of the loss; raises `NotDifferentiable` where there is none."""
    try:
        return differentiate(program)
    except NoGradient as states:
        raise NotDifferentiable(problems_text(program.title, [no_gradient(str(states))])) from None


def simplified(program: GradientProgram, _: Options) -> GradientProgram:
    """The functions of one token in their shortest form."""
    return replace(simplify_program(program), stage="simplify")


def looped(program: GradientProgram, _: Options) -> LoopProgram:
    """The update rule token by token."""
    return token_loop(program)


def dualized(program: LoopProgram, _: Options) -> DualProgram:
    """Mini-batches at once."""
    return dualize(program)


def scheduled(program: DualProgram, options: Options) -> ScanProgram:
    """The program as scans of chunks: the chunk as given or tuned, or as the backend would have a free one. What the
    backend has no row for is spelled out.
    """
    made = frozen(program, options.chunk or SEQUENCE) if options.frozen else _in_chunks(program, options)
    return made if options.backend is None else spelled_out(made, options.backend.ROWS)


def _in_chunks(program: DualProgram, options: Options) -> ScanProgram:
    chunk = options.chunk if options.tuned is None else options.tuned(program)
    made = schedule(program, chunk)
    if chunk is not None or not made.plan.free or options.backend is None or program.telemetry:
        return made
    wanted = options.backend.preferred_chunk(made)
    if wanted is None:
        return made
    made = schedule(program, wanted.chunk)
    return replace(made, plan=replace(made.plan, reason=f"{made.plan.reason}; {wanted.why}"))


def reversed_too(program: ScanProgram, _: Options) -> AdjointProgram:
    """Every scan with its reverse."""
    return adjoint(program)


def emitted(program: AdjointProgram, options: Options) -> EmittedProgram:
    """The kernels of the backend, as text."""
    assert options.backend is not None
    return EmittedProgram.of(
        program, "emit", functions=(), source=options.backend.emit_source(program, options.settings, options.place)
    )


PIPELINE: tuple[Stage, ...] = (
    Stage("declare", traced),  # the user's loss and output, as written
    Stage("differentiate", derived),  # the gradient of the loss, kept as products
    Stage("simplify", simplified),
    Stage("primal", looped),  # the definition: a loop over tokens
    Stage("dualize", dualized),  # a mini-batch at once, no weights of a single token
    Stage("schedule", scheduled),  # chunks, open mini-batches, what is carried
    Stage("adjoint", reversed_too),  # the derivative of every chunk
    Stage("emit", emitted),  # the backend's source
)


@gc_paused()
def advance(history: History, options: Options, last: str) -> History:
    """The stages that come after those of `history`, to the one called `last`; `history` itself stays as it is.

    Only those from `schedule` on depend on the backend: what comes before is made once, whoever is asked for kernels.
    """
    made = History(history.declared, history.entries)
    where = next(iter(made.declared.states.values())).where
    stop = [s.name for s in PIPELINE].index(last) + 1
    for number, stage in enumerate(PIPELINE[len(made) : stop], len(made) + 1):
        given: Any = made.entries[-1].program if made.entries else made.declared
        began = time.perf_counter()
        try:
            with counted() as fired:
                program = stage.run(given, options)
        except NoExactForm as reason:
            raise refusal(made.declared.name, [no_exact_form(made.declared, reason, options.dims)]) from None
        milliseconds = (time.perf_counter() - began) * 1e3
        origin = None if isinstance(program, EmittedProgram) else where
        try:
            made.append(HistoryEntry(stage.name, number, program, milliseconds, dict(fired), origin))
        except PassChangedMeaning as error:
            raise blamed(error, partial(stage.run, given, options)) from None
    return made

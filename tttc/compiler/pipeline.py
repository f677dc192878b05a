"""The compiler: a tuple of stages, and a history that checks itself.

Reading `PIPELINE` is reading what happens to a declaration.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tttc.backends.garbage import uncollected
from tttc.backends.interface import Preferred, Source
from tttc.compiler.stage_check import check_meaning
from tttc.declare.checks import no_exact_form, no_gradient
from tttc.declare.lower import declare
from tttc.declare.variant import Signature
from tttc.errors import NotDifferentiable, SourceLine, problems_text, refusal
from tttc.ir import differentiate
from tttc.ir.adjoint import adjoint
from tttc.ir.dualize import dualize
from tttc.ir.expr import OPS
from tttc.ir.primal import token_loop
from tttc.ir.program import AdjointProgram, DualProgram, GradientProgram, Program, ScanProgram, TokenProgram
from tttc.ir.reading import NoExactForm
from tttc.ir.schedule import schedule
from tttc.ir.simplify import simplify_program
from tttc.ir.verify import verify

COMPOSITES = tuple(op.name for op in OPS.values() if op.lower)


@dataclass(frozen=True)
class Options:
    """What a user may choose beside the declaration; every stage is given them."""

    dims: Mapping[str, int]
    dtype: str = "f32"
    chunk: int | None = None
    telemetry: bool = False
    tuned: Callable[[DualProgram], int | None] | None = None
    """What tuning has found for the chunk of a program, asked before it is scheduled; it has the last word."""
    preferred: Callable[[ScanProgram], Preferred | None] | None = None
    """What the backend would rather have, asked of the scheduled program where nothing else has chosen its chunk."""

    def chunk_for(self, program: DualProgram) -> int | None:
        return self.chunk if self.tuned is None else self.tuned(program)


@dataclass(frozen=True)
class Stage:
    """One step of the compiler: its name, what it does, and the ops that must be gone after it."""

    name: str
    run: Callable[[Any, Options], Program]
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class HistoryEntry:
    """A stage of the history: the program that it made, and how long that took."""

    name: str
    number: int
    total: int
    program: Program | None
    milliseconds: float
    source: Source | None = None
    where: SourceLine | None = None

    def __str__(self) -> str:
        origin = f" - from {self.where}" if self.where else ""
        head = f"# stage {self.number} of {self.total}: {self.name} - {self.milliseconds:.1f} ms{origin}\n"
        return head + self.text

    @property
    def text(self) -> str:
        """The program, or where it has become one, the source."""
        return self.source.shown if self.source else str(self.program)


P = TypeVar("P", bound=Program)


class History:
    """The stages that a declaration went through, verified as they were added. `history["dualize"]` is one of them."""

    def __init__(self, entries: list[HistoryEntry] | None = None) -> None:
        self.entries = entries or []

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

    def append(self, entry: HistoryEntry, stage: Stage) -> None:
        """Add a stage: its types, scopes and ops are verified, with `TTTC_CHECK=1` also its meaning."""
        if entry.program is not None:
            verify(entry.program, stage.forbidden)
            before = [e for e in self.entries if e.program is not None]
            if os.environ.get("TTTC_CHECK", "0") not in ("", "0") and before:
                check_meaning(before[-1].program, entry.program)  # type: ignore[arg-type]
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
    if level >= 3:
        print(entry, file=sys.stderr)


# -- the pipeline ------------------------------------------------------------------------------------------------------


def traced(declared: Signature, options: Options) -> TokenProgram:
    """The declaration as per-token functions."""
    program = declare(declared, options.dims, options.dtype)
    return replace(program, telemetry=options.telemetry)


def differentiate_loss(program: TokenProgram) -> GradientProgram:
    """The derivative of the loss; raises `NotDifferentiable` where there is none."""
    try:
        return differentiate.differentiate(program)
    except differentiate.NoGradient as states:
        raise NotDifferentiable(problems_text(program.title, [no_gradient(str(states))])) from None


def scheduled(program: DualProgram, options: Options) -> ScanProgram:
    """The program as scans of chunks: the chunk as given or tuned, or as the backend would have a free one."""
    chunk = options.chunk_for(program)
    made = schedule(program, chunk)
    if chunk is not None or not made.plan.free or options.preferred is None or program.telemetry:
        return made
    wanted = options.preferred(made)
    if wanted is None:
        return made
    made = schedule(program, wanted.chunk)
    return replace(made, plan=replace(made.plan, reason=f"{made.plan.reason}; {wanted.why}"))


PIPELINE: tuple[Stage, ...] = (
    Stage("declare", lambda d, o: traced(d, o)),  # the user's loss and output, as written
    Stage("differentiate", lambda p, o: differentiate_loss(p)),  # the gradient of the loss, kept as products
    Stage("simplify", lambda p, o: replace(simplify_program(p), stage="simplify")),
    Stage("primal", lambda p, o: token_loop(p)),  # the definition: a loop over tokens
    Stage("dualize", lambda p, o: dualize(p)),  # a mini-batch at once, no weights of a single token
    Stage("schedule", lambda p, o: scheduled(p, o)),  # chunks, open mini-batches, what is carried
    Stage("adjoint", lambda p, o: adjoint(p), COMPOSITES),  # the derivative of every chunk
)


@uncollected()
def run_pipeline(declared: Signature, options: Options) -> History:
    """Every stage before `emit`, which is the backend's."""
    history = History()
    where = next(iter(declared.states.values())).where
    total = len(PIPELINE) + 1
    current: Any = declared
    for number, stage in enumerate(PIPELINE, 1):
        began = time.perf_counter()
        try:
            current = stage.run(current, options)
        except NoExactForm as reason:
            raise refusal(declared.name, [no_exact_form(declared, reason, options.dims)]) from None
        milliseconds = (time.perf_counter() - began) * 1e3
        history.append(HistoryEntry(stage.name, number, total, current, milliseconds, where=where), stage)
    return history

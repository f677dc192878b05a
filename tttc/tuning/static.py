"""Tuning for a GPU that is not there: every candidate is compiled for it, and the cost model ranks what fits.

    candidate                registers  spilled bytes  shared bytes   programs per multiprocessor  estimate, ms
    default (chunk=64)       255 / 255  8 / 2316       40960 / 49152  2 / 2                                1.94
    chunk=16                 128 / 255  0 / 68         14336 / 18944  4 / 2                               0.867
    chunk=16, num_stages=3   153 / 255  0 / 60         20480 / 27136  3 / 2                               0.846  taken

Nothing runs. Kernels compile in processes of their own (backends/triton/compile_process.py); what the estimate is, says
backends/cost_model.py. What is taken is kept as an entry that says it was not measured, and is taken where there
is none that was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from tttc.backends import registry
from tttc.backends.cost_model import EstimatedKernel, NotCompiled
from tttc.backends.interface import Tunable
from tttc.backends.registry import Unit
from tttc.backends.rows import spelled_out
from tttc.backends.target import GPU, GPUS
from tttc.compiler.aot import refuse_to_compile
from tttc.compiler.driver import untuned
from tttc.declare.checks import checked_signature
from tttc.errors import TuningError
from tttc.explain.costs import plan_lengths, shares
from tttc.ir import cost
from tttc.ir.names import own
from tttc.ir.program import AdjointProgram, DualProgram, Scan, ScanKind, number_of
from tttc.terminal import plain, table
from tttc.tuning import database
from tttc.tuning.chunks import chunk_choices
from tttc.tuning.descent import Candidate, Choices, Value, candidate_of, config_of
from tttc.tuning.ranking import RankedRow, Ranking, rank, ranked, shown
from tttc.tuning.records import Choice, Entry, Key, architecture_name, key_of
from tttc.tuning.task import Task

SHORT_CHUNKS = (16, 32, 64)  # beside the default: a product of matrices has at least 16 rows, and long chunks take long


@dataclass(frozen=True)
class StaticTuning:
    """What was chosen for a GPU without one; printed, it is a table of all candidates and what was taken."""

    variant: str
    settings: str
    """What the estimate is for, in words."""
    gpu: GPU
    key: Key
    choice: Choice
    ranking: Ranking
    notes: Sequence[str] = ()
    path: Path | None = None
    """The database, where the result was to be kept."""

    @property
    def speedup(self) -> float:
        """Of the choice against the default, by the estimates."""
        best, default = self.ranking.best, self.ranking.default
        return default.seconds / best.seconds if best and default and best.seconds and default.seconds else 1.0

    def table(self) -> Table:
        """One line per candidate, in the order in which they were compiled; forward / backward."""
        columns = ("registers", "spilled bytes", "shared bytes", "programs per multiprocessor", "estimate, ms")
        made = table("candidate", *columns, "", numbers=("estimate, ms",))
        for r in self.ranking.rows:
            resources = [k.made.resources for k in r.kernels]
            figures = (
                [x.registers for x in resources],
                [x.spilled for x in resources],
                [x.shared for x in resources],
                [k.resident(self.gpu) for k in r.kernels],
            )
            shown = (" / ".join("?" if n is None else str(n) for n in numbers) for numbers in figures)
            seconds = "" if r.seconds is None else f"{r.seconds * 1e3:.3g}"
            made.add_row(self._shown(r), *shown, seconds, self._verdict(r))
        return made

    def _shown(self, row: RankedRow) -> str:
        said = shown(row.candidate)
        return (f"default ({said})" if said else "default") if row is self.ranking.rows[0] else said

    def _verdict(self, row: RankedRow) -> Text:
        if row.seconds is None:
            return Text(row.reason, style="red" if row.reason.startswith(("failed", "does not fit")) else "")
        return Text("taken", style="green") if row is self.ranking.best else Text("")

    def summary(self) -> str:
        """What was taken, what the estimate is, and where the result is."""
        found = self.ranking
        faster = "" if self.speedup <= 1 else f", by the estimate {self.speedup:.2f} times as fast as the default"
        lines = [
            f"{self.variant} for {self.gpu.target}, backend {self.key.backend}, {self.settings}",
            f"taken: {self.choice}{faster}",
            found.outcome(len(found.rows), "", "compile"),
            f"Nothing was measured: the estimate ranks kernels, by what their compiler says they take of "
            f"{self.gpu.multiprocessors} multiprocessors ({self.gpu.product}) and by what the program costs.",
            *self.notes,
        ]
        if self.path is not None:
            lines.append(f"kept in {self.path}; tttc.compile takes it on such a GPU, unless one was measured there")
        return "\n".join(lines)

    def __str__(self) -> str:
        return plain(self.table(), "", self.summary())


def tune_statically(task: Task, target: str) -> StaticTuning:
    """Compile candidates for a GPU of `backends/target.py`, rank them, and keep the best where `tttc.compile` looks."""
    unit = next((u for u in registry.estimators() if task.backend in ("auto", u.name)), None)
    if unit is None:
        known = [u.name for u in registry.estimators()]
        raise TuningError(
            f"backend {task.backend!r} has nothing to tune for {target}: "
            f"only the kernels of {' and '.join(known)} have.\n"
            f'  Use backend="{known[0]}".'
        )
    began = time.perf_counter()
    subject = _Estimated(unit, task, GPUS[target])
    mine = next((e for e in database.own_entries() if e.key == subject.key and e.static), None)
    earlier = None if mine is None else candidate_of(mine.choice, subject.choices)
    with task.reporting(_best_text) as report:
        found = rank(subject, task.budget, [earlier] if earlier else [], began=began, report=report)
    if found.best is None:
        said = "; ".join(f"{shown(r.candidate) or 'the default'} {r.reason}" for r in found.rows[:3])
        raise TuningError(f"variant `{subject.name}`: no candidate for {target} could be taken: {said}")
    choice = subject.choice(found.best.candidate)
    if task.save:
        database.add([subject.entry(found, choice)], replace=True)
    path = database.database_path() if task.save else None
    settings = task.settings(subject.key.dims)
    return StaticTuning(subject.name, settings, GPUS[target], subject.key, choice, found, subject.notes, path)


def _best_text(found: Ranking) -> str:
    best = found.best
    return "" if best is None or best.seconds is None else f"best {best.seconds * 1e3:.3g} ms (estimate)"


class _Estimated:
    """A declaration for a GPU: its candidates, as kernels to be compiled and as what they cost."""

    def __init__(self, unit: Unit, task: Task, gpu: GPU) -> None:
        assert unit.estimator is not None
        self.task, self.gpu, self.name = task, gpu, checked_signature(task.variant).name
        self.unit, self.estimator, self.pool = unit, unit.estimator(), unit.estimator().pool()
        stages = task.compiled(task.dtype, "torch").stages
        dualized, program = stages.of(DualProgram), untuned(task.variant, task.dims, unit.backend)
        refuse_to_compile(unit, gpu.target, stages.program)
        here = key_of(dualized, unit.name, unit.backend, torch.device("cpu"), task.dtype, task.work)
        self.key = replace(here, device=architecture_name(gpu.target))
        free = number_of(program.plan.chunk, task.tokens) if program.plan.free else None
        found = chunk_choices(dualized, task.tokens, free)
        chunks: tuple[Value, ...] = tuple(c for c in found if c == found[0] or c in SHORT_CHUNKS)
        chunks = chunks if len(chunks) > 1 else (None,)
        self._made: dict[Value, Tunable] = {}
        first = [self._of(c) for c in chunks]
        if all(p.refused for p in first):
            raise TuningError(
                f"variant `{self.name}`: there is nothing to tune for {gpu.target}: its loop is no kernel but batched "
                f"operations of PyTorch, because {first[0].refused}."
            )
        self.notes = [f"Not in the estimate: {n}." for n in first[0].left_out]
        choices = {"chunk": chunks} if len(chunks) > 1 else {}
        settings = unit.backend.choices(program)
        self.choices: Choices = choices | {n: (None, *values) for n, values in settings.items()}

    def choice(self, candidate: Candidate) -> Choice:
        """What is kept of a candidate. A chunk that was chosen is named even if it is the default, with which the
        settings beside it were compiled.
        """
        return Choice(candidate.get("chunk"), None, config_of(candidate))

    def entry(self, found: Ranking, choice: Choice) -> Entry:
        best, default = found.best, found.default or found.best
        assert best is not None
        assert default is not None
        assert best.seconds is not None
        assert default.seconds is not None
        return self.task.entry(self.key, choice, (best.seconds, default.seconds), static=True)

    def identity(self, candidate: Candidate) -> Hashable:
        return candidate.get("chunk"), self._of(candidate.get("chunk")).identity(config_of(candidate))

    def row(self, candidate: Candidate, seconds: float, best: float) -> RankedRow:
        task, made, kernels = self.task, self._of(candidate.get("chunk")), list[EstimatedKernel]()
        if made.refused:
            return RankedRow(candidate, reason=f"no kernel: {made.refused}")
        try:
            for kernel in made.compiled(config_of(candidate), self.pool, seconds):
                kernels.append(kernel)
                row = ranked(candidate, kernels, self.gpu, task.batch * task.heads, task.dtype)
                if row.seconds is None:
                    break
                if row.seconds > best and len(kernels) < len(made):
                    return RankedRow(candidate, kernels, reason="slower than the best before all of it was compiled")
        except NotCompiled as error:
            return RankedRow(candidate, kernels, reason=str(error))
        return row

    def end(self) -> None:
        self.pool.end()

    def _of(self, chunk: Value) -> Tunable:
        """The program with a chunk; made before threads ask for it, by whoever asks for the identity first."""
        task = self.task
        if chunk not in self._made:
            if chunk is None:
                program = untuned(task.variant, task.dims, self.unit.backend)
            else:
                program = task.compiled(task.dtype, "torch", chunk=chunk).stages.program
                program = spelled_out(program, self.unit.backend.ROWS)
            turns = {scan.name: n for scan, n in _regular(program, task.tokens)}
            target = self.gpu.target
            self._made[chunk] = self.estimator.tunable(program, turns, task.dtype, target, task.forward_only)
        return self._made[chunk]


def _regular(program: AdjointProgram, tokens: int) -> Iterator[tuple[Scan, int]]:
    """The scans that every mini-batch runs, each with its turns in a call; not what only the beginning of one does."""
    sizes = {**program.dims, own("T"): tokens}
    found = shares(program)
    for scan in program.scans:
        if scan.kind in found and scan.kind is not ScanKind.BEGIN:
            turns = cost.evaluate(found[scan.kind] * cost.TOKENS, {}, plan_lengths(program))  # one may be all tokens
            yield scan, math.ceil(float(cost.evaluate(turns, sizes)))

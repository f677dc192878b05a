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
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from tttc.backends import registry
from tttc.backends.cost_model import EstimatedKernel, NotCompiled
from tttc.backends.interface import Tunable
from tttc.backends.registry import Unit
from tttc.backends.target import GPU, GPUS
from tttc.compiler.aot import refuse_to_compile
from tttc.compiler.driver import compile
from tttc.compiler.driver import untuned as untuned_program
from tttc.declare.checks import checked_signature
from tttc.declare.variant import Variant
from tttc.errors import TuningError
from tttc.explain.costs import plan_lengths, shares
from tttc.ir import cost
from tttc.ir.names import own
from tttc.ir.program import AdjointProgram, DualProgram, Scan, ScanKind, number_of
from tttc.terminal import budget_bar, plain, table
from tttc.tuning import database
from tttc.tuning.chunks import chunk_choices
from tttc.tuning.descent import Candidate, Choices, Value, candidate_of
from tttc.tuning.lookup import untuned
from tttc.tuning.ranking import RankedRow, Ranking, rank, ranked, shown
from tttc.tuning.records import Choice, Entry, Key, architecture_name, key_of

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
        ends = {
            "budget": "no time was left for another candidate",
            "exhausted": "nothing near the best is left to compile",
            "interrupted": "interrupted",
        }
        faster = "" if self.speedup <= 1 else f", by the estimate {self.speedup:.2f} times as fast as the default"
        count = len(found.rows)
        lines = [
            f"{self.variant} for {self.gpu.target}, backend {self.key.backend}, {self.settings}",
            f"taken: {self.choice}{faster}",
            f"{count} candidate{'' if count == 1 else 's'} in {found.elapsed:.0f} s of {found.budget:g}: "
            f"{ends[found.stopped]}",
            f"Nothing was measured: the estimate ranks kernels, by what their compiler says they take of "
            f"{self.gpu.multiprocessors} multiprocessors ({self.gpu.product}) and by what the program costs.",
            *self.notes,
        ]
        if self.path is not None:
            lines.append(f"kept in {self.path}; tttc.compile takes it on such a GPU, unless one was measured there")
        return "\n".join(lines)

    def __str__(self) -> str:
        return plain(self.table(), "", self.summary())


def tune_statically(
    variant: type[Variant],
    dims: Mapping[str, int],
    dtype: torch.dtype,
    target: str,
    budget: float,
    *,
    backend: str = "auto",
    size: tuple[int, int, int],
    forward_only: bool = False,
    save: bool = True,
    progress: bool = True,
    workers: int | None = None,
) -> StaticTuning:
    """Compile candidates for a GPU of `backends/target.py`, rank them, and keep the best where `tttc.compile` looks.

    `size` is the batch, tokens and heads of the call that is estimated; `workers` kernels compile at a time. All else
    is as for `tttc.tune`.
    """
    unit = next((u for u in registry.estimators() if backend in ("auto", u.name)), None)
    if unit is None:
        known = [u.name for u in registry.estimators()]
        raise TuningError(
            f"backend {backend!r} has nothing to tune for {target}: only the kernels of {' and '.join(known)} have.\n"
            f'  Use backend="{known[0]}".'
        )
    began = time.perf_counter()
    subject = _Estimated(unit, variant, dims, dtype, GPUS[target], size, forward_only)
    mine = next((e for e in database.own_entries() if e.key == subject.key and e.static), None)
    earlier = None if mine is None else candidate_of(mine.choice, subject.choices)
    with budget_bar(budget) if progress else nullcontext() as bar:

        def report(found: Ranking) -> None:
            if bar is not None:
                bar.update(bar.task_ids[0], description=_progress_text(found))

        found = rank(subject, budget, [earlier] if earlier else [], began=began, workers=workers, report=report)
    if found.best is None:
        said = "; ".join(f"{shown(r.candidate) or 'the default'} {r.reason}" for r in found.rows[:3])
        raise TuningError(f"variant `{subject.name}`: no candidate for {target} could be taken: {said}")
    choice = subject.choice(found.best.candidate)
    if save:
        database.add([subject.entry(found, choice)], replace=True)
    path = database.database_path() if save else None
    return StaticTuning(subject.name, subject.settings, GPUS[target], subject.key, choice, found, subject.notes, path)


def _progress_text(found: Ranking) -> str:
    best = found.best
    said = "" if best is None or best.seconds is None else f"best {best.seconds * 1e3:.3g} ms (estimate)"
    return ", ".join(x for x in (said, f"now {found.now}" if found.now else "") if x)


class _Estimated:
    """A declaration for a GPU: its candidates, as kernels to be compiled and as what they cost."""

    def __init__(
        self,
        unit: Unit,
        variant: type[Variant],
        dims: Mapping[str, int],
        dtype: torch.dtype,
        gpu: GPU,
        size: tuple[int, int, int],
        forward_only: bool,
    ) -> None:
        assert unit.estimator is not None
        self.name, self.variant, self.dims = checked_signature(variant).name, variant, dims
        self.unit, self.estimator, self.pool = unit, unit.estimator(), unit.estimator().pool()
        self.dtype, self.gpu, self.forward_only = dtype, gpu, forward_only
        self.batch, self.tokens, self.heads = size
        with untuned():
            stages = compile(variant, dims, dtype, backend="torch").stages
        dualized, program = stages.of(DualProgram), untuned_program(variant, dims, unit.backend)
        refuse_to_compile(unit, gpu.target, stages.program)
        work = "forward" if forward_only else "training"
        here = key_of(dualized, unit.name, unit.backend, torch.device("cpu"), dtype, work)
        self.key = replace(here, device=architecture_name(gpu.target))
        free = number_of(program.plan.chunk, self.tokens) if program.plan.free else None
        found = chunk_choices(dualized, self.tokens, free)
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

    @property
    def settings(self) -> str:
        """What is estimated, in words."""
        dims = ", ".join(f"{d}={n}" for d, n in self.key.dims.items())
        work = "forward" if self.forward_only else "forward and backward"
        return f"{dims}, {self.key.dtype}; {work} at B={self.batch}, T={self.tokens}, H={self.heads}"

    def choice(self, candidate: Candidate) -> Choice:
        """What is kept of a candidate. A chunk that was chosen is named even if it is the default, with which the
        settings beside it were compiled.
        """
        return Choice(candidate.get("chunk"), None, _config(candidate))

    def entry(self, found: Ranking, choice: Choice) -> Entry:
        best, default = found.best, found.default or found.best
        assert best is not None
        assert default is not None
        assert best.seconds is not None
        assert default.seconds is not None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        size = self.batch, self.tokens, self.heads
        return Entry(self.key, choice, best.seconds, default.seconds, *size, 0, self.name, now, static=True)

    def identity(self, candidate: Candidate) -> Hashable:
        return candidate.get("chunk"), self._of(candidate.get("chunk")).identity(_config(candidate))

    def row(self, candidate: Candidate, seconds: float, best: float) -> RankedRow:
        made, kernels = self._of(candidate.get("chunk")), list[EstimatedKernel]()
        if made.refused:
            return RankedRow(candidate, reason=f"no kernel: {made.refused}")
        try:
            for kernel in made.compiled(_config(candidate), self.pool, seconds):
                kernels.append(kernel)
                row = ranked(candidate, kernels, self.gpu, self.batch * self.heads, self.dtype)
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
        if chunk not in self._made:
            if chunk is None:
                program = untuned_program(self.variant, self.dims, self.unit.backend)
            else:
                with untuned():
                    program = compile(self.variant, self.dims, self.dtype, backend="torch", chunk=chunk).stages.program
            turns = {scan.name: n for scan, n in _regular(program, self.tokens)}
            target = self.gpu.target
            self._made[chunk] = self.estimator.tunable(program, turns, self.dtype, target, self.forward_only)
        return self._made[chunk]


def _regular(program: AdjointProgram, tokens: int) -> Iterator[tuple[Scan, int]]:
    """The scans that every mini-batch runs, each with its turns in a call; not what only the beginning of one does."""
    sizes = {**program.dims, own("T"): tokens}
    found = shares(program)
    for scan in program.scans:
        if scan.kind in found and scan.kind is not ScanKind.BEGIN:
            turns = cost.evaluate(found[scan.kind] * cost.TOKENS, {}, plan_lengths(program))  # one may be all tokens
            yield scan, math.ceil(float(cost.evaluate(turns, sizes)))


def _config(candidate: Candidate) -> dict[str, int]:
    """The settings of kernels that a candidate has."""
    return {n: v for n, v in candidate.items() if n != "chunk" and v is not None}

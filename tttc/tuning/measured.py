"""The fastest chunk, checkpoints and kernels for a program on this CPU, measured.

A candidate is compiled, compared with the torch backend in float64 (outputs, final weights, gradients), and only then
timed, call by call in turn with the best one so far.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from tttc.backends import registry
from tttc.declare.checks import checked_signature
from tttc.errors import TuningError
from tttc.ir.expr import TOKENS
from tttc.ir.program import SEQUENCE, DualProgram, ScanProgram
from tttc.ir.schedule import schedule
from tttc.runtime.layer import Layer
from tttc.terminal import plain, table
from tttc.tuning import database
from tttc.tuning.accuracy import Accuracy, in_dtype
from tttc.tuning.chunks import chunk_choices
from tttc.tuning.descent import Candidate, Value, candidate_of, config_of, default_of
from tttc.tuning.records import Choice, Entry, Key, found_for, key_of
from tttc.tuning.search import Call, Search, Trial, search
from tttc.tuning.task import Task
from tttc.verification.comparison import Inputs, random_inputs

CHECKPOINTS = (4, 2, 1, 8, 16)  # chunks between two carries that are kept
KEPT = 2  # times the tensors of the call that carries kept for the backward may take


@dataclass(frozen=True)
class TuningResult:
    """What tuning found; printed, it is a table of all candidates and what was taken."""

    variant: str
    settings: str
    """What was timed, in words."""
    key: Key
    choice: Choice
    search: Search
    defaults: Candidate
    path: Path | None = None
    """The database, where the result was to be kept."""
    note: str = ""
    """How far rounding alone moves the results, where candidates had to be compared within that."""
    earlier: Entry | None = None
    """What the database keeps instead: the result of an earlier run that this one had no time to try again."""

    @property
    def speedup(self) -> float:
        """Of the choice against the default; 1 where that is the default."""
        return self.search.speedup

    def table(self) -> Table:
        """One line per candidate, in the order in which they were tried."""
        made = table("candidate", "ms", "by the best before", "", numbers=("ms", "by the best before"))
        styles = {"faster": "green", "confirmed": "green", "wrong": "bold red", "failed": "red"}
        for t in self.search.trials:
            verdict = Text(f"{t.verdict}: {t.reason}" if t.reason else t.verdict, style=styles.get(t.verdict, ""))
            seconds = "" if t.seconds is None else f"{t.seconds * 1e3:.3g}"
            made.add_row(self._shown(t), seconds, "" if t.ratio is None else f"{t.ratio:.2f}", verdict)
        return made

    def _shown(self, trial: Trial) -> str:
        """What a candidate changes."""
        if trial.candidate == self.defaults:
            said = ", ".join(f"{n}={'auto' if v is None else v}" for n, v in self.defaults.items())
            return f"default ({said})" if said else "default"
        return str(_choice(trial.candidate, self.defaults))

    def summary(self) -> str:
        """What was taken, and where it is."""
        found = self.search
        wrong = f", {len(found.rejected)} rejected" if found.rejected else ""
        tried = len({str(t.candidate) for t in found.trials})
        lines = [
            f"{self.variant} on {self.key.device}, backend {self.key.backend}, {self.settings}",
            f"taken: {self.choice}" + (f", {self.speedup:.2f} times as fast as the default" if self._better else ""),
            found.outcome(tried, wrong, "try"),
        ]
        if self.note:
            lines.append(self.note)
        if self.path is not None:
            lines.append(self._kept())
        return "\n".join(lines)

    def _kept(self) -> str:
        if self.earlier is not None:
            return f"in {self.path} an earlier result stays, which was not tried again: {self.earlier.choice}"
        return f'kept in {self.path}; tttc.compile takes it from now on (backend="{self.key.backend}")'

    @property
    def _better(self) -> bool:
        return self.search.default is not None and self.search.best is not self.search.default

    def __str__(self) -> str:
        return plain(self.table(), "", self.summary())


def tune_measured(task: Task) -> TuningResult:
    """Time candidates on this CPU."""
    began = perf_counter()
    subject = _Timed(task)
    choices = subject.choices()
    defaults = default_of(choices)
    mine = next((e for e in database.own_entries() if e.key == subject.key), None)
    before = mine or found_for(subject.key, *database.entries()).entry
    again = None if before is None else candidate_of(before.choice, choices)
    first = [] if again is None else [again]
    with task.reporting(_best_text) as report:
        left = max(task.budget - (perf_counter() - began), 0.0)
        found = search(subject, choices, left, ordered=("chunk", "checkpoint"), first=first, report=report)
    found.budget, found.elapsed = task.budget, found.elapsed + task.budget - left
    if found.best is None:
        said = "; ".join(f"{t.verdict}: {t.reason}" for t in found.trials[:3])
        raise TuningError(f"variant `{subject.signature.name}`: no candidate could be taken: {said}")
    choice = _choice(found.best.candidate, defaults)
    stays = mine is not None and again not in [t.candidate for t in found.trials if t.seconds is not None]
    if task.save and not stays:
        database.add([subject.entry(found, choice)], replace=True)
    path, left_alone = database.database_path() if task.save else None, mine if stays else None
    named = subject.signature.name, subject.settings
    note = subject.accuracy.note
    return TuningResult(*named, subject.key, choice, found, defaults, path, note=note, earlier=left_alone)


def _best_text(found: Search) -> str:
    best = "" if found.best is None or found.best.seconds is None else f"best {found.best.seconds * 1e3:.3g} ms"
    return f"{best} ({found.speedup:.2f}x)" if found.speedup > 1 else best


def _choice(candidate: Candidate, defaults: Candidate) -> Choice:
    """A candidate without what is the default."""
    left: dict[str, Any] = {n: v for n, v in candidate.items() if v != defaults[n]}
    return Choice(left.pop("chunk", None), left.pop("checkpoint", None), left)


class _Timed:
    """A declaration on a device: its candidates compiled, checked and called."""

    def __init__(self, task: Task) -> None:
        self.task, self.signature, backend = task, checked_signature(task.variant), task.backend
        self.exact = task.compiled(torch.float64, "torch")
        self.dims = self.exact.dims
        self.dualized, self.scheduled = self.exact.stages.of(DualProgram), self.exact.stages.of(ScanProgram)
        if backend not in ("auto", *registry.names()):
            raise TuningError(
                f"there is no backend {backend!r} to tune; there are auto, {', '.join(registry.names())}."
            )
        unit = None if backend == "auto" else registry.named(backend, torch.device("cpu"))
        if unit is not None and not (unit.differentiates or task.forward_only):
            remedy = "Tune its forward alone, forward_only=True, or another backend."
            raise TuningError(f"backend {backend!r} has no backward to time.\n  {remedy}")
        self.name = task.compiled(task.dtype, backend).backend  # what is refused is said as compile says it
        self.backend = registry.named(self.name, torch.device("cpu")).backend
        self.key = key_of(self.dualized, self.name, self.backend, torch.device("cpu"), task.dtype, task.work)
        self._layers: dict[Hashable, Layer] = {}
        self._programs: dict[Value, ScanProgram] = {}
        by_torch, forward_only = (lambda: task.compiled(task.dtype, "torch")), task.forward_only
        self.accuracy = Accuracy(self.exact, task.dtype, self._checked_tokens(), by_torch, forward_only=forward_only)
        self._timed: Inputs | None = None

    @property
    def settings(self) -> str:
        """What is timed, in words."""
        return f"{self.task.settings(self.dims)} on {torch.get_num_threads()} threads"

    def entry(self, found: Search, choice: Choice) -> Entry:
        """What is kept."""
        assert found.best is not None
        assert found.best.seconds is not None
        times = found.best.seconds, found.best.seconds * found.speedup
        return self.task.entry(self.key, choice, times, torch.get_num_threads())

    # -- candidates

    def choices(self) -> dict[str, tuple[Value, ...]]:
        """Every coordinate with its values; those that need nothing compiled come first."""
        chunks = self._chunks
        config = {n: tuple(values) for n, values in self.backend.choices(self.exact.stages.program).items()}
        found: dict[str, tuple[Value, ...]] = {"checkpoint": (None, *self._checkpoints())}
        found |= {"chunk": chunks} if chunks else {}
        return {n: values for n, values in {**found, **config}.items() if len(values) > 1}

    @cached_property
    def _chunks(self) -> tuple[int, ...]:
        """Chunks of programs that the backend can run."""
        plan = self.scheduled.plan
        preferred = self.backend.preferred_chunk(self.scheduled) if plan.free else None
        found = chunk_choices(self.dualized, self.task.tokens, None if preferred is None else preferred.chunk)
        if self.backend.refusals(self.scheduled):  # at the chunk of the torch backend
            found = tuple(n for n in found if not self.backend.refusals(self._program(n)))
        return found if len(found) > 1 else ()

    def _checkpoints(self) -> tuple[int, ...]:
        """Distances at which the carries that are kept take about as much memory as the call itself."""
        plan = self.scheduled.plan
        if self.task.forward_only or plan.chunk is SEQUENCE:
            return ()
        dims = {**self.dims, TOKENS: plan.chunk}
        carry = sum(math.prod(dims[a.size] for a in p.axes) for p in self.scheduled.scans[0].carry)
        declared, tokens = self.signature, self.task.tokens
        widths = [s.dims for s in declared.tokens.values()] + [s.dims for s in declared.gates.values()]
        row = sum(math.prod(self.dims[d] for d in w) for w in widths)
        chunks = -(-tokens // plan.chunk)
        automatic = max(1, math.isqrt(chunks))
        fit = (n for n in CHECKPOINTS if n < chunks and chunks / n * carry <= KEPT * row * tokens)
        return tuple(n for n in fit if n != automatic)

    def identity(self, candidate: Candidate) -> tuple[Hashable, Hashable]:
        chunk = candidate.get("chunk")
        kernels = self.backend.identity(self._program(chunk), config_of(candidate))
        return (chunk, kernels), candidate.get("checkpoint")

    def _program(self, chunk: Value) -> ScanProgram:
        """Scheduled with a chunk."""
        if chunk not in self._programs:
            self._programs[chunk] = schedule(self.dualized, chunk)
        return self._programs[chunk]

    def layer(self, candidate: Candidate) -> Layer:
        """Compiled as if nothing had ever been tuned; those that differ in their checkpoints share kernels."""
        config, chunk, checkpoint = config_of(candidate), candidate.get("chunk"), candidate.get("checkpoint")
        key = (chunk, tuple(config.items()))
        if key not in self._layers:
            self._layers[key] = self.task.compiled(self.task.dtype, self.name, chunk=chunk, config=config)
        layer = copy(self._layers[key])
        layer.checkpoint = "auto" if checkpoint is None else checkpoint
        return layer

    def prepare(self, candidate: Candidate) -> Call:
        layer = self.layer(candidate)
        self.accuracy.check(layer)
        return self._call(layer)

    # -- checked

    def _checked_tokens(self) -> int:
        """Three chunks and, where that takes no further kernels, a tail; at most what is timed."""
        plan, most = self.scheduled.plan, self.task.tokens
        if plan.free:
            return min(most, 3 * max(self._chunks or (64,)) + 5)
        if isinstance(plan.mini_batch, int):
            return min(most, plan.mini_batch * -(-48 // plan.mini_batch))
        return min(most, 300)

    # -- timed

    def _call(self, layer: Layer) -> Call:
        """One forward, with its backward unless only the forward is tuned."""
        task = self.task
        if self._timed is None:
            raw = random_inputs(self.signature, self.dims, task.batch, task.tokens, task.heads)
            self._timed = in_dtype(raw, task.dtype, grad=not task.forward_only)
        inputs = self._timed
        leaves = list(inputs.named().values())

        def forward() -> None:
            with torch.no_grad():
                layer(inputs.q, inputs.k, inputs.v, **inputs.keywords())

        def training() -> None:
            z, _ = layer(inputs.q, inputs.k, inputs.v, **inputs.keywords())
            torch.autograd.grad(z, leaves, torch.ones_like(z), allow_unused=True)

        return forward if task.forward_only else training

"""The search of static tuning: candidates compiled, several at a time, in a budget of time, and ranked by estimates.

It goes along one coordinate after the other, with all values of one at once, until nothing near the best has a lower
estimate. It knows no declarations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tttc.backends.cost_model import EstimatedKernel, estimate
from tttc.backends.cpu import usable_cores
from tttc.backends.target import GPU
from tttc.tuning.descent import Candidate, Choices, Progress, Value, default_of, descend

LONGEST = 120.0  # seconds for what is compiled whatever the budget is


@dataclass(frozen=True)
class RankedRow:
    """One candidate: its kernels, forward and backward by turns, and its estimate, or the reason why it has none."""

    candidate: Candidate
    kernels: Sequence[EstimatedKernel] = ()
    seconds: float | None = None
    reason: str = ""


@dataclass
class Ranking(Progress):
    """What was compiled."""

    rows: list[RankedRow] = field(default_factory=list)

    @property
    def best(self) -> RankedRow | None:
        """The lowest estimate; of equal ones the one that was compiled first, which changes least."""
        return min((r for r in self.rows if r.seconds is not None), key=lambda r: r.seconds or 0.0, default=None)

    @property
    def default(self) -> RankedRow | None:
        return next((r for r in self.rows if r.seconds is not None and r is self.rows[0]), None)


def ranked(
    candidate: Candidate, kernels: Sequence[EstimatedKernel], gpu: GPU, programs: int, dtype: torch.dtype
) -> RankedRow:
    """A candidate with its estimate, or what it takes more of than there is."""
    for k in kernels:
        taken = k.made.resources
        if taken.shared > gpu.shared_of_program:
            most = f"{taken.shared} bytes of shared memory, {gpu.shared_of_program} at most"
            return RankedRow(candidate, kernels, reason=f"does not fit: {taken.kernel} takes {most}")
        if not k.resident(gpu):
            return RankedRow(
                candidate, kernels, reason=f"does not fit: {taken.kernel} takes more registers than there are"
            )
    return RankedRow(candidate, kernels, estimate(kernels, gpu, programs, dtype))


class Estimated(Protocol):
    """What is tuned."""

    @property
    def choices(self) -> Choices: ...

    def identity(self, candidate: Candidate) -> Hashable:
        """Equal for candidates whose kernels are the same."""
        ...

    def row(self, candidate: Candidate, seconds: float, best: float) -> RankedRow:
        """A candidate compiled, kernel by kernel, in at most so many seconds, and for as long as its estimate is below
        the best.
        """
        ...

    def end(self) -> None:
        """Stop what is being compiled."""
        ...


def rank(
    subject: Estimated,
    budget: float,
    known: Sequence[Candidate] = (),
    *,
    began: float | None = None,
    workers: int | None = None,
    report: Callable[[Ranking], None] = lambda found: None,
) -> Ranking:
    """Compile the default and what is `known` from earlier, whatever the budget is, and then what is near the best."""
    found = Ranking(budget)
    _Ranking(subject, found, time.perf_counter() if began is None else began, workers, report).run(known)
    return found


class _Ranking:
    def __init__(
        self,
        subject: Estimated,
        found: Ranking,
        began: float,
        workers: int | None,
        report: Callable[[Ranking], None],
    ) -> None:
        self.subject, self.found, self.began, self.report = subject, found, began, report
        self.pool = ThreadPoolExecutor(workers or usable_cores())
        self.seen: set[Hashable] = set()

    def run(self, known: Sequence[Candidate]) -> None:
        choices, found = self.subject.choices, self.found
        try:
            self._compile([default_of(choices), *known], always=True)
            found.stopped = descend(choices, self._best, self._along)
        except KeyboardInterrupt:
            if found.best is None:
                raise
            found.stopped = "interrupted"
        finally:
            self.subject.end()
            self.pool.shutdown(cancel_futures=True)
            found.elapsed = time.perf_counter() - self.began

    def _best(self) -> Candidate:
        return self.found.best.candidate if self.found.best else default_of(self.subject.choices)

    def _along(self, name: str, values: Sequence[Value]) -> bool:
        """All values of one coordinate at once; whether there was time for them."""
        return self._compile([{**self._best(), name: v} for v in values])

    def _compile(self, candidates: Iterable[Candidate], always: bool = False) -> bool:
        """Compile what is new; whether there was time for all of it."""
        waiting = {}
        for candidate in candidates:
            identity = self.subject.identity(candidate)
            if identity not in self.seen:
                self.seen.add(identity)
                waiting[self.pool.submit(self._row, candidate, always)] = candidate
        before, order = self.found.rows, dict(waiting)
        while waiting:
            self._news(waiting.values())
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                del waiting[done]
            finished = [f.result() for f in order if f not in waiting]
            self.found.rows = [*before, *(row for row in finished if row is not None)]
        late = [c for f, c in order.items() if f.result() is None]
        self.seen -= set(map(self.subject.identity, late))
        self._news(())
        return not late

    def _row(self, candidate: Candidate, always: bool) -> RankedRow | None:
        """A candidate compiled; None where no time is left to begin."""
        left = self.found.budget - (time.perf_counter() - self.began)
        if left <= 0 and not always:
            return None
        known = self.found.best
        best = float("inf") if known is None or known.seconds is None else known.seconds
        try:
            return self.subject.row(candidate, max(left, LONGEST) if always else left, best)
        except Exception as error:
            return RankedRow(candidate, reason=f"failed: {' '.join(str(error).split()) or type(error).__name__}")

    def _news(self, waiting: Iterable[Candidate]) -> None:
        self.found.now = "; ".join(shown(c) or "the default" for c in list(waiting)[:2])
        self.report(self.found)


def shown(candidate: Candidate) -> str:
    """What a candidate sets."""
    return ", ".join(f"{n}={v}" for n, v in candidate.items() if v is not None)

"""The search for what is fastest in a budget of time: coordinate descent, a candidate is checked before it is timed.

It knows neither layers nor backends. Times are compared in pairs, one call of each in turn, because a machine that is
shared is fast one second and slow the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, TypeAlias

from tttc.tuning.descent import Candidate, Choices, Progress, Value, default_of, descend

Call: TypeAlias = Callable[[], None]

MARGIN = 0.03  # a candidate that is faster by less may be so by chance
SLOWER = 1.15  # after enough pairs, one that is slower by this much is given up
HOPELESS = 3.0  # one whose calls are long, and the first takes so many times as long, is given up at once
FEWEST, ENOUGH, MOST = 3, 5, 15  # pairs of calls
TIMED_SECONDS = 2.0  # for the pairs of one candidate, once there are a few
SHORTEST = 0.005  # seconds of one measurement; a shorter call is repeated


class IncorrectResult(Exception):
    """A candidate whose result is not that of the reference, with what differs."""


class Timed(Protocol):
    """What is tuned."""

    def identity(self, candidate: Candidate) -> tuple[Hashable, Hashable]:
        """What has to be compiled for a candidate, and all else that tells it from others that compile the same."""
        ...

    def prepare(self, candidate: Candidate) -> Call:
        """A call that can be timed: compiled, and its results found to be right; raises `IncorrectResult` otherwise."""
        ...


@dataclass(frozen=True)
class Trial:
    """One candidate: `verdict` is "default", "faster", "no faster", "wrong" or "failed"; where the best is timed
    against the default again, at the end, "confirmed" or "not confirmed". `reason` says more.
    """

    candidate: Candidate
    verdict: str
    seconds: float | None = None
    """The median of its calls."""
    ratio: float | None = None
    """Its time by that of the best one before it, or of the default where that is confirmed; the median of pairs."""
    reason: str = ""


@dataclass(frozen=True)
class _Pairs:
    """Seconds of calls of two candidates, in turn."""

    times: Sequence[float]
    others: Sequence[float]

    @property
    def seconds(self) -> float:
        return median(self.times)

    @property
    def ratio(self) -> float:
        return median(a / b for a, b in zip(self.times, self.others, strict=True))

    @property
    def faster(self) -> bool:
        """Whether the first is faster by more than chance: by the margin, and in two pairs out of three."""
        wins = sum(a < b for a, b in zip(self.times, self.others, strict=True))
        return self.ratio < 1 - MARGIN and 3 * wins >= 2 * len(self.times)


@dataclass
class Search(Progress):
    """What was found, complete or not."""

    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    default: Trial | None = None

    @property
    def rejected(self) -> list[Trial]:
        return [t for t in self.trials if t.verdict in ("wrong", "failed")]

    @property
    def speedup(self) -> float:
        """Of the best against the default; timed together, once that is confirmed."""
        if self.best is None or self.default is None or not self.best.seconds or not self.default.seconds:
            return 1.0
        if self.best.verdict == "confirmed" and self.best.ratio:
            return 1 / self.best.ratio
        return self.default.seconds / self.best.seconds


def search(
    subject: Timed,
    choices: Choices,
    budget: float,
    *,
    ordered: Collection[str] = (),
    first: Sequence[Candidate] = (),
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[Search], None] = lambda found: None,
) -> Search:
    """Find the fastest candidate.

    Args:
        choices: the values of each coordinate, the default first, then what is most promising.
        budget: seconds. A candidate that would probably not be done in time is not begun; the default always is.
        ordered: coordinates along which time has one valley: beyond a value that is slower than the best one, those
            that are still further from it are not tried.
        first: candidates known to be good somewhere, tried right after the default.
        report: called whenever there is news.

    An interrupt (Ctrl-C) ends it with what was found; one before the default is timed is raised.
    """
    return _Searching(subject, choices, budget, ordered, clock, report).run(first)


class _Searching:
    def __init__(
        self,
        subject: Timed,
        choices: Choices,
        budget: float,
        ordered: Collection[str],
        clock: Callable[[], float],
        report: Callable[[Search], None],
    ) -> None:
        self.subject, self.choices, self.clock, self.report = subject, choices, clock, report
        self.ordered, self.began = ordered, clock()
        self.found = Search(budget)
        self.seen: set[Hashable] = set()
        self.compiled: set[Hashable] = set()
        self.costs: list[float] = []  # seconds that candidates took which had to be compiled
        self.cheap: list[float] = []  # and those that had not
        self.calls: dict[str, Call] = {}

    def run(self, first: Sequence[Candidate]) -> Search:
        found = self.found
        try:
            self._begin(default_of(self.choices))
            found.stopped = self._descend(first)
            self._confirm()
        except KeyboardInterrupt:
            if found.best is None:
                raise
            found.stopped = "interrupted"
        self._news("")
        return found

    def _begin(self, default: Candidate) -> None:
        """The default: it is compiled and timed whatever the budget is."""
        self._news("the default")
        started = self.clock()
        self.seen.add(self.subject.identity(default))
        self.compiled.add(self.subject.identity(default)[0])
        try:
            call = self.subject.prepare(default)
            self.calls = {"default": call, "best": call}
            trial = Trial(default, "default", self._alone(call), 1.0)
            self.found.best = self.found.default = trial
        except Exception as error:
            trial = _rejected(default, error)
        self.found.trials.append(trial)
        self.costs.append(self.clock() - started)

    def _descend(self, first: Sequence[Candidate]) -> str:
        """Candidates known from elsewhere, then one coordinate after the other, until nothing near is faster."""
        for candidate in first:
            if {n: candidate.get(n) for n in self.choices} == candidate:
                self._try(candidate)
        return descend(self.choices, self._best, self._along)

    def _best(self) -> Candidate:
        return self.found.best.candidate if self.found.best else default_of(self.choices)

    def _along(self, name: str, values: Sequence[Value]) -> bool:
        """The values of one coordinate; the best may become another one in between. Whether there was time for all."""
        late = False
        for value in values:
            best = self._best()
            if value != best[name] and not self._beyond(best, name, value):
                late = self._try({**best, name: value}) is None or late
        return not late

    def _beyond(self, best: Candidate, name: str, value: Value) -> bool:
        """Whether something slower lies between the best and a value of an ordered coordinate."""
        here = best[name]
        if name not in self.ordered or here is None or value is None:
            return False
        tried = [t.candidate for t in self.found.trials if t.verdict == "no faster" and t.ratio and t.ratio > 1]
        alike = [c[name] for c in tried if {**c, name: None} == {**best, name: None}]
        return any(x is not None and min(here, value) < x < max(here, value) for x in alike)

    def _try(self, candidate: Candidate) -> bool | None:
        """Whether a candidate is the new best; None where the budget has no room for it."""
        identity = self.subject.identity(candidate)
        if identity in self.seen:
            return False
        compiles = identity[0] not in self.compiled
        pairs = 0.0 if self.found.best is None else 2 * (FEWEST + 1) * (self.found.best.seconds or 0.0)
        confirmation = 0.0 if self.found.best is self.found.default else max(TIMED_SECONDS, pairs)
        if self._left() < max(self._expected(compiles), pairs) + confirmation:
            return None
        self.seen.add(identity)
        self.compiled.add(identity[0])
        self._news(_shown(candidate, self.found.best))
        started = self.clock()
        try:
            trial, call = self._measured(candidate)
        except Exception as error:
            trial, call = _rejected(candidate, error), None
        self.found.trials.append(trial)
        if trial.verdict == "faster" and call is not None:
            self.found.best, self.calls["best"] = trial, call
        (self.costs if compiles else self.cheap).append(self.clock() - started)
        self._news("")
        return trial.verdict == "faster"

    def _measured(self, candidate: Candidate) -> tuple[Trial, Call]:
        call = self.subject.prepare(candidate)
        if self.found.best is None:  # the default was refused
            return Trial(candidate, "faster", self._alone(call), 1.0), call
        times = self._pairs(call, self.calls["best"])
        return Trial(candidate, "faster" if times.faster else "no faster", times.seconds, times.ratio), call

    def _confirm(self) -> None:
        """The best against the default once more, so that what is said about the two was measured together."""
        best, default = self.found.best, self.found.default
        if best is None or default is None or best is default:
            return
        self._news("the best against the default")
        times = self._pairs(self.calls["best"], self.calls["default"])
        verdict, reason = ("confirmed", "") if times.faster else ("not confirmed", "the default is as fast")
        confirmed = Trial(best.candidate, verdict, times.seconds, times.ratio, reason)
        self.found.trials.append(confirmed)
        self.found.default = Trial(default.candidate, "default", median(times.others), 1.0)
        self.found.best = confirmed if times.faster else self.found.default

    def _pairs(self, one: Call, other: Call) -> _Pairs:
        """Both called in turn, until one is clearly slower or there are enough pairs."""
        times: list[float] = []
        others: list[float] = []
        started = self.clock()
        once, its = self._timed(one), self._timed(other)
        if once > max(HOPELESS * its, TIMED_SECONDS / 2):
            return _Pairs([once], [its])
        repeats = self._repeats(other)
        while len(times) < MOST:
            pair = [self._timed(call, repeats) for call in ((one, other) if len(times) % 2 else (other, one))]
            mine, its = pair if len(times) % 2 else pair[::-1]
            times.append(mine)
            others.append(its)
            if len(times) >= FEWEST and self.clock() - started > TIMED_SECONDS:
                break
            if len(times) >= ENOUGH and _Pairs(times, others).ratio > SLOWER:
                break
        return _Pairs(times, others)

    def _alone(self, call: Call) -> float:
        """The median of a few calls; where a call is long, the first, which is slower than others by little."""
        first = self._timed(call)
        return first if first > TIMED_SECONDS else median(self._timed(call) for _ in range(FEWEST))

    def _repeats(self, call: Call) -> int:
        return max(1, min(1000, int(SHORTEST / max(self._timed(call), 1e-9))))

    def _timed(self, call: Call, repeats: int = 1) -> float:
        began = self.clock()
        for _ in range(repeats):
            call()
        return (self.clock() - began) / repeats

    def _left(self) -> float:
        return self.found.budget - (self.clock() - self.began)

    def _expected(self, compiles: bool) -> float:
        """Seconds that a candidate will probably take; the default, timed first, also loads the compiler."""
        known = (self.costs[1:] or self.costs) if compiles else (self.cheap or [TIMED_SECONDS])
        return median(known)

    def _news(self, now: str) -> None:
        self.found.now, self.found.elapsed = now, self.clock() - self.began
        self.report(self.found)


def _rejected(candidate: Candidate, error: Exception) -> Trial:
    """A candidate that cannot be taken, whatever the compiler or the check raised."""
    said = " ".join(str(error).split()) or type(error).__name__
    return Trial(candidate, "wrong" if isinstance(error, IncorrectResult) else "failed", reason=said)


def _shown(candidate: Candidate, best: Trial | None) -> str:
    """What is new in a candidate."""
    changed = {n: v for n, v in candidate.items() if best is None or v != best.candidate.get(n)}
    return ", ".join(f"{n}={'auto' if v is None else v}" for n, v in changed.items())

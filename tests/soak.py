"""Declarations drawn without end, each against the oracle: `python -m tests.soak --help`.

A draw is known by its seed and its number, so that any of them can be repeated alone. What fails is shrunk to a small
recipe and printed as a test to paste.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

KINDS = {
    "equal": "equal",
    "refused": "refused well",
    "backend": "refused by the backend",
    "unclear": "lost in rounding",
    "crash": "crash",
    "mismatch": "mismatch",
    "verdict": "wrong verdict",
}
FAILURES = ("crash", "mismatch", "verdict")
EXAMPLES = 3  # failures alike that are shrunk and printed; of more only the numbers are said
TURNS = 1000  # draws of one process: what it holds of them does not pile up
DEAD = "the process ended"


def main(arguments: list[str] | None = None) -> int:
    """Draw, compare, report; 1 if anything failed."""
    options = _parser().parse_args(arguments)
    soak = Soak(options.seed, options.backend, options.limit)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tttc-soak-"))  # kernels, called once
        stack.enter_context(mock.patch.dict(os.environ, {"TTTC_CACHE_DIR": folder, "TTTC_TUNING": "0"}))
        if options.only is not None:
            prepare(options.backend)
            soak.take(options.only, draw(options.seed, options.only, options.backend))
        else:
            soak.run(options.jobs, options.draws, options.seconds)
    print(soak.summary())
    if options.json:
        Path(options.json).write_text(json.dumps(soak.report(), indent=1) + "\n")
    return soak.failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="Draw declarations at random, compile each, and compare outputs, states, gradients and splits "
        "with the definition. Without --draws and --seconds it goes on until it is interrupted.",
        epilog="A failure is shrunk and printed as a test to paste; `--seed S --only N` repeats the draw N of seed S. "
        "The exit status is 1 if anything failed.",
    )
    add = parser.add_argument
    add("--seconds", type=float, help="stop after so many seconds")
    add("--draws", type=int, help="stop after so many draws")
    add("--seed", default="0", help="where draws begin, any text (default: 0)")
    add("--backend", choices=("torch", "tvm", "triton"), default="torch", help="triton runs in its interpreter")
    add("--jobs", type=int, default=1, help="processes, of one thread each (default: 1)")
    add("--only", type=int, metavar="N", help="repeat this draw alone")
    add("--limit", type=float, default=300.0, help="seconds after which a draw counts as a crash (default: 300)")
    add("--json", metavar="FILE", help="write the counts and the failures there")
    return parser


def prepare(backend: str) -> None:
    """What a process needs before it imports a backend, and before it draws."""
    if backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    if backend == "tvm":  # kernels are called a few times and never again: LLVM may spare itself the trouble
        from tttc.backends.tvm_cpu.machine import Machine

        right = Machine.target
        Machine.target = lambda self: {**right(self), "opt-level": 0}  # type: ignore[method-assign]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`torch.jit")
    if backend == "triton":  # the interpreter computes beyond the ends of blocks too
        warnings.filterwarnings("ignore", message=".*encountered in.*", category=RuntimeWarning)


@dataclass(frozen=True)
class Found:
    """What became of one draw, and where it failed, the test that it becomes."""

    kind: str
    mark: str = ""
    test: str = ""


def draw(seed: str, number: int, backend: str, shrink: bool = True) -> Found:
    """One draw; a failure is shrunk."""
    from tests.draws.comparison import outcome
    from tests.draws.drawing import drawn
    from tests.draws.shrinking import as_test, shrunk
    from tests.helpers import poisoned

    with poisoned():
        pair = drawn(seed, number, small=backend != "torch")
        found = outcome(*pair, backend)
        if not found.fails:
            return Found(found.kind)

        def same(other: Any) -> bool:
            return outcome(*other, backend)[::2] == found[::2]

        small = shrunk(pair, same) if shrink else pair
        return Found(found.kind, found.mark, as_test(small, outcome(*small, backend), backend, f"draw_{number}"))


# -- many --------------------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """The counts so far, and the failures."""

    seed: str
    backend: str
    limit: float = 300.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[int]] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def failed(self) -> bool:
        return any(self.counts[kind] for kind in FAILURES)

    def take(self, number: int, found: Found) -> None:
        """Count a draw, and print its failure."""
        self.counts[found.kind] += 1
        if found.kind not in FAILURES:
            return
        alike = self.failures.setdefault(f"{found.kind}: {found.mark}", [])
        alike.append(number)
        if found.test:
            self.tests.append(found.test)
            print(f"\n# draw {number} of seed {self.seed!r}, {self.backend}\n{found.test}", flush=True)
        else:
            print(f"# draw {number}: {found.kind}, {found.mark}, again", flush=True)

    def run(self, jobs: int, draws: int | None, seconds: float | None) -> None:
        """Draw in several processes until there are enough, or no time is left."""
        numbers = iter(range(draws)) if draws is not None else _naturals()
        with ExitStack() as stack:
            bar = stack.enter_context(Bar(self, draws, seconds))
            workers = [Worker(self.seed, self.backend) for _ in range(jobs)]
            stack.callback(lambda: [w.stop() for w in workers])
            for worker in workers:
                self._begin(worker, numbers)
            while busy := [w for w in workers if w.number is not None]:
                try:
                    wait([w.pipe for w in busy], timeout=0.5)
                except KeyboardInterrupt:
                    return
                for worker in busy:
                    answer = worker.answer(self.limit)
                    if answer is None:
                        continue
                    self.take(worker.number, answer)
                    over = seconds is not None and time.monotonic() - self.began >= seconds
                    self._begin(worker, iter(()) if over else numbers)
                bar.show()

    def _begin(self, worker: Worker, numbers: Iterator[int]) -> None:
        known = [mark for mark, found in self.failures.items() if len(found) >= EXAMPLES]
        worker.begin(next(numbers, None), known)

    def report(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "backend": self.backend,
            "seconds": round(time.monotonic() - self.began, 1),
            "draws": self.counts.total(),
            "counts": {said: self.counts[kind] for kind, said in KINDS.items()},
            "failures": self.failures,
            "tests": self.tests,
        }

    def summary(self) -> str:
        spent = time.monotonic() - self.began
        counted = ", ".join(f"{self.counts[kind]} {said}" for kind, said in KINDS.items())
        lines = [f"{self.counts.total()} draws of seed {self.seed!r} on {self.backend} in {spent:.0f} s: {counted}"]
        lines += [f"  {len(numbers)} x {mark} (draws {_listed(numbers)})" for mark, numbers in self.failures.items()]
        return "\n".join(lines)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def _naturals() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


# -- processes ---------------------------------------------------------------------------------------------------------


class Worker:
    """A process that draws what it is told to; one that dies or hangs is a failure of the draw, and begins anew."""

    def __init__(self, seed: str, backend: str) -> None:
        self.seed, self.backend = seed, backend
        self.number: int | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.seed, self.backend), daemon=True)
        self.process.start()
        theirs.close()
        self.turns = 0

    def begin(self, number: int | None, known: list[str]) -> None:
        """Draw this number; what is known well is not shrunk."""
        if number is not None and self.turns == TURNS:
            self.stop()
            self._start()
        self.number, self.turns, self.since = number, self.turns + 1, time.monotonic()
        if number is not None:
            self.pipe.send((number, known))

    def answer(self, limit: float) -> Found | None:
        """What became of the draw, if that is known."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return self._lost(f"{DEAD} with status {self.process.exitcode}")
        return self._lost(f"no answer for {limit:.0f} s") if time.monotonic() - self.since > limit else None

    def _lost(self, why: str) -> Found:
        self.stop()
        self._start()
        command = f"python -m tests.soak --backend {self.backend} --seed {self.seed} --only {self.number}"
        return Found("crash", why, f"# crash: {why}\n# {command}\n")

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _work(pipe: Connection, seed: str, backend: str) -> None:
    """The loop of a process."""
    prepare(backend)
    while True:
        try:
            number, known = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        found = draw(seed, number, backend, shrink=False)
        if found.kind in FAILURES:
            again = f"{found.kind}: {found.mark}" in known
            found = Found(found.kind, found.mark) if again else draw(seed, number, backend)
        pipe.send(found)


class Bar:
    """How far it is: on a terminal a bar, elsewhere a line every half minute, on stderr."""

    def __init__(self, soak: Soak, draws: int | None, seconds: float | None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from tttc.terminal import console

        self.soak, self.draws, self.seconds, self.said = soak, draws, seconds, time.monotonic()
        columns = (BarColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> Bar:
        self.bar.__enter__()
        self.task = self.bar.add_task("", total=1.0 if self.draws or self.seconds else None)
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def show(self) -> None:
        part, left = self._progress()
        counts = self.soak.counts
        bad = sum(counts[kind] for kind in FAILURES)
        text = f"{counts.total()} draws, {counts['equal']} equal, {counts['refused']} refused well, {bad} failures"
        text += f", {left:.0f} s left" if left is not None else ""
        self.bar.update(self.task, completed=part, description=text)
        if self.bar.disable and time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def _progress(self) -> tuple[float, float | None]:
        """The part that is done, and the seconds that are left, by whichever ends first."""
        spent, done = time.monotonic() - self.soak.began, self.soak.counts.total()
        found = []
        if self.seconds:
            found.append((spent / self.seconds, max(self.seconds - spent, 0.0)))
        if self.draws and done:
            found.append((done / self.draws, spent / done * (self.draws - done)))
        return min(found, key=lambda x: x[1], default=(0.0, None))


if __name__ == "__main__":
    sys.exit(main())

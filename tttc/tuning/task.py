"""What `tttc.tune` is asked for, and what measuring and estimating do with it alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch

from tttc.compiler.driver import compile
from tttc.declare.variant import Variant
from tttc.runtime.layer import Layer
from tttc.terminal import budget_bar
from tttc.tuning.descent import Progress
from tttc.tuning.lookup import untuned
from tttc.tuning.records import Choice, Entry, Key

P = TypeVar("P", bound=Progress)


@dataclass(frozen=True)
class Task:
    """A declaration, the call whose time counts, and the seconds that finding the fastest may take."""

    variant: type[Variant]
    dims: Mapping[str, int]
    dtype: torch.dtype
    backend: str
    batch: int
    tokens: int
    heads: int
    budget: float
    forward_only: bool = False
    save: bool = True
    progress: bool = True

    @property
    def work(self) -> str:
        """As keys of entries have it."""
        return "forward" if self.forward_only else "training"

    def settings(self, dims: Mapping[str, int]) -> str:
        """What is timed or estimated, in words."""
        sizes = ", ".join(f"{d}={n}" for d, n in dims.items())
        work = "forward" if self.forward_only else "forward and backward"
        call = f"B={self.batch}, T={self.tokens}, H={self.heads}"
        return f"{sizes}, {str(self.dtype).removeprefix('torch.')}; {work} at {call}"

    def compiled(self, dtype: torch.dtype, backend: str, **settings: Any) -> Layer:
        """The declaration compiled as if nothing had ever been tuned."""
        with untuned():
            return compile(self.variant, self.dims, dtype, backend=backend, **settings)

    def entry(
        self, key: Key, choice: Choice, seconds: tuple[float, float], threads: int = 0, *, static: bool = False
    ) -> Entry:
        """What is kept: the choice, with its seconds and those of the default."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        call = self.batch, self.tokens, self.heads
        return Entry(key, choice, *seconds, *call, threads, self.variant.__name__, now, static)

    @contextmanager
    def reporting(self, best: Callable[[P], str]) -> Iterator[Callable[[P], None]]:
        """What shows the `best` of a search, and what it does now, beside the time that is left."""
        with budget_bar(self.budget) if self.progress else nullcontext() as bar:

            def report(found: P) -> None:
                if bar is not None:
                    said = ", ".join(x for x in (best(found), f"now {found.now}" if found.now else "") if x)
                    bar.update(bar.task_ids[0], description=said)

            yield report

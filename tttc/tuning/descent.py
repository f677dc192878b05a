"""Coordinate descent over what is tuned, by whatever candidates are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tttc.tuning.records import Choice

Value: TypeAlias = int | None
Candidate: TypeAlias = Mapping[str, Value]
Choices: TypeAlias = Mapping[str, Sequence[Value]]
"""The values of each coordinate, the default first."""


@dataclass
class Progress:
    """How far a search in a budget of seconds has come; `stopped` is "budget", "exhausted" or "interrupted"."""

    budget: float
    elapsed: float = 0.0
    stopped: str = ""
    now: str = ""
    """What is being done, while it goes on."""

    def outcome(self, tried: int, rejected: str, verb: str) -> str:
        """How many candidates there were, and why there were no more to `verb`."""
        ends = {
            "budget": "no time was left for another candidate",
            "exhausted": f"nothing near the best is left to {verb}",
            "interrupted": "interrupted",
        }
        count = f"{tried} candidate{'' if tried == 1 else 's'} in {self.elapsed:.0f} s of {self.budget:g}"
        return f"{count}{rejected}: {ends[self.stopped]}"


def default_of(choices: Choices) -> Candidate:
    return {n: values[0] for n, values in choices.items()}


def descend(choices: Choices, best: Callable[[], Candidate], attempt: Callable[[str, Sequence[Value]], bool]) -> str:
    """Along one coordinate after the other, until nothing near the best candidate is better.

    `attempt` judges the best so far with the values of one coordinate, and says whether there was time for all of them.
    Returns why it ended: "exhausted", or "budget".
    """
    while True:
        before = best()
        in_time = [attempt(name, values) for name, values in choices.items()]
        if best() == before:
            return "exhausted" if all(in_time) else "budget"


def config_of(candidate: Candidate) -> dict[str, int]:
    """The settings of kernels that a candidate has."""
    return {n: v for n, v in candidate.items() if n not in ("chunk", "checkpoint") and v is not None}


def candidate_of(choice: Choice, choices: Choices) -> Candidate | None:
    """A choice of an earlier run; None where this one does not have it."""
    wanted: dict[str, Value] = {"chunk": choice.chunk, "checkpoint": choice.checkpoint, **choice.config}
    wanted = {n: v for n, v in wanted.items() if v is not None}
    if any(v not in choices.get(n, ()) for n, v in wanted.items()):
        return None
    return {n: wanted.get(n, values[0]) for n, values in choices.items()}

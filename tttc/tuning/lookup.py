"""What `tttc.compile` asks the database, and takes from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tttc.backends.registry import Unit
from tttc.backends.target import architecture_of
from tttc.ir.program import LoopProgram
from tttc.tuning.database import entries
from tttc.tuning.records import OFF, UNTUNED, Choice, Key, Tuning, found_for, key_of

if TYPE_CHECKING:
    from tttc.compiler.driver import Settings

_untuned: ContextVar[bool] = ContextVar("untuned", default=False)


@contextmanager
def untuned() -> Iterator[None]:
    """Inside, layers are compiled as if nothing had ever been tuned."""
    token = _untuned.set(True)
    try:
        yield
    finally:
        _untuned.reset(token)


def is_off() -> bool:
    """Whether nothing is looked up: `TTTC_TUNING=0`, or inside `untuned()`."""
    return _untuned.get() or os.environ.get("TTTC_TUNING", "1").casefold() in ("0", "off", "no", "false")


class Lookup:
    """One compilation's question to the database. What the user gave wins; what was left open is the entry's."""

    def __init__(self, unit: Unit, given: Settings) -> None:
        self.unit, self.given = unit, given
        self.tuning = OFF if is_off() else UNTUNED

    def chosen_chunk(self, program: LoopProgram) -> int | None:
        """Look up the program, which is not scheduled yet: the chunk to schedule it with, None for the default."""
        if self.tuning is not OFF and any(known := entries()):
            self.tuning = self._without_given(found_for(self.key(program), *known, architecture_of(self.given.device)))
        return self.given.chunk if self.given.chunk is not None else self.tuning.choice.chunk

    def key(self, program: LoopProgram) -> Key:
        """The key of a program that is not scheduled yet."""
        return key_of(program, self.unit.name, self.unit.backend, self.given.device, self.given.dtype)

    def chosen_config(self, known: Mapping[str, Any]) -> dict[str, int]:
        """The settings of kernels, those of the entry only where this backend still has them."""
        if self.given.config is not None:
            return dict(self.given.config)
        return {n: v for n, v in self.tuning.choice.config.items() if n in known}

    def _without_given(self, found: Tuning) -> Tuning:
        """The same without what the user chose. An entry was tuned as a whole: none of it holds for another chunk."""
        if found.entry is None:
            return found
        choice, chunk, checkpoint = found.entry.choice, self.given.chunk, self.given.checkpoint
        if chunk is not None and choice.chunk is not None and chunk != choice.chunk:
            return Tuning("default", f"default: what was tuned has chunk={choice.chunk}, and chunk={chunk} is given")
        given = [n for n, v in (("chunk", chunk), ("config", self.given.config)) if v is not None]
        given += ["checkpoint"] if checkpoint != "auto" else []
        if not given:
            return found
        left = Choice(
            choice.chunk if chunk is None else None,
            choice.checkpoint if checkpoint == "auto" else None,
            choice.config if self.given.config is None else {},
        )
        return Tuning(found.how, f"{found.why}; {', '.join(given)} as given", replace(found.entry, choice=left))

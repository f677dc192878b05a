"""What `tttc.compile` asks the database, and takes from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch

from tttc.backends.interface import Backend
from tttc.backends.target import architecture_of
from tttc.ir.program import LoopProgram
from tttc.tuning.database import entries
from tttc.tuning.records import OFF, UNTUNED, Choice, Key, Tuning, found_for, key_of

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

    def __init__(
        self,
        name: str,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
        chunk: int | None,
        checkpoint: int | str | None,
        config: Mapping[str, int] | None,
    ) -> None:
        self.name, self.backend, self.device, self.dtype = name, backend, device, dtype
        self.chunk, self.checkpoint, self.config = chunk, checkpoint, config
        self.tuning = OFF if is_off() else UNTUNED

    def chosen_chunk(self, program: LoopProgram) -> int | None:
        """Look up the program, which is not scheduled yet: the chunk to schedule it with, None for the default."""
        if self.tuning is not OFF and any(known := entries()):
            self.tuning = self._without_given(found_for(self.key(program), *known, architecture_of(self.device)))
        return self.chunk if self.chunk is not None else self.tuning.choice.chunk

    def key(self, program: LoopProgram) -> Key:
        """The key of a program that is not scheduled yet."""
        return key_of(program, self.name, self.backend, self.device, self.dtype)

    def chosen_config(self, known: Mapping[str, Any]) -> dict[str, int]:
        """The settings of kernels, those of the entry only where this backend still has them."""
        if self.config is not None:
            return dict(self.config)
        return {n: v for n, v in self.tuning.choice.config.items() if n in known}

    def _without_given(self, found: Tuning) -> Tuning:
        """The same without what the user chose. An entry was tuned as a whole: none of it holds for another chunk."""
        if found.entry is None:
            return found
        choice = found.entry.choice
        if self.chunk is not None and choice.chunk is not None and self.chunk != choice.chunk:
            return Tuning(
                "default", f"default: what was tuned has chunk={choice.chunk}, and chunk={self.chunk} is given"
            )
        given = [n for n, v in (("chunk", self.chunk), ("config", self.config)) if v is not None]
        given += ["checkpoint"] if self.checkpoint != "auto" else []
        if not given:
            return found
        config = choice.config if self.config is None else {}
        checkpoint = choice.checkpoint if self.checkpoint == "auto" else None
        left = replace(found.entry, choice=Choice(choice.chunk if self.chunk is None else None, checkpoint, config))
        return Tuning(found.how, f"{found.why}; {', '.join(given)} as given", left)

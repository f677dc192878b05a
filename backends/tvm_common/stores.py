"""Where the axes of a statement stand, and what is in memory there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tttc.backends.tvm_common.tir import T
from tttc.backends.tvm_cpu.machine import Machine
from tttc.ir.expr import Axis


class Index(NamedTuple):
    """Where an axis stands; `lanes` says that it is there and at the lanes that follow, `beyond` that it may be a token
    after the last one. Equal keys, equal places.
    """

    index: Any
    key: tuple[Any, ...]
    lanes: bool = False
    beyond: bool = False


class Value(NamedTuple):
    """A number, or with `wide` a vector of them."""

    it: Any
    wide: bool


Places = Mapping[Axis, Index]


class Store:
    """A variable in memory: how its axes are laid out, and which index comes before them."""

    def __init__(
        self,
        buffer: Any,
        machine: Machine,
        prefix: Sequence[Any] = (),
        first: Any = None,
        tokens: Any = None,
        rows: int = 0,
        offset: int | None = None,
    ):
        self.buffer, self.machine, self.prefix, self.first, self.tokens = buffer, machine, tuple(prefix), first, tokens
        self.rows = rows
        """Leading axes that are not stored: one row of a loop over the tokens."""
        self.offset = offset
        """Where it lies in the scratch memory, if it does."""

    @property
    def dtype(self) -> str:
        """Of what is in memory; 16 bits become 32 on the way."""
        return str(self.buffer.dtype)

    @property
    def shared(self) -> bool:
        """Whether this is a sequence of the caller, `tokens` of which, from `first` on, are the chunk."""
        return self.first is not None

    def _at(self, places: Sequence[Index]) -> list[Any]:
        assert not any(p.lanes for p in places[:-1]), "vectors lie along the last axis"
        indices = [p.index for p in places[self.rows :]]
        if self.first is not None and indices:
            indices[0] = indices[0] + self.first
        return [*self.prefix, *indices] or [0]

    def load(self, places: Sequence[Index]) -> Value:
        """Of a row beyond the last token, which a tile may hold, the last one: nothing is read that is not there."""
        wide = bool(places) and places[-1].lanes
        if self.shared and places[0].beyond:
            places = [Index(T.min(places[0].index, self.tokens - 1), places[0].key), *places[1:]]
        at = self._at(places)
        lanes = f"x{self.machine.lanes}" if wide else ""
        found = self.buffer.vload(at, f"{self.dtype}{lanes}") if wide else self.buffer[tuple(at)]
        return Value(found if self.dtype == self.machine.dtype else T.Cast(f"{self.machine.dtype}{lanes}", found), wide)

    def save(self, places: Sequence[Index], value: Any) -> None:
        at = self._at(places)
        wide = bool(places) and places[-1].lanes
        if self.dtype != self.machine.dtype:
            value = T.Cast(f"{self.dtype}x{self.machine.lanes}" if wide else self.dtype, value)
        if wide:
            T.add_to_parent(self.buffer.vstore(at, value))
        else:
            T.buffer_store(self.buffer, value, at)


class Registers(Store):
    """A row that is a few vectors: the place of its last axis says which."""

    def _at(self, places: Sequence[Index]) -> list[Any]:
        index = places[-1].index
        assert places[-1].lanes, "no single number of a register is read"
        assert isinstance(index, int), "registers have numbers"
        return [index // self.machine.lanes]

    def load(self, places: Sequence[Index]) -> Value:
        return Value(self.buffer[tuple(self._at(places))], True)

    def save(self, places: Sequence[Index], value: Any) -> None:
        T.buffer_store(self.buffer, value, self._at(places))

"""States of sequences that come and go, in slots of memory that is allocated once: for serving.

    pool = layer.pool(slots=64, heads=12)
    one, two = pool.allocate(2)                                   # slots of two sequences, which begin
    pool.run([one], q, k, v, gates=gates)                         # q: [1, 300, H, D], the prompt of one of them
    z = pool.run([one, two], q, k, v, gates=gates)                # q: [2, 1, H, D], the next token of each
    pool.free([one])                                              # for the next sequence

A state has one position for its whole batch. Sequences that stand at different tokens of their mini-batches are
therefore batches of their own: `run` makes one call of the layer for each place, and `groups` says which they are.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tttc.errors import PoolError, ShapeError, StateMismatch
from tttc.runtime.state import GROUPS, PackedState, State, Tensors, compact, tensors_of
from tttc.runtime.state_file import misfit

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer

Ids = Sequence[int] | torch.Tensor
Key = tuple[str, str]


@dataclass(frozen=True)
class Standing:
    """Where a sequence stands, and which tensors, by group and name, its state has there."""

    position: int
    held: tuple[Key, ...]


class StatePool:
    """`slots` states of a layer with so many heads; `layer.pool` makes one. Of one thread, and without gradients.

    Each tensor of a state has memory of [slots, heads, *dims], allocated at once; that of tokens (`rows` of an open
    mini-batch, `taps` of a window) when a state first has them.
    """

    def __init__(self, layer: Layer, slots: int, heads: int, state: Mapping[str, torch.Tensor] | None = None) -> None:
        self.layer, self.slots, self.heads = layer, operator.index(slots), operator.index(heads)
        if self.slots < 1 or self.heads < 1:
            raise PoolError(f"a pool of {slots} slots and {heads} heads.\n  Give it one of each at least.")
        if layer.decode == "rows" and not isinstance(layer.signature.mini_batch, int):
            raise PoolError(
                f"variant `{layer.signature.name}`: its states keep every token of a sequence, of any length.\n"
                "  A pool is for states that do not grow: set mini_batch to a number."
            )
        self._begins = self._initial(state)
        self._fresh = Standing(0, tuple(("weights", n) for n in self._begins))
        self._places: list[Standing | None] = [None] * self.slots
        self._free = list(range(self.slots))
        self._memory: dict[Key, torch.Tensor] = {}
        for group, tensors in layer.state_layout().items():
            for name, sizes in tensors.items() if group not in ("rows", "taps") else ():
                shape = (self.slots, self.heads, *sizes)
                self._memory[group, name] = torch.zeros(shape, dtype=layer.compute_dtype, device=layer.device)

    def __repr__(self) -> str:
        return f"StatePool({self.layer!r}, {self.slots} slots, {self.available} free)"

    @property
    def available(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def allocate(self, count: int = 1) -> list[int]:
        """Slots for sequences that begin.

        Raises `PoolError` where not as many are free; none is taken then.
        """
        if not 0 <= count <= self.available:
            raise PoolError(
                f"{count} slots are asked for, {self.available} of {self.slots} are free.\n"
                "  Free those of sequences that have ended, or make a pool of more slots."
            )
        ids = [heapq.heappop(self._free) for _ in range(count)]
        for i in ids:
            self._places[i] = self._fresh
        self.reset(ids)
        return ids

    def free(self, ids: Ids) -> None:
        """Give slots back; their states are gone. Raises `PoolError` for one that is not allocated."""
        for i in self._allocated(ids):
            self._places[i] = None
            heapq.heappush(self._free, i)

    def reset(self, ids: Ids) -> None:
        """Let other sequences begin in these slots."""
        known = self._allocated(ids)
        index = self._index(known)
        for name, x in self._begins.items():
            self._memory["weights", name].index_copy_(0, index, x.expand(len(known), *x.shape))
        for i in known:
            self._places[i] = self._fresh

    def position(self, slot: int) -> int:
        """How many tokens into its mini-batch the sequence of a slot stands."""
        (known,) = self._allocated([slot])
        return self._place(known).position

    def groups(self, ids: Ids) -> list[list[int]]:
        """The slots by the places at which they stand, each group in the order given: what `gather` takes at once."""
        found: dict[Standing, list[int]] = {}
        for i in self._allocated(ids):
            found.setdefault(self._place(i), []).append(i)
        return list(found.values())

    def gather(self, ids: Ids) -> State:
        """A copy of the states in these slots as one batch, in this order.

        Raises:
            PoolError: a slot is not allocated, or given twice.
            StateMismatch: they stand at different places of a mini-batch.
        """
        groups = self.groups(ids)
        if len(groups) != 1:
            stand = ", ".join(f"{g} {self._place(g[0]).position} tokens" for g in groups) or "no slots are given"
            raise StateMismatch(
                f"a state stands at one place of a mini-batch, these slots at {len(groups)}: {stand}.\n"
                "  Call pool.run(ids, q, k, v, ...), which makes a call for each, or gather each of pool.groups(ids)."
            )
        index, place = self._index(groups[0]), self._place(groups[0][0])
        found: dict[str, Tensors] = {g: {} for g in GROUPS}
        for group, name in place.held:
            x = self._memory[group, name]
            found[group][name] = (x[:, :, : place.position] if group == "rows" else x).index_select(0, index)
        return State(position=place.position, **found)

    def scatter(self, ids: Ids, state: State) -> None:
        """Put the sequences of a state into these slots, in this order. What was measured in a call is left out.

        Raises:
            PoolError: a slot is not allocated, or given twice.
            StateMismatch: it is no state of this layer, of so many sequences and heads.
        """
        known, state = self._allocated(ids), compact(state)
        tensors = {(g, n): x.detach() for g, ts in tensors_of(state).items() if g != "telemetry" for n, x in ts.items()}
        self._refuse_foreign(len(known), state.position, tensors)
        index = self._index(known)
        for (group, name), x in tensors.items():
            memory = self._memory[group, name]
            (memory[:, :, : state.position] if group == "rows" else memory).index_copy_(0, index, x)
        for i in known:
            self._places[i] = Standing(state.position, tuple(tensors))

    @torch.no_grad()
    def run(
        self,
        ids: Ids,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        gates: Mapping[str, torch.Tensor] | None = None,
        params: Mapping[str, torch.Tensor] | None = None,
        tokens: Mapping[str, torch.Tensor] | None = None,
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Continue the sequences of these slots, wherever each of them stands; their states are those after it.

        Args:
            ids: the slots, [N].
            q, k, v, gates, params, tokens: as for the layer, [N, T, H, D]: T tokens of each; or with `cu_seqlens`
                [1, T, H, D], as many of each as it says, so that prompts and single tokens go together.

        Returns:
            z: [N, T, H, E], or [1, T, H, E] with `cu_seqlens`.

        Raises `PoolError`, and what the layer raises; no state is changed then.
        """
        known, given = self._allocated(ids), {"q": q, "k": k, "v": v}
        if cu_seqlens is not None:
            pack = PackedState(tuple(self.gather([i]) for i in known))
            about: dict[str, Any] = {"gates": gates, "params": params, "tokens": tokens, "cu_seqlens": cu_seqlens}
            z, after = self.layer(q, k, v, state=pack, **about)
            assert isinstance(after, PackedState)
            for i, state in zip(known, after.sequences, strict=True):
                self.scatter([i], state)
            return z
        if any(len(x) != len(known) for x in given.values()):
            sizes = ", ".join(f"{n} {len(x)}" for n, x in given.items())
            raise ShapeError(f"{len(known)} slots are given, and a batch of {sizes}.\n  Give a sequence for each slot.")
        return self._by_place(known, given, dict(gates or {}), params, dict(tokens or {}))

    def _by_place(
        self,
        ids: list[int],
        given: Tensors,
        gates: Tensors,
        params: Mapping[str, torch.Tensor] | None,
        tokens: Tensors,
    ) -> torch.Tensor:
        """One call for each place; the states are put back when all have returned."""
        groups, outputs, states = self.groups(ids), [], []
        row = {slot: n for n, slot in enumerate(ids)}
        rows = [self._index([row[i] for i in group]) for group in groups]
        for group, at in zip(groups, rows, strict=True):
            q, k, v = (_part(x, at) for x in given.values())
            own = [{n: _part(x, at) for n, x in x.items()} for x in (gates, tokens)]
            z, state = self.layer(q, k, v, gates=own[0], tokens=own[1], params=params, state=self.gather(group))
            outputs.append(z)
            states.append(state)
        for group, state in zip(groups, states, strict=True):
            assert isinstance(state, State)
            self.scatter(group, state)
        return outputs[0] if len(groups) == 1 else torch.cat(outputs).index_select(0, torch.cat(rows).argsort())

    # -- slots

    def _place(self, slot: int) -> Standing:
        place = self._places[slot]
        assert place is not None
        return place

    def _index(self, numbers: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.long, device=self.layer.device)

    def _allocated(self, ids: Ids) -> list[int]:
        """The slots as numbers, all of them allocated, each once."""
        known = [operator.index(i) for i in (ids.tolist() if isinstance(ids, torch.Tensor) else ids)]
        for i in known:
            if not 0 <= i < self.slots:
                raise PoolError(f"slot {i} is none of this pool.\n  Its slots are 0 to {self.slots - 1}.")
            if self._places[i] is None:
                raise PoolError(
                    f"slot {i} is free: never allocated, or freed already.\n  Give what `allocate` returned."
                )
        if len(set(known)) < len(known):
            twice = next(i for i in known if known.count(i) > 1)
            raise PoolError(f"slot {twice} is given twice.\n  Each holds one sequence: give it once.")
        return known

    # -- tensors

    def _initial(self, state: Mapping[str, torch.Tensor] | None) -> Tensors:
        """What a sequence begins with, [H, *dims] each."""
        given, found = {**self.layer.initial("state"), **(state or {})}, {}
        for name, sizes in self.layer.state_layout()["weights"].items():
            x = given.pop(name).detach()
            if tuple(x.shape) not in (sizes, (self.heads, *sizes)):
                wanted = f"{list(sizes)} or {[self.heads, *sizes]}"
                raise ShapeError(f"{name} has the shape {list(x.shape)}.\n  A pool begins with {wanted}.")
            found[name] = x.to(self.layer.device, self.layer.compute_dtype).expand(self.heads, *sizes).clone()
        if given:
            raise ShapeError(f"unknown state {', '.join(given)}.\n  The states are {', '.join(found)}.")
        return found

    def _refuse_foreign(self, count: int, position: int, tensors: Mapping[Key, torch.Tensor]) -> None:
        """Refuse tensors that are no state of so many sequences; make the memory that is made when it is first used."""
        shapes = {f"{group}.{n}": tuple(x.shape) for (group, n), x in tensors.items()}
        problem = misfit(shapes, position, self.layer)
        for (group, name), x in tensors.items() if problem is None else ():
            memory = self._memory.get((group, name))
            wanted = [count, *(x.shape if memory is None else memory.shape)[1:]]
            wanted[2:3] = [position] if group == "rows" else wanted[2:3]
            if list(x.shape) != wanted or (memory is None and x.shape[1] % self.heads):
                problem = f"`{group}.{name}` has the shape {list(x.shape)}, expected {wanted}"
            elif memory is not None and x.dtype != memory.dtype:
                problem = f"`{group}.{name}` is {x.dtype}, the pool keeps {memory.dtype}"
        if problem:
            raise StateMismatch(
                f"variant `{self.layer.signature.name}`: this is no state of {count} sequences and "
                f"{self.heads} heads of this pool: {problem}.\n  Give what a call of its layer returned."
            )
        for (group, name), x in tensors.items():
            if (group, name) not in self._memory:
                longest = [int(self.layer.signature.mini_batch) - 1] if group == "rows" else [x.shape[2]]
                self._memory[group, name] = x.new_zeros(self.slots, x.shape[1], *longest, *x.shape[3:])


def _part(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some sequences of a batch, or the batch itself where they are all."""
    return x if len(rows) == len(x) else x.index_select(0, rows)

"""Slots for serving: sequences that come, stand at places of their own and end are each what they are alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import tttc
from tests.test_state import VARIANTS, Sequences, same
from tttc.errors import PoolError, ShapeError, StateMismatch, TTTCError
from tttc.runtime.custom_ops import as_operators
from tttc.runtime.pool import StatePool
from tttc.runtime.state import State

F64 = torch.float64


sequences_of = cache(Sequences)


class Serving:
    """Sequences of different lengths, more of them than slots, served in an order that chance decides."""

    def __init__(self, sequences: Sequences, slots: int, chance: random.Random) -> None:
        self.sequences, self.chance = sequences, chance
        self.pool = sequences.layer.pool(slots, heads=2)
        self.waiting, self.lengths = [0, 1, 2, 0, 1], {0: 12, 1: 5, 2: 9}
        self.served: list[tuple[int, torch.Tensor]] = []
        self.active: dict[int, list[Any]] = {}  # slot -> which sequence, how far it is, its outputs

    def step(self) -> None:
        """Some of the sequences go on: all by as many tokens, or each by as many as it likes."""
        while self.waiting and self.pool.available:
            (slot,) = self.pool.allocate()
            self.active[slot] = [self.waiting.pop(0), 0, []]
        slots = self.chance.sample(list(self.active), self.chance.randint(1, len(self.active)))
        left = [self.lengths[self.active[i][0]] - self.active[i][1] for i in slots]
        counts = [self.chance.randint(0, min(n, 6)) for n in left]
        if self.chance.random() < 0.6:
            counts = [min(1, *left)] * len(slots) if self.chance.random() < 0.7 else [min(left)] * len(slots)
            z = self.call(slots, counts, torch.cat).unbind()
        else:
            ends = [sum(counts[:i]) for i in range(len(slots) + 1)]
            z = self.call(slots, counts, lambda x: torch.cat(x, 1), cu_seqlens=ends)[0].split(counts)
        for slot, n, found in zip(slots, counts, z, strict=True):
            self.active[slot][1] += n
            self.active[slot][2].append(found)
            which, now, outputs = self.active[slot]
            if now == self.lengths[which]:
                self.served.append((which, torch.cat(outputs)))
                del self.active[slot]
                self.pool.free([slot])

    def call(self, slots: list[int], counts: list[int], join: Callable[[Any], torch.Tensor], **more: Any) -> Any:
        places = [
            (self.active[i][0], slice(self.active[i][1], self.active[i][1] + n))
            for i, n in zip(slots, counts, strict=True)
        ]
        tokens, gates = (
            {n: join([x[i : i + 1, where] for i, where in places]) for n, x in group.items()}
            for group in (self.sequences.tokens, self.sequences.gates)
        )
        return self.pool.run(slots, **tokens, gates=gates, **more)


@pytest.mark.parametrize("decode", ["sums", "rows"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_sequence_is_what_it_is_alone(name: str, decode: str) -> None:
    sequences = Sequences(name)
    sequences.layer = tttc.compile(VARIANTS[name], sequences.layer.dims, F64, backend="torch", decode=decode)
    serving = Serving(sequences, 3, random.Random(3))
    while serving.waiting or serving.active:
        serving.step()
    assert len(serving.served) == 5
    assert serving.pool.available == 3
    for which, found in serving.served:
        alone = sequences.call(slice(0, serving.lengths[which]), rows=slice(which, which + 1))[0][0]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-13)


def begun(tokens: int = 3) -> tuple[StatePool, Sequences]:
    """Slots 0 and 2 hold sequences so many tokens in, slot 1 one that begins, slot 3 is free."""
    sequences = sequences_of("TTTLinear")
    pool = sequences.layer.pool(4, heads=2)
    pool.allocate(3)
    pool.scatter([0, 2], sequences.call(slice(0, tokens), rows=slice(0, 2))[1])
    return pool, sequences


@pytest.mark.parametrize("tokens", [0, 3, 4])
@pytest.mark.parametrize("decode", ["sums", "rows"])
def test_a_state_of_a_graph(decode: str, tokens: int) -> None:
    """It has all its parts at every place, and room for the tokens of a whole mini-batch."""
    sequences = Sequences("TTTLinear")
    sequences.layer = tttc.compile(VARIANTS["TTTLinear"], sequences.layer.dims, F64, backend="torch", decode=decode)
    _, wanted = sequences.call(slice(0, tokens), rows=slice(0, 2))
    with as_operators():
        _, state = sequences.call(slice(0, tokens), rows=slice(0, 2))
    pool = sequences.layer.pool(2, heads=2)
    pool.scatter(pool.allocate(2), state)
    wanted.telemetry = {}
    same(pool.gather([0, 1]), wanted)


def test_what_is_put_into_slots_comes_out_of_them() -> None:
    pool, sequences = begun(7)
    _, state = sequences.call(slice(0, 7), rows=slice(0, 2))
    state.telemetry = {}
    same(pool.gather([0, 2]), state)
    same(pool.gather(torch.tensor([2, 0])), state.select([1, 0]))
    assert [pool.position(i) for i in range(3)] == [3, 0, 3]
    assert pool.groups([2, 1, 0]) == [[2, 0], [1]]
    pool.gather([0]).weights["W1"].zero_()  # a copy
    same(pool.gather([0, 2]), state)
    pool.reset([0])
    assert pool.position(0) == 0
    assert torch.equal(pool.gather([0])["W1"], pool.gather([1])["W1"])


def test_outputs_are_in_the_order_of_the_slots_whichever_go_together() -> None:
    for ids in ([0, 1, 2], [2, 1, 0], [1, 2]):
        pool, sequences = begun()
        tokens, gates = ({n: x[ids, 3:5] for n, x in group.items()} for group in (sequences.tokens, sequences.gates))
        states = [pool.gather([i]) for i in ids]
        z = pool.run(ids, **tokens, gates=gates)
        for row, state in enumerate(states):
            here = slice(row, row + 1)
            given = {n: x[here] for n, x in gates.items()}
            alone, after = sequences.layer(**{n: x[here] for n, x in tokens.items()}, gates=given, state=state)
            torch.testing.assert_close(z[here], alone, rtol=0, atol=1e-13)
            torch.testing.assert_close(pool.gather([ids[row]])["W1"], after["W1"], rtol=0, atol=1e-13)


def test_a_sequence_begins_with_the_weights_that_the_pool_was_given() -> None:
    sequences = Sequences("TTTLinear")
    W1 = torch.rand(2, 3, 3, dtype=F64)
    pool = sequences.layer.pool(2, heads=2, state={"W1": W1})
    sequence = {n: x[:1, :5] for n, x in sequences.tokens.items()}
    gates = {n: x[:1, :5] for n, x in sequences.gates.items()}
    for _ in range(2):
        (slot,) = pool.allocate()
        z = pool.run([slot], **sequence, gates=gates)
        assert torch.equal(z, sequences.layer(**sequence, gates=gates, state={"W1": W1})[0])
        pool.free([slot])


def test_a_call_that_is_refused_changes_no_state() -> None:
    pool, sequences = begun()
    before = [pool.gather([i]) for i in range(3)]
    tokens = {n: x[:, 3:5] for n, x in sequences.tokens.items()}
    gates = {n: x[:, 3:5] for n, x in sequences.gates.items()}
    wrong = State(before[1].weights | {"b1": torch.rand(1, 2, 9, dtype=F64)})
    original = pool.gather
    pool.gather = lambda ids: wrong if ids == [1] else original(ids)  # type: ignore[method-assign]  # the second call
    with pytest.raises(ShapeError, match="b1 has shape"):
        pool.run([0, 1, 2], **tokens, gates=gates)
    pool.gather = original  # type: ignore[method-assign]
    for i in range(3):
        same(pool.gather([i]), before[i])


def state_of(name: str, rows: slice = slice(0, 1), tokens: int = 3) -> State:
    found: State = sequences_of(name).call(slice(0, tokens), rows=rows)[1]
    return found


one = torch.rand(1, 1, 2, 3, dtype=F64)
REFUSED: dict[str, tuple[Callable[[StatePool], Any], type[TTTCError], str]] = {
    "more than there are": (
        lambda p: p.allocate(2),
        PoolError,
        "2 slots are asked for, 1 of 4 are free.\n  Free those",
    ),
    "freed twice": (lambda p: (p.free([1]), p.free([1])), PoolError, "slot 1 is free: never allocated, or freed"),
    "never allocated": (lambda p: p.gather([3]), PoolError, "slot 3 is free"),
    "of another pool": (lambda p: p.reset([4]), PoolError, "slot 4 is none of this pool.\n  Its slots are 0 to 3"),
    "counted from the end": (lambda p: p.free([-1]), PoolError, "slot -1 is none"),
    "twice": (lambda p: p.run([0, 0], one, one, one), PoolError, "slot 0 is given twice"),
    "a free one among others": (lambda p: p.free([0, 3]), PoolError, "slot 3 is free"),
    "two places at once": (
        lambda p: p.gather([0, 1, 2]),
        StateMismatch,
        r"these slots at 2: \[0, 2\] 3 tokens, \[1\] 0 tokens.\n  Call pool.run",
    ),
    "no slots": (lambda p: p.gather([]), StateMismatch, "no slots are given"),
    "a batch of another size": (
        lambda p: p.run([0, 2], one, one, one),
        ShapeError,
        "2 slots are given, and a batch of q 1",
    ),
    "a state of another size": (
        lambda p: p.scatter([0, 1], state_of("TTTLinear")),
        StateMismatch,
        "shape .1, .*expected .2",
    ),
    "a state of another rule": (lambda p: p.scatter([0], state_of("Titans")), StateMismatch, "it has no `memory.M.W1`"),
    "a state in other numbers": (
        lambda p: p.scatter([0], state_of("TTTLinear").to(torch.float32)),
        StateMismatch,
        "is torch.float32, the pool keeps torch.float64",
    ),
    "no slots at all": (lambda p: p.layer.pool(0, 2), PoolError, "0 slots and 2 heads"),
    "weights of other heads": (
        lambda p: p.layer.pool(2, 3, {"W1": torch.ones(2, 3, 3)}),
        ShapeError,
        r"W1 has the shape \[2, 3, 3\].\n  A pool begins with \[3, 3\] or \[3, 3, 3\]",
    ),
    "weights that it has not": (lambda p: p.layer.pool(2, 2, {"W7": one}), ShapeError, "unknown state W7"),
}


def test_what_a_pool_cannot_do_is_refused_and_changes_nothing() -> None:
    for name, (act, kind, reason) in REFUSED.items():
        pool, _ = begun()
        before = pool.gather([0, 2])
        with pytest.raises(kind, match=reason):
            act(pool)
        same(pool.gather([0, 2]), before)
        assert pool.available == 1 + (name == "freed twice")

"""Calls that are not of one shape: more q heads than k, v heads, and sequences packed along the time axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from tttc.errors import ShapeError, StateMismatch
from tttc.state import PackedState, State, Tensors
from tttc.variant import Signature


@dataclass(frozen=True)
class Arguments:
    """What a layer is called with. `group`: how many q heads read the weights of one k, v head."""

    tokens: Tensors
    gates: Tensors
    params: Mapping[str, torch.Tensor] | None
    state: Any
    group: int = 1


def ungrouped(given: Arguments, declared: Signature) -> Arguments:
    """Repeat what the k, v heads have for each q head that reads them; as it is where there are as many."""
    q, k = given.tokens.get("q"), given.tokens.get("k")
    if not isinstance(q, torch.Tensor) or not isinstance(k, torch.Tensor) or min(q.dim(), k.dim()) < 3:
        return given  # said where the tensors are checked
    if q.shape[2] == k.shape[2]:
        return given
    heads = k.shape[2]
    if heads == 0 or q.shape[2] % heads:
        raise ShapeError(
            f"variant `{declared.name}`: q has {q.shape[2]} heads, k has {heads}.\n"
            "  Give q as many heads as k and v, or a multiple of that."
        )
    n = q.shape[2] // heads

    def heads_of(x: Any, axis: int) -> Any:
        fits = isinstance(x, torch.Tensor) and x.dim() > axis and x.shape[axis] == heads
        return x.repeat_interleave(n, axis) if fits else x

    def weights(values: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
        """[H, *dims] and [B, H, *dims]: the axis of the heads stands before the dims."""
        ranks = {
            m: x.dim() - len(specs[m].dims) - 1 if m in specs and isinstance(x, torch.Tensor) else -1
            for m, x in values.items()
        }
        return {m: heads_of(x, ranks[m]) if ranks[m] >= 0 else x for m, x in values.items()}

    state = given.state
    if isinstance(state, State):
        state = state.map(lambda x: heads_of(x, 1))
    elif isinstance(state, Mapping):
        state = weights(state, declared.states)
    return replace(
        given,
        tokens={m: heads_of(x, 2) for m, x in given.tokens.items()},
        gates={m: heads_of(x, 2) for m, x in given.gates.items()},
        params=None if given.params is None else weights(given.params, declared.params),
        state=state,
        group=n,
    )


def packed(
    given: Arguments,
    cu_seqlens: torch.Tensor | Sequence[int],
    declared: Signature,
    run: Callable[[Arguments], tuple[torch.Tensor, State]],
) -> tuple[torch.Tensor, PackedState]:
    """Run every sequence of a pack by itself; those of one length go together, as a batch.

    Raises:
        ShapeError: B is not 1, or the boundaries do not go from 0 to T without stepping back.
        StateMismatch: there are not as many states as sequences.
    """
    q, name = given.tokens["q"], declared.name
    ends = [int(x) for x in cu_seqlens]
    if q.shape[0] != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != q.shape[1] or sorted(ends) != ends:
        raise ShapeError(
            f"variant `{name}`: cu_seqlens is {ends}, and q has the shape {list(q.shape)}.\n"
            "  Packed sequences are [1, T, H, D] with boundaries 0 <= ... <= T: torch.tensor([0, 3, 7, T])."
        )
    pieces = list(pairwise(ends))
    states = _states(given.state, len(pieces), name)
    outputs: list[Any] = [None] * len(pieces)
    finals: list[Any] = [None] * len(pieces)
    for members in _alike(pieces, states):
        found, after = run(_together(given, declared, pieces, states, members))
        for row, i in enumerate(members):
            outputs[i] = found[row : row + 1]
            finals[i] = after.map(lambda x, row=row: x[row : row + 1])
    return torch.cat(outputs, 1), PackedState(tuple(finals))


def _states(state: Any, count: int, name: str) -> list[Any]:
    """The state of each sequence: a `State`, a dict of tensors, or None."""
    if isinstance(state, PackedState):
        if len(state.sequences) != count:
            raise StateMismatch(
                f"variant `{name}`: {len(state.sequences)} states are given for {count} packed sequences.\n"
                "  Pass the state that a call with as many sequences returned."
            )
        return list(state.sequences)
    return [state] * count


def _alike(pieces: Sequence[tuple[int, int]], states: Sequence[Any]) -> list[list[int]]:
    """Indices of the sequences that can run as one batch: of one length, at one position of a mini-batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (begin, end) in enumerate(pieces):
        position = states[i].position if isinstance(states[i], State) else -1
        groups.setdefault((end - begin, position), []).append(i)
    return list(groups.values())


def _together(
    given: Arguments,
    declared: Signature,
    pieces: Sequence[tuple[int, int]],
    states: Sequence[Any],
    members: list[int],
) -> Arguments:
    """The sequences `members` as one batch."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, slice(*pieces[i])] for i in members])

    def own(name: str, x: torch.Tensor) -> torch.Tensor:
        """The rows of the members, of a state that is given for each sequence."""
        each = name in declared.states and x.dim() == len(declared.states[name].dims) + 2 and len(x) == len(pieces)
        return x[members] if each else x

    first = states[members[0]]
    state: Any = first
    if isinstance(first, State):
        state = State.joined([states[i] for i in members])
    elif isinstance(first, Mapping):
        state = {n: own(n, x) for n, x in first.items()}
    tokens, gates = ({n: cut(x) for n, x in group.items()} for group in (given.tokens, given.gates))
    return replace(given, tokens=tokens, gates=gates, state=state)

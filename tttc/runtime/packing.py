"""Calls that are not of one shape: more q heads than k, v heads, and sequences packed along the time axis."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from tttc.declare.variant import Signature
from tttc.errors import Problem, ShapeError, StateMismatch, problems_text
from tttc.ir.expr import leaves
from tttc.ir.names import as_declared
from tttc.ir.program import ScanProgram
from tttc.runtime.state import PackedState, State, Tensors, compact, layout, tensors_of


@dataclass(frozen=True)
class Arguments:
    """What a layer is called with. `group`: how many q heads read the weights of one k, v head; `wide`: what each of
    them has of its own, by its name in the IR.
    """

    tokens: Tensors
    gates: Tensors
    params: Mapping[str, torch.Tensor] | None
    state: Any
    group: int = 1
    wide: frozenset[str] = frozenset()


def carried(program: ScanProgram) -> set[tuple[str, str]]:
    """Role and name of everything that more than the outputs is made of: weights, what is carried beside them, and what
    is measured.
    """
    read = {(a.leaf.role, a.leaf.name) for a in program.scans[0].outputs[:1]}
    made = [a for s in program.scans for a in s.block.assigns if (a.leaf.role, a.leaf.name) not in read]
    return {(e.role, as_declared(e.name)) for e in leaves(a.value for a in made)}


def ungrouped(given: Arguments, declared: Signature, changing: Set[tuple[str, str]]) -> Arguments:
    """Repeat what the k, v heads have for each q head that reads them; as it is where there are as many.

    `changing` is what the weights are made of, by role and name: the heads of a group have it in common.
    """
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
    wide = _of_the_heads_of_q(given, declared, q.shape[2])
    _refuse_apart(wide, declared, changing, q.shape[2], heads)

    def heads_of(x: Any, axis: int | None) -> Any:
        fits = axis is not None and isinstance(x, torch.Tensor) and x.dim() > axis and x.shape[axis] == heads
        return x.repeat_interleave(n, axis) if fits else x

    def weights(values: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
        return {m: heads_of(x, _heads_axis(x, specs.get(m))) for m, x in values.items()}

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
        wide=frozenset(declared.identity(role, m) for role, m in wide),
    )


def regrouped(state: State, given: Arguments) -> State:
    """The state of the k, v heads, with the last tokens of what the q heads have of their own."""

    def of_group(group: str, name: str, x: torch.Tensor) -> torch.Tensor:
        own = group in ("rows", "taps") and name in given.wide
        return x if own else x[:, :: given.group]

    groups = {g: {n: of_group(g, n, x) for n, x in group.items()} for g, group in tensors_of(state).items()}
    return State(position=state.position, **groups)


def _heads_axis(x: Any, spec: Any) -> int | None:
    """[H, *dims] and [B, H, *dims]: the axis of the heads stands before the dims."""
    axis = x.dim() - len(spec.dims) - 1 if spec is not None and isinstance(x, torch.Tensor) else -1
    return axis if axis >= 0 else None


def _of_the_heads_of_q(given: Arguments, declared: Signature, heads: int) -> list[tuple[str, str]]:
    """Role and name of what comes with as many heads as q."""
    found = [("token", n) for n, x in given.tokens.items() if _has_heads(x, 2, heads)]
    found += [("gate", n) for n, x in given.gates.items() if _has_heads(x, 2, heads)]
    given_state = dict(given.state) if isinstance(given.state, Mapping) else {}
    for role, values, specs in (
        ("param", given.params or {}, declared.params),
        ("state", given_state, declared.states),
    ):
        found += [(role, n) for n, x in values.items() if _has_heads(x, _heads_axis(x, specs.get(n)), heads)]
    return found


def _has_heads(x: Any, axis: int | None, heads: int) -> bool:
    return axis is not None and isinstance(x, torch.Tensor) and x.dim() > axis and x.shape[axis] == heads


def _refuse_apart(
    wide: Sequence[tuple[str, str]], declared: Signature, changing: Set[tuple[str, str]], q_heads: int, heads: int
) -> None:
    """Refuse what would give the q heads of a group weights of their own."""
    specs = {(role, name): spec for role, group in declared.by_role.items() for name, spec in group.items()}
    problems = [
        Problem(
            f"{role} `{name}` has the {q_heads} heads of q, but {'it is' if role == 'state' else 'it changes'} "
            f"the weights, of which k and v have {heads}.",
            f"Give it {heads} head{'s' * (heads > 1)}: {q_heads // heads} q heads read the same weights. Or give k, v "
            f"and all else {q_heads}, k.repeat_interleave({q_heads // heads}, 2): each head then has weights of its "
            "own.",
            specs[role, name].where,
        )
        for role, name in wide
        if (role, name) in specs and (role == "state" or (role, name) in changing)
    ]
    if problems:
        raise ShapeError(problems_text(declared.name, problems))


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
    states = _states(given.state, len(pieces), declared)
    outputs: list[Any] = [None] * len(pieces)
    finals: list[Any] = [None] * len(pieces)
    for members in _alike(pieces, states):
        found, after = run(_together(given, declared, pieces, states, members))
        for row, i in enumerate(members):
            outputs[i] = found[row : row + 1]
            finals[i] = after.map(lambda x, row=row: x[row : row + 1])
    return torch.cat(outputs, 1), PackedState(tuple(finals))


def _states(state: Any, count: int, declared: Signature) -> list[Any]:
    """The state of each sequence: a `State`, a dict of tensors, or None."""

    def refuse(found: str) -> StateMismatch:
        return StateMismatch(
            f"variant `{declared.name}`: {found} for {count} packed sequences.\n"
            "  Pass the state that a call with as many sequences returned, or one for all of them."
        )

    if isinstance(state, PackedState):
        if len(state.sequences) != count:
            raise refuse(f"{len(state.sequences)} states are given")
        return list(state.sequences)
    if not isinstance(state, Mapping):
        return [state] * count
    ranks = {n: len(spec.dims) + 2 for n, spec in declared.states.items()}
    batches = {len(x) for n, x in state.items() if isinstance(x, torch.Tensor) and x.dim() == ranks.get(n)}
    if batches - {1, count}:
        raise refuse(f"a state with a batch of {max(batches)} is given")
    if isinstance(state, State) and count in batches and count > 1:
        return [state.select(i) for i in range(count)]
    return [state] * count


def _alike(pieces: Sequence[tuple[int, int]], states: Sequence[Any]) -> list[list[int]]:
    """Indices of the sequences that can run as one batch: of one length, with states at one place of a mini-batch that
    hold the same.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (begin, end) in enumerate(pieces):
        at = states[i]
        place = (at.position, str(layout(compact(at)))) if isinstance(at, State) else None
        groups.setdefault((end - begin, place), []).append(i)
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

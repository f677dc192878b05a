"""Where a sequence stands: what a layer returns, and is given to continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node

from tttc.errors import StateMismatch
from tttc.runtime import state_file
from tttc.runtime.state_file import Contents

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer

Tensors = dict[str, torch.Tensor]


class Moved:
    """What is made of tensors, and goes where they can go."""

    def map(self, function: Any) -> Self:
        """The same with a function applied to every tensor."""
        raise NotImplementedError

    def detach(self) -> Self:
        """The same values without their history: for truncated backpropagation through time."""
        return self.map(lambda x: x.detach())

    def to(self, *arguments: Any, **settings: Any) -> Self:
        """On another device, or in another dtype: the arguments of `torch.Tensor.to`."""
        return self.map(lambda x: x.to(*arguments, **settings))

    def pin_memory(self) -> Self:
        """In memory from which a GPU copies without waiting."""
        return self.map(lambda x: x.pin_memory())

    def save(self, path: str | Path, layer: Any) -> Path:
        """Write it as a file of safetensors, to the last bit, for the layer (of a `Cache`, the block) that returned it.

        The file notes the digest of the declaration, its dims and the position. What a call measured (`telemetry`) is
        left out.

        Raises `StateMismatch` where it is no state of the layer.

        >>> z, state = layer(q, k, v, gates=gates)
        >>> state.save("session.safetensors", layer)
        """
        return state_file.save(path, self._contents(), _compiled(layer))

    @classmethod
    def load(cls, path: str | Path, layer: Any) -> Self:
        """What `save` wrote, on the device of the layer (of a `Cache`, the block), whose next call goes on there.

        Raises `FileRefused` where the file is damaged, or of another version, declaration or dims. Nothing of it is
        run.

        >>> z, state = layer(q, k, v, gates=gates, state=tttc.State.load("session.safetensors", layer))
        """
        return cls._of(state_file.load(path, cls.__name__, _compiled(layer)))

    def _contents(self) -> Contents:
        """What a file of it holds."""
        raise NotImplementedError

    @classmethod
    def _of(cls, contents: Contents) -> Self:
        """It, from what a file holds."""
        raise NotImplementedError


def _compiled(layer: Any) -> Layer:
    """The layer, or that which a block of `tttc.nn` calls."""
    if not hasattr(layer, "compiled"):
        return layer
    weight = next(layer.parameters())
    return layer.compiled(weight.device, weight.dtype)


@dataclass
class State(Moved, Mapping[str, torch.Tensor]):
    """Where a sequence stands: the fast weights by name, each [B, H, *dims], as `state["W"]` or `state.W`.

    `memory` is what the update rule carries beside them (momentum, averages, ...). Inside a mini-batch, `position`
    tokens into it, the state also holds the weights at its start (`start`) and what it has added since (`summed`), or
    its tokens (`rows`) where that is known only when it is whole; a following call continues there. `taps` are the
    last tokens of what is declared with a window, and `telemetry` what a layer compiled with telemetry=True measured
    in the last call.

    `state.save(path, layer)` writes it as safetensors for `State.load(path, layer)`, which takes it for a layer of the
    same declaration alone; `torch.save` and `torch.load` work as they are, with `tttc` imported. Every tensor that a
    layer returned in it begins with the batch: `select` takes sequences out of it, `repeat` makes more of each,
    `joined` brings several together; `to`, `detach` and `pin_memory` are those of tensors.
    """

    weights: Tensors
    position: int = 0
    start: Tensors = field(default_factory=dict)
    summed: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    rows: Tensors = field(default_factory=dict)
    taps: Tensors = field(default_factory=dict)
    telemetry: Tensors = field(default_factory=dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getattr__(self, name: str) -> torch.Tensor:
        weights = self.__dict__.get("weights", {})
        if name in weights:
            return weights[name]
        raise AttributeError(f"no state named {name!r}; the states are {', '.join(weights)}")

    def map(self, function: Any) -> Self:
        groups = {g: {n: function(x) for n, x in group.items()} for g, group in tensors_of(self).items()}
        return type(self)(position=self.position, **groups)

    @staticmethod
    def joined(states: Sequence[State]) -> State:
        """States that stand at the same place of a mini-batch as one batch of sequences.

        What the last call measured is no place: telemetry is joined where it is of equal length, else left out.

        Raises:
            StateMismatch: they stand at different places, or hold different things.
        """
        if not states:
            raise StateMismatch("State.joined is given no states.\n  Give it one at least.")
        states = [compact(s) for s in states]
        first = states[0]
        for i, other in enumerate(states):
            _alike(first, other, i)
        measured = [{n: (x.shape[1:], x.dtype) for n, x in s.telemetry.items()} for s in states]
        names = [n for n in GROUPS if n != "telemetry" or all(m == measured[0] for m in measured)]
        groups = {g: {n: torch.cat([tensors_of(s)[g][n] for s in states]) for n in tensors_of(first)[g]} for g in names}
        return State(position=first.position, **groups)

    def _contents(self) -> Contents:
        return Contents("State", (self.position,), (tensors_of(compact(self)),))

    @classmethod
    def _of(cls, contents: Contents) -> Self:
        return cls(position=contents.positions[0], **_grouped(contents.groups[0]))

    def select(self, sequences: int | Sequence[int] | slice | torch.Tensor) -> State:
        """Some of its sequences as a state of their own: one by its index, or as an index, a slice or a mask of a
        tensor's first axis chooses; an index may occur several times.
        """
        return self.map(lambda x: _chosen(x, sequences))

    def repeat(self, times: int) -> State:
        """Each sequence so many times, one after the other: n samples, or beams, that begin at the same place."""
        return self.map(lambda x: x.repeat_interleave(times, 0))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}: {list(x.shape)}" for n, x in self.weights.items())
        return f"State({shapes}, position={self.position})"


GROUPS = ("weights", "start", "summed", "memory", "rows", "taps", "telemetry")


def tensors_of(state: State) -> dict[str, Tensors]:
    """Its tensors by what they are for."""
    return {n: getattr(state, n) for n in GROUPS}


def _grouped(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Tensors]:
    """Each group with its tensors, empty ones too."""
    return {n: dict(groups.get(n, {})) for n in GROUPS}


def compact(state: State) -> State:
    """The same state without what a graph makes up, whose tensors are as large at every place: the parts for an open
    mini-batch where none is, and room for the tokens that one lacks.
    """
    if state.position:
        return replace(state, rows={n: x[:, :, : state.position] for n, x in state.rows.items()})
    return replace(state, start={}, summed={}, rows={})


def layout(state: State) -> dict[str, dict[str, tuple[int, ...]]]:
    """What a state holds, beside what the last call measured: the sizes of one sequence, by group and name."""
    return {
        g: {n: tuple(x.shape[1:]) for n, x in ts.items()} for g, ts in tensors_of(state).items() if g != "telemetry"
    }


def _alike(first: State, other: State, number: int) -> None:
    """Refuse states that are no batch."""
    if first.position != other.position:
        raise StateMismatch(
            f"State.joined: state 0 stands {first.position} tokens into its mini-batch, "
            f"state {number} stands {other.position}.\n"
            "  Call the layer with both as a pack, state=PackedState(states) and cu_seqlens=[0, T, 2 * T, ...]: each "
            "then continues at its own place."
        )
    one, two = layout(first), layout(other)
    for group in one:
        if one[group] != two[group]:
            raise StateMismatch(
                f"State.joined: the {group} of state 0 are {_sizes(one[group])}, those of state {number} "
                f"{_sizes(two[group])}.\n"
                "  Join states that calls of one layer returned, with as many heads."
            )


def _chosen(x: torch.Tensor, sequences: int | Sequence[int] | slice | torch.Tensor) -> torch.Tensor:
    """Some of the sequences of a tensor, which stand along its first axis."""
    index = [sequences] if isinstance(sequences, int) else sequences
    return x[index.to(x.device) if isinstance(index, torch.Tensor) else index]


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{n} {list(x)}" for n, x in shapes.items()) or "none"


class PackedState(Moved, Mapping[str, torch.Tensor]):
    """The states of sequences that were packed into one: `state["W"]` is [N, H, *dims], `state.sequences` are the N
    states, each with a batch of one. Given back to the layer, every sequence continues. Saved, loaded and moved like a
    `State`.
    """

    def __init__(self, sequences: tuple[State, ...]) -> None:
        self.sequences = sequences

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.cat([s[name] for s in self.sequences])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sequences[0])

    def __len__(self) -> int:
        return len(self.sequences[0])

    def __getattr__(self, name: str) -> torch.Tensor:
        sequences = self.__dict__.get("sequences", ())
        if sequences and name in sequences[0]:
            return self[name]
        raise AttributeError(f"no state named {name!r}")

    def map(self, function: Any) -> Self:
        return type(self)(tuple(s.map(function) for s in self.sequences))

    def _contents(self) -> Contents:
        positions, groups = zip(*((s.position, tensors_of(compact(s))) for s in self.sequences), strict=True)
        return Contents("PackedState", positions, groups)

    @classmethod
    def _of(cls, contents: Contents) -> Self:
        each = zip(contents.positions, contents.groups, strict=True)
        return cls(tuple(State(position=p, **_grouped(groups)) for p, groups in each))

    def select(self, sequences: int | Sequence[int] | slice) -> PackedState:
        """Some of its sequences, as a pack; an index may occur several times."""
        if isinstance(sequences, slice):
            return PackedState(self.sequences[sequences])
        indices = [sequences] if isinstance(sequences, int) else [int(i) for i in sequences]
        return PackedState(tuple(self.sequences[i] for i in indices))

    def repeat(self, times: int) -> PackedState:
        """Each sequence so many times, one after the other."""
        return PackedState(tuple(s for s in self.sequences for _ in range(times)))

    def __repr__(self) -> str:
        return f"PackedState({len(self.sequences)} sequences, {self.sequences[0]!r})"


@dataclass(frozen=True)
class Cache(Moved):
    """Where a sequence stands after a call of `TTT`: pass it to the next call to continue at the next token.

    Its size does not grow with the number of tokens seen. `torch.save` and `torch.load` work as they are, with `tttc`
    imported; `to`, `select`, `repeat`, `detach` and `pin_memory` as with a `State`.
    """

    state: Any
    """From the compiled layer: the fast weights (`cache.state.W1`) and what an open mini-batch needs."""
    position: int
    """Tokens seen so far."""
    taps: torch.Tensor | None
    """The last `conv_kernel - 1` rows that the convolution reads, [B, conv_kernel - 1, hidden_size]."""

    def map(self, function: Any) -> Self:
        return self._with(self.state.map(function), function)

    def _contents(self) -> Contents:
        return Contents("Cache", (self.state.position,), (tensors_of(compact(self.state)),), self.position, self.taps)

    @classmethod
    def _of(cls, contents: Contents) -> Self:
        assert contents.seen is not None
        return cls(State._of(contents), contents.seen, contents.taps)

    def _with(self, state: Any, function: Any) -> Self:
        return type(self)(state, self.position, None if self.taps is None else function(self.taps))

    def select(self, sequences: int | Sequence[int] | slice | torch.Tensor) -> Cache:
        """Some of its sequences, as `State.select` chooses them: to reorder beams, or to drop what has ended."""
        return self._with(self.state.select(sequences), lambda x: _chosen(x, sequences))

    def repeat(self, times: int) -> Cache:
        """Each sequence so many times, one after the other."""
        return self._with(self.state.repeat(times), lambda x: x.repeat_interleave(times, 0))


def register_tree(
    kind: type, children: Sequence[str], aside: str | None, build: Callable[[list[Any], Any], Any]
) -> None:
    """Make a class known to torch, which maps and exports trees of tensors, by the names of its children. What is told
    `aside` is an int: where it differs, the tree is another one. In a graph that is for many of them it is a formula of
    its sizes, and then a child.
    """

    def parts(x: Any) -> tuple[list[tuple[str, Any]], Any]:
        found = [(n, getattr(x, n)) for n in children]
        number = None if aside is None else getattr(x, aside)
        return (found, number) if number is None or type(number) is int else ([*found, (str(aside), number)], None)

    def flatten(x: Any) -> tuple[list[Any], Any]:
        found, context = parts(x)
        return [value for _, value in found], context

    def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], Any]:
        found, context = parts(x)
        return [(GetAttrKey(n), value) for n, value in found], context

    def unflatten(values: Iterable[Any], context: Any) -> Any:
        found = list(values)
        return build(found, found.pop() if aside is not None and context is None else context)

    name = f"{kind.__module__}.{kind.__qualname__}"
    register_pytree_node(kind, flatten, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys)


register_tree(State, GROUPS, "position", lambda groups, position: State(groups[0], position, *groups[1:]))
register_tree(PackedState, ("sequences",), None, lambda children, _: PackedState(*children))
register_tree(Cache, ("state", "taps"), "position", lambda children, seen: Cache(children[0], seen, children[1]))
torch.serialization.add_safe_globals(
    [State, PackedState, Cache]
)  # torch.load takes them without being told to trust a file

"""Where a sequence stands: what a layer returns, and is given to continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node

Tensors = dict[str, torch.Tensor]


@dataclass
class State(Mapping[str, torch.Tensor]):
    """Where a sequence stands: the fast weights by name, each [B, H, *dims], as `state["W"]` or `state.W`.

    `memory` is what the update rule carries beside them (momentum, averages, ...). Inside a mini-batch, `position`
    tokens into it, the state also holds the weights at its start (`start`) and what it has added since (`summed`), or
    its tokens (`rows`) where that is known only when it is whole; a following call continues there. `taps` are the
    last tokens of what is declared with a window, and `telemetry` what a layer compiled with telemetry=True measured
    in the last call.
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

    def map(self, function: Any) -> State:
        """The same state with a function applied to every tensor."""
        groups = (self.weights, self.start, self.summed, self.memory, self.rows, self.taps, self.telemetry)
        weights, *others = ({n: function(x) for n, x in group.items()} for group in groups)
        return State(weights, self.position, *others)

    @staticmethod
    def joined(states: Sequence[State]) -> State:
        """States that stand at the same place of a mini-batch as one batch of sequences."""
        tensors: list[list[torch.Tensor]] = []
        for state in states:
            tensors.append([])
            state.map(tensors[-1].append)  # in the order in which the last line takes them
        joined = iter([torch.cat(xs) for xs in zip(*tensors, strict=True)])
        return states[0].map(lambda x: next(joined))

    def detach(self) -> State:
        """The same values without their history: for truncated backpropagation through time."""
        return self.map(lambda x: x.detach())

    def to(self, *arguments: Any, **settings: Any) -> State:
        return self.map(lambda x: x.to(*arguments, **settings))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}: {list(x.shape)}" for n, x in self.weights.items())
        return f"State({shapes}, position={self.position})"


class PackedState(Mapping[str, torch.Tensor]):
    """The states of sequences that were packed into one: `state["W"]` is [N, H, *dims], `state.sequences` are the N
    states, each with a batch of one. Given back to the layer, every sequence continues.
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

    def map(self, function: Any) -> PackedState:
        """The same states with a function applied to every tensor."""
        return PackedState(tuple(s.map(function) for s in self.sequences))

    def detach(self) -> PackedState:
        """The same values without their history."""
        return self.map(lambda x: x.detach())

    def __repr__(self) -> str:
        return f"PackedState({len(self.sequences)} sequences, {self.sequences[0]!r})"


def register_tree(
    kind: type, children: Sequence[str], aside: str | None, build: Callable[[list[Any], Any], Any]
) -> None:
    """Make a class known to torch, which maps and exports trees of tensors, by the names of its children. What is told
    `aside` is no tensor: where it differs, the tree is another one.
    """

    def flatten(x: Any) -> tuple[list[Any], Any]:
        return [getattr(x, n) for n in children], aside and getattr(x, aside)

    def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], Any]:
        values, context = flatten(x)
        return [(GetAttrKey(n), value) for n, value in zip(children, values, strict=True)], context

    def unflatten(values: Iterable[Any], context: Any) -> Any:
        return build(list(values), context)

    name = f"{kind.__module__}.{kind.__qualname__}"
    register_pytree_node(kind, flatten, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys)


register_tree(
    State,
    ("weights", "start", "summed", "memory", "rows", "taps", "telemetry"),
    "position",
    lambda groups, position: State(groups[0], position, *groups[1:]),
)
register_tree(PackedState, ("sequences",), None, lambda children, _: PackedState(*children))

"""A call of a layer as a function of tensors in one order, whatever its length and wherever its sequences stand.

    z, W, W_start, S_W, *kept = call.forward([q, k, v, lr, W, W_start, S_W], position=5, checkpoint=4, keep=True)

That is what an operator of PyTorch is made of (runtime/custom_ops.py). The state is always complete: the weights, what
the rule carries beside them, and for a mini-batch that may be open its start and its sums, or room for all its tokens.
Of these only the first `position` count. A position of -1 begins a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from tttc.backends.scan import CompiledScan
from tttc.declare.variant import Signature
from tttc.ir.expr import Expr
from tttc.ir.program import EACH, ScanProgram, number_of
from tttc.runtime import autograd
from tttc.runtime.call import Call
from tttc.runtime.sequencing import Sequencing
from tttc.runtime.state import State, Tensors

BEGINS = -1
"""The position of a sequence that has no past."""
DECIDED_LATER = -1
"""A checkpoint that is chosen when the number of tokens is known."""
GIVEN = ("token", "gate", "param")
"""The groups that come back from no call."""
STATE_GROUPS = ("weights", "memory", "start", "summed", "rows")


class FlatTensor(NamedTuple):
    """The place of a tensor among those of a call: the group that it is of, its variable, its dims after those of
    batch, heads and, for tokens, gates and rows, tokens.
    """

    group: str
    name: str
    dims: tuple[int, ...]
    begins: float = 0.0


class Extent(NamedTuple):
    """What a call consists of, as numbers or as formulas of them."""

    position: Any
    tokens: Any
    whole: Any
    """Tokens in whole mini-batches, run by one scan."""
    after: Any
    """The position after the call."""


class FlatCall:
    """The calls of one layer. `every` says how many chunks lie between two kept states, by the number of tokens."""

    def __init__(
        self,
        program: ScanProgram,
        declared: Signature,
        sequencing: Sequencing,
        scans: Mapping[str, CompiledScan],
        dtype: torch.dtype,
        every: Callable[[int], int],
    ) -> None:
        self.program, self.declared, self.sequencing = program, declared, sequencing
        self.dtype, self.every = dtype, every
        self.scans = {n: s.custom_op for n, s in scans.items()}
        self._recorded = scans
        self._params = {s.name: s.params for s in program.scans}
        self.main, plan = program.scans[0], program.plan
        self.opens = not plan.free and plan.mini_batch != 1
        self._b = plan.mini_batch if isinstance(plan.mini_batch, int) else None
        cut = plan.tiled or plan.substitution or not (plan.free or self._b)
        self.keeps = self.main.loops and not cut
        """Whether the states of the scan of whole mini-batches are kept; what is not runs again."""
        self.given, self.carried = self._tensors(declared)

    def _tensors(self, declared: Signature) -> tuple[tuple[FlatTensor, ...], tuple[FlatTensor, ...]]:
        sequencing = self.sequencing

        def tensor(group: str, name: str, dims: Sequence[str], begins: float = 0.0) -> FlatTensor:
            return FlatTensor(group, name, tuple(self.program.dims[d] for d in dims), begins)

        def axes(variable: Expr) -> list[str]:
            return [a.size for a in variable.axes]

        sequences = []
        for n, token in declared.tokens.items():
            window = () if token.window is None else (token.window,)
            sequences.append(tensor("token", declared.identity("token", n), (*window, *token.given)))
        sequences += [tensor("gate", declared.identity("gate", n), s.dims) for n, s in declared.gates.items()]
        params = [tensor("param", n, s.dims) for n, s in declared.params.items()]
        weights = [tensor("weights", n, s.dims) for n, s in declared.states.items()]
        carried = [*weights, *(tensor("memory", m.name, axes(m)) for m in sequencing.memory)]
        if self.opens:
            carried += [w._replace(group="start") for w in weights]
        if self.opens and sequencing.decode == "rows":
            each = [tensor("token", EACH.name, ())] if sequencing.counts else []
            carried += [s._replace(group="rows") for s in (*sequences, *each)]
        elif self.opens:
            carried += [tensor("summed", o.variable.name, axes(o.variable), o.begins) for o in sequencing.opened]
        return (*sequences, *params), tuple(carried)

    @property
    def inputs(self) -> tuple[FlatTensor, ...]:
        return (*self.given, *self.carried)

    @property
    def differentiated(self) -> int:
        """How many results, from the first on, have cotangents: z and what is carried."""
        return 1 + len(self.carried)

    @property
    def results(self) -> int:
        """z, what is carried and what was measured; what is kept for a backward comes after them."""
        return self.differentiated + len(self.sequencing.measures)

    @property
    def kept(self) -> int:
        """How many tensors are kept for a backward."""
        return self.keeps * len(self.main.carry) * (1 + self.opens)

    # -- a call of a layer as tensors, and back

    def flat(self, call: Call) -> tuple[list[torch.Tensor], Any]:
        """The tensors of a call in their order, those that its state lacks made up, and its position."""
        state = call.state
        position = state.position
        if self.sequencing.memory and not state.memory:
            position = BEGINS
        groups: dict[str, Tensors] = {"token": call.sequences, "gate": call.sequences, "param": call.params}
        groups |= {g: getattr(state, g) for g in STATE_GROUPS}
        found = []
        for tensor in self.inputs:
            x = groups[tensor.group].get(tensor.name)
            found.append(self._absent(tensor, call) if x is None else x)
        return found, position

    def _absent(self, tensor: FlatTensor, call: Call) -> torch.Tensor:
        """Room for the tokens of an open mini-batch, in their dtype; sums in that of arithmetic."""
        leading = call.queries.shape[:2]
        if tensor.group == "rows":
            room = 0 if self._b is None else self._b
            return call.sequences.get(tensor.name, call.queries).new_zeros((*leading, room, *tensor.dims))
        like = next(iter(call.state.weights.values()))
        return like.new_full((*leading, *tensor.dims), tensor.begins)

    def state_after(self, results: Sequence[torch.Tensor], position: Any, tokens: Any) -> State:
        """What a call returns beside z, from the results of its operator."""
        groups: dict[str, Tensors] = {g: {} for g in STATE_GROUPS}
        for tensor, x in zip(self.carried, results[1:], strict=False):
            groups[tensor.group][tensor.name] = x
        return State(position=self._extent(position, tokens).after, **groups)

    def measured(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the inner loop did, each [B, H, mini-batches]."""
        return list(results[self.differentiated : self.results])

    def _extent(self, position: Any, tokens: Any) -> Extent:
        at = 0 if isinstance(position, int) and position == BEGINS else torch.sym_max(position, 0)
        b = self._b
        if not self.opens:
            return Extent(0, tokens, tokens, 0)
        if b is None:
            return Extent(at, tokens, 0, at + tokens)
        if self.sequencing.decode == "rows":
            whole = (at + tokens) // b * b
        else:
            whole = torch.sym_max(tokens - (b - at) % b, 0) // b * b
        return Extent(at, tokens, whole, (at + tokens) % b)

    # -- sizes

    def shapes(self, inputs: Sequence[torch.Tensor], position: Any, checkpoint: Any, keep: bool) -> list[torch.Tensor]:
        """Memory for the results and for what is kept, for sizes that may be symbols."""
        q = inputs[0]
        B, H, T = q.shape[:3]
        place = self._extent(position, T)
        weights = inputs[len(self.given)]
        z = q.new_empty((B, T, H, *self.sequencing.width), dtype=self.dtype).transpose(1, 2)
        found = [z]
        for tensor, x in zip(self.carried, inputs[len(self.given) :], strict=True):
            room = [] if tensor.group != "rows" else [place.after if self._b is None else self._b]
            found.append(x.new_empty((B, H, *room, *tensor.dims)))
        found += [weights.new_empty((B, H, self._measurements(place))) for _ in self.sequencing.measures]
        return [*found, *self._kept(weights, place, checkpoint, keep)]

    def _measurements(self, place: Extent) -> Any:
        """How many mini-batches a call touches."""
        chunk = self.program.plan.chunk
        if not isinstance(chunk, int):
            return torch.sym_min(place.tokens, 1)
        return torch.sym_min(place.tokens, (place.position + place.tokens + chunk - 1) // chunk)

    def _kept(self, weights: torch.Tensor, place: Extent, checkpoint: Any, keep: bool) -> list[torch.Tensor]:
        """The carry of the scan of whole mini-batches every so many chunks, and where others follow after it."""
        if not self.keeps:
            return []
        B, H = weights.shape[:2]
        dims = [[self.program.dims[a.size] for a in p.axes] for p in self.main.carry]
        step = (checkpoint or 1) * number_of(self.program.plan.chunk, 0)
        groups = (place.whole + step - 1) // step
        found = [weights.new_empty((B, H, groups, *d) if keep else (0,)) for d in dims]
        return [*found, *(weights.new_zeros((B, H, *d) if keep else (0,)) for d in dims if self.opens)]

    # -- running

    def forward(self, inputs: Sequence[torch.Tensor], position: int, checkpoint: int, keep: bool) -> list[torch.Tensor]:
        """The results, each in memory of its own, and what `backward` needs of the forward.

        Raises:
            StateMismatch: the call cannot go on at this position.
        """
        call = self._call(inputs, position)
        call.recorded = keep
        memory = self.shapes(inputs, position, checkpoint, keep)
        kept = memory[self.results :]
        whole = self._extent(position, call.tokens).whole

        def outputs(name: str, call: Call, values: Tensors, now: int, stop: int) -> tuple[torch.Tensor, ...]:
            given = [call.value(p, values, now, stop) for p in self._params[name]]
            scan = self.scans[name]
            if not (keep and self._is_whole(name, whole, now, stop)):
                return scan.forward(given, None)[0]
            scan.prewarm_backward(given)
            found, states = scan.forward(given, checkpoint)
            ends = [x.clone() for x in found[len(self.main.outputs) :]] if self.opens else []
            kept[:] = [*states, *ends]
            return found

        z, after = self.sequencing.run(call, outputs)
        measured = list(after.telemetry.values()) or memory[self.differentiated : self.results]
        found = [z, *self._complete(after, inputs), *measured]
        taken: set[int] = {_memory_of(x) for x in inputs}
        return [*(_settled(x, to, taken) for x, to in zip(found, memory, strict=False)), *kept]

    def backward(
        self,
        inputs: Sequence[torch.Tensor],
        kept: Sequence[torch.Tensor],
        position: int,
        checkpoint: int,
        cotangents: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """The cotangents of the inputs from those of z and of what is carried. The call is recorded once more, but for
        whole mini-batches, which go on from what was kept.
        """
        memory = self.gradients(inputs)
        whole = self._extent(position, inputs[0].shape[2]).whole

        def outputs(name: str, call: Call, values: Tensors, now: int, stop: int) -> tuple[torch.Tensor, ...]:
            given = [call.value(p, values, now, stop) for p in self._params[name]]
            scan = self._recorded[name]
            if self._is_whole(name, whole, now, stop):
                scan = Resumed(self.scans[name], kept, self.opens)
            return autograd.run(scan, len(scan.scan.results), max(checkpoint, 0), given)

        with recording():
            leaves = [x.detach().requires_grad_() for x in inputs]
            call = self._call(leaves, position)
            call.recorded = True
            z, after = self.sequencing.run(call, outputs)
            made = [z, *self._complete(after, leaves)]
            found = [(y, c.to(y.dtype)) for y, c in zip(made, cotangents, strict=True) if y.requires_grad]
            results, seeds = zip(*found, strict=True)
            gradients = torch.autograd.grad(results, leaves, seeds, allow_unused=True, materialize_grads=True)
        taken = {_memory_of(x) for x in (*inputs, *kept, *cotangents)}  # a cotangent may be passed on as it is
        return [_settled(x, to, taken) for x, to in zip(gradients, memory, strict=True)]

    def gradients(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for what `backward` returns: sequences lie as their users have them, [B, T, H, ...]."""
        found = []
        for tensor, x in zip(self.inputs, inputs, strict=True):
            batch, heads, *own = x.shape
            if tensor.group in ("token", "gate"):
                found.append(x.new_empty((batch, own[0], heads, *own[1:])).transpose(1, 2))
            else:
                found.append(x.new_empty((batch, heads, *own)))
        return found

    def _is_whole(self, name: str, whole: int, now: int, stop: int) -> bool:
        """Whether it is the run over whole mini-batches, of which states are kept."""
        return self.keeps and name == self.main.name and stop - now == whole

    def _call(self, inputs: Sequence[torch.Tensor], position: int) -> Call:
        """The tensors by what they are for."""
        groups: dict[str, Tensors] = {g: {} for g in ("token", "gate", "param", *STATE_GROUPS)}
        for tensor, x in zip(self.inputs, inputs, strict=True):
            groups[tensor.group][tensor.name] = x
        memory = {} if position == BEGINS else groups["memory"]
        state = State(groups["weights"], max(position, 0), memory=memory)
        if state.position:
            state.start, state.summed, state.rows = (groups[g] for g in ("start", "summed", "rows"))
        return Call(groups["token"] | groups["gate"], groups["param"], state)

    def _complete(self, after: State, inputs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What is carried after a call; at the end of a mini-batch its parts for an open one are made up."""
        begun = {} if after.summed or not self.opens else self.sequencing.begun(after.weights)
        for tensor, x in zip(self.carried, inputs[len(self.given) :], strict=True):
            if tensor.group == "start":
                yield (after.start or after.weights)[tensor.name]
            elif tensor.group == "summed":
                yield (after.summed or begun)[tensor.name]
            elif tensor.group == "rows":
                yield self._with_room(after.rows.get(tensor.name), x)
            else:
                yield getattr(after, tensor.group)[tensor.name]

    def _with_room(self, rows: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """The tokens of an open mini-batch, with room for those that it lacks."""
        found = x.new_empty((*x.shape[:2], 0, *x.shape[3:])) if rows is None else rows
        if self._b is None:
            return found
        room = found.new_zeros((*found.shape[:2], self._b - found.shape[2], *found.shape[3:]))
        return torch.cat([found, room], 2)


class Resumed(CompiledScan):
    """A scan that was run before, of which its carry was kept: it goes backward from there. Of its results only the
    new carry is read again, where something comes after it.
    """

    def __init__(self, inner: CompiledScan, kept: Sequence[torch.Tensor], ends: bool) -> None:
        super().__init__(inner.scan, inner.program)
        self.inner = inner
        count = len(self.scan.carry)
        self.states, self.ends = kept[:count], kept[count:] if ends else ()

    def forward(self, inputs: Sequence[torch.Tensor], checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Any]:
        found = self.inner.outputs(inputs)
        for i, x in enumerate(self.ends, len(self.scan.outputs)):
            found[i] = x.clone()
        return tuple(found), self.states

    def backward(
        self,
        inputs: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        checkpoint: int,
        cotangents: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        return self.inner.backward(inputs, saved, checkpoint, cotangents)


@contextmanager
def recording() -> Iterator[None]:
    """Autograd inside an operator, whose dispatch has left it behind."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        left_out = left_out.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left_out), torch.enable_grad():
        yield


def _memory_of(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _settled(x: torch.Tensor, memory: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """A result as its operator foretold it, `memory` where it lies elsewhere or in the memory of another tensor."""
    as_foretold = x.dtype == memory.dtype and x.shape == memory.shape and x.stride() == memory.stride()
    if not as_foretold or _memory_of(x) in taken:
        x = memory.copy_(x)
    taken.add(_memory_of(x))
    return x

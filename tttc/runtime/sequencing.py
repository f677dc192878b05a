"""How a call goes over its tokens: which scans of the program run, in what order, and what is carried between them.

whole mini-batches                        the scan itself, as many as one run can take
what opens or closes a mini-batch         a scan of its tokens, and one where it ends
one token, no gradient asked for          a kernel of its own
gradients at the weights of each token    chunk by chunk: coefficients, rows one after the other, the chunk
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tttc.declare.variant import Signature
from tttc.errors import StateMismatch
from tttc.ir.expr import TOKENS
from tttc.ir.names import spelled
from tttc.ir.program import EACH, SEQUENCE, ScanKind, ScanProgram, number_of
from tttc.ir.substitution import NOW, PAST, row_name
from tttc.ir.update import memories, openings
from tttc.runtime import autograd
from tttc.runtime.call import Call
from tttc.runtime.state import State, Tensors

Outputs = Callable[[str, Call, Tensors, int, int], tuple[torch.Tensor, ...]]
"""Runs a scan by its name on the tokens from `now` to `stop` of a call: its results, [B, H, ...] each."""


class Sequencing:
    """The scans of a program, in the order in which calls need them."""

    def __init__(self, program: ScanProgram, declared: Signature, dims: Mapping[str, int], decode: str) -> None:
        self.name, self.plan, self.dims = program.name, program.plan, dims
        self.title, self.read, self.mini_batch = declared.name, declared.read, declared.mini_batch
        self._named = {s.kind: s.name for s in program.scans}
        self._made = {s.name: [str(a.leaf.name) for a in s.updates] for s in program.scans}
        self.measures = [str(a.leaf.name) for a in program.scans[0].outputs[1:]]
        """What chunks measure, where there is telemetry."""
        self.ends_more = bool(set(self._made.get(self._named.get(ScanKind.CLOSE, ""), ())) - set(declared.states))
        """Whether the end of a mini-batch changes what is carried beside the weights."""
        self.opened = openings(program.update)
        """What an open mini-batch carries beside its weights."""
        self.memory = tuple(m.variable for m in memories(program.update))
        """What a sequence carries beside its weights."""
        self.counts = any(p.name == EACH.name for s in program.scans for p in s.params)
        """Whether the program counts tokens: a scan then reads ones."""
        loop = program.scan(ScanKind.ROWS)
        past = loop.carry if loop is not None and self.plan.substitution else ()
        self._past = {p.name: [dims[a.size] for a in p.axes if a != PAST] for p in past}
        self._token = program.scan(ScanKind.TOKEN)
        read = program.scans[0].outputs[:1]
        self.width = [dims[a.size] for output in read for a in output.target.axes if a.size != TOKENS]
        self.decode = "rows" if self._keeps_rows(declared, decode) else "sums"

    def run(self, call: Call, outputs: Outputs) -> tuple[torch.Tensor, State]:
        """z: [B, H, T, *dims], and the state after the last token.

        Raises:
            StateMismatch: the call cannot go on where its state stands.
        """
        self._refuse_unfit(call)
        if self.counts:
            q = call.queries
            call.sequences[EACH.name] = q.new_ones(q.shape[:3])
        if call.tokens == 0:
            after = call.state.map(_copied)
            after.memory = after.memory or self._begin(call, outputs, after.weights)
            return self._nothing(call), after
        if call.tokens == 1 and self._has_kernel_of(call):
            z, after = self._decode_step(call, outputs)
        elif self.plan.substitution:
            z, after = self._substituted(call, outputs)
        else:
            z, after = self._rows(call, outputs) if self.decode == "rows" else self._tokens(call, outputs)
        after.telemetry = call.telemetry(list(map(spelled, self.measures)))
        return z, after

    def _refuse_unfit(self, call: Call) -> None:
        state, b = call.state, self.mini_batch
        if not state.position:
            return
        stands = f"variant `{self.title}`: the state stands {state.position} tokens into a mini-batch"
        if self.read == "end" and call.tokens:
            raise StateMismatch(
                f'{stands} of {b}, and read="end" reads weights that the tokens already returned could not see.\n'
                "  Cut sequences at whole mini-batches, or start a new one from dict(state)."
            )
        if isinstance(b, int) and not 0 <= state.position < b:
            raise StateMismatch(f"{stands} of {b}.\n  Pass the state that a call of this layer returned.")
        kept, other = ("rows", "sums") if self.decode == "rows" else ("sums", "rows")
        names = call.sequences if kept == "rows" else [o.variable.name for o in self.opened]
        if set(names) - set(state.rows if kept == "rows" else state.summed):
            raise StateMismatch(
                f"{stands}, and does not have the {kept} of these tokens, which this layer carries.\n"
                f'  Pass a state of a layer with decode="{kept}", not "{other}", or one at a mini-batch\'s end.'
            )

    def _nothing(self, call: Call) -> torch.Tensor:
        """The output of no tokens, which still belongs to the graph of q: calling backward on it is no error."""
        q = call.queries
        empty = q.new_zeros(*q.shape[:3], *self.width)
        return empty + 0 * q.sum() if q.requires_grad else empty

    def begun(self, weights: Tensors) -> Tensors:
        """What an open mini-batch carries, before its first token."""
        like = next(iter(weights.values()))
        shapes = {o: [self.dims[a.size] for a in o.variable.axes] for o in self.opened}
        return {o.variable.name: like.new_full((*like.shape[:2], *s), o.begins) for o, s in shapes.items()}

    def _tokens(self, call: Call, outputs: Outputs) -> tuple[torch.Tensor, State]:
        """Whole mini-batches, and what comes before and after them."""
        T = call.tokens
        b = None if self.plan.mini_batch in (SEQUENCE, None) else self.plan.mini_batch
        weights, position = call.state.weights, call.state.position
        memory = call.state.memory or self._begin(call, outputs, weights)
        start, summed = (call.state.start, call.state.summed) if position else (weights, {})
        found: list[torch.Tensor] = []
        now = 0
        while now < T:
            if position == 0 and (stop := self._whole_until(now, T, b)) > now:
                z, new = self._scan(outputs, self.name, call, weights | memory, now, stop)
                weights, memory = _updated(weights, new), _updated(memory, new)
                start = weights
            else:
                stop = T if b is None else min(T, now + b - position)
                summed = summed if position else self.begun(weights)
                z, new = self._scan(outputs, self._named[ScanKind.OPEN], call, start | memory | summed, now, stop)
                summed, memory = _updated(summed, new), _updated(memory, new)
                _, new = self._scan(outputs, self._named[ScanKind.CLOSE], call, start | memory | summed, stop - 1, stop)
                weights, position = _updated(weights, new), position + stop - now
                if position == b:
                    start, memory, position = weights, _updated(memory, new), 0
            assert z is not None
            found.append(z)
            now = stop
        z = _joined(found)
        opened = (position, self._kept(call, start), summed) if position else (0, {}, {})
        return z, State(weights, *opened, memory)

    def _has_kernel_of(self, call: Call) -> bool:
        """Whether the one token of a call has a kernel of its own: as far as no gradient is asked for, unless its
        mini-batch is kept as rows, or ends with it and changes more than the weights.
        """
        if self._token is None or self.decode == "rows" or call.recorded:
            return False
        if call.state.position + 1 == self.plan.mini_batch and self.ends_more:
            return False
        state = call.state
        groups = (call.sequences, call.params, state.weights, state.start, state.summed, state.memory)
        return not autograd.asked_for(x for group in groups for x in group.values())

    def _decode_step(self, call: Call, outputs: Outputs) -> tuple[torch.Tensor, State]:
        """One token: a decode step."""
        assert self._token is not None
        weights, position = call.state.weights, call.state.position
        memory = call.state.memory or self._begin(call, outputs, weights)
        start, summed = (call.state.start, call.state.summed) if position else (weights, {})
        b = None if self.plan.free else self.plan.mini_batch
        if b not in (None, 1) and not position:
            summed = self.begun(weights)
        _, new = self._scan(outputs, self._token.name, call, start | memory | summed, 0, 1)
        z = new.pop(str(self._token.updates[0].leaf.name)).unsqueeze(2)
        after, memory = _updated(weights, new), _updated(memory, new)
        if b is None or b == 1 or b == position + 1:  # not `in`: as in arguments.py, position varies
            return z, State(after, memory=memory)
        return z, State(after, position + 1, self._kept(call, start), _updated(summed, new), memory)

    def _rows(self, call: Call, outputs: Outputs) -> tuple[torch.Tensor, State]:
        """Whole mini-batches by the scan alone: an open one is run again from its first token."""
        before = call.state.position
        if before:
            rows = call.state.rows  # of which some come with room for a whole mini-batch
            call.sequences = {n: torch.cat([rows[n][:, :, :before], x], 2) for n, x in call.sequences.items()}
        T = call.tokens
        weights = call.state.start if before else call.state.weights
        memory = call.state.memory or self._begin(call, outputs, weights)
        b: Any = self.plan.mini_batch
        whole = T // b * b if isinstance(b, int) else 0
        found: list[torch.Tensor] = []
        start, kept = weights, memory
        for now, stop in ((0, whole), (whole, T)):
            if stop > now:
                start, kept = weights, memory
                z, new = self._scan(outputs, self.name, call, weights | memory, now, stop)
                weights, memory = _updated(weights, new), _updated(memory, new)
                assert z is not None
                found.append(z)
        z = _joined(found)[:, :, before:]
        if whole == T:
            return z, State(weights, memory=memory)
        rows = {n: x[:, :, whole:] for n, x in call.sequences.items()}
        if not before:  # otherwise they are in memory that was made above
            rows = {n: _copied(x) for n, x in rows.items()}
        return z, State(weights, T - whole, self._kept(call, start), {}, kept, rows)

    def _kept(self, call: Call, start: Tensors) -> Tensors:
        """The weights at which an open mini-batch began; those that were given as a dict belong to the caller, who may
        change them.
        """
        given = call.state.weights
        lent = call.lent and any(start[n] is given[n] for n in start)
        return {n: _copied(x) for n, x in start.items()} if lent else start

    def _substituted(self, call: Call, outputs: Outputs) -> tuple[torch.Tensor, State]:
        """Chunk by chunk: first the rows of its gradients, one token after the other, then the chunk from its rows."""
        weights = call.state.weights
        memory = call.state.memory or self._begin(call, outputs, weights)
        found: list[torch.Tensor] = []
        chunk = number_of(self.plan.chunk, call.tokens)
        for now in range(0, call.tokens, chunk):
            stop = min(now + chunk, call.tokens)
            part = {n: x[:, :, now:stop] for n, x in call.sequences.items()}
            _, made = self._scan(outputs, self._named[ScanKind.COEFFICIENTS], call, part, now, stop)
            like = next(iter(weights.values()))
            eye = torch.eye(stop - now, dtype=like.dtype, device=like.device)
            past = {n: like.new_zeros(*like.shape[:2], stop - now, *shape) for n, shape in self._past.items()}
            values = weights | memory | part | made | past | {NOW.name: eye.expand(*like.shape[:2], -1, -1)}
            *rows, _ = outputs(self._named[ScanKind.ROWS], call, values, now, stop)
            named = {row_name(i): x for i, x in enumerate(rows[: len(self._past)])}
            z, new = self._scan(outputs, self.name, call, values | named, now, stop)
            weights, memory = _updated(weights, new), _updated(memory, new)
            assert z is not None
            found.append(z)
        return _joined(found), State(weights, memory=memory)

    def _begin(self, call: Call, outputs: Outputs, weights: Tensors) -> Tensors:
        """What the sequence carries beside its weights, where it begins."""
        name = self._named.get(ScanKind.BEGIN)
        return {} if name is None else self._scan(outputs, name, call, weights, 0, 0)[1]

    def _keeps_rows(self, declared: Signature, decode: str) -> bool:
        """Whether an open mini-batch is carried as its tokens: asked for, the only way, or smaller than its sums."""
        b: Any = self.plan.mini_batch
        if self.plan.rows or self.plan.free or self.plan.tiled or not isinstance(b, int) or b == 1:
            return self.plan.rows
        if decode != "auto":
            return decode == "rows"
        specs: list[Any] = [*declared.tokens.values(), *declared.gates.values()]
        row = sum(math.prod(self.dims[d] for d in s.dims) for s in specs)
        sums = sum(math.prod(self.dims[a.size] for a in o.variable.axes) for o in self.opened)
        return b * row < sums

    def _whole_until(self, now: int, tokens: int, b: int | None) -> int:
        """The end of the whole mini-batches that one scan can take from here."""
        if self.plan.free:
            return tokens
        if self.plan.tiled or b is None:
            return now
        return now + (tokens - now) // b * b

    def _scan(
        self, outputs: Outputs, name: str, call: Call, values: Tensors, now: int, stop: int
    ) -> tuple[torch.Tensor | None, Tensors]:
        """The outputs of the tokens from `now` to `stop`, if the scan has any, and the new values by name."""
        found = outputs(name, call, values, now, stop)
        made = self._made[name]
        stored = len(found) - len(made)
        chunk = number_of(self.plan.chunk, stop - now)
        call.measured += [found[i][:, :, ::chunk].detach() for i in range(1, stored)]
        return (found[0] if stored else None), dict(zip(made, found[stored:], strict=True))


def _updated(values: Tensors, new: Tensors) -> Tensors:
    """The same variables, with the values of those that are new."""
    return {n: new.get(n, x) for n, x in values.items()}


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _joined(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other along the tokens, laid out as the caller has them: [B, T, H, ...]."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([z.transpose(1, 2) for z in outputs], 1).transpose(1, 2)

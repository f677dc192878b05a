"""A compiled variant as a function on PyTorch tensors, with its state, its gradients and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.autograd import forward_ad

from tttc.backends.interface import CompiledScan, Source
from tttc.backends.memory import fake
from tttc.backends.registry import named
from tttc.compiler.pipeline import History
from tttc.declare.pickling import PickledVariant
from tttc.declare.specs import initial_value
from tttc.declare.variant import Signature
from tttc.errors import ShapeError
from tttc.explain.report import explain
from tttc.ir.expr import TOKENS
from tttc.ir.names import spelled
from tttc.ir.program import EACH, SEQUENCE, ScanKind, number_of
from tttc.ir.substitution import NOW, PAST, row_name
from tttc.ir.update import memories, openings
from tttc.runtime import autograd
from tttc.runtime.arguments import Call
from tttc.runtime.custom_ops import Operator, operator, untraced
from tttc.runtime.packing import Arguments, carried, packed, regrouped, ungrouped
from tttc.runtime.stability import warn_of_growth
from tttc.runtime.state import PackedState, State, Tensors
from tttc.tuning.records import UNTUNED, Tuning

__all__ = ["Layer", "PackedState", "State"]


class Layer:
    """A compiled variant: `z, state = layer(q, k, v, gates=..., params=..., state=...)`.

    `torch.compile(fullgraph=True)` and `torch.export` take a call whole: each scan is one operator of the graph.
    Pickled, it is compiled again where it is read, from its declaration, which has to be importable there; a copy of it
    is itself.

    Attributes: `signature` (the declaration), `stages` (the history of the compiler), `source` (the generated code),
    `backend`, `dims`, `dtype`, `device`, `tuning` (what was taken from `tttc tune`, and why).
    """

    def __init__(
        self,
        signature: Signature,
        stages: History,
        scans: Mapping[str, CompiledScan],
        source: Source,
        *,
        dims: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        why: str,
        checkpoint: int | str | None,
        decode: str = "auto",
        tuning: Tuning = UNTUNED,
        settings: Mapping[str, Any],
        recompile: Callable[[PickledVariant, Mapping[str, Any]], Layer],
    ) -> None:
        self.signature, self.stages, self._source = signature, stages, source
        self.dims, self.dtype, self.device = dict(dims), dtype, device
        self.backend, self.why, self.checkpoint, self.tuning = backend, why, checkpoint, tuning
        self.compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._scans, self._settings, self._recompile = scans, settings, recompile
        self._of_kernels = not named(backend, device).of_torch
        self.halves = self.compute_dtype == torch.float32 and all(s.halves for s in scans.values())
        program = stages.program
        self._name, self._plan = program.name, program.plan
        self._named = {s.kind: s.name for s in program.scans}
        self._params = {s.name: s.params for s in program.scans}
        self._operators: dict[str, Operator] = {}
        self._results = {s.name: s.results for s in program.scans}
        self._measures = [str(a.leaf.name) for a in program.scans[0].outputs[1:]]
        self._made = {s.name: [str(a.leaf.name) for a in s.updates] for s in program.scans}
        # whether the end of a mini-batch changes what is carried beside the weights
        self._ends_more = bool(set(self._made.get(self._named.get(ScanKind.CLOSE, ""), ())) - set(signature.states))
        self._opened = openings(program.update)
        loop = program.scan(ScanKind.ROWS)
        past = loop.carry if loop is not None and self._plan.substitution else ()
        self._past = {p.name: [self.dims[a.size] for a in p.axes if a != PAST] for p in past}
        self.decode = "rows" if self._keeps_rows(decode) else "sums"
        self._token = program.scan(ScanKind.TOKEN)
        self._memory = tuple(m.variable for m in memories(program.update))
        self._counts = any(p.name == EACH.name for s in program.scans for p in s.params)
        output = program.scans[0].outputs[0].target if program.scans[0].outputs else None
        self._carried = carried(program)
        self._width: tuple[str, ...] = (
            tuple(a.size for a in output.axes if a.size != TOKENS) if output is not None else ()
        )

    @property
    def source(self) -> str:
        """The generated code, as text."""
        return self._source.text

    def __repr__(self) -> str:
        dims = ", ".join(f"{d}={n}" for d, n in self.dims.items())
        return f"Layer({self.signature.name}, {dims}, {self.dtype}, {self.device}, backend={self.backend})"

    def __deepcopy__(self, memo: Any) -> Layer:
        return self  # nothing of it is trained, or changed by a call

    def __reduce__(self) -> tuple[Any, ...]:
        return self._recompile, (PickledVariant.of(self.signature.variant), self._settings)

    def explain(self, latex: bool = False, stages: Sequence[str] | None = None) -> str:
        """The mathematics stage by stage (or of `stages`), the costs, and why this backend was taken; or as LaTeX."""
        return explain(self, latex=latex, stages=stages)

    def init_params(self, generator: torch.Generator | None = None) -> Tensors:
        """Initial values of the params, each [*dims]."""
        return self._initial(self.signature.params, generator)

    def init_state(self, generator: torch.Generator | None = None) -> Tensors:
        """Initial values of the states, each [*dims]; the same at every call unless a generator is given."""
        return self._initial(self.signature.states, generator)

    def _initial(self, specs: Mapping[str, Any], generator: torch.Generator | None) -> Tensors:
        generator = generator or torch.Generator().manual_seed(0)
        values = {}
        for name, spec in specs.items():
            shape = tuple(self.dims[d] for d in spec.dims)
            value = initial_value(self.signature.name, name, spec.init, shape, generator)
            values[name] = value.to(self.compute_dtype).to(self.device)
        return values

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        gates: Mapping[str, torch.Tensor] | None = None,
        params: Mapping[str, torch.Tensor] | None = None,
        state: State | PackedState | Mapping[str, torch.Tensor] | None = None,
        tokens: Mapping[str, torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        check: bool = False,
    ) -> tuple[torch.Tensor, State | PackedState]:
        """Run over the tokens.

        Args:
            q, k, v: [B, T, H, D] in the dtype of the layer; `tokens` likewise for further declared tokens. q may have
                n times as many heads as k and v: n of its heads then read the same weights.
            gates: one tensor [B, T, H] per gate, [B, T, H, axis] where it is per channel. Where q has more heads than
                k and v, so may what changes no weights: a gate, token or param that only `output` sees.
            params: [*dims] or [H, *dims] each; their `init` if not given.
            state: what a previous call returned, or a dict of [*dims], [H, *dims] or [B, H, *dims]; a state that is
                missing starts at its `init`.
            cu_seqlens: [N + 1], where N sequences packed along T begin and end: 0, ..., T. B is 1, states have the
                axes [N, H, *dims], and what is returned is a `PackedState`.
            check: raise `NonFinite` if an input holds a NaN or an infinity, and warn where a linear learner's steps
                overshoot: lr * |k|^2 > 2.

        Returns:
            z: [B, T, H, E], and the state after the last token.

        Raises:
            ShapeError, StateMismatch, NonFinite.
        """
        arguments = Arguments({"q": q, "k": k, "v": v, **(tokens or {})}, dict(gates or {}), params, state)
        if cu_seqlens is not None:
            if torch.compiler.is_compiling() and isinstance(cu_seqlens, torch.Tensor):
                return self._packed(arguments, cu_seqlens, check)
            return packed(arguments, cu_seqlens, self.signature, lambda a: self._one(a, check))
        return self._one(arguments, check)

    @torch.compiler.disable(reason="cu_seqlens is a tensor, whose values no graph knows: pass a list of ints.")
    def _packed(self, given: Arguments, cu_seqlens: torch.Tensor, check: bool) -> tuple[torch.Tensor, PackedState]:
        if torch.compiler.is_compiling():
            raise ShapeError(
                f"variant `{self.signature.name}`: cu_seqlens is a tensor, whose values no graph knows.\n"
                "  Pass a list of ints: the boundaries are then part of the graph."
            )
        return packed(given, cu_seqlens, self.signature, lambda a: self._one(a, check))

    def _one(self, given: Arguments, check: bool) -> tuple[torch.Tensor, State]:
        """Sequences of one length."""
        whole = ungrouped(given, self.signature, self._carried)
        call = Call(self, whole)
        if check:
            call.refuse_non_finite()
            warn_of_growth(self, call)
        z, after = self._run(call)
        return z.to(self.dtype), after if whole.group == 1 else regrouped(after, whole)

    # -- one call ----------------------------------------------------------------------------------------------------

    def _run(self, call: Call) -> tuple[torch.Tensor, State]:
        B, T, H = call.batch, call.tokens, call.heads
        if T == 0:
            empty = call.sequences["q"].new_zeros(B, 0, H, *(self.dims[d] for d in self._width))
            return _attached(empty, call), call.state.map(_copied)
        if T == 1 and self._has_kernel_of(call):
            z, after = self._run_token(call)
        elif self._plan.substitution:
            z, after = self._run_substituted(call)
        else:
            z, after = self._run_rows(call) if self.decode == "rows" else self._run_tokens(call)
        after.taps, after.telemetry = call.taps, call.telemetry(list(map(spelled, self._measures)))
        return z.transpose(1, 2), after

    def _run_tokens(self, call: Call) -> tuple[torch.Tensor, State]:
        """Whole mini-batches, and what comes before and after them."""
        T = call.tokens
        b = None if self._plan.mini_batch in (SEQUENCE, None) else self._plan.mini_batch
        weights, position = call.state.weights, call.state.position
        memory = call.state.memory or self._begin(call, weights)
        start, summed = (call.state.start, call.state.summed) if position else (weights, {})
        outputs: list[torch.Tensor] = []
        now = 0
        while now < T:
            if position == 0 and (stop := self._whole_until(now, T, b)) > now:
                z, new = self._scan(self._name, call, weights | memory, now, stop)
                weights, memory = _updated(weights, new), _updated(memory, new)
                start = weights
            else:
                stop = T if b is None else min(T, now + b - position)
                summed = summed if position else call.opened(self._opened)
                z, new = self._scan(self._named[ScanKind.OPEN], call, start | memory | summed, now, stop)
                summed, memory = _updated(summed, new), _updated(memory, new)
                _, new = self._scan(self._named[ScanKind.CLOSE], call, start | memory | summed, stop - 1, stop)
                weights, position = _updated(weights, new), position + stop - now
                if position == b:
                    start, memory, position = weights, _updated(memory, new), 0
            assert z is not None
            outputs.append(z)
            now = stop
        z = _joined(outputs)
        opened = (position, self._kept(call, start), summed) if position else (0, {}, {})
        return z, State(weights, *opened, memory)

    def _has_kernel_of(self, call: Call) -> bool:
        """Whether the one token of a call has a kernel of its own: as far as no gradient is asked for, unless its
        mini-batch is kept as rows, or ends with it and changes more than the weights.
        """
        if self._token is None or self.decode == "rows":
            return False
        if call.state.position + 1 == self._plan.mini_batch and self._ends_more:
            return False
        state = call.state
        groups = (call.sequences, call.params, state.weights, state.start, state.summed, state.memory)
        return not autograd.asked_for(x for group in groups for x in group.values())

    def _run_token(self, call: Call) -> tuple[torch.Tensor, State]:
        """One token: a decode step."""
        assert self._token is not None
        weights, position = call.state.weights, call.state.position
        memory = call.state.memory or self._begin(call, weights)
        start, summed = (call.state.start, call.state.summed) if position else (weights, {})
        b = None if self._plan.free else self._plan.mini_batch
        if b not in (None, 1) and not position:
            summed = call.opened(self._opened)
        _, new = self._scan(self._token.name, call, start | memory | summed, 0, 1)
        z = new.pop(str(self._token.updates[0].leaf.name)).unsqueeze(2)
        after, memory = _updated(weights, new), _updated(memory, new)
        if b is None or b == 1 or b == position + 1:  # not `in`: as in call.py, position varies
            return z, State(after, memory=memory)
        return z, State(after, position + 1, self._kept(call, start), _updated(summed, new), memory)

    def _run_rows(self, call: Call) -> tuple[torch.Tensor, State]:
        """Whole mini-batches by the scan alone: an open one is run again from its first token."""
        before = call.state.position
        if before:
            call.sequences = {n: torch.cat([call.state.rows[n], x], 2) for n, x in call.sequences.items()}
        T = call.tokens + before
        weights = call.state.start if before else call.state.weights
        memory = call.state.memory or self._begin(call, weights)
        b: Any = self._plan.mini_batch
        whole = T // b * b if isinstance(b, int) else 0
        outputs: list[torch.Tensor] = []
        start, kept = weights, memory
        for now, stop in ((0, whole), (whole, T)):
            if stop > now:
                start, kept = weights, memory
                z, new = self._scan(self._name, call, weights | memory, now, stop)
                weights, memory = _updated(weights, new), _updated(memory, new)
                assert z is not None
                outputs.append(z)
        z = _joined(outputs)[:, :, before:]
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
        lent = not call.continues and any(start[n] is given[n] for n in start)
        return {n: _copied(x) for n, x in start.items()} if lent else start

    def _run_substituted(self, call: Call) -> tuple[torch.Tensor, State]:
        """Chunk by chunk: first the rows of its gradients, one token after the other, then the chunk from its rows."""
        weights = call.state.weights
        memory = call.state.memory or self._begin(call, weights)
        outputs: list[torch.Tensor] = []
        chunk = number_of(self._plan.chunk, call.tokens)
        for now in range(0, call.tokens, chunk):
            stop = min(now + chunk, call.tokens)
            part = {n: x[:, :, now:stop] for n, x in call.sequences.items()}
            _, made = self._scan(self._named[ScanKind.COEFFICIENTS], call, part, now, stop)
            eye = torch.eye(stop - now, dtype=self.compute_dtype, device=self.device)
            like = next(iter(weights.values()))
            past = {n: like.new_zeros(*like.shape[:2], stop - now, *shape) for n, shape in self._past.items()}
            values = weights | memory | part | made | past | {NOW.name: eye.expand(*like.shape[:2], -1, -1)}
            *rows, _ = self._outputs(self._named[ScanKind.ROWS], call, values, now, stop)
            named = {row_name(i): x for i, x in enumerate(rows[: len(self._past)])}
            z, new = self._scan(self._name, call, values | named, now, stop)
            weights, memory = _updated(weights, new), _updated(memory, new)
            assert z is not None
            outputs.append(z)
        return _joined(outputs), State(weights, memory=memory)

    def _begin(self, call: Call, weights: Tensors) -> Tensors:
        """What the sequence carries beside its weights, where it begins."""
        name = self._named.get(ScanKind.BEGIN)
        return {} if name is None else self._scan(name, call, weights, 0, 0)[1]

    def _keeps_rows(self, decode: str) -> bool:
        """Whether an open mini-batch is carried as its tokens: asked for, the only way, or smaller than its sums."""
        b: Any = self._plan.mini_batch
        if self._plan.rows or self._plan.free or self._plan.tiled or not isinstance(b, int) or b == 1:
            return self._plan.rows
        if decode != "auto":
            return decode == "rows"
        specs: list[Any] = [*self.signature.tokens.values(), *self.signature.gates.values()]
        row = sum(math.prod(self.dims[d] for d in s.dims) for s in specs)
        sums = sum(math.prod(self.dims[a.size] for a in o.variable.axes) for o in self._opened)
        return b * row < sums

    def _whole_until(self, now: int, tokens: int, b: int | None) -> int:
        """The end of the whole mini-batches that one scan can take from here."""
        if self._plan.free:
            return tokens
        if self._plan.tiled or b is None:
            return now
        return now + (tokens - now) // b * b

    def _scan(self, name: str, call: Call, values: Tensors, now: int, stop: int) -> tuple[torch.Tensor | None, Tensors]:
        """The outputs of the tokens from `now` to `stop`, if the scan has any, and the new values by name."""
        outputs = self._outputs(name, call, values, now, stop)
        made = self._made[name]
        stored = len(outputs) - len(made)
        chunk = number_of(self._plan.chunk, stop - now)
        call.measured += [outputs[i][:, :, ::chunk].detach() for i in range(1, stored)]
        return (outputs[0] if stored else None), dict(zip(made, outputs[stored:], strict=True))

    def _outputs(self, name: str, call: Call, values: Tensors, now: int, stop: int) -> tuple[torch.Tensor, ...]:
        inputs = [call.value(p, values, now, stop) for p in self._params[name]]
        if self._recorded_by_name(inputs):
            if torch.compiler.is_compiling() and transformed():
                return self._transformed(name, inputs, stop - now)
            self._prepare()
            kept = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
            kept = kept and not torch.compiler.is_exporting()  # what is exported is first of all run
            return self._operators[name](inputs, self._checkpoint_of(name, stop - now) if kept else None)
        if not autograd.asked_for(inputs):
            outputs, _ = self._scans[name].forward(inputs, None)
            return outputs
        checkpoint = self._checkpoint_of(name, stop - now)
        return autograd.run(self._scans[name], len(self._results[name]), checkpoint, inputs)

    @torch.compiler.disable(
        reason="the operators of tttc know no torch.func and no forward mode: leave torch.compile out of the transform."
    )
    def _transformed(self, name: str, inputs: Sequence[torch.Tensor], tokens: int) -> tuple[torch.Tensor, ...]:
        return autograd.run(self._scans[name], len(self._results[name]), self._checkpoint_of(name, tokens), inputs)

    def _recorded_by_name(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether a graph is being made of the call, or its tensors have no memory that a kernel could read."""
        if torch.compiler.is_compiling():
            return True
        return self._of_kernels and (torch._C._len_torch_dispatch_stack() > 0 or fake(inputs))

    def initial(self, role: str) -> Tensors:
        """What a call starts with that is given no params, or no state: drawn once, as it never changes."""
        if torch.compiler.is_compiling():
            self._prepare()
        return {n: x.clone() for n, x in self._begun[role].items()}

    @cached_property
    def _begun(self) -> dict[str, Tensors]:
        return untraced(lambda: {"param": self.init_params(), "state": self.init_state()})

    @torch.compiler.assume_constant_result
    def _prepare(self) -> bool:
        """What a graph that is being traced will find here: the operators of the scans, and initial values, for it has
        no generator that begins anew.
        """
        if not self._operators:
            self._operators = {n: operator(n, s.opaque, len(self._results[n])) for n, s in self._scans.items()}
        return bool(self._begun)

    def _checkpoint_of(self, name: str, tokens: int) -> int:
        """Of a scan over so many tokens; one that reads no tokens has nothing to keep."""
        return self._checkpoint(tokens) if any(p.at for p in self._params[name]) else 0

    def _checkpoint(self, tokens: int) -> int:
        """Chunks between two kept states, about the square root of their number unless given; 0 keeps everything."""
        if self.checkpoint is None or self.checkpoint == 0:
            return 0
        if self.checkpoint != "auto":
            return int(self.checkpoint)
        entry = self.tuning.entry
        if entry is not None and entry.choice.checkpoint is not None and tokens <= entry.tokens:
            return entry.choice.checkpoint  # for longer calls it would keep more than was tuned with
        chunk = number_of(self._plan.chunk, tokens)
        if torch.compiler.is_compiling():
            every = 1
            while 4 * every * every * chunk < tokens:  # of a number of tokens that is not known, this asks only a bound
                every *= 4
            return every
        return max(1, math.isqrt(math.ceil(tokens / chunk)))


def _updated(values: Tensors, new: Tensors) -> Tensors:
    """The same variables, with the values of those that are new."""
    return {n: new.get(n, x) for n, x in values.items()}


@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Whether a graph is being made of a transform of `torch.func`, or in forward mode."""
    return autograd.transforming() or forward_ad._current_level >= 0


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _joined(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other along the tokens, laid out as the caller has them: [B, T, H, ...]."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([z.transpose(1, 2) for z in outputs], 1).transpose(1, 2)


def _attached(z: torch.Tensor, call: Call) -> torch.Tensor:
    """An empty output that still belongs to the graph of q, so that calling backward on it is no error."""
    return z + 0 * call.sequences["q"].sum() if call.sequences["q"].requires_grad else z

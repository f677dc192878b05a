"""A compiled variant as a function on PyTorch tensors, with its state, its gradients and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from tttc.backends.interface import Source
from tttc.backends.memory import fake
from tttc.backends.registry import named
from tttc.backends.scan import CompiledScan
from tttc.compiler.pipeline import History
from tttc.declare.pickling import PickledVariant
from tttc.declare.specs import initial_value
from tttc.declare.variant import Signature
from tttc.errors import BackendRefusal, ShapeError
from tttc.explain.report import explain
from tttc.ir.names import spelled
from tttc.ir.program import TokenProgram, number_of
from tttc.ir.structure import digest
from tttc.runtime import autograd
from tttc.runtime.arguments import BoundCall
from tttc.runtime.call import Call
from tttc.runtime.custom_ops import MOST_TENSORS, Operator, asked_by_name, in_parts, operator, registered, untraced
from tttc.runtime.flat_call import DECIDED_LATER, FlatCall
from tttc.runtime.graphs import constant_in_graphs, outside_graphs
from tttc.runtime.inlining import inlining
from tttc.runtime.packing import Arguments, carried, packed, regrouped, ungrouped
from tttc.runtime.pool import StatePool
from tttc.runtime.sequencing import Sequencing
from tttc.runtime.stability import warn_of_growth
from tttc.runtime.state import PackedState, State, Tensors
from tttc.runtime.state_layout import Layout, state_layout
from tttc.tuning.records import Tuning

if TYPE_CHECKING:
    from tttc.compiler.driver import Settings

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
        settings: Settings,
        *,
        backend: str,
        why: str,
        tuning: Tuning,
        recompile: Callable[[PickledVariant, Mapping[str, Any]], Layer],
    ) -> None:
        self.signature, self.stages, self._source = signature, stages, source
        dtype, device = self.dtype, self.device = settings.dtype, settings.device
        self.dims, self.checkpoint = dict(settings.dims), settings.checkpoint
        self.backend, self.why, self.tuning = backend, why, tuning
        self.compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._scans, self.settings, self._recompile = scans, settings, recompile
        self._of_kernels = not named(backend, device).of_torch
        self.accepts_16bit = self.compute_dtype == torch.float32 and all(s.accepts_16bit for s in scans.values())
        program = stages.program
        self._name = program.name
        self._params = {s.name: s.params for s in program.scans}
        self._results = {s.name: s.results for s in program.scans}
        self._operator: Operator | None = None
        self._carried = carried(program)
        self.sequencing = Sequencing(program, signature, self.dims, settings.decode)
        self._measured = list(map(spelled, self.sequencing.measures))  # a graph calls no function that has a cache

    @property
    def decode(self) -> str:
        """What an open mini-batch is carried as: "sums" or "rows"."""
        return self.sequencing.decode

    @cached_property
    def digest(self) -> str:
        """A checksum of what was declared, dims included: layers of one digest read each other's states."""
        return digest(self.stages.of(TokenProgram))

    def pool(self, slots: int, heads: int, state: Mapping[str, torch.Tensor] | None = None) -> StatePool:
        """Memory for the states of so many sequences, for serving: they come, go on at places of their own, and end.

        `state` is where each begins, [*dims] or [H, *dims], such as the trained `initial_state` of a block; their
        `init` if not given.

        >>> pool = layer.pool(slots=64, heads=12)
        >>> z = pool.run(pool.allocate(2), q, k, v, gates=gates)
        """
        return StatePool(self, slots, heads, state)

    def state_layout(self, position: int = 0) -> Layout:
        """What a state at a position of a mini-batch may hold: the sizes behind batch and heads, by group and name."""
        return state_layout(self, position)

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
        return self._recompile, (PickledVariant.of(self.signature.variant), dict(vars(self.settings)))

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

    @outside_graphs("cu_seqlens is a tensor, whose values no graph knows: pass a list of ints.")
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
        call = BoundCall(self, whole)
        if check:
            call.refuse_non_finite()
            warn_of_growth(self, call)
        if (made := inlining()) is not None:
            return made(self, call)
        z, after = self._run(call)
        z, after.taps = z.transpose(1, 2), call.taps
        return z.to(self.dtype), after if whole.group == 1 else regrouped(after, whole)

    def _run(self, call: Call) -> tuple[torch.Tensor, State]:
        if not self._by_name(call):
            return self.sequencing.run(call, self._outputs)
        if torch.compiler.is_compiling() and transformed():
            return self._transformed(call)
        if not self._fits():
            return self._too_many(call)
        self._prepare()
        return self._as_operator(call)

    def _as_operator(self, call: Call) -> tuple[torch.Tensor, State]:
        """The call as one operator, which is what graphs hold."""
        assert self._operator is not None
        flat = self._operator.call
        inputs, position = flat.flat(call)
        kept = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        kept = kept and not torch.compiler.is_exporting()  # what is exported is first of all run
        results = self._operator(inputs, position, self._checkpoint(call.tokens) if kept else DECIDED_LATER, kept)
        after = flat.state_after(results, position, call.tokens)
        after.telemetry = dict(zip(self._measured, flat.measured(results), strict=True))
        return results[0], after

    @outside_graphs(
        "the operators of tttc know no torch.func and no forward mode: leave torch.compile out of the transform."
    )
    def _transformed(self, call: Call) -> tuple[torch.Tensor, State]:
        return self.sequencing.run(call, self._outputs)

    @outside_graphs(
        "the operator of this layer would have more tensors than one of PyTorch may have: compile "
        "without fullgraph, or declare fewer and larger states."
    )
    def _too_many(self, call: Call) -> tuple[torch.Tensor, State]:
        if self._by_name(call):
            raise BackendRefusal(
                f"variant `{self.signature.name}`: its calls have {len(self._flat_call().inputs)} tensors, an operator "
                f"of PyTorch at most {MOST_TENSORS}.\n  Declare fewer and larger states."
            )
        return self.sequencing.run(call, self._outputs)

    @constant_in_graphs
    def _fits(self) -> bool:
        """Whether an operator may have as many tensors as the calls."""
        return self._operator is not None or len(self._flat_call().inputs) <= MOST_TENSORS

    def _by_name(self, call: Call) -> bool:
        """Whether a graph is being made of the call, or its tensors are in parts, or have no memory that a kernel could
        read.
        """
        tensors = call.queries, *call.state.weights.values()
        if torch.compiler.is_compiling() or asked_by_name() or any(map(in_parts, tensors)):
            return True
        return self._of_kernels and (torch._C._len_torch_dispatch_stack() > 0 or fake(tensors))

    # -- scans -------------------------------------------------------------------------------------------------------

    def _outputs(self, name: str, call: Call, values: Tensors, now: int, stop: int) -> tuple[torch.Tensor, ...]:
        inputs = [call.value(p, values, now, stop) for p in self._params[name]]
        if not autograd.asked_for(inputs):
            outputs, _ = self._scans[name].forward(inputs, None)
            return outputs
        checkpoint = self._checkpoint_of(name, stop - now)
        return autograd.run(self._scans[name], len(self._results[name]), checkpoint, inputs)

    def initial(self, role: str) -> Tensors:
        """What a call starts with that is given no params, or no state: drawn once, as it never changes."""
        if torch.compiler.is_compiling():
            self._prepare()
        return {n: x.clone() for n, x in self._begun[role].items()}

    @cached_property
    def _begun(self) -> dict[str, Tensors]:
        return untraced(lambda: {"param": self.init_params(), "state": self.init_state()})

    @constant_in_graphs
    def _prepare(self) -> bool:
        """What a graph that is being traced will find here: the operator of the calls, and initial values, for it has
        no generator that begins anew.
        """
        if self._operator is None:
            self._operator = operator(self._name, self._flat_call(), self)
        return bool(self._begun)

    def _flat_call(self) -> FlatCall:
        program, scans = self.stages.program, self._scans
        return FlatCall(program, self.signature, self.sequencing, scans, self.dtype, self._checkpoint)

    def register(self, name: str) -> Operator:
        """The operator of its calls under a name that a file has for it."""
        self._operator = registered(name, self._flat_call(), self)
        return self._operator

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
        chunk = number_of(self.sequencing.plan.chunk, tokens)
        if torch.compiler.is_compiling():
            every = 1
            while 4 * every * every * chunk < tokens:  # of a number of tokens that is not known, this asks only a bound
                every *= 4
            return every
        return max(1, math.isqrt(math.ceil(tokens / chunk)))


@constant_in_graphs
def transformed() -> bool:
    """Whether a graph is being made of a transform of `torch.func`, or in forward mode."""
    return autograd.transforming() or forward_ad._current_level >= 0

"""A compiled variant as a function on PyTorch tensors, with its state, its gradients and its errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tttc.backends.interface import CompiledScan
from tttc.compile import History
from tttc.errors import NonFinite, ShapeError, StateMismatch
from tttc.explain import explain
from tttc.ir.expr import Expr
from tttc.variant import Signature

Tensors = dict[str, torch.Tensor]


@dataclass
class State(Mapping[str, torch.Tensor]):
    """Where a sequence stands: the fast weights by name, each [B, H, *dims], as `state["W"]` or `state.W`.

    Inside a mini-batch, `position` tokens into it, the state also holds the weights at its start (`start`: the point
    where gradients are taken) and what it has summed since (`summed`); a following call continues there.
    """

    weights: Tensors
    position: int = 0
    start: Tensors = field(default_factory=dict)
    summed: Tensors = field(default_factory=dict)

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
        groups = ({n: function(x) for n, x in g.items()} for g in (self.weights, self.start, self.summed))
        weights, start, summed = groups
        return State(weights, self.position, start, summed)

    def detach(self) -> State:
        """The same values without their history: for truncated backpropagation through time."""
        return self.map(lambda x: x.detach())

    def to(self, *arguments: Any, **settings: Any) -> State:
        return self.map(lambda x: x.to(*arguments, **settings))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}: {list(x.shape)}" for n, x in self.weights.items())
        return f"State({shapes}, position={self.position})"


class _Run(torch.autograd.Function):
    """One scan with the derived backward. Under `create_graph` the backward is itself recorded by autograd."""

    @staticmethod
    def forward(ctx: Any, scan: CompiledScan, checkpoint: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, saved = scan.forward(inputs, checkpoint)
        ctx.scan, ctx.checkpoint, ctx.saved = scan, checkpoint, saved
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        inputs, scan, checkpoint = ctx.saved_tensors, ctx.scan, ctx.checkpoint
        if torch.is_grad_enabled():
            _, saved = scan.forward(inputs, 0)  # what the first forward kept has no history
            return None, None, *scan.backward(inputs, saved, 0, cotangents)
        return None, None, *scan.backward(inputs, ctx.saved, checkpoint, cotangents)


class Layer:
    """A compiled variant: `z, state = layer(q, k, v, gates=..., params=..., state=...)`.

    Attributes: `signature` (the declaration), `stages` (the history of the compiler), `source` (the generated code),
    `backend`, `dims`, `dtype`, `device`.
    """

    def __init__(
        self,
        signature: Signature,
        stages: History,
        scans: Mapping[str, CompiledScan],
        source: str,
        *,
        dims: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        why: str,
        checkpoint: int | str | None,
    ) -> None:
        self.signature, self.stages, self.source = signature, stages, source
        self.dims, self.dtype, self.device = dict(dims), dtype, device
        self.backend, self.why, self.checkpoint = backend, why, checkpoint
        self.compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._scans = scans
        program = stages.program
        assert program.plan is not None
        self._name, self._plan = program.name, program.plan
        self._params = {s.name: s.params for s in program.scans}
        output = program.scans[0].outputs[0].target if program.scans[0].outputs else None
        self._width: tuple[str, ...] = (
            tuple(a.size for a in output.axes if a.name not in ("t", "s")) if output is not None else ()
        )

    def __repr__(self) -> str:
        dims = ", ".join(f"{d}={n}" for d, n in self.dims.items())
        return f"Layer({self.signature.name}, {dims}, {self.dtype}, {self.device}, backend={self.backend})"

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
            value = spec.init(shape, generator) if callable(spec.init) else torch.full(shape, float(spec.init))
            values[name] = value.to(self.compute_dtype).to(self.device)
        return values

    @torch.compiler.disable  # a loop over chunks is no graph: torch.compile takes the module around it
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        gates: Mapping[str, torch.Tensor] | None = None,
        params: Mapping[str, torch.Tensor] | None = None,
        state: State | Mapping[str, torch.Tensor] | None = None,
        tokens: Mapping[str, torch.Tensor] | None = None,
        check: bool = False,
    ) -> tuple[torch.Tensor, State]:
        """Run over the tokens.

        Args:
            q, k, v: [B, T, H, D] in the dtype of the layer; `tokens` likewise for further declared tokens.
            gates: one tensor [B, T, H] per gate, [B, T, H, axis] where it is per channel.
            params: [*dims] or [H, *dims] each; their `init` if not given.
            state: what a previous call returned, or a dict of [*dims], [H, *dims] or [B, H, *dims]; a state that is
                missing starts at its `init`.
            check: raise `NonFinite` if an input holds a NaN or an infinity.

        Returns:
            z: [B, T, H, E], and the state after the last token.

        Raises:
            ShapeError, StateMismatch, NonFinite.
        """
        call = _Call(self, q, k, v, gates or {}, params, state, tokens or {})
        if check:
            call.refuse_non_finite()
        z, after = self._run(call)
        return z.to(self.dtype), after

    # -- one call ----------------------------------------------------------------------------------------------------

    def _run(self, call: _Call) -> tuple[torch.Tensor, State]:
        B, T, H = call.batch, call.tokens, call.heads
        if T == 0:
            empty = call.sequences["q"].new_zeros(B, 0, H, *(self.dims[d] for d in self._width))
            return _attached(empty, call), call.state.map(call.unflatten)
        b = None if self._plan.mini_batch in ("T", None) else int(self._plan.mini_batch)
        weights, position = call.state.weights, call.state.position
        start, summed = (call.state.start, call.state.summed) if position else (weights, call.zeros())
        outputs: list[torch.Tensor] = []
        now = 0
        while now < T:
            if position == 0 and (stop := self._whole_until(now, T, b)) > now:
                z, weights = self._whole(call, weights, now, stop)
                start, summed = weights, call.zeros()
            else:
                stop = T if b is None else min(T, now + b - position)
                z, summed = self._open(call, start, summed, now, stop)
                weights = self._close(call, start, summed, stop - 1)
                position += stop - now
                if position == b:
                    start, summed, position = weights, call.zeros(), 0
            outputs.append(z)
            now = stop
        z = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        z = z.unflatten(0, (B, H)).transpose(1, 2)
        after = State(weights, position, start, summed) if position else State(weights)
        return z, after.map(call.unflatten)

    def _whole_until(self, now: int, tokens: int, b: int | None) -> int:
        """The end of the whole mini-batches that one scan can take from here."""
        if self._plan.free:
            return tokens
        if self._plan.tiled or b is None:
            return now
        return now + (tokens - now) // b * b

    def _whole(self, call: _Call, weights: Tensors, now: int, stop: int) -> tuple[torch.Tensor, Tensors]:
        z, *new = self._scan(self._name, call, {**weights}, now, stop)
        return z, dict(zip(weights, new, strict=True))

    def _open(self, call: _Call, start: Tensors, summed: Tensors, now: int, stop: int) -> tuple[torch.Tensor, Tensors]:
        sums = {f"S_{n}": x for n, x in summed.items()}
        z, *new = self._scan(f"{self._name}_open", call, {**start, **sums}, now, stop)
        return z, dict(zip(start, new, strict=True))

    def _close(self, call: _Call, start: Tensors, summed: Tensors, last: int) -> Tensors:
        sums = {f"S_{n}": x for n, x in summed.items()}
        new = self._scan(f"{self._name}_close", call, {**start, **sums}, last, last + 1)
        return dict(zip(start, new, strict=True))

    def _scan(self, name: str, call: _Call, values: Tensors, now: int, stop: int) -> tuple[torch.Tensor, ...]:
        inputs = [call.value(p, values, now, stop) for p in self._params[name]]
        sequence = [p for p in self._params[name] if p.arg[0].at]
        checkpoint = self._checkpoint(stop - now) if sequence else 0
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            outputs, _ = self._scans[name].forward(inputs, stop - now)  # nothing but the first carry is kept
            return outputs
        return _Run.apply(self._scans[name], checkpoint, *inputs)

    def _checkpoint(self, tokens: int) -> int:
        """Chunks between two kept states, about the square root of their number unless given; 0 keeps everything."""
        if self.checkpoint is None or self.checkpoint == 0:
            return 0
        if self.checkpoint != "auto":
            return int(self.checkpoint)
        chunk = tokens if self._plan.chunk == "T" else int(self._plan.chunk)
        return max(1, math.isqrt(math.ceil(tokens / chunk)))


def _attached(z: torch.Tensor, call: _Call) -> torch.Tensor:
    """An empty output that still belongs to the graph of q, so that calling backward on it is no error."""
    return z + 0 * call.sequences["q"].sum() if call.sequences["q"].requires_grad else z


class _Call:
    """The tensors of one call, checked and laid out as [G, ...] with G = batch * heads."""

    def __init__(
        self,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: Mapping[str, torch.Tensor],
        params: Mapping[str, torch.Tensor] | None,
        state: State | Mapping[str, torch.Tensor] | None,
        tokens: Mapping[str, torch.Tensor],
    ) -> None:
        self.layer = layer
        declared = layer.signature
        given = {"q": q, "k": k, "v": v, **tokens}
        self._named("token", given, declared.tokens)
        self._named("gate", gates, declared.gates)
        for name, x in {**given, **gates}.items():
            self._tensor(name, x)
        if q.dim() < 3:
            raise self._error(f"q has shape {list(q.shape)}", "q is [B, T, H, D]: batch, tokens, heads, key width.")
        self.batch, self.tokens, self.heads = q.shape[:3]
        for name, spec in declared.tokens.items():
            self._shape(name, given[name], spec.dims, layer.dtype)
        for name, gate in declared.gates.items():
            self._shape(name, gates[name], gate.dims, None)
        if params is None:
            params = layer.init_params()
        self._named("param", params, declared.params)
        self.sequences = {n: self._flat_sequence(x) for n, x in {**given, **gates}.items()}
        self.params = {
            n: self._flat(n, params[n], len(s.dims), self._dims(s.dims), batched=False)
            for n, s in declared.params.items()
        }
        self.state = self._state(state)

    def _state(self, state: State | Mapping[str, torch.Tensor] | None) -> State:
        specs = self.layer.signature.states
        values = {**self.layer.init_state(), **(state or {})}
        self._named("state", values, specs)

        def flat(group: Mapping[str, torch.Tensor]) -> Tensors:
            return {n: self._flat(n, group[n], len(s.dims), self._dims(s.dims), batched=True) for n, s in specs.items()}

        if not isinstance(state, State):
            return State(flat(values))
        self._continues(state)
        opened = (flat(state.start), flat(state.summed)) if state.position else ({}, {})
        return State(flat(state.weights), state.position, *opened)

    def _continues(self, state: State) -> None:
        b = self.layer.signature.mini_batch
        if state.position and self.layer.signature.read == "end" and self.tokens:
            raise StateMismatch(
                f"variant `{self.layer.signature.name}`: the state stands {state.position} tokens "
                f"into a mini-batch of {b}, "
                'and read="end" reads weights that the tokens already returned could not see.\n'
                "  Cut sequences at whole mini-batches, or start a new one from dict(state)."
            )
        if isinstance(b, int) and not 0 <= state.position < b:
            raise StateMismatch(
                f"variant `{self.layer.signature.name}`: the state stands {state.position} tokens "
                f"into a mini-batch of {b}.\n"
                "  Pass the state that a call of this layer returned."
            )

    def zeros(self) -> Tensors:
        return {n: torch.zeros_like(w) for n, w in self.state.weights.items()}

    def unflatten(self, x: torch.Tensor) -> torch.Tensor:
        """[G, ...] -> [B, H, ...]."""
        return x.unflatten(0, (self.batch, self.heads))

    def value(self, p: Expr, values: Tensors, now: int, stop: int) -> torch.Tensor:
        """The tensor of one parameter of a scan."""
        name, role, at = p.arg[0]
        if role in ("state", "sum"):
            return values[name]
        if role == "param":
            return self.params[name]
        whole = self.sequences[name]
        return whole[:, now:stop] if at else whole[:, stop - 1]

    def refuse_non_finite(self) -> None:
        groups = {"": self.sequences, "param ": self.params, "state ": self.state.weights}
        bad = [
            f"{kind}{n}"
            for kind, group in groups.items()
            for n, x in group.items()
            if not bool(torch.isfinite(x).all())
        ]
        if bad:
            raise NonFinite(
                f"variant `{self.layer.signature.name}`: NaN or infinity in {', '.join(bad)}.\n"
                "  Find where it comes from with torch.isfinite; check=False runs without this test."
            )

    # -- layout --------------------------------------------------------------------------------------------------------

    def _flat_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, ...] -> [G, T, ...]."""
        return x.to(self.layer.compute_dtype).transpose(1, 2).flatten(0, 1).contiguous()

    def _flat(self, name: str, x: torch.Tensor, rank: int, dims: tuple[int, ...], *, batched: bool) -> torch.Tensor:
        """[*dims], [H, *dims] or, for states, [B, H, *dims] -> [G, *dims]."""
        self._tensor(name, x)
        leading = x.shape[: x.dim() - rank]
        allowed = [(), (self.heads,), (1,)] + ([(self.batch, self.heads), (1, self.heads), (1, 1)] if batched else [])
        if x.dim() < rank or tuple(leading) not in allowed or tuple(x.shape[x.dim() - rank :]) != dims:
            leads = [(), (self.heads,), *([(self.batch, self.heads)] if batched else [])]
            shown = [[*lead, *dims] for lead in leads]
            raise self._error(f"{name} has shape {list(x.shape)}", f"It must be {' or '.join(map(str, shown))}.")
        x = x.to(self.layer.compute_dtype)
        while x.dim() < rank + 2:
            x = x.unsqueeze(0)
        return x.expand(self.batch, self.heads, *dims).reshape(self.batch * self.heads, *dims)

    def _dims(self, dims: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.layer.dims[d] for d in dims)

    # -- errors --------------------------------------------------------------------------------------------------------

    def _error(self, what: str, remedy: str) -> ShapeError:
        return ShapeError(f"variant `{self.layer.signature.name}`: {what}.\n  {remedy}")

    def _named(self, role: str, given: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
        missing = [n for n in declared if n not in given]
        unknown = [n for n in given if n not in declared]
        if not missing and not unknown:
            return
        said = [f"missing {role} {', '.join(missing)}"] if missing else []
        said += [f"unknown {role} {', '.join(unknown)}"] if unknown else []
        raise self._error(" and ".join(said), f"The {role}s of this variant are: {', '.join(declared) or 'none'}.")

    def _tensor(self, name: str, x: Any) -> None:
        if not isinstance(x, torch.Tensor):
            raise self._error(f"{name} is a {type(x).__name__}", "Pass a torch.Tensor.")
        if not x.is_floating_point():
            raise self._error(f"{name} has dtype {x.dtype}", f"Convert it: {name}.to({self.layer.dtype}).")
        if x.device.type != self.layer.device.type:
            raise self._error(
                f"{name} is on {x.device}, the layer was compiled for {self.layer.device}",
                f"Move it, {name}.to({str(self.layer.device)!r}), or compile with device={str(x.device)!r}.",
            )

    def _shape(self, name: str, x: torch.Tensor, dims: Sequence[str], dtype: torch.dtype | None) -> None:
        wanted = (self.batch, self.tokens, self.heads, *self._dims(dims))
        if tuple(x.shape) != wanted:
            named = ", ".join(["B", "T", "H", *dims])
            sizes = ", ".join(f"{d}={self.layer.dims[d]}" for d in dims)
            raise self._error(
                f"{name} has shape {list(x.shape)}, expected [{named}] = {list(wanted)}",
                "B, T and H come from q" + (f", {sizes} from dims=." if dims else "."),
            )
        if dtype is not None and x.dtype != dtype:
            raise self._error(
                f"{name} has dtype {x.dtype}, the layer was compiled for {dtype}",
                f"Convert it, {name}.to({dtype}), or compile with dtype={x.dtype}.",
            )

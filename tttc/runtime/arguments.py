"""What a layer is called with: checked, with errors that say what was expected, and laid out for the scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tttc.declare.specs import TokenSpec
from tttc.errors import NonFinite, ShapeError, StateMismatch, TTTCError
from tttc.ir.names import as_declared, spelled
from tttc.runtime.call import Call
from tttc.runtime.packing import Arguments
from tttc.runtime.state import State, Tensors

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer


class BoundCall(Call):
    """The tensors of one call, checked and laid out as [B, H, ...], where they lie; `taps` are what the windows of its
    tokens leave for the next call.
    """

    def __init__(self, layer: Layer, arguments: Arguments) -> None:
        self.layer = layer
        declared = layer.signature
        given, gates, params = arguments.tokens, arguments.gates, arguments.params
        q = given["q"]
        self._named("token", given, declared.tokens)
        self._named("gate", gates, declared.gates)
        for name, x in (*given.items(), *gates.items()):
            self._tensor(name, x)
        if q.dim() < 3:
            raise self._error(f"q has shape {list(q.shape)}", "q is [B, T, H, D]: batch, tokens, heads, key width.")
        self.batch, self.length, self.heads = q.shape[:3]
        for name, spec in declared.tokens.items():
            self._shape(name, given[name], spec.given, layer.dtype)
        for name, gate in declared.gates.items():
            self._shape(name, gates[name], gate.dims, None)
        if params is None:
            params = dict(layer.initial("param"))
        self._named("param", params, declared.params)
        sequences = {declared.identity("token", n): self._flat_sequence(given[n]) for n in declared.tokens}
        sequences |= {declared.identity("gate", n): self._flat_sequence(gates[n]) for n in declared.gates}
        flat = {
            n: self._flat(n, params[n], len(s.dims), self._dims(s.dims), batched=False)
            for n, s in declared.params.items()
        }
        state = arguments.state
        super().__init__(sequences, flat, self._state(state), lent=not isinstance(state, State))
        windows = {declared.identity("token", n): s for n, s in declared.tokens.items() if s.window is not None}
        self.taps = {n: self._window(n, spec) for n, spec in windows.items()}

    def _window(self, name: str, spec: TokenSpec) -> torch.Tensor:
        """Lay the last K tokens of each token side by side; what is left for the next call."""
        x, K = self.sequences[name], self.layer.dims[str(spec.window)]
        before = self.state.taps.get(name)
        none = x.new_zeros(*x.shape[:2], K - 1, *x.shape[3:])
        joined = torch.cat([none if before is None else before, x], 2)
        shifted = [joined[:, :, i : i + x.shape[2]] for i in range(K)]
        self.sequences[name] = torch.stack(shifted, 3)
        return joined[:, :, joined.shape[2] - (K - 1) :]

    def _state(self, state: Any) -> State:
        specs = self.layer.signature.states
        values = dict(state or {})
        if any(n not in values for n in specs):
            values = {**self.layer.initial("state"), **values}
        self._named("state", values, specs)

        def flat(group: Mapping[str, torch.Tensor]) -> Tensors:
            return {n: self._flat(n, group[n], len(s.dims), self._dims(s.dims), batched=True) for n, s in specs.items()}

        if not isinstance(state, State):
            return State(flat(values))
        start = flat(state.start) if state.start else {}
        variables = {
            v.name: v for v in (*self.layer.sequencing.memory, *(o.variable for o in self.layer.sequencing.opened))
        }

        def carried(group: Mapping[str, torch.Tensor]) -> Tensors:
            axes = {n: tuple(a.size for a in variables[n].axes) for n in group if n in variables}
            return {n: self._flat(n, group[n], len(dims), self._dims(dims), batched=True) for n, dims in axes.items()}

        rows = {n: self._kept(n, x) for n, x in state.rows.items()}
        taps = {n: self._kept(n, x) for n, x in state.taps.items()}
        carry = carried(state.summed), carried(state.memory)
        return State(flat(state.weights), state.position, start, *carry, rows, taps)

    def refuse_non_finite(self) -> None:
        groups = {"": self.sequences, "param ": self.params, "state ": self.state.weights}
        bad = [
            f"{kind}{spelled(n)}"
            for kind, group in groups.items()
            for n, x in group.items()
            if not bool(torch.isfinite(x).all())
        ]
        if bad:
            remedy = "Find where it comes from with torch.isfinite; check=False runs without this test."
            raise self._error(f"NaN or infinity in {', '.join(bad)}", remedy, NonFinite)

    # -- layout --------------------------------------------------------------------------------------------------------

    def _flat_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, ...] -> [B, H, T, ...], where it lies."""
        return self._stored(x).transpose(1, 2)

    def _stored(self, x: torch.Tensor) -> torch.Tensor:
        """A sequence in the dtype of arithmetic, or as it is where the kernels read 16 bits."""
        as_it_is = self.layer.accepts_16bit and x.dtype in (torch.float16, torch.bfloat16)
        return x if as_it_is else _cast(x, self.layer.compute_dtype)

    def _kept(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Tokens that a state carries, of as many sequences and heads as this call has."""
        if x.shape[:2] != (self.batch, self.heads):
            raise self._error(
                f"the state carries tokens of `{as_declared(name)}` for a batch of {x.shape[0]} and {x.shape[1]} "
                f"heads, this call has {self.batch} and {self.heads}",
                "Pass the state that a call of the same batch and heads returned.",
                StateMismatch,
            )
        return self._stored(x)

    def _flat(self, name: str, x: torch.Tensor, rank: int, dims: tuple[int, ...], *, batched: bool) -> torch.Tensor:
        """[*dims], [H, *dims] or, for states, [B, H, *dims] -> [B, H, *dims], where it lies."""
        self._tensor(name, x)
        whole = (self.batch, self.heads, *dims)
        if batched and x.dim() == len(whole) and x.shape == whole:
            return _cast(x, self.layer.compute_dtype)
        if x.dim() == rank + 1 and x.shape == whole[1:]:  # before others are: a graph remembers what its sizes are not
            return _cast(x, self.layer.compute_dtype).expand(whole)
        leading = x.shape[: x.dim() - rank]
        allowed = [(), (self.heads,), (1,)] + ([(self.batch, self.heads), (1, self.heads), (1, 1)] if batched else [])
        known = allowed.count(tuple(leading))  # not `in`: torch.compile finds no constant among numbers that vary
        if x.dim() < rank or not known or tuple(x.shape[x.dim() - rank :]) != dims:
            leads = [(), (self.heads,), *([(self.batch, self.heads)] if batched else [])]
            shown = [[*lead, *dims] for lead in leads]
            raise self._error(f"{name} has shape {list(x.shape)}", f"It must be {' or '.join(map(str, shown))}.")
        return _cast(x, self.layer.compute_dtype).expand(whole)

    def _dims(self, dims: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.layer.dims[d] for d in dims)

    # -- errors --------------------------------------------------------------------------------------------------------

    def _error(self, what: str, remedy: str, kind: type[TTTCError] = ShapeError) -> TTTCError:
        return kind(f"variant `{self.layer.signature.name}`: {what}.\n  {remedy}")

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
        wanted = (self.batch, self.length, self.heads, *self._dims(dims))
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


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In this dtype; where it is, no operation of torch is called, whose microseconds are those of a decode step."""
    return x if x.dtype == dtype else x.to(dtype)

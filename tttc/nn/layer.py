"""`tttc.nn.TTT`: any declaration as a sequence-modelling layer, a drop-in for causal self-attention.

The layer is that of "Learning to (Learn at Test Time)" (Sun et al., arXiv:2407.04620, section 2.7), with the
declaration in the place of TTT-Linear and TTT-MLP. For hidden states x: [B, T, hidden_size]:

    q, k, v   = x Wq, x Wk, x Wv           split into H heads of width D; RoPE on q and k
    gate      = low + scale * activation(x w_h + b_h), or max(1 / i + learned_i, 0) for a mini-batch's i-th token
    z         = variant(q, k, v; gates, params, state)
    y         = post_norm(concatenated heads of z) Wo
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tttc.backends.memory import autocast
from tttc.declare.number import whole
from tttc.declare.pickling import PickledVariant
from tttc.declare.read import signature
from tttc.declare.specs import Init, initial_value
from tttc.declare.variant import Signature, Variant
from tttc.errors import DeclarationError, ShapeError, StateMismatch, TTTCError
from tttc.nn.containers import Modules, Parameters
from tttc.nn.convolution import CausalConvolution
from tttc.nn.gates import STD, HiddenGate, PositionGate, gate_module
from tttc.nn.rotation import rotated
from tttc.nn.sizes import output_shape, sizes_of
from tttc.runtime.layer_cache import shared
from tttc.runtime.state import Cache

__all__ = ["TTT", "Cache"]

_EPS = 1e-6  # of the post norm


class TTT(nn.Module):
    """A Test-Time-Training layer for the declaration `variant`, from and to [B, T, hidden_size].

    Args:
        variant: the declaration, a `tttc.Variant` subclass; nothing here depends on which.
        hidden_size: width of the input and of the output.
        num_heads: H; each head has its own learner. The head width is D = hidden_size / num_heads.
        dims: sizes of the declaration's other dims. Default: F = 4 D, E = D.
        rope: rotate q and k by position (interleaved pairs, arXiv:2104.09864). The position is counted from
            the start of the mini-batch, or of the sequence where `mini_batch = "all"`.
        rope_theta: base of the rotation's wavelengths.
        qk_norm: give q and k the length one in each head. Default: as the declaration says, whose `qk_norm` is True
            where the rule is stable for such keys alone, as the delta rule is.
        post_norm: LayerNorm (eps 1e-6) over the concatenated heads before the output projection.
        output_gate: multiply by gelu(x Wg), tanh form, after the post norm.
        conv_kernel: if given, q and k come from one shared projection, each by its own causal depthwise
            convolution over this many tokens (4 in the Mamba-style backbone of arXiv:2407.04620).
        backend, checkpoint, telemetry: as for `tttc.compile`, which is called on the first use with a device and
            dtype. With telemetry, `cache.state.telemetry` has what the inner loop did in a call with return_state=True.
        check: as for a call of the compiled layer: refuse what is not finite, warn where the inner loop overshoots.
        dtype, device: of the parameters, as in `torch.nn`.

    Parameters by their names in `state_dict()`, where the options and the declaration call for them:
        q_proj.weight, k_proj.weight    [H D, hidden_size]; with `conv_kernel`, k_proj is absent
        v_proj.weight                   [H E, hidden_size], E the axis that the declaration gives v
        token_proj.<name>.weight        [H *dims, hidden_size] for each further `tttc.token`
        conv_q.weight, conv_k.weight    [H D, 1, conv_kernel], and .bias [H D]
        gates.<name>.weight             [H, *dims, hidden_size], and .bias [H, *dims]; of a gate by="hidden"
        gates.<name>.learned            [mini_batch, *dims]; of a gate by="position", if mini_batch is an int
        params.<name>                   [H, *dims] for each `tttc.param`
        initial_state.<name>            [H, *dims] for each `tttc.state`: where every sequence starts
        post_norm.weight, .bias         [H E]
        g_proj.weight                   [H E, hidden_size]
        o_proj.weight                   [hidden_size, H E]

    Raises:
        DeclarationError: `variant` is not a valid declaration.
        ShapeError: the sizes do not fit together; the message lists everything that is wrong.
    """

    def __init__(
        self,
        variant: type[Variant],
        hidden_size: int,
        num_heads: int,
        *,
        dims: Mapping[str, int] | None = None,
        rope: bool = True,
        rope_theta: float = 10000.0,
        qk_norm: bool | None = None,
        post_norm: bool = True,
        output_gate: bool = False,
        conv_kernel: int | None = None,
        backend: str = "auto",
        checkpoint: int | str | None = "auto",
        check: bool = False,
        telemetry: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(variant, type) and issubclass(variant, Variant)):
            raise DeclarationError(f"tttc.nn.TTT needs a subclass of tttc.Variant, got {variant!r}.")
        declared = signature(variant)
        hidden_size, num_heads = (x if (n := whole(x)) is None else n for x in (hidden_size, num_heads))
        dims = {d: size if (n := whole(size)) is None else n for d, size in (dims or {}).items()}
        self.variant = variant
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.dims = sizes_of(declared, hidden_size, num_heads, dims or {}, rope, conv_kernel)
        self.mini_batch = declared.mini_batch
        self.rope = rope
        self.rope_theta = rope_theta
        self.qk_norm = declared.qk_norm if qk_norm is None else qk_norm
        self.conv_kernel = conv_kernel
        self.backend = backend
        self.checkpoint = checkpoint
        self.check, self.telemetry = check, telemetry

        self.token_shapes = {name: self._shape(spec.given) for name, spec in declared.tokens.items()}
        self._make(declared, post_norm, output_gate, {"dtype": dtype, "device": device})
        self.reset_parameters()

    def _make(self, declared: Signature, post_norm: bool, output_gate: bool, made: dict[str, Any]) -> None:
        """Every module and parameter, without values, in the order of `state_dict()`."""
        hidden_size, num_heads, kernel = self.hidden_size, self.num_heads, self.conv_kernel
        width = {name: math.prod(shape) for name, shape in self.token_shapes.items()}
        (z_width,) = output_shape(declared, self.dims)

        def projection(width: int) -> nn.Linear:
            return nn.Linear(hidden_size, num_heads * width, bias=False, **made)

        def convolution(width: int) -> CausalConvolution | None:
            return None if kernel is None else CausalConvolution(num_heads * width, kernel, **made)

        self.q_proj = projection(width["q"])
        self.k_proj = projection(width["k"]) if kernel is None else None
        self.v_proj = projection(width["v"])
        self.token_proj = Modules({n: projection(w) for n, w in width.items() if n not in ("q", "k", "v")})
        self.conv_q, self.conv_k = convolution(width["q"]), convolution(width["k"])
        gates = declared.gates.items()
        self.gates = Modules({n: gate_module(g, hidden_size, num_heads, self.dims, declared, **made) for n, g in gates})
        self.params = self._inner_parameters(declared.params, **made)
        self.initial_state = self._inner_parameters(declared.states, **made)
        self.post_norm = nn.LayerNorm(num_heads * z_width, eps=_EPS, **made) if post_norm else None
        self.g_proj = projection(z_width) if output_gate else None
        self.o_proj = nn.Linear(num_heads * z_width, hidden_size, bias=False, **made)

    def _shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.dims[dim] for dim in dims)

    def _inner_parameters(self, specs: Mapping[str, Any], **made: Any) -> Parameters:
        return Parameters(
            {n: nn.Parameter(torch.empty(self.num_heads, *self._shape(s.dims), **made)) for n, s in specs.items()}
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew: projections N(0, 0.02^2), inner ones by their `init`, for each head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=STD)
            elif isinstance(module, CausalConvolution | HiddenGate | PositionGate | nn.LayerNorm):
                module.reset_parameters()
        declared = signature(self.variant)
        specs = declared.params | declared.states
        for name, parameter in [*self.params.items(), *self.initial_state.items()]:
            parameter.copy_(_drawn(self.variant, name, specs[name].init, self.num_heads, tuple(parameter.shape[1:])))

    def forward(self, x: Tensor, state: Cache | None = None, return_state: bool = False) -> Any:
        """The layer's output for each token of x, which it has seen up to and including that token.

        Args:
            x: [B, T, hidden_size], of the parameters' dtype and device; any T, 0 included.
            state: what a previous call returned; x then continues its sequences at any token. Default:
                sequences start here, with the learned initial state.
            return_state: also return a `Cache` that continues after x.

        Returns:
            y: [B, T, hidden_size], or (y, cache) with `return_state=True`.

        Raises:
            ShapeError: x is not [B, T, hidden_size], or of another dtype or device than the parameters.
            StateMismatch: `state` is of another batch size or of a layer with other options.
        """
        self._check(x, state)
        positions = self._positions(x, state)
        q, k, taps = self._queries_and_keys(x, None if state is None else state.taps)
        q, k = self._split("q", q), self._split("k", k)
        if self.qk_norm:
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        if self.rope:
            q, k = rotated(q, positions, self.rope_theta), rotated(k, positions, self.rope_theta)
        v = self._split("v", self.v_proj(x))
        z, inner = self.compiled(q.device, q.dtype)(
            q,
            k,
            v,
            gates={name: gate(x, positions) for name, gate in self.gates.items()},
            params=dict(self.params.items()),
            state=dict(self.initial_state.items()) if state is None else state.state,
            tokens={name: self._split(name, project(x)) for name, project in self.token_proj.items()} or None,
            check=self.check,
        )
        y = z.flatten(2)
        if self.post_norm is not None:
            y = self.post_norm(y)
        if self.g_proj is not None:
            y = y * F.gelu(self.g_proj(x), approximate="tanh")
        y = self.o_proj(y)
        if not return_state:
            return y
        seen = x.shape[1] + (0 if state is None else state.position)
        return y, Cache(inner, seen, taps)

    def compiled(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The compiled variant for a device and dtype, made on first use; layers of equal dims share it."""
        options = self.backend, self.checkpoint, self.telemetry
        return shared(self.variant, tuple(self.dims.items()), dtype, device, *options)

    def _check(self, x: Tensor, state: Cache | None) -> None:
        def refused(kind: type[TTTCError], what: str, remedy: str) -> TTTCError:
            return kind(f"tttc.nn.TTT({self.variant.__name__}): {what}.\n  {remedy}")

        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            what = f"x has the shape {list(x.shape)}, expected [B, T, {self.hidden_size}]"
            raise refused(ShapeError, what, "The last axis is the hidden_size that the layer was made with.")
        weight = self.q_proj.weight
        cast = autocast(x.device.type) and x.is_floating_point()
        if x.device != weight.device or (x.dtype != weight.dtype and not cast):
            what = f"x is {x.dtype} on {x.device}, the parameters are {weight.dtype} on {weight.device}"
            remedy = f"Move one of them: x.to({weight.dtype}), or layer.to(...); or run under torch.autocast."
            raise refused(ShapeError, what, remedy)
        if state is None:
            return
        if not isinstance(state, Cache):
            what = f"state is a {type(state).__name__}, expected a tttc.nn.Cache"
            raise refused(StateMismatch, what, "It is the second result of a call with return_state=True.")
        name, start = next(iter(self.initial_state.items()))
        found = list(state.state[name].shape)
        if found != [x.shape[0], *start.shape]:
            what = f"the state's {name} has the shape {found}, expected {[x.shape[0], *start.shape]}"
            remedy = f"Pass the state that this layer returned for a batch of {x.shape[0]}."
            raise refused(StateMismatch, what, remedy)
        kernel = None if state.taps is None else state.taps.shape[1] + 1
        if kernel != self.conv_kernel:
            what = f"the state is of a layer with conv_kernel={kernel}, this one has conv_kernel={self.conv_kernel}"
            raise refused(StateMismatch, what, "Pass the state that this layer returned.")

    def _positions(self, x: Tensor, state: Cache | None) -> Tensor:
        """Each token's place, from 0, in its mini-batch, or in a sequence that is one mini-batch: [T]."""
        positions = torch.arange(x.shape[1], device=x.device) + (0 if state is None else state.position)
        return positions if self.mini_batch == "all" else positions % int(self.mini_batch)

    def _queries_and_keys(self, x: Tensor, taps: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """q and k before the split into heads, each [B, T, H D], and the convolution's taps after x."""
        shared = self.q_proj(x)
        if self.conv_q is None or self.conv_k is None:
            assert self.k_proj is not None  # absent only where a convolution takes its place
            return shared, self.k_proj(x), None
        kept = self.conv_q.weight.shape[2] - 1
        before = shared.new_zeros(x.shape[0], kept, shared.shape[2]) if taps is None else taps
        rows = torch.cat([before, shared], 1)
        return self.conv_q(rows), self.conv_k(rows), rows[:, rows.shape[1] - kept :]

    def _split(self, token: str, x: Tensor) -> Tensor:
        """[B, T, H *dims] -> [B, T, H, *dims]."""
        return x.unflatten(-1, (self.num_heads, *self.token_shapes[token]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"variant": PickledVariant.of(self.variant)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"variant": state["variant"].variant})

    def extra_repr(self) -> str:
        dims = ", ".join(f"{dim}={size}" for dim, size in self.dims.items())
        shown = [
            self.variant.__name__,
            f"hidden_size={self.hidden_size}",
            f"num_heads={self.num_heads}",
            dims,
        ]
        shown += [f"mini_batch={self.mini_batch!r}"]
        shown += [f"rope_theta={self.rope_theta:g}" if self.rope else "rope=False"]
        shown += ["qk_norm=True"] if self.qk_norm else []
        shown += [f"conv_kernel={self.conv_kernel}"] if self.conv_kernel is not None else []
        shown += [f"backend={self.backend!r}"]
        return ", ".join(shown)


def _drawn(variant: type[Variant], name: str, init: Init, num_heads: int, shape: tuple[int, ...]) -> Tensor:
    """Initial values [H, *shape] in float64, drawn for each head by itself from torch's default generator."""
    if not callable(init):
        return torch.full((num_heads, *shape), float(init), dtype=torch.float64, device="cpu")
    with torch.device("cpu"):  # where the generator is, also inside `with torch.device("meta")`
        draws = [initial_value(variant.__name__, name, init, shape, torch.default_generator) for _ in range(num_heads)]
    return torch.stack(draws)

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tttc.backends.memory import autocast
from tttc.declare.gates import gate_bias, gate_problem
from tttc.declare.number import whole
from tttc.declare.pickling import PickledVariant
from tttc.declare.read import signature
from tttc.declare.specs import GateSpec, Init, initial_value
from tttc.declare.variant import Signature, Variant, bind
from tttc.errors import DeclarationError, Problem, ShapeError, StateMismatch, problems_text
from tttc.nn.containers import Modules, Parameters
from tttc.runtime.layer_cache import shared
from tttc.runtime.state import register_tree

__all__ = ["TTT", "Cache"]

_STD = 0.02  # of every projection and gate weight at initialisation, as in the reference implementation
_EPS = 1e-6  # of the post norm

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "none": lambda x: x,
}


@dataclass(frozen=True)
class Cache:
    """Where a sequence stands after a call of `TTT`: pass it to the next call to continue at the next token.

    Its size does not grow with the number of tokens seen. `torch.save` and `torch.load` work as they are, with `tttc`
    imported; `to`, `select`, `repeat`, `detach` and `pin_memory` as with a `State`.
    """

    state: Any
    """From the compiled layer: the fast weights (`cache.state.W1`) and what an open mini-batch needs."""
    position: int
    """Tokens seen so far."""
    taps: Tensor | None
    """The last `conv_kernel - 1` rows that the convolution reads, [B, conv_kernel - 1, hidden_size]."""

    def map(self, function: Any) -> Cache:
        """The same place with a function applied to every tensor."""
        return self._with(self.state.map(function), function)

    def _with(self, state: Any, function: Any) -> Cache:
        return Cache(state, self.position, None if self.taps is None else function(self.taps))

    def detach(self) -> Cache:
        """The same values without their history: for truncated backpropagation through time."""
        return self.map(lambda x: x.detach())

    def to(self, *arguments: Any, **settings: Any) -> Cache:
        """On another device, or in another dtype: the arguments of `torch.Tensor.to`."""
        return self.map(lambda x: x.to(*arguments, **settings))

    def pin_memory(self) -> Cache:
        """In memory from which a GPU copies without waiting."""
        return self.map(lambda x: x.pin_memory())

    def select(self, sequences: int | Sequence[int] | slice | Tensor) -> Cache:
        """Some of its sequences, as `State.select` chooses them: to reorder beams, or to drop what has ended."""
        index = [sequences] if isinstance(sequences, int) else sequences
        return self._with(
            self.state.select(sequences), lambda x: x[index.to(x.device) if isinstance(index, Tensor) else index]
        )

    def repeat(self, times: int) -> Cache:
        """Each sequence so many times, one after the other."""
        return self._with(self.state.repeat(times), lambda x: x.repeat_interleave(times, 0))


torch.serialization.add_safe_globals([Cache])  # as with `State`
register_tree(Cache, ("state", "taps"), "position", lambda children, seen: Cache(children[0], seen, children[1]))


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
        self.dims = _sizes(declared, hidden_size, num_heads, dims or {}, rope, conv_kernel)
        self.mini_batch = declared.mini_batch
        self.rope = rope
        self.rope_theta = rope_theta
        self.qk_norm = declared.qk_norm if qk_norm is None else qk_norm
        self.conv_kernel = conv_kernel
        self.backend = backend
        self.checkpoint = checkpoint
        self.check, self.telemetry = check, telemetry

        made: dict[str, Any] = {"dtype": dtype, "device": device}
        width = {name: math.prod(self._shape(spec.given)) for name, spec in declared.tokens.items()}
        (z_width,) = _output_shape(declared, self.dims)
        self.token_shapes = {name: self._shape(spec.given) for name, spec in declared.tokens.items()}

        def projection(width: int) -> nn.Linear:
            return nn.Linear(hidden_size, num_heads * width, bias=False, **made)

        self.q_proj = projection(width["q"])
        self.k_proj = projection(width["k"]) if conv_kernel is None else None
        self.v_proj = projection(width["v"])
        self.token_proj = Modules({n: projection(w) for n, w in width.items() if n not in ("q", "k", "v")})
        self.conv_q: CausalConvolution | None = None
        self.conv_k: CausalConvolution | None = None
        if conv_kernel is not None:
            self.conv_q = CausalConvolution(num_heads * width["q"], conv_kernel, **made)
            self.conv_k = CausalConvolution(num_heads * width["k"], conv_kernel, **made)
        self.gates = Modules(
            {
                name: _gate(spec, hidden_size, num_heads, self.dims, declared, **made)
                for name, spec in declared.gates.items()
            }
        )
        self.params = self._inner_parameters(declared.params, **made)
        self.initial_state = self._inner_parameters(declared.states, **made)
        self.post_norm = nn.LayerNorm(num_heads * z_width, eps=_EPS, **made) if post_norm else None
        self.g_proj = projection(z_width) if output_gate else None
        self.o_proj = nn.Linear(num_heads * z_width, hidden_size, bias=False, **made)
        self.reset_parameters()

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
                nn.init.normal_(module.weight, std=_STD)
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
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ShapeError(
                f"tttc.nn.TTT({self.variant.__name__}): x has the shape {list(x.shape)}, "
                f"expected [B, T, {self.hidden_size}].\n"
                f"  The last axis is the hidden_size that the layer was made with."
            )
        weight = self.q_proj.weight
        cast = autocast(x.device.type) and x.is_floating_point()
        if x.device != weight.device or (x.dtype != weight.dtype and not cast):
            raise ShapeError(
                f"tttc.nn.TTT({self.variant.__name__}): x is {x.dtype} on {x.device}, "
                f"the parameters are {weight.dtype} on {weight.device}.\n"
                f"  Move one of them: x.to({weight.dtype}), or layer.to(...); or run under torch.autocast."
            )
        if state is None:
            return
        if not isinstance(state, Cache):
            raise StateMismatch(
                f"tttc.nn.TTT({self.variant.__name__}): state is a {type(state).__name__}, "
                f"expected a tttc.nn.Cache.\n"
                f"  It is the second result of a call with return_state=True."
            )
        name, start = next(iter(self.initial_state.items()))
        found = list(state.state[name].shape)
        if found != [x.shape[0], *start.shape]:
            raise StateMismatch(
                f"tttc.nn.TTT({self.variant.__name__}): the state's {name} has the shape {found}, "
                f"expected {[x.shape[0], *start.shape]}.\n"
                f"  Pass the state that this layer returned for a batch of {x.shape[0]}."
            )
        if (state.taps is None) != (self.conv_kernel is None) or (
            state.taps is not None and state.taps.shape[1] + 1 != self.conv_kernel
        ):
            kernel = None if state.taps is None else state.taps.shape[1] + 1
            raise StateMismatch(
                f"tttc.nn.TTT({self.variant.__name__}): the state is of a layer with conv_kernel={kernel}, "
                f"this one has conv_kernel={self.conv_kernel}.\n"
                f"  Pass the state that this layer returned."
            )

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


class CausalConvolution(nn.Module):
    """A depthwise convolution in which a token sees itself and the `kernel - 1` tokens before it.

    Weight [channels, 1, kernel] (the last tap is the token itself) and bias [channels], as in `nn.Conv1d`.
    """

    def __init__(self, channels: int, kernel: int, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, **made))
        self.bias = nn.Parameter(torch.empty(channels, **made))

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(kernel), the default of `nn.Conv1d`."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, rows: Tensor) -> Tensor:
        """[B, kernel - 1 + T, channels], whose first rows are those before the tokens -> [B, T, channels]."""
        kernel = self.weight.shape[2]
        T = rows.shape[1] - kernel + 1
        # A sum over shifted views, not F.conv1d, which has no meaning for T = 0 and wants channels first.
        y = self.bias + sum(rows[:, j : j + T] * self.weight[:, 0, j] for j in range(kernel))
        return y.to(rows.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, kernel={self.weight.shape[2]}"


class HiddenGate(nn.Module):
    """low + scale * activation(x w_h + b_h), one row of weights per head (and channel): [B, T, H, *dims].

    b_h begins at `start`.
    """

    def __init__(
        self,
        num_heads: int,
        shape: tuple[int, ...],
        hidden_size: int,
        activation: str,
        scale: float,
        low: float = 0.0,
        start: float = 0.0,
        **made: Any,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, *shape, hidden_size, **made))
        self.bias = nn.Parameter(torch.empty(num_heads, *shape, **made))
        self.activation = activation
        self.scale = scale
        self.low, self.start = low, start

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_STD)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [B, T, hidden_size]; `positions` is not used."""
        logits = F.linear(x, self.weight.flatten(0, -2), self.bias.flatten()).unflatten(-1, self.bias.shape)
        value = self.scale * _ACTIVATIONS[self.activation](logits)
        return value + self.low if self.low else value

    def extra_repr(self) -> str:
        low = f"{self.low:g} + " if self.low else ""
        return f"{low}{self.scale:g} * {self.activation}(x @ {list(self.weight.shape)} + b)"


class PositionGate(nn.Module):
    """max(1 / i + learned_i, 0) for the i-th token of its mini-batch, i from 1; the same for every head."""

    def __init__(self, num_heads: int, shape: tuple[int, ...], mini_batch: int | None, **made: Any) -> None:
        super().__init__()
        self.shape = (num_heads, *shape)
        self.learned = None if mini_batch is None else nn.Parameter(torch.empty(mini_batch, *shape, **made))

    def reset_parameters(self) -> None:
        if self.learned is not None:
            nn.init.zeros_(self.learned)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [B, T, hidden_size], positions: [T] from 0 -> [B, T, H, *dims]."""
        inner = [1] * len(self.shape[1:])
        scale = (1.0 / (positions + 1).to(x.dtype)).view(-1, *inner)
        if self.learned is not None:
            scale = torch.clamp_min(scale + self.learned[positions], 0.0)
        return scale.unsqueeze(1).expand(*x.shape[:2], *self.shape)

    def extra_repr(self) -> str:
        return "1 / i" if self.learned is None else f"max(1 / i + learned_i, 0), i = 1..{self.learned.shape[0]}"


def _gate(
    spec: GateSpec,
    hidden_size: int,
    num_heads: int,
    dims: Mapping[str, int],
    declared: Signature,
    **made: Any,
) -> nn.Module:
    """The module that makes this gate, as its declaration says."""
    shape = tuple(dims[dim] for dim in spec.dims)
    if spec.by == "position":
        return PositionGate(
            num_heads, shape, None if declared.mini_batch == "all" else int(declared.mini_batch), **made
        )
    problem = None
    if spec.by != "hidden":
        problem = Problem(
            f"gate `{spec.name}` is made by {spec.by!r}.", 'Use by="hidden" or by="position".', spec.where
        )
    elif spec.activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        problem = Problem(
            f"gate `{spec.name}` has the activation {spec.activation!r}.", f"Use one of {known}.", spec.where
        )
    sizes = {"D": hidden_size // num_heads, **dims}
    problem = problem or gate_problem(spec, sizes)
    if problem is not None:
        raise DeclarationError(problems_text(declared.name, [problem]))
    shown = spec.activation, spec.scale_value(sizes), float(spec.low), gate_bias(spec, sizes)
    return HiddenGate(num_heads, shape, hidden_size, *shown, **made)


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of x: [B, T, H, D] at `positions`: [T] (arXiv:2104.09864, equation 34).

    Channels 2i and 2i + 1 form a plane, turned by position * theta^(-2i / D). The angles, their cosines and
    sines are float32 for every dtype of x, as in the reference implementation, so that weights trained there
    mean the same here.
    """
    D = x.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)
    angles = positions.to(torch.float32)[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _drawn(variant: type[Variant], name: str, init: Init, num_heads: int, shape: tuple[int, ...]) -> Tensor:
    """Initial values [H, *shape] in float64, drawn for each head by itself from torch's default generator."""
    if not callable(init):
        return torch.full((num_heads, *shape), float(init), dtype=torch.float64, device="cpu")
    with torch.device("cpu"):  # where the generator is, also inside `with torch.device("meta")`
        draws = [initial_value(variant.__name__, name, init, shape, torch.default_generator) for _ in range(num_heads)]
    return torch.stack(draws)


def _sizes(
    declared: Signature,
    hidden_size: int,
    num_heads: int,
    dims: Mapping[str, int],
    rope: bool,
    conv_kernel: int | None,
) -> dict[str, int]:
    """The size of each dim that the declaration mentions; `ShapeError` lists everything that does not fit."""
    asked = {"hidden_size": hidden_size, "num_heads": num_heads, **dims}
    bad = [f"{n} is {size!r}" for n, size in asked.items() if whole(size) is None or int(size) < 1]
    if bad:
        raise ShapeError(problems_text(declared.name, [Problem(f"{', '.join(bad)}.", "A size is a positive int.")]))
    if hidden_size < 1 or num_heads < 1 or hidden_size % num_heads:
        near = [n for n in range(1, max(hidden_size, 0) + 1) if hidden_size % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - num_heads))[:4])
        options = (
            f"Take num_heads from {', '.join(map(str, near))}, or another hidden_size."
            if near
            else "Both are at least 1."
        )
        what = f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}."
        raise ShapeError(problems_text(declared.name, [Problem(what, options)]))
    head = hidden_size // num_heads
    problems = []
    if dims.get("D", head) != head:
        problems.append(
            Problem(
                f"dims has D = {dims['D']}, but the head width is {hidden_size} / {num_heads} = {head}.",
                "Leave D out of dims, or change num_heads.",
            )
        )
    unknown = [dim for dim in dims if dim not in (*declared.dims, "D")]
    if unknown:
        problems.append(
            Problem(
                f"dims gives {', '.join(unknown)}, which the declaration does not mention.",
                f"Its dims are {', '.join(declared.dims)}.",
            )
        )
    sizes = {"D": head, "E": head, "F": 4 * head, **dims}
    missing = [dim for dim in declared.dims if dim not in sizes]
    if missing:
        given = ", ".join(f'"{dim}": ...' for dim in missing)
        problems.append(Problem(f"the size of {', '.join(missing)} is not known.", f"Give it: dims={{{given}}}."))
    bad = [dim for dim in declared.dims if dim in sizes and sizes[dim] < 1]
    if bad:
        problems.append(Problem(f"{', '.join(f'{d} = {sizes[d]}' for d in bad)} in dims.", "A size is at least 1."))
    problems += [] if missing else _token_problems(declared, sizes, rope, conv_kernel)
    if problems:
        raise ShapeError(problems_text(declared.name, problems))
    return {dim: sizes[dim] for dim in declared.dims}


def _token_problems(
    declared: Signature, sizes: Mapping[str, int], rope: bool, conv_kernel: int | None
) -> list[Problem]:
    problems = []
    shapes = {name: [sizes[dim] for dim in declared.tokens[name].given] for name in ("q", "k")}
    for name, shape in shapes.items():
        if rope and (len(shape) != 1 or shape[0] % 2):
            problems.append(
                Problem(
                    f"rope=True turns pairs of channels, but `{name}` has the shape {shape} per head.",
                    "Choose num_heads so that the head width is even, or pass rope=False.",
                )
            )
    if conv_kernel is not None and conv_kernel < 1:
        problems.append(
            Problem(
                f"conv_kernel is {conv_kernel}.",
                "It counts the tokens that a convolution sees: at least 1, or None.",
            )
        )
    if conv_kernel is not None and shapes["q"] != shapes["k"]:
        problems.append(
            Problem(
                f"conv_kernel={conv_kernel} makes q and k from one projection, "
                f"but q is {shapes['q']} and k {shapes['k']}.",
                "Leave conv_kernel out, or declare q and k over one axis.",
            )
        )
    return problems


def _output_shape(declared: Signature, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of what `output` returns for one token, found by calling it on zeros."""

    def zeros(dims: tuple[str, ...]) -> Tensor:
        return torch.zeros([sizes[dim] for dim in dims], dtype=torch.float64, device="cpu")

    values = {name: zeros(spec.dims) for name, spec in (declared.states | declared.params).items()}
    values |= {name: zeros(spec.dims) for name, spec in declared.tokens.items() if name not in ("q", "k", "v")}
    values |= {name: zeros(declared.gates[gate].dims) for name, gate in declared.attributes.items()}
    found = tuple(bind(declared.variant, values).output(zeros(declared.tokens["q"].dims)).shape)
    if len(found) != 1:
        what = f"the output of one token has the shape {list(found)}."
        raise ShapeError(
            problems_text(declared.name, [Problem(what, "`output` (or `learner`) must return one vector.")])
        )
    return found

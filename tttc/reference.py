"""The oracle: the primal program of a variant, token by token, in float64, with torch.autograd.

It calls the user's own `loss`, `output` and `at_end` functions and imports nothing of the compiler: every stage and
every backend is measured against this file. Per batch element and head, over mini-batches of `mini_batch` tokens:

    g_s = d loss(k_s, v_s) / d state           at the mini-batch's start, or with anchor="token" at the weights W_{s-1}
    S_s = mu_s * S_{s-1} + lr_s * g_s          momentum, where there is one; otherwise lr_s * g_s
    U_s = alpha_s * U_{s-1} + S_s              what the mini-batch has added: U = 0 at its start
    W_s = (alpha product so far) * W_start - tau_t * U_s
    z_t = output(q_t; W_t)

read="after" reads W_t, "before" W_{t-1}, "start" W_start and "end" the weights at the mini-batch's end. tau_t belongs
to the reading token; the weights handed to the next mini-batch are those "after" its last token, with the stages of
`at_end` applied: first those of the update, tau * U, then those of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tttc.declare.read import signature
from tttc.declare.specs import GateSpec, ParamSpec, TokenSpec
from tttc.declare.update_rules import AtEnd
from tttc.declare.upstream import loss_of
from tttc.declare.variant import Signature, Variant, bind

Tensors = dict[str, torch.Tensor]


def reference(
    variant: type[Variant],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    gates: Mapping[str, torch.Tensor],
    params: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    tokens: Mapping[str, torch.Tensor] | None = None,
    dims: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, Tensors]:
    """Outputs z: [B, T, H, E] and final weights, each [B, H, *dims], differentiable by torch.autograd in every
    argument.

    q, k, v: [B, T, H, D]; gates: [B, T, H]; params: [*dims] or [H, *dims]; state: [*dims], [H, *dims] or [B, H, *dims].
    dims: sizes, read off states and params where they have them; a window that neither has is known from here alone.
    """
    declared = signature(variant)
    batch, heads = q.shape[0], q.shape[2]
    weights = [(s, state[n]) for n, s in declared.states.items()] + [(s, params[n]) for n, s in declared.params.items()]
    sizes = dict(dims or {})
    sizes |= {d: size for s, x in weights for d, size in zip(s.dims[::-1], x.shape[::-1], strict=False)}
    sequences = {"q": q, "k": k, "v": v, **(tokens or {})}
    outputs: list[torch.Tensor] = []
    finals: dict[str, list[torch.Tensor]] = {name: [] for name in declared.states}
    for i in range(batch):
        for h in range(heads):
            own = {name: _windowed(x[i, :, h], declared.tokens.get(name), sizes) for name, x in sequences.items()}
            rates = {name: x[i, :, h] for name, x in gates.items()}
            slow = {n: _of_head(params[n], len(s.dims), i, h) for n, s in declared.params.items()}
            fast = {n: _of_head(state[n], len(s.dims), i, h) for n, s in declared.states.items()}
            z, final = of_one_head(declared, own, rates, slow, fast)
            outputs.append(z)
            for name, w in final.items():
                finals[name].append(w)
    z = torch.stack(outputs).unflatten(0, (batch, heads)).transpose(1, 2)
    return z, {name: torch.stack(ws).unflatten(0, (batch, heads)) for name, ws in finals.items()}


def of_one_head(
    declared: Signature, sequences: Tensors, gates: Tensors, params: Tensors, state: Tensors
) -> tuple[torch.Tensor, Tensors]:
    """The same of one batch element and head: sequences [T, ...], those with a window [T, K, ...]."""
    with _numbers_of(sequences["q"].dtype):
        return _Head(declared, sequences, gates, params).run(state)


@contextmanager
def _numbers_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, a comparison times a number has this dtype: torch would give (x > 0) * 0.1 only 24 bits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _of_head(x: torch.Tensor, rank: int, i: int, h: int) -> torch.Tensor:
    """The tensor of one batch element and head, whether or not `x` has axes for them."""
    if x.dim() == rank + 2:
        return x[i if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]
    return x[h if x.shape[0] > 1 else 0] if x.dim() == rank + 1 else x


@dataclass(frozen=True)
class _Point:
    """Where a mini-batch stands after some of its tokens, by state."""

    added: Tensors  # U
    kept: Tensors  # the product of decays since the mini-batch's start
    momentum: Tensors
    average: Tensors


def _windowed(x: torch.Tensor, spec: TokenSpec | None, dims: Mapping[str, int]) -> torch.Tensor:
    """[T, D] -> [T, K, D], the last K tokens of each, zeros before the first; other sequences as they are."""
    if spec is None or spec.window is None:
        return x
    K = dims[spec.window]
    padded = torch.cat([x.new_zeros(K - 1, *x.shape[1:]), x])
    return torch.stack([padded[i : i + len(x)] for i in range(K)], 1)


class _Head:
    """One batch element and head: `sequences` are its tokens [T, ...], `gates` its gates, `params` its slow weights."""

    def __init__(self, declared: Signature, sequences: Tensors, gates: Tensors, params: Tensors) -> None:
        self.declared, self.sequences, self.gates, self.params = declared, sequences, gates, params
        self.rule = declared.update
        self.extras = [name for name in declared.tokens if name not in ("q", "k", "v")]

    def run(self, weights: Tensors) -> tuple[torch.Tensor, Tensors]:
        T = self.sequences["q"].shape[0]
        b = max(T, 1) if self.declared.mini_batch == "all" else int(self.declared.mini_batch)
        memory = _Memory(self.rule.at_end, weights)
        outputs: list[torch.Tensor] = []
        for first in range(0, T, b):
            z, weights = self.mini_batch(range(first, min(first + b, T)), weights, memory)
            outputs += z
        if not outputs:
            return self.sequences["q"].new_zeros(0, *self.output_shape(weights)), weights
        return torch.stack(outputs), weights

    def mini_batch(self, tokens: range, start: Tensors, memory: _Memory) -> tuple[list[torch.Tensor], Tensors]:
        """The outputs of one mini-batch and the weights that it hands on; `memory` is carried along."""
        at_start = memory.average or start
        for _ in range(self.declared.steps):
            begun = start
            zero = {n: torch.zeros_like(w) for n, w in begun.items()}
            one = {n: torch.ones_like(w) for n, w in begun.items()}
            trail = [_Point(zero, one, memory.momentum, memory.average or begun)]
            for s in tokens:
                trail.append(self.after_token(s, begun, trail[-1]))
            start = self.ended(tokens, begun, trail[-1], memory)
        outputs = []
        staged = bool(self.rule.at_end) or self.rule.per == "mini_batch"
        for i, t in enumerate(tokens):
            if self.declared.read == "start":
                seen = at_start
            elif self.declared.read == "end":
                seen = start if staged else self.readable(t, begun, trail[-1])
            else:
                seen = self.readable(t, begun, trail[i + 1 if self.declared.read == "after" else i])
            outputs.append(self.bound(t, seen).output(self.sequences["q"][t]))
        return outputs, start

    def after_token(self, s: int, begun: Tensors, now: _Point) -> _Point:
        """The update rule: one token further."""
        rule, online = self.rule, self.declared.anchor == "token"
        current = {n: now.kept[n] * w - now.added[n] for n, w in begun.items()} if online else begun
        if rule.decay_first:
            current = {n: self.rate("decay", n, s) * w for n, w in current.items()}
        gradient = self.clipped(self.gradient(s, current))
        added, kept, momentum, average = {}, {}, {}, {}
        for n, g in gradient.items():
            lr, decay = self.rate("lr", n, s), self.rate("decay", n, s)
            if rule.per == "mini_batch":
                decay = 1.0
            if rule.momentum is None or rule.per == "mini_batch":
                momentum[n], step = now.momentum[n], lr * g
            elif rule.ema:
                mu = self.rate("momentum", n, s)
                momentum[n] = mu * now.momentum[n] + (1.0 - mu) * g
                step = lr * momentum[n]
            else:
                mu = self.rate("momentum", n, s)
                momentum[n] = mu * now.momentum[n] + lr * g
                step = lr * g + mu * momentum[n] if rule.nesterov else momentum[n]
            added[n] = decay * now.added[n] + step
            kept[n] = decay * now.kept[n]
            rho = self.rate("average", n, s)
            average[n] = (1.0 - rho) * now.average[n] + rho * (kept[n] * begun[n] - added[n])
        return _Point(added, kept, momentum, average)

    def readable(self, t: int, begun: Tensors, at: _Point) -> Tensors:
        """The weights that token t reads at some point of the mini-batch."""
        if self.rule.average is not None:
            return at.average
        return {n: at.kept[n] * w - self.rate("read_scale", n, t) * at.added[n] for n, w in begun.items()}

    def ended(self, tokens: range, begun: Tensors, last: _Point, memory: _Memory) -> Tensors:
        """The weights that a mini-batch hands on; `memory` is what the next one needs beside them."""
        added, kept, momentum = last.added, last.kept, last.momentum
        if self.rule.per == "mini_batch":
            mu = {n: sum(self.rate("momentum", n, s, 0.0) for s in tokens) / len(tokens) for n in begun}
            kept = {n: sum(self.rate("decay", n, s) for s in tokens) / len(tokens) for n in begun}
            momentum = {n: mu[n] * last.momentum[n] + added[n] for n in begun}
            added = {n: added[n] + mu[n] * momentum[n] if self.rule.nesterov else momentum[n] for n in begun}
        memory.momentum = momentum
        if self.rule.average is not None:
            memory.average = last.average
        step = {n: self.rate("read_scale", n, tokens[-1]) * u for n, u in added.items()}
        for stage in self.rule.at_end:
            if stage.on == "update":
                step = step | _applied(stage, {n: step[n] for n in stage.of(step)})
        weights = {n: kept[n] * memory.accumulated.get(n, w) - step[n] for n, w in begun.items()}
        for stage in self.rule.at_end:
            acted = {n: weights[n] for n in stage.of(weights)}
            if stage.on == "view":
                memory.accumulated = memory.accumulated | acted
            if stage.on != "update":
                weights = weights | _applied(stage, acted, memory.begun.get(stage, {}))
        return weights

    def clipped(self, gradient: Tensors) -> Tensors:
        """The gradient of a token, scaled down to the norm `clip` over all states."""
        if self.rule.clip is None:
            return gradient
        most = float(self.rule.clip) ** 2
        square = torch.stack([(g * g).sum() for g in gradient.values()]).sum()
        scale = (most / square.clamp_min(most)).sqrt()
        return {n: scale * g for n, g in gradient.items()}

    def gradient(self, s: int, weights: Tensors) -> Tensors:
        """d loss(k_s, v_s) / d state at `weights`, itself differentiable in everything."""
        with torch.enable_grad():
            at = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}
            loss = loss_of(self.bound(s, at), self.sequences["k"][s], self.sequences["v"][s])
            found = torch.autograd.grad(loss, list(at.values()), create_graph=True, allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(at.items(), found, strict=True)}

    def bound(self, t: int, weights: Tensors) -> Any:
        """The user's class on the tensors of token t."""
        extras = {name: self.sequences[name][t] for name in self.extras}
        gates = {attribute: self.gates[name][t] for attribute, name in self.declared.attributes.items()}
        return bind(self.declared.variant, {**self.params, **weights, **extras, **gates})

    def rate(self, role: str, state: str, t: int, missing: float = 1.0) -> Any:
        """A rate of token t, ready to multiply the state: per channel, it runs along the axis of that name."""
        rate = self.rule.of(role, state)
        if rate is None:
            return missing
        if isinstance(rate, GateSpec):
            value = self.gates[rate.name][t]
            if rate.per == "channel":
                dims = self.declared.states[state].dims
                axis = dims.index(rate.axis)
                value = value.reshape([-1 if i == axis else 1 for i in range(len(dims))])
            return value
        return self.params[self.declared.rate_name(rate)] if isinstance(rate, ParamSpec) else float(rate)

    def output_shape(self, weights: Tensors) -> tuple[int, ...]:
        """The shape of one output, for a sequence without tokens: what `output` returns on a token of ones."""
        one, gates = (
            {name: x.new_ones(1, *x.shape[1:]) for name, x in group.items()} for group in (self.sequences, self.gates)
        )
        return tuple(_Head(self.declared, one, gates, self.params).bound(0, weights).output(one["q"][0]).shape)


class _Memory:
    """What a sequence carries beside its weights: momentum, the averaged weights, what `at_end` stages keep."""

    def __init__(self, stages: tuple[AtEnd, ...], weights: Tensors) -> None:
        self.momentum = {n: torch.zeros_like(w) for n, w in weights.items()}
        self.average: Tensors = {}
        self.accumulated: Tensors = {}
        self.begun: dict[AtEnd, Tensors] = {}
        for stage in stages:
            begun = {n: stage.begin(weights[n]) if stage.begin else weights[n] for n in stage.of(weights)}
            if stage.on == "view":
                self.accumulated = self.accumulated | begun
            elif stage.begin:
                self.begun[stage] = begun


def _applied(stage: AtEnd, values: Tensors, kept: Tensors | None = None) -> Tensors:
    if stage.joint:
        return dict(stage.function(values))
    return {n: stage.function(x, kept[n]) if kept else stage.function(x) for n, x in values.items()}

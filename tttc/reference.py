"""The oracle: the primal program of a variant, token by token, in float64, with torch.autograd.

It calls the user's own `loss` and `output` and imports nothing of the compiler: every stage and every backend is
measured against this file. Per batch element and head, over mini-batches of `mini_batch` tokens:

    g_s = d loss(k_s, v_s) / d state           at the mini-batch's start
    W_t = W_start - tau_t * sum_{s in R(t)} lr_s * g_s
    z_t = output(q_t; W_t)

R(t) are the tokens of the mini-batch up to and including t (`read="after"`), before t ("before"), none ("start") or all
("end"). tau_t belongs to the reading token; the weights handed to the next mini-batch are those "after" its last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tttc.variant import GateSpec, ParamSpec, Rate, Signature, Variant, signature

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
) -> tuple[torch.Tensor, Tensors]:
    """Outputs z: [B, T, H, E] and final weights, each [B, H, *dims], differentiable by torch.autograd in every
    argument.

    q, k, v: [B, T, H, D]; gates: [B, T, H]; params: [*dims] or [H, *dims]; state: [*dims], [H, *dims] or [B, H, *dims].
    """
    declared = signature(variant)
    batch, heads = q.shape[0], q.shape[2]
    sequences = {"q": q, "k": k, "v": v, **(tokens or {}), **gates}
    outputs: list[torch.Tensor] = []
    finals: dict[str, list[torch.Tensor]] = {name: [] for name in declared.states}
    for i in range(batch):
        for h in range(heads):
            own = {name: x[i, :, h] for name, x in sequences.items()}
            slow = {n: _of_head(params[n], len(s.dims), i, h) for n, s in declared.params.items()}
            fast = {n: _of_head(state[n], len(s.dims), i, h) for n, s in declared.states.items()}
            z, final = _Head(declared, own, slow).run(fast)
            outputs.append(z)
            for name, w in final.items():
                finals[name].append(w)
    z = torch.stack(outputs).unflatten(0, (batch, heads)).transpose(1, 2)
    return z, {name: torch.stack(ws).unflatten(0, (batch, heads)) for name, ws in finals.items()}


def _of_head(x: torch.Tensor, rank: int, i: int, h: int) -> torch.Tensor:
    """The tensor of one batch element and head, whether or not `x` has axes for them."""
    if x.dim() == rank + 2:
        return x[i if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]
    return x[h if x.shape[0] > 1 else 0] if x.dim() == rank + 1 else x


class _Head:
    """One batch element and head: `sequences` are its tokens and gates [T, ...], `params` its slow weights."""

    def __init__(self, declared: Signature, sequences: Tensors, params: Tensors) -> None:
        self.declared, self.sequences, self.params = declared, sequences, params
        self.extras = [name for name in declared.tokens if name not in ("q", "k", "v")]

    def run(self, weights: Tensors) -> tuple[torch.Tensor, Tensors]:
        T = self.sequences["q"].shape[0]
        b = max(T, 1) if self.declared.mini_batch == "all" else int(self.declared.mini_batch)
        outputs: list[torch.Tensor] = []
        for first in range(0, T, b):
            z, weights = self.mini_batch(range(first, min(first + b, T)), weights)
            outputs += z
        if not outputs:
            return self.sequences["q"].new_zeros(0, *self.output_shape(weights)), weights
        return torch.stack(outputs), weights

    def mini_batch(self, tokens: range, start: Tensors) -> tuple[list[torch.Tensor], Tensors]:
        """The outputs of one mini-batch and the weights that it hands on."""
        sums = [{name: torch.zeros_like(w) for name, w in start.items()}]  # sums[i]: over its first i tokens
        for s in tokens:
            gradient = self.gradient(s, start)
            rates = {name: self.rate(self.declared.update.lr_of(name), s) for name in start}
            sums.append({name: sums[-1][name] + rates[name] * gradient[name] for name in start})
        outputs = []
        for i, t in enumerate(tokens):
            seen = {"after": i + 1, "before": i, "start": 0, "end": len(tokens)}[self.declared.read]
            outputs.append(self.bound(t, self.moved(start, sums[seen], t)).output(self.sequences["q"][t]))
        return outputs, self.moved(start, sums[-1], tokens[-1])

    def moved(self, start: Tensors, total: Tensors, t: int) -> Tensors:
        """The weights that token t reads: W_start - tau_t * total."""
        tau = {name: self.rate(self.declared.update.read_scale_of(name), t) for name in start}
        return {name: w - tau[name] * total[name] for name, w in start.items()}

    def gradient(self, s: int, start: Tensors) -> Tensors:
        """d loss(k_s, v_s) / d state at `start`, itself differentiable in everything."""
        with torch.enable_grad():
            at = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in start.items()}
            loss = self.bound(s, at).loss(self.sequences["k"][s], self.sequences["v"][s])
            found = torch.autograd.grad(loss, list(at.values()), create_graph=True, allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(at.items(), found, strict=True)}

    def bound(self, t: int, weights: Tensors) -> Any:
        """The user's class on the tensors of token t."""
        extras = {name: self.sequences[name][t] for name in self.extras}
        gates = {attribute: self.sequences[name][t] for attribute, name in self.declared.attributes.items()}
        return self.declared.variant.bind({**self.params, **weights, **extras, **gates})

    def rate(self, rate: Rate | None, t: int) -> Any:
        if rate is None:
            return 1.0
        if isinstance(rate, GateSpec):
            return self.sequences[rate.name][t]
        return self.params[self.declared.rate_name(rate)] if isinstance(rate, ParamSpec) else float(rate)

    def output_shape(self, weights: Tensors) -> tuple[int, ...]:
        """The shape of one output, for a sequence without tokens: what `output` returns on a token of ones."""
        one = {name: x.new_ones(1, *x.shape[1:]) for name, x in self.sequences.items()}
        return tuple(_Head(self.declared, one, self.params).bound(0, weights).output(one["q"][0]).shape)

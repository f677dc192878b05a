"""The oracle: the primal program of DESIGN section 2, token by token, in float64, with torch.autograd.

It calls the user's own `loss` and `output` and imports nothing of the compiler: every stage and every backend is measured
against this file. Per batch element and head, over mini-batches of `mini_batch` tokens:

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
    """Outputs z: [B, T, H, E] and final weights, each [B, H, *dims], differentiable by torch.autograd in every argument.

    q, k, v: [B, T, H, D]; gates: [B, T, H]; params: [*dims] or [H, *dims]; state: [*dims], [H, *dims] or [B, H, *dims].
    """
    declared = signature(variant)
    B, T, H = q.shape[:3]
    rows: list[torch.Tensor] = []
    finals: dict[str, list[torch.Tensor]] = {name: [] for name in declared.states}
    inputs = {"q": q, "k": k, "v": v, **(tokens or {})}
    for i in range(B):
        for h in range(H):
            z, final = _one_head(
                declared,
                {name: x[i, :, h] for name, x in inputs.items()},
                {name: x[i, :, h] for name, x in gates.items()},
                {name: _head(params[name], len(spec.dims), i, h) for name, spec in declared.params.items()},
                {name: _head(state[name], len(spec.dims), i, h) for name, spec in declared.states.items()},
            )
            rows.append(z)
            for name, w in final.items():
                finals[name].append(w)
    z = torch.stack(rows).unflatten(0, (B, H)).transpose(1, 2)
    return z, {name: torch.stack(ws).unflatten(0, (B, H)) for name, ws in finals.items()}


def _head(x: torch.Tensor, rank: int, i: int, h: int) -> torch.Tensor:
    """The tensor of one batch element and head, whether or not `x` has axes for them."""
    if x.dim() == rank + 2:
        return x[i if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]
    return x[h if x.shape[0] > 1 else 0] if x.dim() == rank + 1 else x


def _one_head(
    declared: Signature, tokens: Tensors, gates: Tensors, params: Tensors, state: Tensors
) -> tuple[torch.Tensor, Tensors]:
    T = tokens["q"].shape[0]
    b = max(T, 1) if declared.mini_batch == "all" else int(declared.mini_batch)
    weights = dict(state)
    outputs: list[torch.Tensor] = []

    def bound(t: int, at: Tensors) -> Any:
        extras = {name: x[t] for name, x in tokens.items() if name not in ("q", "k", "v")}
        own_gates = {attribute: gates[name][t] for attribute, name in declared.attributes.items()}
        return declared.variant.bind({**params, **at, **extras, **own_gates})

    def scaled(start: Tensors, total: Tensors, t: int) -> Tensors:
        return {n: start[n] - _rate(declared, declared.update.read_scale_of(n), gates, params, t) * total[n] for n in start}

    for first in range(0, T, b):
        start = weights
        batch = range(first, min(first + b, T))
        total = {name: torch.zeros_like(w) for name, w in start.items()}
        before: list[Tensors] = []
        after: list[Tensors] = []
        for s in batch:
            before.append(total)
            gradient = _gradient(bound(s, start), start, tokens["k"][s], tokens["v"][s], bound, s)
            total = {
                name: total[name] + _rate(declared, declared.update.lr_of(name), gates, params, s) * gradient[name]
                for name in total
            }
            after.append(total)
        for i, t in enumerate(batch):
            read = {
                "after": lambda: scaled(start, after[i], t),
                "before": lambda: scaled(start, before[i], t),
                "start": lambda: start,
                "end": lambda: scaled(start, after[-1], t),
            }[declared.read]()
            outputs.append(bound(t, read).output(tokens["q"][t]))
        weights = scaled(start, after[-1], batch[-1])
    if not outputs:
        width = bound_output_width(declared, tokens, gates, params, state)
        return tokens["q"].new_zeros(0, *width), weights
    return torch.stack(outputs), weights


def bound_output_width(
    declared: Signature, tokens: Tensors, gates: Tensors, params: Tensors, state: Tensors
) -> tuple[int, ...]:
    """The shape of one output: what `output` returns on a token of zeros."""
    extras = {name: x.new_zeros(x.shape[1:]) for name, x in tokens.items() if name not in ("q", "k", "v")}
    own_gates = {attribute: gates[name].new_ones(gates[name].shape[1:]) for attribute, name in declared.attributes.items()}
    bound = declared.variant.bind({**params, **state, **extras, **own_gates})
    return tuple(bound.output(tokens["q"].new_zeros(tokens["q"].shape[1:])).shape)


def _gradient(bound: Any, start: Tensors, k: torch.Tensor, v: torch.Tensor, rebind: Any, s: int) -> Tensors:
    """d loss(k, v) / d state at `start`, itself differentiable in everything."""
    with torch.enable_grad():
        at = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in start.items()}
        loss = rebind(s, at).loss(k, v)
        found = torch.autograd.grad(loss, list(at.values()), create_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(at.items(), found, strict=True)
    }


def _rate(declared: Signature, rate: Rate | None, gates: Tensors, params: Tensors, t: int) -> Any:
    if rate is None:
        return 1.0
    if isinstance(rate, GateSpec):
        return gates[rate.name][t]
    return params[declared.rate_name(rate)] if isinstance(rate, ParamSpec) else float(rate)

"""`tttc.verify`: a compiled variant against the oracle, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tttc.api import checked_dims, compile
from tttc.reference import reference
from tttc.variant import GateSpec, ParamSpec, Signature, Variant, signature

OUTPUT_TOLERANCE = 1e-12  # float64: the rounding of a few thousand operations, relative to the norm of the tensor
GRADIENT_TOLERANCE = 1e-11  # a gradient sums over all tokens and passes every operation twice


@dataclass(frozen=True)
class Row:
    """One tensor: its relative Frobenius error against the oracle, and what is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


@dataclass(frozen=True)
class Verification:
    """A table of per-tensor errors."""

    variant: str
    settings: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max(len(r.name) for r in self.rows)
        lines = [f"{self.variant}: {'equal to the oracle' if self.ok else 'DIFFERS from the oracle'} ({self.settings})"]
        lines += [
            f"  {r.name:<{width}}  {r.error:8.1e}  {'ok' if r.ok else f'more than {r.tolerance:.0e}'}"
            for r in self.rows
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Inputs:
    """Everything that a call takes, as float64 leaves of autograd."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]

    def keywords(self) -> dict[str, Any]:
        """The arguments beside q, k and v."""
        return {"gates": self.gates, "params": self.params, "state": self.state, "tokens": self.tokens}

    def named(self) -> dict[str, torch.Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v, **self.tokens, **self.gates, **self.params, **self.state}


def verify(
    variant: type[Variant],
    dims: Mapping[str, int] | None = None,
    *,
    tokens: int = 37,
    heads: int = 2,
    batch: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    checkpoint: int | str | None = "auto",
    backend: str = "torch",
) -> Verification:
    """Compare outputs, final weights and every gradient with the oracle, in float64 on random inputs.

    dims default to D=8, F=4*D and otherwise D. Errors are relative in the Frobenius norm. `backend` is what computes
    them: "torch" at once, "tvm" after some seconds in which its kernels are compiled.
    """
    declared = signature(variant)
    sizes = checked_dims(declared, default_dims(declared, 8) | dict(dims or {}))
    inputs = random_inputs(declared, sizes, batch, tokens, heads, seed)
    layer = compile(variant, sizes, torch.float64, backend=backend, chunk=chunk, checkpoint=checkpoint)
    z, final = layer(inputs.q, inputs.k, inputs.v, **inputs.keywords())
    z_true, final_true = reference(variant, inputs.q, inputs.k, inputs.v, **inputs.keywords())
    rows = [Row("z", relative_error(z, z_true), OUTPUT_TOLERANCE)]
    rows += [Row(f"state {n}", relative_error(final[n], w), OUTPUT_TOLERANCE) for n, w in final_true.items()]
    found = gradients(z, dict(final), inputs.named(), seed)
    wanted = gradients(z_true, final_true, inputs.named(), seed)
    errors = gradient_errors(found, wanted)
    rows += [Row(f"grad {n}", errors[n], GRADIENT_TOLERANCE) for n in wanted]
    shown = ", ".join(f"{d}={n}" for d, n in sizes.items())
    settings = f"{shown}, T={tokens}, mini_batch={declared.mini_batch}, read={declared.read}"
    return Verification(declared.name, settings, tuple(rows))


def default_dims(declared: Signature, width: int) -> dict[str, int]:
    """D, E and any other dim are `width`; F, the hidden width, is four times that."""
    return {d: 4 * width if d == "F" else width for d in declared.dims}


def random_inputs(
    declared: Signature, dims: Mapping[str, int], batch: int, tokens: int, heads: int, seed: int = 0
) -> Inputs:
    """Inputs of unit scale, weights scaled by the width that they contract, small learning rates.

    Larger rates make a step on every token a chaotic map for some learners: one rounding of an input then becomes 1e-10
    of a gradient in the oracle itself, and there is nothing left to compare to 1e-11.
    """
    generator = torch.Generator().manual_seed(seed)
    width = math.prod(dims[d] for d in declared.tokens["k"].given)
    rates, decays = _rate_names(declared, ("lr",)), _rate_names(declared, ("decay",))

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    def sizes(names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(dims[d] for d in names)

    vectors = {n: normal(batch, tokens, heads, *sizes(s.given)) for n, s in declared.tokens.items()}
    gates = {}
    for n, gate in declared.gates.items():
        raw = torch.rand((batch, tokens, heads, *sizes(gate.dims)), generator=generator, dtype=torch.float64)
        small = 0.01 + raw * (0.1 if n in rates else 0.5) / width**0.5
        gates[n] = (1.0 - 0.5 * raw if n in decays else small).requires_grad_()
    params = {}
    for n, p in declared.params.items():
        value = 1.0 + normal(heads, *sizes(p.dims), scale=0.3).detach()
        params[n] = (
            0.05 * value if n in rates else 0.9 * value.clamp(0.5, 1) if n in decays else value
        ).requires_grad_()
    state = {}
    for n, s in declared.states.items():
        scale = dims[s.dims[0]] ** -0.5 if s.dims else 1.0
        state[n] = normal(batch, heads, *sizes(s.dims), scale=scale)
    extra = {n: x for n, x in vectors.items() if n not in ("q", "k", "v")}
    return Inputs(vectors["q"], vectors["k"], vectors["v"], gates, params, state, extra)


def _rate_names(declared: Signature, roles: tuple[str, ...]) -> set[str]:
    """The gates and params that are rates of these roles."""
    rates = [declared.update.of(role, n) for role in roles for n in declared.states]
    named = {r.name for r in rates if isinstance(r, GateSpec)}
    return named | {declared.rate_name(r) for r in rates if isinstance(r, ParamSpec)}


def gradients(
    z: torch.Tensor, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], seed: int
) -> dict[str, torch.Tensor]:
    """The gradients of a random linear function of the outputs and the final weights."""
    generator = torch.Generator().manual_seed(seed + 1)
    total = z.new_zeros(())
    for x in (z, *(state[n] for n in sorted(state))):
        total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found, strict=True)}


def gradient_errors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors; a gradient that vanishes beside the others is measured against a thousandth of the largest.

    The derivative by the scale of an update that is normalised afterwards is 0: what both sides then hold is rounding.
    """
    largest = max((float(g.detach().norm()) for g in wanted.values()), default=0.0)
    return {n: relative_error(found[n], g, 1e-3 * largest) for n, g in wanted.items()}


def relative_error(x: torch.Tensor, true: torch.Tensor, least: float = 0.0) -> float:
    """|x - true| / max(|true|, least) in the Frobenius norm; where that is 0, |x|."""
    if x.shape != true.shape:
        return float("inf")
    norm = max(float(true.detach().norm()), least)
    error = float((x.detach() - true.detach()).norm())
    return error / norm if norm > 0 else error

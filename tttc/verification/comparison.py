"""`tttc.verify`: a compiled variant against the oracle, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from tttc.compiler.driver import checked_dims, compile
from tttc.compiler.fallback import said_elsewhere
from tttc.declare.read import signature
from tttc.declare.variant import Signature, Variant
from tttc.reference import reference
from tttc.verification.inputs import Inputs, default_dims, initial, perturbed, random_inputs

__all__ = ["Inputs", "Row", "Verification", "default_dims", "random_inputs", "verify"]

OUTPUT_TOLERANCE = 1e-12  # float64: the rounding of a few thousand operations, relative to the norm of the tensor
GRADIENT_TOLERANCE = 1e-11  # a gradient sums over all tokens and passes every operation twice
ROUNDING = 2.0**-52  # one unit in the last place of float64
SEVERAL = 16.0  # times what one rounding of every input moves: there are as many more on the way
UNTOLD = 1e-5  # where rounding moves a tensor by more than this, a comparison says nothing
PERTURBATIONS = 3

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One tensor: its relative Frobenius error against the oracle, and what is allowed."""

    name: str
    error: float
    tolerance: float
    finite: bool = True
    """Whether it is finite in the oracle itself: otherwise there is nothing to compare with."""
    amplified: float = 0.0
    """How many times its definition multiplies a rounding of the inputs, where more is allowed because of that."""

    @property
    def told(self) -> bool:
        """Whether the comparison can say anything."""
        return self.finite and self.tolerance <= UNTOLD

    @property
    def ok(self) -> bool:
        return self.told and self.error <= self.tolerance  # false for NaN

    @property
    def verdict(self) -> str:
        """In a few words."""
        if not self.finite:
            return "not finite in the oracle itself"
        excuse = f"a rounding is multiplied by {self.amplified:.0e}" if self.amplified else ""
        if not self.told:
            return f"nothing to compare: {excuse}"
        return f"ok{excuse and f': {excuse}'}" if self.ok else f"more than {self.tolerance:.0e}"


@dataclass(frozen=True)
class Verification:
    """A table of per-tensor errors."""

    variant: str
    settings: str
    rows: tuple[Row, ...]
    why: str = ""
    """The backend that computed them, and why it was taken."""
    reasons: tuple[str, ...] = ()
    """Why nothing can be told, or why more than the fixed tolerances is allowed."""

    @property
    def ok(self) -> bool:
        """Whether every tensor was compared, and is equal."""
        return all(row.ok for row in self.rows)

    @property
    def differs(self) -> bool:
        """Whether a tensor that can be compared is not equal."""
        return any(row.told and not row.ok for row in self.rows)

    @property
    def verdict(self) -> str:
        """In a few words: what the table says."""
        if self.differs:
            return "DIFFERS from the oracle"
        if not all(row.finite for row in self.rows):
            return "nothing to compare with: the oracle itself is not finite here"
        if not self.ok:
            return "nothing to compare: the oracle itself is too ill-conditioned here"
        within = any(row.amplified for row in self.rows)
        return "equal to the oracle" + (", which is ill-conditioned here" if within else "")

    @property
    def headline(self) -> str:
        """The verdict, of what and for which settings."""
        return f"{self.variant}: {self.verdict} ({self.settings})"

    @property
    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        return [*([f"computed by {self.why}"] if self.why else []), *self.reasons]

    def __str__(self) -> str:
        width = max(len(r.name) for r in self.rows)
        lines = [self.headline]
        lines += [f"  {r.name:<{width}}  {r.error:8.1e}  {r.verdict}" for r in self.rows]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


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
    backend: str = "auto",
) -> Verification:
    """Compare outputs, final weights and every gradient with the oracle, in float64 on random inputs.

    dims default to D=8, F=4*D and otherwise D. Errors are relative in the Frobenius norm. `backend` is what computes
    the layer, by default what `tttc.compile` takes: native kernels need some seconds to be compiled.

    Where a tensor is further off than the fixed tolerances, it is measured how far the oracle itself moves when every
    input moves by one unit in the last place: several times that is allowed, and said. Nothing is loosened where the
    definition does not amplify rounding. Where it is not finite, or moves by more than 1e-5, there is nothing to
    compare: that is neither `ok` nor `differs`.
    """
    declared = signature(variant)
    sizes = checked_dims(declared, default_dims(declared, 8) | dict(dims or {}))
    inputs = random_inputs(declared, sizes, batch, tokens, heads, seed)
    with said_elsewhere():  # in the table
        layer = compile(variant, sizes, torch.float64, backend=backend, chunk=chunk, checkpoint=checkpoint)

    def oracle(given: Inputs) -> Results:
        z, final = reference(variant, given.q, given.k, given.v, **given.keywords(), dims=sizes)
        return results(z, final, given, seed)

    z, final = layer(inputs.q, inputs.k, inputs.v, **inputs.keywords())
    wanted = oracle(inputs)
    rows = _rows(errors(results(z, final, inputs, seed), wanted), wanted)
    if any(row.told and not row.ok for row in rows):
        moved = movement(oracle, inputs, wanted, ROUNDING)
        rows = [_excused(row, moved[row.name]) for row in rows]
    reasons = _ill_conditioned(rows), _not_finite(declared, oracle, inputs, wanted)
    shown = ", ".join(f"{d}={n}" for d, n in layer.dims.items())
    settings = f"{shown}, T={tokens}, mini_batch={declared.mini_batch}, read={declared.read}, backend {layer.backend}"
    return Verification(declared.name, settings, tuple(rows), layer.why, tuple(r for r in reasons if r))


def results(
    z: torch.Tensor, final: Mapping[str, torch.Tensor], inputs: Inputs, seed: int, *, forward_only: bool = False
) -> Results:
    """Outputs, final weights and gradients, by the names that the table has for them."""
    slopes = {} if forward_only else gradients(z, final, inputs.named(), seed)
    weights = {f"state {n}": w.detach() for n, w in final.items()}
    return {"z": z.detach(), **weights, **{f"grad {n}": g for n, g in slopes.items()}}


def errors(found: Results, wanted: Results) -> dict[str, float]:
    """The relative error of each tensor."""
    slopes = {n: g for n, g in wanted.items() if n.startswith("grad ")}
    outputs = {n: relative_error(found[n], x) for n, x in wanted.items() if n not in slopes}
    return outputs | gradient_errors(found, slopes)


def _rows(errors: Mapping[str, float], wanted: Results) -> list[Row]:
    """The table against the fixed tolerances.

    Where some tensor of the oracle is not finite, a NaN in another one of the layer is no fault of the layer: what is
    masked in a chunk is multiplied by zero, which a NaN survives.
    """
    finite = {n: bool(x.isfinite().all()) for n, x in wanted.items()}
    if not all(finite.values()):
        finite = {n: ok and math.isfinite(errors[n]) for n, ok in finite.items()}
    allowed = {n: GRADIENT_TOLERANCE if n.startswith("grad ") else OUTPUT_TOLERANCE for n in wanted}
    return [Row(n, e, allowed[n], finite[n]) for n, e in errors.items()]


def _excused(row: Row, moved: float) -> Row:
    """What the definition makes of a rounding is allowed, where that is more than the tolerance."""
    allowed = SEVERAL * moved
    if row.error <= row.tolerance or allowed <= row.tolerance:
        return row
    return replace(row, tolerance=allowed, amplified=moved / ROUNDING)


def movement(run: Callable[[Inputs], Results], inputs: Inputs, results: Results, relative: float) -> dict[str, float]:
    """How far each result moves, relative to its norm, when every input moves by `relative` of itself: the most of
    several draws of the signs.
    """
    moved = [errors(run(perturbed(inputs, relative, seed)), results) for seed in range(PERTURBATIONS)]
    return {n: max(m[n] for m in moved) for n in results}


def _ill_conditioned(rows: list[Row]) -> str:
    """What the amplification of a rounding means for the table; nothing where there is none that matters."""
    worst = max(rows, key=lambda r: r.amplified)
    if not worst.amplified:
        return ""
    return (
        f"ill-conditioned here: when each input moves by one unit in its last place, {worst.name} of the oracle itself "
        f"moves by {worst.amplified * ROUNDING:.0e}; fewer tokens or smaller rates tell more"
    )


def _not_finite(declared: Signature, oracle: Callable[[Inputs], Results], inputs: Inputs, wanted: Results) -> str:
    """Which tensors of the oracle are not finite, from where on, and which input brings them there if one does."""
    bad = [n for n, x in wanted.items() if not x.isfinite().all()]
    if not bad:
        return ""
    said = f"not finite in the oracle itself: {', '.join(bad)}"
    if "z" in bad:
        tokens = wanted["z"].isfinite().transpose(0, 1).flatten(1).all(1)
        said += f"; z from token {int((~tokens).nonzero()[0])} on"
    guilty = []
    for name in inputs.named():
        tamed = oracle(_tamed(declared, inputs, name))
        if all(x.isfinite().all() for x in tamed.values()):
            guilty.append(f"`{name}` {'starts at its init' if name in declared.states else 'is positive'}")
    return said + (f"; it is finite where {' or '.join(guilty)}" if guilty else "")


def _tamed(declared: Signature, inputs: Inputs, name: str) -> Inputs:
    """The same inputs with a state where it begins, or another input positive."""
    if name not in declared.states:
        positive = inputs.named()[name]
        return inputs.map(lambda x: x.abs() if x.data_ptr() == positive.data_ptr() else x)
    given = inputs.state[name]
    batch, heads, *shape = given.shape
    generator = torch.Generator().manual_seed(0)
    draws = [initial(declared.states[name].init, tuple(shape), generator) for _ in range(batch * heads)]
    value = torch.stack(draws).reshape(given.shape).clone().requires_grad_()
    return replace(inputs, state={**inputs.state, name: value})


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
    norms = [float(g.detach().norm()) for g in wanted.values()]
    largest = max(filter(math.isfinite, norms), default=0.0)
    return {n: relative_error(found[n], g, 1e-3 * largest) for n, g in wanted.items()}


def relative_error(x: torch.Tensor, true: torch.Tensor, least: float = 0.0) -> float:
    """|x - true| / max(|true|, least) in the Frobenius norm; where that is 0, |x|."""
    if x.shape != true.shape:
        return float("inf")
    norm = max(float(true.detach().norm()), least)
    error = float((x.detach() - true.detach()).norm())
    return error / norm if norm > 0 else error

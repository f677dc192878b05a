"""Whether a compiled layer is right in its own dtype: against the torch backend in float64, tensor by tensor.

The oracle runs token by token and is too slow to be asked about every candidate; that the torch backend equals it in
float64 is what `tttc.verify` and the tests are for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch

from tttc.runtime.layer import Layer
from tttc.tuning.search import IncorrectResult
from tttc.verification.comparison import SEVERAL, Inputs, Results, errors, movement, random_inputs, results

TOLERANCES = {  # of outputs and of gradients, against float64: rounding of the dtype over some hundred operations
    torch.float64: (1e-12, 1e-11),
    torch.float32: (5e-6, 1e-5),
    torch.float16: (2e-3, 4e-3),
    torch.bfloat16: (1.5e-2, 3e-2),
}
OTHERS = 2.0  # where torch in the same dtype is further off than the tolerance: times its own error,
MOST = 10.0  # but never more than this many times the tolerance
AMPLIFIED = 100.0  # roundings: a definition that makes more of one excuses its candidates
SAYS_NOTHING = 0.1  # a comparison that allows more says nothing
HEADS = 2


class Accuracy:
    """The check of layers of one declaration in one dtype, on `tokens` tokens; `exact` computes in float64."""

    def __init__(
        self, exact: Layer, dtype: torch.dtype, tokens: int, by_torch: Callable[[], Layer], *, forward_only: bool
    ) -> None:
        self.exact, self.dtype, self.tokens, self.by_torch = exact, dtype, tokens, by_torch
        self.forward_only = forward_only
        self.excused = False
        """Whether a candidate was further off than the tolerances and the definition amplifies rounding."""

    def check(self, layer: Layer) -> None:
        """Compare outputs, final weights and gradients; raises `IncorrectResult` with those that are too far off.

        What is further off may still be right where the definition itself amplifies rounding: several times what one
        rounding of the inputs moves is then allowed, and `note` says so. Where that would leave nothing to compare,
        fewer tokens are.
        """
        wrong = self._too_far_off(layer)
        while wrong and self.tokens > 1 and max(self._excuses.values(), default=0.0) > SAYS_NOTHING:
            self._shorten()
            wrong = self._too_far_off(layer)
        wrong = {n: (e, max(most, self._excuses.get(n, 0.0))) for n, (e, most) in wrong.items()}
        if said := ", ".join(f"{n} {e:.1e}, more than {most:.1e}" for n, (e, most) in wrong.items() if not e <= most):
            raise IncorrectResult(said)

    @property
    def note(self) -> str:
        """What the definition makes of a rounding, where candidates were compared within that."""
        if not self.excused:
            return ""
        name, most = max(self._excuses.items(), key=lambda item: item[1])
        return (
            f"ill-conditioned: when each input moves by one rounding ({self._rounding:.0e}), {name} moves by "
            f"{most / SEVERAL:.0e} in the definition itself; candidates were compared within {SEVERAL:g} times that, "
            f"on {self.tokens} tokens"
        )

    def _too_far_off(self, layer: Layer) -> dict[str, tuple[float, float]]:
        """The errors beyond the tolerance of the dtype and beyond what torch is off in it, with what is allowed."""
        allowed = TOLERANCES[self.dtype]
        found = {n: (e, allowed[n.startswith("grad ")]) for n, e in self.errors(layer).items()}
        if all(e <= most for e, most in found.values()):
            return {}
        torchs = self._errors_of_torch
        found = {n: (e, max(most, min(OTHERS * torchs.get(n, 0.0), MOST * most))) for n, (e, most) in found.items()}
        return {n: (e, most) for n, (e, most) in found.items() if not e <= most}

    @cached_property
    def _excuses(self) -> dict[str, float]:
        """What is allowed because the definition amplifies rounding; nothing for what it does not."""
        moved = movement(partial(self._results, self.exact), self._inputs, self._exact, self._rounding)
        found = {n: SEVERAL * m for n, m in moved.items() if not m <= AMPLIFIED * self._rounding}
        self.excused = self.excused or bool(found)
        return found

    @property
    def _rounding(self) -> float:
        """Of the arithmetic, relative."""
        return float(torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps)

    def _shorten(self) -> None:
        """Half as many tokens: each multiplies what rounding does."""
        self.tokens //= 2
        for known in ("_inputs", "_exact", "_errors_of_torch", "_excuses"):
            vars(self).pop(known, None)

    def errors(self, layer: Layer) -> dict[str, float]:
        """How far each tensor is from float64, relative in the Frobenius norm."""
        own = in_dtype(self._inputs, self.dtype, grad=not self.forward_only)
        return errors({n: x.double() for n, x in self._results(layer, own).items()}, self._exact)

    def _results(self, layer: Layer, inputs: Inputs) -> Results:
        """The output and final weights, and the gradients of all inputs."""
        z, final = layer(inputs.q, inputs.k, inputs.v, **inputs.keywords())
        return results(z, final, inputs, 0, forward_only=self.forward_only)

    @cached_property
    def _inputs(self) -> Inputs:
        """In float64, of values that the dtype can hold."""
        raw = random_inputs(self.exact.signature, self.exact.dims, 1, self.tokens, HEADS)
        return in_dtype(in_dtype(raw, self.dtype, grad=False), torch.float64, grad=True)

    @cached_property
    def _exact(self) -> Results:
        return self._results(self.exact, self._inputs)

    @cached_property
    def _errors_of_torch(self) -> dict[str, float]:
        """What rounding does to the same program in operations of torch."""
        return self.errors(self.by_torch())


def in_dtype(inputs: Inputs, dtype: torch.dtype, *, grad: bool) -> Inputs:
    """As a layer of this dtype takes them: tokens in it, everything else in that of its arithmetic."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def to(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        return x.detach().to(kind, copy=True).requires_grad_(grad)

    def all_to(group: Results, kind: torch.dtype) -> Results:
        return {n: to(x, kind) for n, x in group.items()}

    gates, params, state = (all_to(group, compute) for group in (inputs.gates, inputs.params, inputs.state))
    q, k, v = (to(x, dtype) for x in (inputs.q, inputs.k, inputs.v))
    return Inputs(q, k, v, gates, params, state, all_to(inputs.tokens, dtype))

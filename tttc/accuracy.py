"""Whether a compiled layer is right in its own dtype: against the torch backend in float64, tensor by tensor.

The oracle runs token by token and is too slow to be asked about every candidate; that the torch backend equals it in
float64 is what `tttc.verify` and the tests are for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from tttc.layer import Layer
from tttc.search import Wrong
from tttc.verify import Inputs, gradient_errors, gradients, random_inputs, relative_error

TOLERANCES = {  # of outputs and of gradients, against float64: rounding of the dtype over some hundred operations
    torch.float64: (1e-12, 1e-11),
    torch.float32: (5e-6, 1e-5),
    torch.float16: (2e-3, 4e-3),
    torch.bfloat16: (1.5e-2, 3e-2),
}
OTHERS = 2.0  # where torch in the same dtype is further off than the tolerance: times its own error,
MOST = 10.0  # but never more than this many times the tolerance
HEADS = 2

Results = dict[str, torch.Tensor]


class Accuracy:
    """The check of layers of one declaration in one dtype, on `tokens` tokens; `exact` computes in float64."""

    def __init__(
        self, exact: Layer, dtype: torch.dtype, tokens: int, by_torch: Callable[[], Layer], *, forward_only: bool
    ) -> None:
        self.exact, self.dtype, self.tokens, self.by_torch = exact, dtype, tokens, by_torch
        self.forward_only = forward_only

    def check(self, layer: Layer) -> None:
        """Compare outputs, final weights and gradients; raises `Wrong` with those that are too far off."""
        errors, excused = self.errors(layer), {}
        if any(not error <= self._tolerance(n) for n, error in errors.items()):
            excused = self._errors_of_torch
        wrong = []
        for name, error in errors.items():
            most = self._tolerance(name)
            allowed = max(most, min(OTHERS * excused.get(name, 0.0), MOST * most))
            if not error <= allowed:
                wrong.append(f"{name} {error:.1e}, more than {allowed:.1e}")
        if wrong:
            raise Wrong(", ".join(wrong))

    def errors(self, layer: Layer) -> dict[str, float]:
        """How far each tensor is from float64, relative in the Frobenius norm."""
        outputs, wanted = self._exact
        own = in_dtype(self._inputs, self.dtype, grad=not self.forward_only)
        found, slopes = self._results(layer, own)
        errors = {n: relative_error(x.double(), outputs[n]) for n, x in found.items()}
        slopes = {n: g.double() for n, g in slopes.items()}
        return errors | {f"grad {n}": e for n, e in gradient_errors(slopes, wanted).items()}

    def _tolerance(self, name: str) -> float:
        return TOLERANCES[self.dtype][name.startswith("grad ")]

    def _results(self, layer: Layer, inputs: Inputs) -> tuple[Results, Results]:
        """The output and final weights, and the gradients of all inputs."""
        z, final = layer(inputs.q, inputs.k, inputs.v, **inputs.keywords())
        slopes = {} if self.forward_only else gradients(z, dict(final), inputs.named(), 0)
        return {"z": z.detach(), **{f"state {n}": w.detach() for n, w in final.items()}}, slopes

    @cached_property
    def _inputs(self) -> Inputs:
        """In float64, of values that the dtype can hold."""
        raw = random_inputs(self.exact.signature, self.exact.dims, 1, self.tokens, HEADS)
        return in_dtype(in_dtype(raw, self.dtype, grad=False), torch.float64, grad=True)

    @cached_property
    def _exact(self) -> tuple[Results, Results]:
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

"""Random inputs on which a layer and its definition are compared: in the domain that the declaration has them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tttc.declare.gates import gate_range
from tttc.declare.specs import GateSpec, Init, ParamSpec, StateSpec
from tttc.declare.variant import Signature

DRAWS = 8  # of an `init`, at least: as many as tell that its values have one sign


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
        """All of them by name; what is called as another is, says what it is: a gate, or a state called k."""
        tokens = {"q": self.q, "k": self.k, "v": self.v, **self.tokens}
        params = {f"param {n}" if n in tokens else n: x for n, x in self.params.items()}
        state = {f"state {n}" if n in tokens else n: x for n, x in self.state.items()}
        others = {*tokens, *self.params, *self.state}
        gates = {f"gate {n}" if n in others else n: x for n, x in self.gates.items()}
        return {**tokens, **gates, **params, **state}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """Every tensor changed, and again a leaf."""

        def made(x: torch.Tensor) -> torch.Tensor:
            return change(x.detach()).requires_grad_(x.requires_grad)

        groups = (self.gates, self.params, self.state, self.tokens)
        return Inputs(made(self.q), made(self.k), made(self.v), *({n: made(x) for n, x in g.items()} for g in groups))


def default_dims(declared: Signature, width: int) -> dict[str, int]:
    """D, E and any other dim are `width`; F, the hidden width, is four times that."""
    return {d: 4 * width if d == "F" else width for d in declared.dims}


def random_inputs(
    declared: Signature, dims: Mapping[str, int], batch: int, tokens: int, heads: int, seed: int = 0
) -> Inputs:
    """Inputs of unit scale, weights scaled by the width that they contract, small learning rates.

    A state or param whose `init` has one sign keeps it: a learner may take its logarithm. A gate lies where its
    activation and scale can bring it. Larger rates make a step on every token a chaotic map for some learners: one
    rounding of an input then becomes 1e-10 of a gradient in the oracle itself, and there is nothing left to compare to
    1e-11.
    """
    draw = _Draw(declared, dims, (batch, tokens, heads), seed)
    vectors = {n: draw.normal(batch, tokens, heads, *draw.sizes(s.given)) for n, s in declared.tokens.items()}
    gates = {n: draw.gate(n, gate) for n, gate in declared.gates.items()}
    params = {n: draw.param(n, spec) for n, spec in declared.params.items()}
    state = {n: draw.state(spec) for n, spec in declared.states.items()}
    q, k, v = (vectors.pop(n).requires_grad_() for n in ("q", "k", "v"))
    groups = (gates, params, state, vectors)
    return Inputs(q, k, v, *({n: x.requires_grad_() for n, x in group.items()} for group in groups))


class _Draw:
    """One value after the other, in the order of the declaration."""

    def __init__(self, declared: Signature, dims: Mapping[str, int], size: tuple[int, int, int], seed: int) -> None:
        self.dims, self.size, self.seed = dims, size, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.width = math.prod(dims[d] for d in declared.tokens["k"].given)
        self.lr, self.decay = _rate_names(declared, "lr"), _rate_names(declared, "decay")
        self.mean = _rate_names(declared, "momentum") | _rate_names(declared, "average")

    def sizes(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.dims[d] for d in names)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def gate(self, name: str, spec: GateSpec) -> torch.Tensor:
        """Small, a decay between 1/2 and 1; in the range that is declared."""
        raw = torch.rand((*self.size, *self.sizes(spec.dims)), generator=self.generator, dtype=torch.float64)
        most = 0.01 + (0.1 if name in self.lr else 0.5) / self.width**0.5
        value, most = (1.0 - 0.5 * raw, 1.0) if name in self.decay else (0.01 + raw * (most - 0.01), most)
        low, high = gate_range(spec, spec.scale_value({"D": self.width, **self.dims}))
        return _within(value, most, low, high)

    def param(self, name: str, spec: ParamSpec) -> torch.Tensor:
        """About one, or about where it begins if that has a sign; a rate as small as a gate."""
        _, _, heads = self.size
        shape = self.sizes(spec.dims)
        value = 1.0 + 0.3 * self.normal(heads, *shape)
        if name in self.decay or name in self.mean:
            return 0.9 * value.clamp(0.5, 1)
        begins = self._begins_with_one_sign(spec.init, shape, (heads,))
        if name in self.lr:
            return 0.05 * value * (1.0 if begins is None else begins.sign())
        return value if begins is None else _around(begins, value.clamp_min(0.1))

    def state(self, spec: StateSpec) -> torch.Tensor:
        """Of the scale that a product with it keeps, or about where it begins if that has a sign."""
        batch, _, heads = self.size
        shape = self.sizes(spec.dims)
        drawn = self.normal(batch, heads, *shape)
        begins = self._begins_with_one_sign(spec.init, shape, (batch, heads))
        if begins is not None:
            return _around(begins, (0.3 * drawn).exp())
        return drawn * (shape[0] ** -0.5 if shape else 1.0)

    def _begins_with_one_sign(
        self, init: Init, shape: tuple[int, ...], leading: tuple[int, ...]
    ) -> torch.Tensor | None:
        """Draws of an `init`, [*leading, *shape]; None if their values differ in sign, or are all zero."""
        generator = torch.Generator().manual_seed(self.seed)
        count = math.prod(leading)
        drawn = torch.stack([initial(init, shape, generator) for _ in range(max(count, DRAWS))])
        if not drawn.any() or (drawn.min() < 0 < drawn.max()):
            return None
        return drawn[:count].reshape(*leading, *shape)


def _within(value: torch.Tensor, most: float, low: float, high: float) -> torch.Tensor:
    """Values between 0 and `most`, as they are where these are in the range, otherwise made smaller or moved there."""
    if low > 0:
        return low + value * (min(1.0, high - low) if math.isfinite(high) else 1.0)
    far = high if high > 0 else low
    return value * math.copysign(min(1.0, 1.0 if far >= most else 0.95 * abs(far) / most), far)


def _around(begins: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Values of one sign times positive factors; what is zero becomes small, of the same sign."""
    return torch.where(begins == 0, 0.1 * factor * begins.sum().sign(), begins * factor)


def perturbed(inputs: Inputs, relative: float, seed: int) -> Inputs:
    """Every number larger or smaller by `relative` of itself: what a rounding of the inputs may do to them."""
    generator = torch.Generator().manual_seed(seed)

    def moved(x: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8).to(x.dtype) * 2 - 1
        return x * (1 + relative * sign)

    return inputs.map(moved)


def initial(init: Init, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One draw of an `init`, in float64."""
    made = init(shape, generator) if callable(init) else float(init)
    return torch.as_tensor(made, dtype=torch.float64).expand(shape)


def _rate_names(declared: Signature, role: str) -> set[str]:
    """The gates and params that are rates of a role."""
    rates = [declared.update.of(role, n) for n in declared.states]
    named = {r.name for r in rates if isinstance(r, GateSpec)}
    return named | {declared.rate_name(r) for r in rates if isinstance(r, ParamSpec)}

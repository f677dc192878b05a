"""What `benchmarks.cpu` runs: variants with representative sizes, and inputs of the scales of a trained layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

import tttc
from tttc.declare.read import signature
from tttc.declare.specs import GateSpec
from tttc.declare.variant import Signature, Variant
from tttc.runtime.layer import Layer

Tensors = dict[str, torch.Tensor]


class Invented(tttc.Variant):
    """A learner that is in no file of the compiler: three layers, the second gated, RMSNorm."""

    mini_batch = 16
    W1 = tttc.state("D", "F", init=tttc.normal(0.02))
    W2 = tttc.state("F", "F", init=tttc.normal(0.02))
    Wg = tttc.state("D", "F", init=tttc.normal(0.02))
    W3 = tttc.state("F", "D", init=tttc.normal(0.02))
    gamma = tttc.param("D", init=1.0)

    def learner(self, x: Any) -> Any:
        y = (tttc.gelu(x @ self.W1) @ self.W2) * tttc.sigmoid(x @ self.Wg)
        return x + tttc.rms_norm(y @ self.W3, self.gamma, eps=1e-6)

    def loss(self, k: Any, v: Any) -> Any:
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr", scale="1/D"), read_scale=tttc.gate("tau", by="position"))


@dataclass(frozen=True)
class Case:
    """A variant at a size. Those that are `asked` for get more rounds, and their memory is measured."""

    label: str
    variant: type[Variant]
    dims: Mapping[str, int]
    B: int = 1
    T: int = 2048
    H: int = 12
    asked: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        return self.variant.__name__

    @property
    def declared(self) -> Signature:
        return _declared(self.variant)

    @property
    def mini_batch(self) -> int:
        return self.T if self.declared.mini_batch == "all" else int(self.declared.mini_batch)

    def sizes(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "H": self.H, **self.dims}


HEADLINE = ("TTTLinear", "TTTMLP", "LinearAttention", "GatedDeltaNet")
"""What `--quick` runs."""

_SIZES: dict[str, dict[str, int]] = {
    "GatedThreeLayer": {"F": 128},
    "LaCT": {"D": 128, "F": 128, "H": 4, "T": 4096},  # two of its mini-batches
    "MTTT": {"T": 1024},  # the tokens of a picture; they are one mini-batch
    "ViTTT": {"T": 1024},
}


def case(label: str, variant: type[Variant], asked: bool = False, **sizes: int) -> Case:
    """D=64, F=4*D, any other dim D, B=1, T=2048, H=12, unless given."""
    D = sizes.get("D", 64)
    dims = {d: sizes.get(d, 4 * D if d == "F" else D) for d in signature(variant).dims}
    return Case(label, variant, dims, asked=asked, **{n: size for n, size in sizes.items() if n in "BTH"})


def cases() -> dict[str, Case]:
    """Everything that is measured, what is asked for first."""
    library = tttc.library
    first = [
        case("TTTLinear", library.TTTLinear, True),
        case("TTTLinear-128", library.TTTLinear, True, D=128),
        case("TTTMLP", library.TTTMLP, True),
        case("LinearAttention", library.LinearAttention, True),
        case("GatedDeltaNet", library.GatedDeltaNet, True),
        case("Invented", Invented, True, F=128),
    ]
    known = {c.label for c in first}
    rest = [case(n, getattr(library, n), **_SIZES.get(n, {})) for n in sorted(library.__all__) if n not in known]
    return {c.label: c for c in (*first, *rest)}


# -- inputs ------------------------------------------------------------------------------------------------------------


def inputs(c: Case, tokens: int | None = None) -> Tensors:
    """Every input by its name, float32, requiring gradients.

    Keys and queries of length one, rates as the declaration scales them, decays close to one, params a little below
    their initial values, and initial states that keep the scale of what they multiply.
    """
    generator = torch.Generator().manual_seed(0)
    declared, T = c.declared, tokens or c.T

    def sizes(names: tuple[str, ...]) -> list[int]:
        return [c.dims[d] for d in names]

    x = {n: torch.randn(c.B, T, c.H, *sizes(s.given), generator=generator) for n, s in declared.tokens.items()}
    x |= {n: torch.nn.functional.normalize(x[n], dim=-1) for n in ("q", "k")}
    for n, gate in declared.gates.items():
        drawn = torch.rand(c.B, T, c.H, *sizes(gate.dims), generator=generator)
        x[n] = _gate(c, n, gate, drawn)
    for n, param in declared.params.items():
        shape = sizes(param.dims)
        start = param.init(tuple(shape), generator).float() if callable(param.init) else float(param.init)
        x[n] = start - 0.02 * torch.rand(c.H, *shape, generator=generator)
    for n, state in declared.states.items():
        shape = sizes(state.dims)
        x[n] = torch.randn(c.B, c.H, *shape, generator=generator) * shape[0] ** -0.5
    return {n: t.requires_grad_() for n, t in x.items()}


def _gate(c: Case, name: str, gate: GateSpec, drawn: torch.Tensor) -> torch.Tensor:
    """A gate from uniform numbers, by its role."""
    declared = c.declared
    if gate.by == "position":
        position = torch.arange(drawn.shape[1]) % c.mini_batch + 1
        return (1.0 / position).view(1, -1, 1).expand(drawn.shape).clone()
    if gate in [declared.update.of("decay", w) for w in declared.states]:
        return 1 - 0.001 * drawn  # a memory of two layers that forgets all has a LayerNorm that divides by rounding
    whole = 1 / drawn.shape[1] if declared.mini_batch == "all" else 1.0  # one step on the mean of all tokens
    return drawn * gate.scale_value({"D": c.dims["D"], **c.dims}) * whole


def parts(c: Case, x: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """The sequences, the params and the states among the inputs."""
    declared = c.declared
    groups = ([*declared.tokens, *declared.gates], declared.params, declared.states)
    sequences, params, state = ({n: x[n] for n in names} for names in groups)
    return sequences, params, state


@cache
def _declared(variant: type[Variant]) -> Signature:
    """Traced once: that takes milliseconds, which are no contender's."""
    return signature(variant)


def call(layer: Layer, c: Case, x: Tensors) -> tuple[torch.Tensor, Tensors]:
    """The compiled layer on these inputs: z and the final states."""
    declared = c.declared
    z, final = layer(
        x["q"],
        x["k"],
        x["v"],
        gates={n: x[n] for n in declared.gates},
        params={n: x[n] for n in declared.params},
        state={n: x[n] for n in declared.states},
        tokens={n: x[n] for n in declared.tokens if n not in ("q", "k", "v")},
    )
    return z, dict(final)

"""A draw against the oracle: refused exactly where it must be, or equal to it.

Equal are outputs, final weights and every gradient, of one call and of the same sequence cut into several; on a sample
also second derivatives, and derivatives forward.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

import tttc
from tests.draws.declaration import declaration
from tests.draws.recipe import SCALE, Recipe
from tests.draws.refusals import refusals
from tests.helpers import Result, differences, keywords, split_call
from tttc.declare.read import read_declaration
from tttc.declare.variant import Variant
from tttc.errors import BackendRefusal, DeclarationError, Problem
from tttc.reference import reference
from tttc.runtime.layer import Layer
from tttc.verification.comparison import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    Inputs,
    gradient_errors,
    random_inputs,
    relative_error,
)

# Of a dtype: a few units in its last place; what an output and a gradient may differ by; and how often that where the
# oracle itself is worse conditioned.
PRECISION = {
    torch.float64: (1e-15, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, 1e4),
    torch.float32: (1e-7, 5e-6, 1e-5, 1e3),
}
DTYPES = {"triton": torch.float32}  # of a backend, where it is not float64
CHECKED = 8  # `tttc.check` is asked about one in so many that compile


@dataclass(frozen=True, repr=False)
class Call:
    """How a declaration is compiled and called; `cuts` are where the sequence is cut into several calls."""

    dims: Mapping[str, int]
    tokens: int = 5
    chunk: int | None = None
    checkpoint: int | str | None = "auto"
    cuts: tuple[int, ...] = ()
    seed: int = 0
    batch: int = 1
    heads: int = 1
    group: int = 1  # heads of q that read one head of weights
    decode: str = "auto"
    derivative: str = "first"  # or "second", "forward"

    def __repr__(self) -> str:
        """What differs from the defaults."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Call({', '.join(f'{n}={x!r}' for n, x in chosen.items())})"


class Lost(ArithmeticError):
    """The definition itself has no digits worth a comparison, in the precision of the backend: or no number at all."""


class Outcome(NamedTuple):
    """What became of a draw.

    `kind` is "equal" or "refused", as it must be; "backend", where only the backend refuses; "unclear", where it
    differs and the definition itself is lost in the backend's precision; or a failure: "crash", "mismatch" or "verdict"
    (refused without a reason, or not, or in other words). Failures with the same `mark` are taken for the same one.
    """

    kind: str
    text: str = ""
    mark: str = ""

    @property
    def fails(self) -> bool:
        return self.kind in ("crash", "mismatch", "verdict")


def outcome(recipe: Recipe, call: Call, backend: str = "torch") -> Outcome:
    """Compile and compare."""
    try:
        return _outcome(recipe, call, backend)
    except Exception as error:  # an error of the compiler, or of what it made
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].name} in {frames[-1].filename.rpartition('/')[2]}"
        text = "".join(traceback.format_exception(error, limit=-4))
        return Outcome("crash", text, f"{type(error).__name__} by {where}")


def _outcome(recipe: Recipe, call: Call, backend: str) -> Outcome:
    variant, wanted = declaration(recipe), refusals(recipe)
    try:
        layer = compiled(variant, call, backend)
    except BackendRefusal as refusal:
        return Outcome("backend", str(refusal))
    except DeclarationError as refusal:
        text = _badly_refused(variant, str(refusal), wanted, tttc.check(variant))
        return Outcome("verdict", text, text.partition(":")[0]) if text else Outcome("refused")
    if wanted:
        return Outcome("verdict", f"compiled, in spite of {wanted}", "compiled")
    if call.seed % CHECKED == 0 and (problems := tttc.check(variant)):
        return Outcome("verdict", f"compiled, in spite of what tttc.check says: {problems}", "checked")
    try:
        text = _unequal(layer, call)
    except Lost as lost:
        return Outcome("unclear", str(lost))
    return Outcome("mismatch", text, "mismatch") if text else Outcome("equal")


def compiled(variant: type[Variant], call: Call, backend: str) -> Layer:
    dtype = DTYPES.get(backend, torch.float64)
    settings: Any = dict(chunk=call.chunk, checkpoint=call.checkpoint, decode=call.decode, backend=backend)
    return tttc.compile(variant, call.dims, dtype, **settings)


def _badly_refused(variant: type[Variant], message: str, wanted: list[str], problems: list[Problem]) -> str:
    """What is wrong with a refusal: it names the variant, every reason, and the way out of each; `tttc.check` says the
    same.
    """
    if not wanted:
        return f"refused without a reason:\n{message}"
    if not message.startswith(f"variant `{variant.__name__}`"):
        return f"refused without its name:\n{message}"
    if lacking := [reason for reason in wanted if reason not in message]:
        return f"refused, and nothing says {lacking}:\n{message}"
    if not problems:
        return f"refused, and tttc.check has no problem with it:\n{message}"
    for problem in problems:
        if problem.what not in message or not problem.remedy.strip() or f"\n  {problem.remedy}" not in message:
            return f"refused without the way out that tttc.check knows, {problem}:\n{message}"
    return ""


# -- numbers -----------------------------------------------------------------------------------------------------------


def _unequal(layer: Layer, call: Call) -> str:
    """The tensors that differ from those of the oracle; empty where none does."""
    inputs, variant = inputs_of(layer, call), layer.signature.variant
    wanted = _result(*_oracle(variant, inputs, call), inputs, call)
    if not all(x.isfinite().all() for x in (wanted.z, *wanted.final.values(), *wanted.gradients.values())):
        raise Lost("the definition itself is not finite on these inputs")
    dtype = DTYPES.get(layer.backend, torch.float64)
    given = _mapped(inputs, lambda x: x.detach().to(dtype).requires_grad_())
    found = _result(*layer(given.q, given.k, given.v, **keywords(given)), given, call)
    pairs = {"": (found, wanted)}
    if cuts := _cuts(layer, call):
        pairs[f"cut at {cuts}: "] = (_result(*split_call(layer, given, cuts), given, call), found)
    allowed: tuple[float, float] | None = None
    for where, (one, other) in pairs.items():
        _, output, gradient, _ = PRECISION[dtype]
        if differences(one, other, output, gradient):
            allowed = allowed or _allowed(variant, inputs, wanted, call, dtype)
            if text := differences(one, other, *allowed):
                return f"{where}{text}"
    return _wrong_forward(layer, given, wanted, call, dtype) if call.derivative == "forward" else ""


def inputs_of(layer: Layer, call: Call) -> Inputs:
    """Random inputs, as the dtype of the backend holds them, in float64; q has more heads where they are grouped."""
    inputs = random_inputs(layer.signature, layer.dims, call.batch, call.tokens, call.heads, call.seed)
    shape = [*inputs.q.shape]
    shape[2] *= call.group
    q = torch.randn(shape, generator=torch.Generator().manual_seed(call.seed), dtype=torch.float64)
    dtype = DTYPES.get(layer.backend, torch.float64)
    return _mapped(replace(inputs, q=q), lambda x: x.detach().to(dtype).double().requires_grad_())


def _mapped(inputs: Inputs, change: Any) -> Inputs:
    groups = {n: {k: change(x) for k, x in getattr(inputs, n).items()} for n in ("gates", "params", "state", "tokens")}
    return replace(inputs, q=change(inputs.q), k=change(inputs.k), v=change(inputs.v), **groups)


def _oracle(variant: type[Variant], inputs: Inputs, call: Call) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Outputs and final weights; what a group of q's heads reads is the same for each of them."""

    group = call.group

    def each(values: Mapping[str, torch.Tensor], axis: int) -> dict[str, torch.Tensor]:
        return {n: x.repeat_interleave(group, axis) for n, x in values.items()}

    k, v = (x.repeat_interleave(group, 2) for x in (inputs.k, inputs.v))
    gates, tokens = each(inputs.gates, 2), each(inputs.tokens, 2)
    params, state = each(inputs.params, 0), each(inputs.state, 1)
    z, final = reference(
        variant, inputs.q, k, v, gates=gates, params=params, state=state, tokens=tokens, dims=call.dims
    )
    return z, {n: x[:, ::group] for n, x in final.items()}


def _result(z: torch.Tensor, final: Mapping[str, torch.Tensor], inputs: Inputs, call: Call) -> Result:
    """Outputs, final weights, and the gradients of a random linear function of both; where second derivatives are
    drawn also those of a random linear function of the gradients.
    """
    second = call.derivative == "second"
    outputs = [z, *(final[n] for n in sorted(final))]
    first = _gradients(outputs, inputs.named(), 1, second)
    found = {**first, **{f"second {n}": x for n, x in _second(first, inputs).items()}} if second else first
    return Result(z.double(), {n: x.double() for n, x in final.items()}, {n: x.double() for n, x in found.items()})


def _second(first: Mapping[str, torch.Tensor], inputs: Inputs) -> dict[str, torch.Tensor]:
    return _gradients(list(first.values()), inputs.named(), 2, False)


def _gradients(
    outputs: list[torch.Tensor], inputs: Mapping[str, torch.Tensor], seed: int, differentiable: bool
) -> dict[str, torch.Tensor]:
    total = sum((x * w).sum() for x, w in zip(outputs, _weights(outputs, seed), strict=True))
    none = {n: torch.zeros_like(x) for n, x in inputs.items()}
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return none
    leaves = list(inputs.values())
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True, create_graph=differentiable)
    return {n: none[n] if g is None else g for n, g in zip(inputs, found, strict=True)}


def _weights(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]


def _wrong_forward(layer: Layer, given: Inputs, wanted: Result, call: Call, dtype: torch.dtype) -> str:
    """A random linear function of the tangents that forward mode finds, against the gradients of the oracle."""
    directions = dict(zip(given.named(), _weights(list(given.named().values()), 3), strict=True))
    with forward_ad.dual_level():
        dual = {id(x): forward_ad.make_dual(x.detach(), directions[n]) for n, x in given.named().items()}
        groups = {
            group: {n: dual[id(x)] for n, x in getattr(given, group).items()}
            for group in ("gates", "params", "state", "tokens")
        }
        z, final = layer(*(dual[id(x)] for x in (given.q, given.k, given.v)), **groups)
        outputs = [z, *(final[n] for n in sorted(final))]
        tangents = [forward_ad.unpack_dual(x).tangent for x in outputs]
    found = sum(float((w * t).sum()) for w, t in zip(_weights(outputs, 1), tangents, strict=True) if t is not None)
    products = [(wanted.gradients[n] * directions[n]).flatten() for n in directions]
    true, size = float(sum(p.sum() for p in products)), float(sum(p.abs().sum() for p in products))
    error = abs(found - true)
    if error <= 100 * PRECISION[dtype][2] * max(size, 1e-300):
        return ""
    return f"forward mode: {found} is not {true}"


def _cuts(layer: Layer, call: Call) -> list[int]:
    """Where the sequence may be cut: what read="end" reads, a cut inside a mini-batch would hide."""
    if call.derivative != "first":
        return []
    b, read = layer.signature.mini_batch, layer.signature.read
    if read != "end":
        return [min(c, call.tokens) for c in call.cuts]
    return [c // b * b for c in call.cuts if c <= call.tokens] if isinstance(b, int) else []


def _allowed(
    variant: type[Variant], inputs: Inputs, wanted: Result, call: Call, dtype: torch.dtype
) -> tuple[float, float]:
    """The tolerances where the oracle itself is worse conditioned than these: Muon magnifies small singular values
    about 500 times. Ten times of what rounding the inputs does to it, three times over: a tensor of one entry may
    happen to be rounded by nearly nothing. Ten times of what the oracle is wrong by when it computes in float32, in
    proportion to the precision: a sum that nearly cancels loses digits that no rounding of the inputs shows. And of
    what rounding the derivative of the loss does: where it is zero, Muon divides by next to nothing, twice in a second
    derivative. Raises `Lost` where that is more than what anything may be wrong by.
    """
    rounding, output, gradient, most = PRECISION[dtype]
    generator = torch.Generator().manual_seed(0)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (x.detach() * (1.0 + rounding * noise)).requires_grad_()

    share = rounding / PRECISION[torch.float32][0]
    others = [
        *((variant, _mapped(inputs, rounded), 1.0) for _ in range(3)),
        (variant, _mapped(inputs, lambda x: x.detach().float().requires_grad_()), share),
        (_tilted(variant, SCALE * rounding), inputs, 1.0),
    ]
    noise = 1.0
    for declared, other, part in others:
        moved = _result(*_oracle(declared, other, call), other, call)
        outputs = [relative_error(moved.z, wanted.z)]
        outputs += [relative_error(moved.final[n], w) for n, w in wanted.final.items()]
        gradients = gradient_errors(moved.gradients, wanted.gradients).values()
        noise = max(noise, 10 * part * max(outputs) / output, 10 * part * max(gradients) / gradient)
    if noise > most:
        raise Lost(f"the definition itself is wrong by about {noise * gradient / 10:.1e} in {dtype}")
    return noise * output, noise * gradient


def _tilted(variant: type[Variant], slope: float) -> type[Variant]:
    """The variant with about `slope` added to the derivative of its loss by what the learner makes of a token, and by
    every state.
    """
    states = read_declaration(variant)[0].states

    def loss(self: Any, k: Any, v: Any) -> Any:
        total = tttc.sum(self.learner(k))
        for name in states:
            total = total + tttc.sum(getattr(self, name))
        return variant.loss(self, k, v) + slope * (1.0 + tttc.sum(k) + tttc.sum(v)) * total

    return type(variant.__name__, (variant,), {"loss": loss, "__module__": __name__})

"""What several test files share: the variants, compiled layers, and the comparison with the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch

import tttc
from tttc import library
from tttc.backends.interface import Source
from tttc.declare.read import signature
from tttc.declare.variant import Variant
from tttc.ir.interpret import interpret
from tttc.ir.program import Function, Program
from tttc.reference import reference
from tttc.runtime.layer import Layer, State
from tttc.verification.comparison import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    Inputs,
    gradient_errors,
    gradients,
    random_inputs,
    relative_error,
)

LIBRARY = {name: getattr(library, name) for name in library.__all__}
# Crossed with every read point and mini-batch: their rule is plain descent, which all of these suit.
VARIANTS = {name: LIBRARY[name] for name in ("TTTLinear", "TTTMLP", "LinearAttention", "GatedThreeLayer")}
CAUSAL_READS = ("after", "before", "start")
READS = (*CAUSAL_READS, "end")
MINI_BATCHES = (1, 4, 16, "all")


class Result(NamedTuple):
    """What is compared: outputs, final weights, and the gradient of a random function of both, by input."""

    z: torch.Tensor
    final: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def evaluate_function(function: Function, dims: Mapping[str, int], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a function of the IR that stands alone gives on arrays."""
    return interpret(Program(function.name, "", (function,), dims), function.name, arguments)


def dims_of(variant: type[Variant], D: int, F: int | None = None) -> dict[str, int]:
    """Sizes for the dims of a variant: F as given, or 4 * D; every other dim is D."""
    hidden = 4 * D if F is None else F
    return {d: hidden if d == "F" else D for d in signature(variant).dims}


@cache
def compiled(
    name: str,
    D: int = 3,
    F: int | None = None,
    *,
    chunk: Any = None,
    checkpoint: Any = "auto",
    **settings: Any,
) -> Layer:
    """A library variant with other settings, compiled in float64; each combination once per worker."""
    variant = LIBRARY[name].replace(**settings)
    return tttc.compile(variant, dims_of(variant, D, F), torch.float64, chunk=chunk, checkpoint=checkpoint)


def inputs_for(layer: Layer, tokens: int, *, batch: int = 1, heads: int = 1, seed: int = 0) -> Inputs:
    return random_inputs(layer.signature, layer.dims, batch, tokens, heads, seed)


def keywords(inputs: Inputs) -> dict[str, Any]:
    return {"gates": inputs.gates, "params": inputs.params, "state": inputs.state, "tokens": inputs.tokens}


def result_of(z: torch.Tensor, final: Mapping[str, torch.Tensor], inputs: Inputs) -> Result:
    return Result(z, dict(final), gradients(z, dict(final), inputs.named(), seed=0))


def layer_result(layer: Layer, inputs: Inputs) -> Result:
    z, final = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    return result_of(z, final, inputs)


def oracle_result(variant: type[Variant], inputs: Inputs) -> Result:
    z, final = reference(variant, inputs.q, inputs.k, inputs.v, **keywords(inputs))
    return result_of(z, final, inputs)


def split_call(layer: Layer, inputs: Inputs, cuts: Sequence[int]) -> tuple[torch.Tensor, State]:
    """The same sequence in several calls, each continuing with the state that the last one returned."""
    ends = [*cuts, inputs.q.shape[1]]
    state: Any = inputs.state
    outputs = []
    for begin, end in zip([0, *cuts], ends, strict=True):
        part = slice(begin, end)
        z, state = layer(
            inputs.q[:, part],
            inputs.k[:, part],
            inputs.v[:, part],
            gates={n: x[:, part] for n, x in inputs.gates.items()},
            params=inputs.params,
            state=state,
            tokens={n: x[:, part] for n, x in inputs.tokens.items()},
        )
        outputs.append(z)
    return torch.cat(outputs, 1), state


def second_derivative(layer: Layer) -> torch.Tensor:
    """Of the squared output of three tokens, by k and then, squared again, by v."""
    inputs = inputs_for(layer, 3)
    z, _ = layer(inputs.q, inputs.k, inputs.v, gates=inputs.gates, state=inputs.state)
    (g,) = torch.autograd.grad(z.square().sum(), inputs.k, create_graph=True)
    return torch.autograd.grad(g.square().sum(), inputs.v)[0]


def differences(
    found: Result, wanted: Result, output: float = OUTPUT_TOLERANCE, gradient: float = GRADIENT_TOLERANCE
) -> str:
    """The tensors that differ by more than is allowed, with their relative Frobenius errors; empty when all agree.

    The defaults are those of `tttc.verify`: float64 rounds at 1.1e-16, an output is the result of a few thousand
    operations, and a gradient sums over all tokens and passes every operation twice.
    """
    errors = {"z": (relative_error(found.z, wanted.z), output)}
    errors |= {f"state {n}": (relative_error(found.final[n], w), output) for n, w in wanted.final.items()}
    errors |= {f"grad {n}": (e, gradient) for n, e in gradient_errors(found.gradients, wanted.gradients).items()}
    return "\n".join(
        f"{name}: {error:.1e} > {allowed:.0e}" for name, (error, allowed) in errors.items() if not error <= allowed
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh tensors hold NaN, so that a value which is never written cannot look right by chance."""
    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocated(*arguments: object, **settings: object) -> torch.Tensor:
        made = allocate(*arguments, **settings)
        if made.is_floating_point() and not made.is_meta:
            with torch.no_grad():
                made.fill_(float("nan"))
        return made

    return allocated


def replaced(source: Source, right: str, wrong: str) -> Source:
    """A generated file with a fault in it, its functions called as before."""
    assert right in source.text
    return Source(lambda: source.wording._replace(text=source.text.replace(right, wrong)), source.language)


def run_alone(script: str) -> None:
    """Run a script in a process of its own, where it must end well and say nothing."""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

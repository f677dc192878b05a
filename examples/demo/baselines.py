"""What one would write without `tttc`: a declaration in PyTorch, by `vmap(grad)` over a mini-batch's tokens.

Every token's gradient is a whole weight matrix, and so is every weight that a token reads: the memory traffic
that the dual form avoids. `Eager` runs any declaration this way, `compiled_by_torch` puts `torch.compile`
around its mini-batch, and `time_interleaved` times such candidates against each other fairly.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tttc.declare.read import signature
from tttc.declare.specs import GateSpec, ParamSpec, TokenSpec
from tttc.declare.update_rules import Rate, sgd
from tttc.declare.variant import Signature, Variant, bind
from tttc.reference import reference
from tttc.verification.comparison import relative_error

Tensors = dict[str, torch.Tensor]
Implementation = Callable[..., tuple[torch.Tensor, Any]]
Step = Callable[..., tuple[torch.Tensor, Tensors]]

# How far float32 may be from the float64 definition over a few mini-batches; a wrong formula is far above.
FLOAT32_TOLERANCE = 1e-4


class Eager:
    """A declaration as a function of whole sequences: a Python loop over mini-batches of `step`."""

    def __init__(self, variant: type[Variant], step: Step | None = None) -> None:
        self.declared = signature(variant)
        self.step = step or mini_batch_step(variant)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        gates: Mapping[str, torch.Tensor],
        params: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        tokens: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, Tensors]:
        """z: [B, T, H, E] and the final weights.

        q, k, v: [B, T, H, D]; params and state: [*dims], the same for all heads.
        """
        B, T, H = q.shape[:3]
        b = T if self.declared.mini_batch == "all" else int(self.declared.mini_batch)
        inputs = {"q": q, "k": k, "v": v, **(tokens or {})}
        weights = {name: w.expand(B, H, *w.shape) for name, w in state.items()}
        slow = {name: p.expand(H, *p.shape) for name, p in params.items()}
        outputs = []
        for first in range(0, T, b):
            here = slice(first, first + b)
            z, weights = self.step(
                weights,
                slow,
                {name: x[:, here] for name, x in inputs.items()},
                {name: x[:, here] for name, x in gates.items()},
            )
            outputs.append(z)
        return torch.cat(outputs, 1), weights


def mini_batch_step(variant: type[Variant]) -> Step:
    """Weights [B, H, *dims], params [H, *dims], tokens, gates [B, b, H, ...] -> z [B, b, H, E], weights."""
    declared = signature(variant)

    def loss(weights: Tensors, params: Tensors, token: Tensors) -> torch.Tensor:
        return bind(variant, {**token, **params, **weights}).loss(token["k"], token["v"])

    def output(weights: Tensors, params: Tensors, token: Tensors) -> torch.Tensor:
        return bind(variant, {**token, **params, **weights}).output(token["q"])

    def one_head(weights: Tensors, params: Tensors, tokens: Tensors, gates: Tensors) -> tuple[torch.Tensor, Tensors]:
        tokens = tokens | {attribute: gates[name] for attribute, name in declared.attributes.items()}
        # Each [b, *dims]: the gradient of every token by itself.
        gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))(weights, params, tokens)
        summed = {
            name: torch.cumsum(_rate(declared, declared.update.of("lr", name), g, gates, params) * g, 0)
            for name, g in gradient.items()
        }
        moved = {
            name: weights[name] - _rate(declared, declared.update.of("read_scale", name), s, gates, params) * s
            for name, s in summed.items()
        }
        z = torch.func.vmap(output, in_dims=(0, None, 0))(moved, params, tokens)
        return z, {name: w[-1] for name, w in moved.items()}

    rule, plain = declared.update, sgd(lr=1.0)
    beyond = [n for n in ("momentum", "decay", "average", "clip", "at_end") if getattr(rule, n) != getattr(plain, n)]
    beyond += [f"{n}={getattr(declared, n)!r}" for n in ("read", "anchor") if getattr(declared, n) not in _EAGER]
    if beyond:
        raise ValueError(
            f"the eager baseline is plain descent with read='after'; {declared.name} has {', '.join(beyond)}"
        )
    heads = torch.func.vmap(one_head, in_dims=(0, 0, 1, 1), out_dims=(1, 0))
    return torch.func.vmap(heads, in_dims=(0, None, 0, 0))


_EAGER = ("after", "mini_batch")


def _rate(declared: Signature, rate: Rate | None, like: torch.Tensor, gates: Tensors, params: Tensors) -> Any:
    """One rate per token, shaped to scale `like`: [b, *dims]."""
    if isinstance(rate, GateSpec):
        return gates[rate.name].reshape(-1, *[1] * (like.dim() - 1))
    if isinstance(rate, ParamSpec):
        return params[declared.rate_name(rate)]
    return 1.0 if rate is None else float(rate)


def compiled_by_torch(variant: type[Variant]) -> Eager:
    """The eager program with `torch.compile` around its mini-batch."""
    return Eager(variant, torch.compile(mini_batch_step(variant), fullgraph=True))


@dataclass(frozen=True)
class Workload:
    """What a layer is called with, all of it requiring gradients: the same for every implementation."""

    qkv: Tensors
    tokens: Tensors
    gates: Tensors
    params: Tensors
    state: Tensors

    def forward(self, implementation: Implementation) -> torch.Tensor:
        extra = {"tokens": self.tokens} if self.tokens else {}
        return implementation(**self.qkv, gates=self.gates, params=self.params, state=self.state, **extra)[0]

    def backward(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of |z|^2 / 2 in q, k, v and every other token, gate, param and initial state."""
        groups = (self.qkv, self.tokens, self.gates, self.params, self.state)
        leaves = {name: x for group in groups for name, x in group.items()}
        found = torch.autograd.grad(z, list(leaves.values()), z.detach(), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def first(self, count: int) -> Workload:
        """The same, cut after `count` tokens."""

        def cut(group: Tensors) -> Tensors:
            return _as_leaves(group, lambda x: x[:, :count])

        return Workload(cut(self.qkv), cut(self.tokens), cut(self.gates), self.params, self.state)

    def in_float64(self) -> Workload:
        """The same numbers, in float64."""
        groups = (self.qkv, self.tokens, self.gates, self.params, self.state)
        return Workload(*(_as_leaves(group, torch.Tensor.double) for group in groups))


def _as_leaves(tensors: Mapping[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {name: change(x.detach()).clone().requires_grad_() for name, x in tensors.items()}


def random_workload(
    variant: type[Variant],
    params: Tensors,
    state: Tensors,
    dims: Mapping[str, int],
    size: tuple[int, int, int],
    seed: int = 0,
) -> Workload:
    """Normal q, k and v and uniform gates times their declared scale, for B, T, H = `size`."""
    declared = signature(variant)
    generator = torch.Generator().manual_seed(seed)

    def shape(spec: TokenSpec | GateSpec) -> list[int]:
        return [*size, *(dims[dim] for dim in spec.dims)]

    tokens = {name: torch.randn(shape(spec), generator=generator) for name, spec in declared.tokens.items()}
    gates = {
        name: torch.rand(shape(spec), generator=generator) * spec.scale_value(dims)
        for name, spec in declared.gates.items()
    }
    qkv = {name: tokens.pop(name) for name in ("q", "k", "v")}
    groups = (qkv, tokens, gates, params, state)
    return Workload(*(_as_leaves(group, torch.Tensor.float) for group in groups))


def faults(variant: type[Variant], implementations: Mapping[str, Implementation], workload: Workload) -> dict[str, str]:
    """Which implementations differ from the definition, and by how much, in the output or a gradient."""
    exact = workload.in_float64()
    z = exact.forward(functools.partial(reference, variant))
    expected = {"z": z, **exact.backward(z)}
    found = {}
    for name, implementation in implementations.items():
        z = workload.forward(implementation)
        tensors = {"z": z, **workload.backward(z)}
        errors = {what: relative_error(x.double(), expected[what]) for what, x in tensors.items()}
        worst = max(errors, key=lambda what: math.inf if math.isnan(errors[what]) else errors[what])
        if not errors[worst] <= FLOAT32_TOLERANCE:
            found[name] = f"{worst} is off by {errors[worst]:.1e}, relative to its norm"
    return found


def time_interleaved(
    implementations: Mapping[str, Implementation], workload: Workload, rounds: Iterable[object]
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of the forward and of the backward pass, for each implementation.

    They take turns in every round, so that whatever else the machine does slows all of them alike.
    Warm them up before.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
    for _ in rounds:
        for name, implementation in implementations.items():
            times[name].append(_time_once(implementation, workload))
    return {name: (_median(runs, 0), _median(runs, 1)) for name, runs in times.items()}


def _median(runs: list[tuple[float, float]], part: int) -> float:
    return statistics.median(run[part] for run in runs)


def _time_once(implementation: Implementation, workload: Workload) -> tuple[float, float]:
    began = time.perf_counter()
    z = workload.forward(implementation)
    halfway = time.perf_counter()
    workload.backward(z)
    ended = time.perf_counter()
    return 1e3 * (halfway - began), 1e3 * (ended - halfway)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block after so many seconds; only the main thread can be interrupted so."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

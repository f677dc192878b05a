"""The calls of a layer as operators of PyTorch, for graphs: `torch.compile`, `torch.export`, tensors in parts.

    tttc::ttt_linear_<digest>(Tensor token_q, ..., Tensor weights_W, Tensor start_W, Tensor summed_S_W,
                              SymInt position, SymInt checkpoint, bool keep) -> (Tensor, Tensor, ...)

A graph calls a layer by name and knows the sizes and strides of what it returns; it does not look into it, whatever the
number of tokens and wherever a mini-batch ends. The digest is that of the mathematics and of what makes the kernels, so
that equal layers share their operators, in every process. `..._backward` is the derivative.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock, local
from typing import Any, TypeVar

import torch
from torch.library import custom_op

from tttc.ir.names import spelled
from tttc.ir.structure import written
from tttc.runtime import autograd
from tttc.runtime.flat_call import FlatCall, FlatTensor

Function = Callable[..., Any]
Result = TypeVar("Result")
MOST_TENSORS = 60
"""As many are given to an operator, which has 64 arguments at most, beside four others."""
_known: dict[str, Operator] = {}
_lock = Lock()


class _ByName(local):
    """Whether calls in this thread are those of operators; every call asks."""

    on = False


_by_name = _ByName()


class Operator:
    """The calls of a layer, differentiable once; over a batch of batches; on tensors in parts, by batch or heads."""

    def __init__(self, name: str, call: FlatCall, layer: Any) -> None:
        self.name, self.call, self.layer = name, call, layer
        self.backward = _backward(f"tttc::{name}_backward", call)
        self.forward = _forward(f"tttc::{name}", call, self.backward)
        self.target = getattr(torch.ops.tttc, name).default
        """What graphs call."""
        self._in_parts = False
        if "torch.distributed.tensor" in sys.modules:
            self.in_parts()

    def __call__(
        self, inputs: Sequence[torch.Tensor], position: Any, checkpoint: int, keep: bool
    ) -> tuple[torch.Tensor, ...]:
        """The results of `FlatCall.forward`; with `keep` there is what a backward needs among them."""
        if (parted := next((x for x in inputs if in_parts(x)), None)) is not None:
            self.in_parts()
            inputs = [x if in_parts(x) else _on_every_part(x, parted) for x in inputs]
        return tuple(self.target(*inputs, position, checkpoint, keep)[: self.call.results])

    def in_parts(self) -> None:
        """Make it known to `torch.distributed.tensor`: every part has some of the sequences, or some of the heads."""
        if self._in_parts:
            return
        from torch.distributed.tensor import Replicate, Shard  # what is not asked for is not loaded: it takes 1 s
        from torch.distributed.tensor.experimental import register_sharding

        backward = getattr(torch.ops.tttc, f"{self.name}_backward").default
        for operator in (self.target, backward):
            register_sharding(operator)(partial(_placements, operator, [Replicate(), Shard(0), Shard(1)]))
        self._in_parts = True


def in_parts(x: torch.Tensor) -> bool:
    """Whether it is a `DTensor`."""
    return hasattr(x, "device_mesh")


def _on_every_part(x: torch.Tensor, parted: Any) -> torch.Tensor:
    """A tensor that is the same everywhere, as one in parts: what the layer itself begins with, or was given so."""
    return type(parted).from_local(x, parted.device_mesh, run_check=False)


def _placements(operator: Any, known: Sequence[Any], *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """How results and arguments may be placed: batch and heads come first in every tensor but those left empty."""
    results = [None] * len(operator._schema.returns)
    found = []
    for placement in known:
        each = [x for group in arguments for x in (group if isinstance(group, tuple) else [group])]
        given = [placement if hasattr(x, "placements") else None for x in each]
        found.append(([placement for _ in results], given))
    return found


def operator_of(target: Any) -> Operator | None:
    """The operator that a node of a graph calls, if it is one of a layer."""
    return next((o for o in _known.values() if o.target is target), None)


@contextmanager
def as_operators() -> Iterator[None]:
    """Calls of layers in this thread are those of their operators, as in a graph: a state that one returns has all of
    its parts.
    """
    before, _by_name.on = _by_name.on, True
    try:
        yield
    finally:
        _by_name.on = before


def asked_by_name() -> bool:
    """Whether calls are those of operators, graph or not."""
    return _by_name.on


def operator(name: str, call: FlatCall, layer: Any) -> Operator:
    """The operator of a layer's calls; registered when it is first asked for."""
    return registered(f"{name}_{digest(call)}", call, layer)


def registered(full: str, call: FlatCall, layer: Any) -> Operator:
    """The operator of that name: the first that was asked for, of what may be many equal layers."""
    with _lock:  # a second registration of one name is an error of torch
        if full not in _known:
            _known[full] = Operator(full, call, layer)
    return _known[full]


def known(full: str) -> Operator | None:
    """The operator of that name, where there is one."""
    return _known.get(full)


def digest(call: FlatCall) -> str:
    """Of what is computed and by which kernels: equal for calls that can stand for each other."""
    sequencing = call.sequencing
    how = (call.inputs, call.dtype, sequencing.decode, sequencing.read, sequencing.mini_batch, call.program.plan)
    parts = [written(how), *(scan.fingerprint for scan in call.scans.values())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _forward(name: str, call: FlatCall, backward: Function) -> Function:
    count, kept = len(call.inputs), call.kept
    settings = "SymInt position, SymInt checkpoint, bool keep"

    @custom_op(name, mutates_args=(), schema=_schema(call.inputs, settings, call.results + kept))
    def run(*given: Any) -> tuple[torch.Tensor, ...]:
        return tuple(call.forward(given[:count], *given[count:]))

    @run.register_fake
    def shapes(*given: Any) -> tuple[torch.Tensor, ...]:
        return tuple(call.shapes(given[:count], *given[count:]))

    @run.register_vmap
    def mapped(info: Any, dims: Sequence[int | None], *given: Any) -> Any:
        folded = autograd.folded(given[:count], dims[:count], info.batch_size)
        return autograd.unfolded(run(*folded, *given[count:]), info.batch_size)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.position, ctx.checkpoint, ctx.keep = inputs[count:]
        ctx.shapes = [(x.shape, x.dtype) for x in output[: call.differentiated]]
        ctx.mark_non_differentiable(*output[call.differentiated :])
        ctx.set_materialize_grads(False)  # of what is kept it would make zeros
        ctx.save_for_backward(*inputs[:count], *(output[call.results :] if ctx.keep else ()))

    def differentiate(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        given, states = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        checkpoint = ctx.checkpoint
        if not ctx.keep:
            checkpoint = call.every(given[0].shape[2])
            states = run(*given, ctx.position, checkpoint, True)[call.results :]
        whole = [
            given[0].new_zeros(shape, dtype=dtype) if c is None else c
            for c, (shape, dtype) in zip(cotangents, ctx.shapes, strict=False)
        ]
        return (*backward(*given, list(states), whole, ctx.position, checkpoint), None, None, None)

    run.register_autograd(differentiate, setup_context=remember)
    return run


def _backward(name: str, call: FlatCall) -> Function:
    count = len(call.inputs)
    # what a layer keeps and returns may be as many as it is given: an operator has not so many arguments
    settings = "Tensor[] kept, Tensor[] cotangents, SymInt position, SymInt checkpoint"

    @custom_op(name, mutates_args=(), schema=_schema(call.inputs, settings, count))
    def run(*given: Any) -> tuple[torch.Tensor, ...]:
        kept, cotangents, position, checkpoint = given[count:]
        return tuple(call.backward(given[:count], kept, position, checkpoint, cotangents))

    @run.register_fake
    def shapes(*given: Any) -> tuple[torch.Tensor, ...]:
        return tuple(call.gradients(given[:count]))

    @run.register_vmap
    def mapped(info: Any, dims: Sequence[Any], *given: Any) -> Any:
        def over(tensors: Sequence[torch.Tensor], of: Sequence[int | None]) -> list[torch.Tensor]:
            return autograd.folded(tensors, of, info.batch_size)

        inputs, others = over(given[:count], dims[:count]), map(over, given[count:-2], dims[count:-2])
        return autograd.unfolded(run(*inputs, *others, *given[-2:]), info.batch_size)

    return run


def _schema(inputs: Sequence[FlatTensor], settings: str, results: int) -> str:
    names: list[str] = []
    for slot in inputs:
        name = f"{slot.group}_{re.sub('[^0-9A-Za-z_]', '_', spelled(slot.name))}"  # an operator's names are ASCII
        while name in names:
            name += "_"
        names.append(name)
    given = ", ".join(f"Tensor {n}" for n in names)
    return f"({given}, {settings}) -> ({', '.join(['Tensor'] * results)})"


def untraced(function: Callable[[], Result]) -> Result:
    """What a function returns when nothing is being traced: the modes of a tracer are those of its thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()

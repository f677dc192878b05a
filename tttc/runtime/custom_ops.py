"""The scans of a layer as operators of PyTorch, for graphs: `torch.compile`, `torch.export`, CUDA graphs.

A graph calls a scan by name and knows the sizes and strides of what it returns; it does not look into it. There are two
operators for each scan, `tttc::<scan>_<digest>_forward` and `..._backward`. The digest is that of the mathematics and
of what makes the kernels, so that equal layers share their operators, in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import torch
from torch.library import custom_op

from tttc.backends.scan import CompiledScan

Tensors = list[torch.Tensor]
Function = Callable[..., Tensors]
Result = TypeVar("Result")
_known: dict[str, Operator] = {}
_lock = Lock()


class Operator:
    """One scan: called like its forward, differentiable once."""

    def __init__(self, name: str, scan: CompiledScan, results: int) -> None:
        self.results = results  # those that the caller is given; what is kept for the backward comes after them
        self.backward = _backward(f"tttc::{name}_backward", scan)
        self.forward = _forward(f"tttc::{name}_forward", scan, results, self.backward)
        self._run = getattr(torch.ops.tttc, f"{name}_forward").default

    def __call__(self, inputs: Sequence[torch.Tensor], checkpoint: int | None) -> tuple[torch.Tensor, ...]:
        """The results of the scan; with a checkpoint it keeps what its backward needs."""
        keep = checkpoint is not None
        return tuple(self._run(list(inputs), checkpoint or 0, keep)[: self.results])


def operator(name: str, scan: CompiledScan, results: int) -> Operator:
    """The operator of a scan that has so many results; registered when it is first asked for."""
    full = f"{name}_{hashlib.sha256(scan.fingerprint.encode()).hexdigest()[:16]}"
    with _lock:  # a second registration of one name is an error of torch
        if full not in _known:
            _known[full] = Operator(full, scan, results)
    return _known[full]


def untraced(function: Callable[[], Result]) -> Result:
    """What a function returns when nothing is being traced: the modes of a tracer are those of its thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def _forward(name: str, scan: CompiledScan, results: int, backward: Function) -> Function:
    schema = "(Tensor[] inputs, SymInt checkpoint, bool keep) -> Tensor[]"

    @custom_op(name, mutates_args=(), schema=schema)
    def run(inputs: Tensors, checkpoint: int, keep: bool) -> Tensors:
        if keep:
            scan.prewarm_backward(inputs)
        outputs, kept = scan.forward(inputs, checkpoint if keep else None)
        return [*outputs, *kept]

    @run.register_fake
    def shapes(inputs: Tensors, checkpoint: int, keep: bool) -> Tensors:
        outputs, kept = scan.results(inputs, checkpoint if keep else None)
        return [*outputs, *kept]

    def remember(ctx: Any, inputs: tuple[Tensors, int, bool], output: Tensors) -> None:
        given, ctx.checkpoint, ctx.keep = inputs
        ctx.count = len(given)
        ctx.mark_non_differentiable(*output[results:])
        ctx.save_for_backward(*given, *(output[results:] if ctx.keep else ()))

    def differentiate(ctx: Any, cotangents: Tensors) -> tuple[Any, None, None]:
        given, kept = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
        if not ctx.keep:
            kept = run(given, ctx.checkpoint, True)[results:]
        return backward(given, kept, ctx.checkpoint, cotangents[:results]), None, None

    run.register_autograd(differentiate, setup_context=remember)
    return run


def _backward(name: str, scan: CompiledScan) -> Function:
    schema = "(Tensor[] inputs, Tensor[] kept, SymInt checkpoint, Tensor[] cotangents) -> Tensor[]"

    @custom_op(name, mutates_args=(), schema=schema)
    def run(inputs: Tensors, kept: Tensors, checkpoint: int, cotangents: Tensors) -> Tensors:
        return list(scan.backward(inputs, kept, checkpoint, cotangents))

    @run.register_fake
    def shapes(inputs: Tensors, kept: Tensors, checkpoint: int, cotangents: Tensors) -> Tensors:
        return scan.gradients(inputs)

    return run

"""A scan as a function of PyTorch: what its derivatives, batches and second derivatives are made of.

reverse mode                 `Run` and `Pull`: the derived backward, by the kernels of the backend
vmap                         the batch that is mapped over becomes a part of the batch of the scan
forward mode, and what       the scan in operations of PyTorch (`CompiledScan.differentiable`), which carry tangents
comes after the first        and are recorded; no kernel ever sees a dual number
derivative
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from tttc.backends.scan import CompiledScan

Tensors = Sequence[torch.Tensor]

transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of `torch.func` is at work."""


def asked_for(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether anything is to be differentiated or mapped over: what `run` is for. They are looked at only where it may
    be so.
    """
    recording, tangents = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if transforming() or not (recording or tangents):
        return transforming()
    return any(
        (recording and x.requires_grad) or (tangents and forward_ad.unpack_dual(x).tangent is not None) for x in tensors
    )


def run(scan: CompiledScan, results: int, checkpoint: int, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The results of a scan, to be differentiated or mapped over in any way."""
    if carries_tangents(inputs):
        return scan.differentiable.forward([_widened(x) for x in inputs], 0)[0]
    if transforming() and scan.pull is None:
        scan = scan.custom_op  # it keeps a list of tensors [B, H, ...], none in the memory of another
    return Run.apply(scan, checkpoint, results, *inputs)[:results]


def carries_tangents(tensors: Tensors) -> bool:
    """Whether forward mode is at work on them; under a transform, which may hide it, whether it is at all."""
    if forward_ad._current_level < 0:
        return False
    return transforming() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


class Run(torch.autograd.Function):
    """The results of a scan, and after them what its backward needs: that is saved by autograd, where checkpointing
    and the hooks of saved tensors see it.
    """

    @staticmethod
    def forward(scan: CompiledScan, checkpoint: int, results: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scan.prewarm_backward(inputs)
        outputs, kept = scan.forward(inputs, checkpoint)
        return (*map(_no_view, outputs), *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.scan, ctx.checkpoint, results, *given = inputs
        ctx.count, ctx.shapes = len(given), [(x.shape, x.dtype) for x in output[:results]]
        ctx.mark_non_differentiable(*output[results:])
        ctx.set_materialize_grads(False)  # of what is kept it would make zeros
        ctx.save_for_backward(*given, *output[results:])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        saved = _saved(ctx)
        inputs, kept = saved[: ctx.count], saved[ctx.count :]
        shapes = zip(cotangents, ctx.shapes, strict=False)
        given = [inputs[0].new_zeros(n, dtype=d) if c is None else c for c, (n, d) in shapes]
        return None, None, None, *_pulled(ctx.scan, ctx.checkpoint, inputs, kept, given)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], scan: Any, checkpoint: int, results: int, *inputs: Any) -> Any:
        flat = folded(inputs, in_dims[3:], info.batch_size)
        made = Run.apply(scan, checkpoint, results, *flat)
        if scan.pull is not None:  # nobody reads what is kept: a backward under a transform is that scan
            made = made[:results]
        return unfolded(made, info.batch_size)


def _pulled(
    scan: CompiledScan, checkpoint: int, inputs: Tensors, kept: Tensors, cotangents: Tensors
) -> tuple[torch.Tensor, ...]:
    """The cotangents of the inputs, to be differentiated or mapped over themselves."""
    if carries_tangents([*inputs, *cotangents]):
        return _recorded_backward(scan, inputs, cotangents)
    in_batches = any(map(torch._C._functorch.is_legacy_batchedtensor, cotangents))
    if scan.pull is not None and not in_batches and (torch.is_grad_enabled() or transforming()):
        return _pulled_by_scan(scan.pull, checkpoint, inputs, cotangents)
    if (in_batches or transforming()) and scan.custom_op is not scan:  # the forward was not transformed
        scan = scan.custom_op
        _, kept = scan.forward(inputs, checkpoint)
    if in_batches:
        return _pulled_in_batches(scan, checkpoint, inputs, kept, cotangents)
    if not torch.is_grad_enabled() and not transforming():
        return scan.backward(inputs, kept, checkpoint, cotangents)
    return Pull.apply(scan, checkpoint, (len(inputs), len(kept)), *inputs, *kept, *cotangents)


def _pulled_by_scan(
    pull: CompiledScan, checkpoint: int, inputs: Tensors, cotangents: Tensors
) -> tuple[torch.Tensor, ...]:
    """The same where the backward is a scan: its carry begins at zero, and its results come as it makes them."""
    fixed = len(pull.scan.fixed)
    zeros = [torch.zeros_like(x) for x in inputs[:fixed]]
    made = run(pull, len(pull.scan.results), checkpoint, [*zeros, *inputs, *cotangents])
    stores = len(pull.scan.outputs)
    return (*made[stores:], *made[:stores])


class Pull(torch.autograd.Function):
    """The cotangents of the inputs of a scan from those of its results. Its own derivative is that of the same backward
    in operations of PyTorch, which knows how what was kept comes from the inputs.
    """

    @staticmethod
    def forward(
        scan: CompiledScan, checkpoint: int, counts: tuple[int, int], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        inputs, kept, cotangents = _parts(tensors, counts)
        return tuple(map(_no_view, scan.backward(inputs, kept, checkpoint, cotangents)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.scan, _, ctx.counts, *tensors = inputs
        given, _, cotangents = _parts(tensors, ctx.counts)
        ctx.save_for_backward(*given, *cotangents)

    @staticmethod
    def backward(ctx: Any, *seconds: torch.Tensor) -> tuple[Any, ...]:
        inputs, kept = ctx.counts

        def pulled(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _recorded_backward(ctx.scan, tensors[:inputs], tensors[inputs:])

        found = _vector_jacobian(pulled, _saved(ctx), seconds)
        return None, None, None, *found[:inputs], *kept * (None,), *found[inputs:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], scan: Any, checkpoint: int, counts: Any, *tensors: Any) -> Any:
        flat = folded(tensors, in_dims[3:], info.batch_size)
        return unfolded(Pull.apply(scan, checkpoint, counts, *flat), info.batch_size)


def _parts(tensors: Tensors, counts: tuple[int, int]) -> tuple[Tensors, Tensors, Tensors]:
    inputs, kept = counts
    return tensors[:inputs], tensors[inputs : inputs + kept], tensors[inputs + kept :]


def _recorded_backward(scan: CompiledScan, inputs: Tensors, cotangents: Tensors) -> tuple[torch.Tensor, ...]:
    """The derived backward in operations of PyTorch, which are recorded and carry tangents."""
    wide = [_widened(x) for x in inputs]
    _, kept = scan.differentiable.forward(wide, 0)  # what the first forward kept has no history
    found = scan.differentiable.backward(wide, kept, 0, [_widened(x) for x in cotangents])
    return tuple(g.to(x.dtype) for g, x in zip(found, inputs, strict=True))


def _vector_jacobian(
    function: Callable[..., tuple[torch.Tensor, ...]], values: Tensors, cotangents: Tensors
) -> tuple[torch.Tensor, ...]:
    """The cotangents of `values`, differentiable in turn where that is asked for."""
    if transforming():
        return torch.func.vjp(function, *values)[1](tuple(cotangents))
    again = torch.is_grad_enabled()
    with torch.enable_grad():  # each a node of its own, at which to stop: one value may come from another
        given = [x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_() for x in values]
        made = function(*given)
    found = [(y, c) for y, c in zip(made, cotangents, strict=True) if y.requires_grad]
    if not found:
        return tuple(map(torch.zeros_like, values))
    results, seeds = zip(*found, strict=True)
    return torch.autograd.grad(results, given, seeds, create_graph=again, allow_unused=True, materialize_grads=True)


# -- what is mapped over -----------------------------------------------------------------------------------------------


def folded(tensors: Tensors, dims: Sequence[int | None], size: int) -> list[torch.Tensor]:
    """The axis that is mapped over as a part of the first one of each: [N, B, ...] -> [N B, ...]."""
    found = []
    for x, dim in zip(tensors, dims, strict=True):
        first = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        found.append(first.flatten(0, 1))
    return found


def unfolded(tensors: Tensors, size: int) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """[N B, ...] -> [N, B, ...], and where the axis N is, as a rule of `torch.func.vmap` says it."""
    return tuple(x.unflatten(0, (size, len(x) // size)) for x in tensors), len(tensors) * (0,)


def _pulled_in_batches(
    scan: CompiledScan, checkpoint: int, inputs: Tensors, kept: Tensors, cotangents: Tensors
) -> tuple[torch.Tensor, ...]:
    """The same for `is_grads_batched=True`, whose batches torch maps over in a way of their own."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = torch._C._functorch.is_legacy_batchedtensor
    dims = [0 if batched(x) else None for x in (*inputs, *kept, *cotangents)]
    plain = [
        x if dim is None else torch._remove_batch_dim(x, level, 1, 0)
        for x, dim in zip((*inputs, *kept, *cotangents), dims, strict=True)
    ]
    size = next(len(x) for x, dim in zip(plain, dims, strict=True) if dim is not None)
    flat = _parts(folded(plain, dims, size), (len(inputs), len(kept)))
    found, _ = unfolded(_pulled(scan, checkpoint, *flat), size)
    return tuple(torch._add_batch_dim(x, 0, level) for x in found)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _saved(ctx: Any) -> Tensors:
    """What was saved; a transform that has ended since has left its wrapping on it, which no kernel can read."""
    return unwrap_dead_wrappers(ctx.saved_tensors)


def _no_view(x: torch.Tensor) -> torch.Tensor:
    """The same memory, and for autograd no view: what a function returns as a view nobody may change in place."""
    return x.detach() if x._is_view() else x


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

"""The cross-entropy of next tokens, twice differentiable in few passes over the logits.

With p = softmax(logits), y the target and u the cotangent of the gradient:

    nll          = logsumexp(logits) - logits[y]
    gradient     = g (p - onehot(y))
    its pullback = g (p * u - p sum(p u))  to the logits,   sum(p u) - u[y]  to g

`F.cross_entropy` is the same function; autograd makes its second derivative of a dozen operations, each with a tensor
of the size of the logits. Here each derivative makes the softmax again, and nothing but the logits is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each target, in nats: logits [..., V], targets [...] -> [...].

    Of 16-bit logits it is float32, and the sums in it and in its derivatives are; otherwise of their dtype. It can be
    differentiated twice, and mapped over by `torch.vmap`. Targets are int64 in [0, V): no index is ignored.

        nll(torch.zeros(2, 3, 256), torch.zeros(2, 3, dtype=torch.long))     # log(256) everywhere, [2, 3]
    """
    return _CrossEntropy.apply(logits, targets)


def summed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of such numbers are in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=summed_in(logits.dtype))


def _at(x: Tensor, targets: Tensor) -> Tensor:
    return x.gather(-1, targets[..., None]).squeeze(-1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.to(summed_in(logits.dtype))
        return torch.logsumexp(wide, -1) - _at(wide, targets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        logits, targets = ctx.saved_tensors
        return _CrossEntropyGradient.apply(logits, targets, g), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _CrossEntropy.apply(*_batch_first(info.batch_size, in_dims, tensors)), 0


class _CrossEntropyGradient(torch.autograd.Function):
    """The gradient of the logits, as a function of them and of the cotangent g of the likelihoods."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, g: Tensor) -> Tensor:
        p = _probabilities(logits)
        p.scatter_add_(-1, targets[..., None], p.new_full((), -1.0).expand(*targets.shape, 1))
        return p.mul_(g[..., None]).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:
        logits, targets, g = ctx.saved_tensors
        p = _probabilities(logits)
        weighted = p * u
        mean = weighted.sum(-1)
        onto_logits = weighted.sub_(p.mul_(mean[..., None])).mul_(g[..., None])
        return onto_logits.to(logits.dtype), None, (mean - _at(u, targets)).to(g.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _CrossEntropyGradient.apply(*_batch_first(info.batch_size, in_dims, tensors)), 0


def _batch_first(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors with the axis that is mapped over in front: to these functions one more axis is one more."""
    return [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)
    ]
